# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cts_hf import apply_cts
from cts_hf.training import DataArguments, SegmentationTask
from cts_hf.training.existing_models import check_crops, predicts_masks, resized_processor
from cts_hf.training.tasks import MaskTask

from ..helpers.existing_models import PROCESSORS, build_existing, build_processor


def task_of(name, kind=SegmentationTask):
    return kind(apply_cts(build_existing(name), token_reduction=0), build_processor(name), [], ())


def test_masks_and_classes_are_those_of_the_image_processor():
    labels = torch.randint(5, (2, 16, 24), generator=torch.Generator().manual_seed(0))
    labels[0, :8] = 255
    labels[1][labels[1] == 3] = 2  # a class that does not occur
    images = [Image.new("RGB", (24, 16))] * 2
    processor = build_processor("mask2former", ignore_index=255, do_resize=False, do_pad=False)
    expected = processor(images, segmentation_maps=[label.numpy() for label in labels], return_tensors="pt")
    given = {}
    task = task_of("mask2former", MaskTask)
    task.forward(lambda images, **targets: given.update(targets), {"pixel_values": None, "labels": labels})
    for name in ("mask_labels", "class_labels"):
        for found, target in zip(given[name], expected[name], strict=True):
            assert torch.equal(found, target.to(found.dtype))
    assert task.count({"labels": labels}) == 2


@pytest.mark.parametrize("name", PROCESSORS)
def test_models_that_predict_masks_are_known(name):
    assert predicts_masks(build_existing(name)) == (name in ("mask2former", "eomt", "eomt_dinov3"))


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("upernet_dinov2", "backbone.embeddings.mask_token"),
        ("dpt_segmentation", ("dpt.layernorm.", "neck.fusion_stage.layers.0.residual_layer1.")),
    ],
)
def test_a_checked_model_is_as_before_but_for_weights_that_get_no_gradient(name, unused):
    task = task_of(name)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    check_crops(task, 64)
    frozen = [key for key, parameter in task.model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(key.startswith(unused) for key in frozen)
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "crop_size", "size"),
    [
        ("beit_segmentation", {"do_reduce_labels": True}, 64, {"height": 72, "width": 56}),
        ("beit_segmentation", {}, 32, {"height": 41, "width": 32}),
        ("mask2former", {}, 64, {"shortest_edge": 64, "longest_edge": 128}),
        ("mask2former", {}, 96, {"shortest_edge": 96, "longest_edge": 192}),
        ("eomt", {}, 64, {"shortest_edge": 64}),
    ],
)
def test_the_image_processor_follows_the_crops(name, options, crop_size, size):
    data_args = DataArguments(crop_size=crop_size)
    processor = resized_processor(build_processor(name, **options), SimpleNamespace(image_size=64), data_args)
    assert {key: value for key, value in dict(processor.size).items() if value is not None} == size
    # Class ids of our data sets start at 0, and 255 is ignored.
    assert not getattr(processor, "do_reduce_labels", False)
    assert getattr(processor, "ignore_index", 255) == 255
