# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of weights whose tensors or names are none, or have other dimensions, are refused by name."""

import io
import re
import zipfile

import numpy as np
import pytest
import torch

from cts_hf import CtsModel
from cts_hf.conversion import load_vit_weights
from cts_hf.conversion.checkpoints import convert_checkpoint, load_policy
from cts_hf.conversion.weight_names import rename_lite0_package

from ..helpers.golden import load_golden
from ..helpers.models import tiny_config
from .test_checkpoints import write_original


DECIDING = "encoder.patch_embed.proj.weight"
# Those that a size is read off, or that have another shape in this package.
SHAPED = [DECIDING, "encoder.blocks.0.mlp.fc1.weight", "encoder.pos_embed", "encoder.blocks.0.attn.qkv.weight"]
SHAPED += ["decoder.mask_norm.weight", "decoder.proj_patch"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: torch.ones(2)}, "must hold a dictionary of tensors .* got the entries 0: a Tensor"),
        ({}, r"must hold a dictionary of tensors .* got the entries \(none\)"),
        ({DECIDING: "x"}, f"must hold a dictionary of tensors .* got the entries '{DECIDING}': a str"),
        ({DECIDING: torch.ones(2)}, rf"weight '{DECIDING}' must have 4 dimensions, got the shape \(2,\)"),
        ({DECIDING: torch.tensor(1.0)}, rf"weight '{DECIDING}' must have 4 dimensions, got the shape \(\)"),
        ({"backbone.patch_embed.projection.weight": torch.ones(2)}, f"weight '{DECIDING}' must have 4 dimensions"),
        ({"conv_stem.weight": torch.ones(2)}, "weight 'conv_stem.weight' must have 4 dimensions"),
    ],
)
def test_weights_that_are_none_are_named(tmp_path, weights, message):
    torch.save({"model": weights}, tmp_path / "weights.pth")
    convert = load_policy if "conv_stem.weight" in weights else convert_checkpoint
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "weights.pth")


@pytest.mark.parametrize("part", SHAPED)
def test_weights_of_other_dimensions_are_named(tmp_path, part):
    """Whatever is read off a weight, or done to bring it into our shape."""
    golden, meta = load_golden("tiny_mask_cts")
    golden["weights"][part] = golden["weights"][part].new_ones(())
    source = write_original(tmp_path / "run", golden["weights"], meta)
    with pytest.raises(ValueError, match=rf"{re.escape(part)}('|: \(\)).* (must have . dimensions|is expected)"):
        convert_checkpoint(source)


def test_arrays_that_claim_too_much_memory_are_named(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**48,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("weight.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(ValueError, match=r"huge\.npz must be a file of weights, got one that .*Memory"):
        convert_checkpoint(tmp_path / "huge.npz")


@pytest.mark.parametrize("name", ["query/kernel", "query/bias", "out/kernel"])
def test_arrays_of_other_dimensions_are_named(tmp_path, name):
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    arrays = {
        f"{attention}/{part}/{kind}": np.ones((32, 2, 16)[kind == "bias" :])
        for part in ("query", "key", "value")
        for kind in ("kernel", "bias")
    }
    arrays[f"{attention}/out/kernel"] = np.ones((2, 16, 32))
    arrays["Transformer/posembed_input/pos_embedding"] = np.ones((1, 17, 32))
    arrays[f"{attention}/{name}"] = np.ones(())
    np.savez(tmp_path / "weights.npz", **arrays)
    part = "proj.weight" if name == "out/kernel" else f"qkv.{'weight' if 'kernel' in name else 'bias'}"
    with pytest.raises(ValueError, match=rf"(missing|misshaped): .*blocks\.0\.attn\.{part}"):
        load_vit_weights(CtsModel(tiny_config()), tmp_path / "weights.npz")


def test_blocks_that_the_package_of_lite0_does_not_have_are_left_over():
    weights = {"_blocks.99._bn1.bias": torch.ones(2), "_blocks.1._bn9.bias": torch.ones(2), "_fc.bias": torch.ones(2)}
    assert set(rename_lite0_package(weights)) == {
        "_blocks.99._bn1.bias",
        "blocks.1.0._bn9.bias",
        "classifier._fc.bias",
    }
