# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Numeric references made by running the original implementation of CTS on random weights. Small ones are in `fixtures`;
the others are looked for in the folder that the environment variable CTS_GOLDEN_DIR names.
"""

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from cts_hf.conversion import convert_segmenter


FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ("tiny_mask_cts", "tiny_linear_cts_distilled")
LARGE = (
    "segmenter_mask_plain",
    "segmenter_mask_cts",
    "segmenter_linear_cts_nonsquare",
    "segmenter_mask_cts_distilled",
    "segmenter_mask_cts_policy",
)


def load_golden(name):
    """The tensors of a reference and, under "weights", its weights; and its metadata. Skips where it is absent."""
    path = FIXTURES / f"{name}.safetensors"
    if not path.exists():
        path = Path(os.environ.get("CTS_GOLDEN_DIR", "golden")) / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is absent: set CTS_GOLDEN_DIR to the folder with the large references")
    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get("meta", "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    return {**tensors, "weights": weights}, meta


def build_golden_model(golden, meta):
    """The model of a reference, and the arguments of its forward that reproduce the reference's token sharing."""
    height, width = meta["image_height"], meta["image_width"]
    token_reduction = 3 * meta["num_shared"] / (height * width / meta["patch_size"] ** 2)
    model = convert_segmenter(
        golden["weights"],
        image_size=(height, width),
        patch_size=meta["patch_size"],
        num_attention_heads=meta["num_attention_heads"],
        token_reduction=token_reduction,
    )
    inputs = {"pixel_values": golden["pixel_values"]}
    if "policy_logits" in golden and meta["policy_backbone"] is None:
        inputs["superpatch_scores"] = golden["policy_logits"][:, 1] - golden["policy_logits"][:, 0]
    return model, inputs
