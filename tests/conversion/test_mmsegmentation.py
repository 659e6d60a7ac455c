# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the exact file formats of other implementations, made here."""

import pytest
import torch

from cts_hf.conversion.checkpoints import convert_checkpoint

from ..helpers.mmsegmentation import build_segmenter
from ..helpers.models import random_images


class HistoryBuffer:
    """mmengine saves its log with the weights."""

    def __init__(self):
        self.history = torch.ones(2).numpy()


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize("wrapping", ["mmengine", "mmcv", "none"])
@torch.no_grad()
def test_mmsegmentation(decoder, wrapping, tmp_path):
    reference = build_segmenter(decoder)
    classes = ("wall", "floor", "tree", "sky", "car")
    checkpoint = reference.state_dict()
    if wrapping == "mmengine":
        meta = {"dataset_meta": {"classes": classes, "palette": [[0, 0, 0]] * 5}, "experiment_name": "segmenter"}
        checkpoint = {"meta": meta, "state_dict": checkpoint, "message_hub": {"loss": HistoryBuffer()}}
    elif wrapping == "mmcv":
        checkpoint = {"meta": {"CLASSES": classes}, "state_dict": checkpoint}
    torch.save(checkpoint, tmp_path / "iter_160000.pth")

    model, processor = convert_checkpoint(tmp_path / "iter_160000.pth", num_attention_heads=2)
    images = random_images()
    expected = reference.decode_head(reference.backbone(images))
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-4)
    assert model.config.token_reduction == 0
    assert (model.config.id2label[4] == "car") is (wrapping != "none")
    assert processor.size == {"shortest_edge": 64}


@pytest.mark.parametrize("meta", [{"CLASSES": 5}, {"dataset_meta": ["wall"]}, {"CLASSES": [1, 2, 3, 4, 5]}, "none"])
def test_metadata_without_names_of_classes_is_left_out(tmp_path, meta):
    torch.save({"meta": meta, "state_dict": build_segmenter().state_dict()}, tmp_path / "segmenter.pth")
    model, _ = convert_checkpoint(tmp_path / "segmenter.pth", num_attention_heads=2)
    assert model.config.id2label[4] == "LABEL_4"
