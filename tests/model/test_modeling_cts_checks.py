# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import re

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from cts_hf.model.modeling_cts_grid import PatchGrid

from ..helpers.models import random_images, tiny_model


def mask_of(*corners):
    """1 within the given corners, (top, left, bottom, right), of images of 64 x 64 pixels."""
    mask = torch.zeros(len(corners), 64, 64)
    for index, (top, left, bottom, right) in enumerate(corners):
        mask[index, top:bottom, left:right] = 1
    return mask


def with_hole(mask, row, column):
    mask[-1, row, column] = 1 - mask[-1, row, column]
    return mask


WHOLE = (0, 0, 64, 64)


@pytest.mark.parametrize(
    ("pixel_mask", "images"),
    [
        (mask_of(WHOLE, (0, 8, 64, 64)), "[1]"),  # padding on the left
        (mask_of((8, 0, 64, 64), WHOLE), "[0]"),  # at the top
        (mask_of((8, 8, 56, 56), WHOLE), "[0]"),  # all around
        (mask_of(WHOLE, (0, 0, 0, 0)), "[1]"),  # nothing else
        (mask_of(WHOLE, (0, 0, 15, 64)), "[1]"),  # an image smaller than a superpatch
        (mask_of(WHOLE, (0, 0, 64, 15)), "[1]"),
        (with_hole(mask_of(WHOLE, WHOLE), 30, 30), "[1]"),
        (with_hole(mask_of(WHOLE, WHOLE), 0, 30), "[1]"),
        (with_hole(mask_of(WHOLE, (0, 0, 32, 32)), 63, 63), "[1]"),
        (255 * mask_of(WHOLE, (0, 0, 32, 32)), "[0, 1]"),
        (0.5 * mask_of(WHOLE, (0, 0, 32, 32)), "[0, 1]"),
        (-mask_of(WHOLE, (0, 0, 32, 32)), "[0, 1]"),
        (mask_of(WHOLE, (0, 0, 32, 32)) / mask_of(WHOLE, WHOLE).index_fill(0, torch.tensor(1), 0), "[1]"),  # NaN, inf
    ],
)
def test_a_pixel_mask_is_a_rectangle_in_the_top_left_corner(pixel_mask, images):
    model = tiny_model()
    message = (
        "`pixel_mask` must be 1 in the top left corner of each image, in a rectangle of at least 16 x 16 pixels, and "
        f"0 elsewhere, got something else for the images {images}: pad images on the right and the bottom"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(random_images(), pixel_mask=pixel_mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int64, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_pixel_mask_has_any_real_dtype(dtype):
    model, pixel_mask = tiny_model(), mask_of(WHOLE, (0, 0, 16, 40))
    expected = model(random_images(), pixel_mask=pixel_mask)
    outputs = model(random_images(), pixel_mask=pixel_mask.to(dtype))
    assert outputs.logits_sizes.tolist() == [[8, 8], [2, 5]]
    assert torch.equal(outputs.logits, expected.logits)


def test_scores_of_a_policy_that_are_nan_name_the_cause():
    model, images = tiny_model(), random_images()
    broken = images.clone()
    broken[1, 0, 5, 5] = float("nan")
    with pytest.raises(
        ValueError, match=r"`pixel_values` must be finite, got NaN or infinity in 1 of 2 images: check"
    ):
        model(broken)
    weight = model.cts.policy.head.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    cause = (
        r"policy's weights .* must be finite, got NaN .* weights hold NaN .* \(1 tensors, the first is head\.weight\)"
    )
    with pytest.raises(ValueError, match=cause):
        model(images)
    assert model(images, token_reduction=0).logits.isfinite().all()  # the policy is not run
    with torch.no_grad():  # too large for a dtype, in both logits and whatever the order of sums: features are near 2
        model.cts.policy.backbone.blocks[-1][-1].bn3.bias.fill_(2)
        weight.zero_()[:, 0] = torch.finfo(torch.float32).max
    with pytest.raises(ValueError, match=r"finite weights, whose features are too large for torch\.float32"):
        model(images)


@pytest.fixture
def assertions(monkeypatch):
    """The messages of assertions that are to run on a device."""
    messages = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: messages.append(message))
    return messages


ARGUMENTS = {
    "labels": torch.zeros(2, 64, 64, dtype=torch.int64),
    "pixel_mask": mask_of(WHOLE, WHOLE),
}


def test_a_device_checks_values_by_itself(assertions):
    """No value of a meta tensor is known: this fails wherever the host waits for one."""
    model = tiny_model().to("meta")
    images, arguments = random_images().to("meta"), {name: value.to("meta") for name, value in ARGUMENTS.items()}
    model(images, labels=arguments["labels"])
    PatchGrid.of_images(images, arguments["pixel_mask"], 8)  # alone, as transformers waits for the mask of attention
    expected = [
        "`labels` must be ids from 0 to 4",
        "`pixel_values` must be finite",
        "The policy's weights and features must be finite",
        "Scores of superpatches must not be NaN",
        "`pixel_mask` must be 1 in the top left corner",
    ]
    assert [message[: len(start)] for start, message in zip(expected, assertions, strict=True)] == expected


@torch.no_grad()
def test_nothing_is_checked_where_there_are_no_values(assertions):
    model = tiny_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(2, 3, 64, 64), pixel_mask=torch.ones(2, 64, 64)).logits.shape == (2, 5, 8, 8)
    assert not assertions


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_checked_in_what_is_exported(assertions):
    exported = torch.export.export(tiny_model(decoder_type="linear"), (random_images(),), ARGUMENTS)
    assert "assert_async" not in str(exported.graph)
    assert not assertions


@pytest.mark.parametrize("labels", [torch.zeros(2, 64, 64, dtype=torch.int64), torch.full((2, 64, 64), 255)])
@torch.no_grad()
def test_an_ignore_index_that_is_a_class_is_refused_where_there_are_labels(labels):
    model = tiny_model(num_labels=256)
    assert model(random_images()).loss is None
    with pytest.raises(ValueError, match=r"`semantic_loss_ignore_index` must be .* got 255 with 256 classes.* -100"):
        model(random_images(), labels=labels)
    assert tiny_model(num_labels=255)(random_images(), labels=labels).loss is not None
    assert tiny_model(num_labels=256, semantic_loss_ignore_index=-100)(random_images(), labels=labels).loss > 0


@torch.no_grad()
def test_the_background_may_be_ignored():
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    model = tiny_model(semantic_loss_ignore_index=0)
    assert model(random_images(), labels=labels).loss == 0
    assert model(random_images(), labels=labels + 1).loss > 0


@torch.no_grad()
def test_a_policy_must_not_ignore_one_of_its_two_classes():
    model = tiny_model().cts.policy
    model.config.semantic_loss_ignore_index = 1
    with pytest.raises(ValueError, match=r"`semantic_loss_ignore_index` must be .* got 1 with 2 classes"):
        model(random_images(), labels=torch.ones(2, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_reduction": 0.9}, r"token_reduction.*0\.9"),
        ({"pixel_values": torch.zeros(2, 1, 64, 64)}, r"num_channels.*\(2, 1, 64, 64\)"),
        ({"pixel_values": torch.zeros(2, 3, 15, 64)}, "16 x 16 pixels, got 15 x 64"),
        ({"labels": torch.zeros(2, 32, 64, dtype=torch.int64)}, r"\(2, 64, 64\).*\(2, 32, 64\)"),
        ({"labels": torch.full((2, 64, 64), 5)}, r"0 to 4, or 255.*\[5\]"),
        ({"labels": torch.full((2, 64, 64), 5, dtype=torch.uint16)}, r"0 to 4, or 255.*\[5\]"),
        ({"labels": torch.full((2, 64, 64), -1)}, r"\[-1\]"),
        ({"labels": torch.zeros(2, 64, 64)}, "`labels` must be a torch.Tensor of integer dtype, got torch.float32"),
        ({"labels": np.zeros((2, 64, 64), int)}, r"`labels` .*got <class 'numpy\.ndarray'>"),
        ({"labels": np.zeros((2, 64, 64), int), "pixel_values": np.zeros((2, 3, 64, 64))}, "`pixel_values` .*ndarray"),
        ({"pixel_values": np.zeros((2, 3, 64, 64))}, r"`pixel_values` .*got <class 'numpy\.ndarray'>"),
        ({"pixel_values": [torch.zeros(3, 64, 64)]}, "`pixel_values` .*got <class 'list'>"),
        (
            {"pixel_values": torch.zeros(2, 3, 64, 64, dtype=torch.uint8)},
            "floating-point dtype, got torch.uint8: make",
        ),
        ({"pixel_values": torch.zeros(2, 3, 64, 64) * 1j}, "floating-point dtype, got torch.complex64"),
        ({"pixel_mask": torch.ones(2, 64, 64).numpy()}, r"`pixel_mask` .*got <class 'numpy\.ndarray'>"),
        ({"pixel_mask": torch.ones(2, 64, 64) * 1j}, "real dtype, got torch.complex64"),
        ({"superpatch_scores": torch.zeros(2, 4, 4).tolist()}, "`superpatch_scores` .*got <class 'list'>"),
        ({"superpatch_scores": np.zeros((2, 4, 4))}, r"`superpatch_scores` .*got <class 'numpy\.ndarray'>"),
        ({"superpatch_scores": torch.zeros(2, 4, 4) * 1j}, "real dtype, got torch.complex64"),
        ({"token_reduction": "0.3"}, "must be a number between 0 .* got '0.3'"),
        ({"token_reduction": float("nan")}, "must be a number between 0 .* got nan"),
        ({"token_reduction": torch.tensor(0.3)}, r"must be a number between 0 .* got tensor\(0\.3000\)"),
        ({"superpatch_scores": torch.zeros(2, 8, 8)}, r"\(2, 4, 4\).*\(2, 8, 8\)"),
        ({"superpatch_scores": torch.full((2, 4, 4), float("nan"))}, "NaN"),
        ({"pixel_mask": torch.ones(2, 32, 32)}, r"pixel_mask.*\(2, 64, 64\).*\(2, 32, 32\)"),
    ],
)
def test_refusals_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{"pixel_values": random_images(), **arguments})
