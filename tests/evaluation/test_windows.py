# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from cts_hf import CtsImageProcessor
from cts_hf.conversion import convert_segmenter
from cts_hf.evaluation.windows import (
    InferenceOptions,
    View,
    check_input_sizes,
    resized_images,
    segment,
    sliding_window_logits,
    window_boxes,
    windowed_size,
    with_flips,
)

from ..helpers.golden import load_golden
from ..helpers.models import random_images, tiny_model


SIZES = [(48, 48), (48, 150), (131, 70), (40, 90), (17, 30)]


def identity_model(pixel_values):
    """A model whose logits are the image: whatever is misplaced shows."""
    return SimpleNamespace(logits=pixel_values)


def naive_logits(model, image, window, stride):
    """Windows one by one, as the rule says."""
    height, width = image.shape[-2:]
    if min(height, width) < window:
        factor = window / min(height, width)
        image = interpolate(image, (int(height * factor), int(width * factor)), mode="bilinear")
        height, width = image.shape[-2:]
    total, count = torch.zeros(model.config.num_labels, height, width), torch.zeros(height, width)
    top, done_rows = 0, False
    while not done_rows:
        top, done_rows = min(top, height - window), top + window >= height
        left, done_columns = 0, False
        while not done_columns:
            left, done_columns = min(left, width - window), left + window >= width
            logits = model(image[:, :, top : top + window, left : left + window]).logits
            total[:, top : top + window, left : left + window] += interpolate(
                logits, (window, window), mode="bilinear"
            )[0]
            count[top : top + window, left : left + window] += 1
            left += stride
        top += stride
    return total / count


@pytest.mark.parametrize("name", ["sliding_window", "sliding_window_multiscale_flip"])
def test_agrees_with_the_original(name):
    golden, meta = load_golden(name)
    model = convert_segmenter(
        golden["weights"],
        image_size=meta["window"],
        patch_size=meta["patch_size"],
        num_attention_heads=meta["num_attention_heads"],
    )
    inputs = sorted(key for key in golden if key.startswith("input_"))
    views = [View(golden[key], flipped=key.endswith("flip1")) for key in inputs]
    for batch_size in (1, 3):
        probabilities = segment(model, views, tuple(meta["ori"]), meta["window"], meta["stride"], batch_size)
        difference = (probabilities - golden["probabilities"]).abs().max().item()
        print(f"{name}: {difference:.1e}")
        assert difference <= 1e-4


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_agrees_with_windows_one_by_one(size):
    model = tiny_model(token_reduction=0.3)
    image = random_images(1, *size)
    expected = naive_logits(model, image, window=48, stride=32)
    assert expected.shape[1:] == windowed_size(*size, 48)
    for batch_size in (1, 3, 100):
        logits = sliding_window_logits(model, image, window=48, stride=32, batch_size=batch_size)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_merging_puts_every_pixel_in_its_place(stride):
    image = random_images(1, 29, 40)
    logits = sliding_window_logits(identity_model, image, window=16, stride=stride)
    # Up to 16 x 16 windows are added up, each sum rounded to 2**-24 of it: 7e-5 for pixels up to 4.5.
    torch.testing.assert_close(logits, image[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(48, 48), (48, 49), (100, 144)])
def test_windows_start_at_multiples_and_end_at_the_border(size):
    boxes = window_boxes(*size, window=48, stride=32)
    assert len(set(boxes)) == len(boxes)
    for low, high, side in (("top", "bottom", size[0]), ("left", "right", size[1])):
        starts = sorted({getattr(box, low) for box in boxes})
        assert starts[-1] == side - 48
        assert starts[:-1] == list(range(0, side - 48, 32))
        assert all(getattr(box, high) - getattr(box, low) == 48 for box in boxes)


def test_a_window_as_large_as_the_image_is_the_image():
    model, image = tiny_model(), random_images(1, 64, 64)
    whole = segment(model, [View(image)], (64, 64))
    torch.testing.assert_close(segment(model, [View(image)], (64, 64), window=64), whole)


def test_flips_are_flipped_back():
    views = [View(random_images(1, 20, 30)), View(random_images(1, 30, 45, seed=1))]
    expected = segment(identity_model, views, (40, 60))
    assert expected.shape == (3, 40, 60)
    torch.testing.assert_close(expected.sum(0), torch.ones(40, 60))
    torch.testing.assert_close(segment(identity_model, with_flips(views), (40, 60)), expected)
    flipped_only = [version for version in with_flips(views) if version.flipped]
    torch.testing.assert_close(segment(identity_model, flipped_only, (40, 60), window=16, stride=9), expected)


@torch.no_grad()
def test_scores_are_asked_for_each_window_where_it_lies():
    model, image = tiny_model(), random_images(1, 64, 96)
    grid = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))  # superpatches of 16 pixels
    asked = []

    def scores(windows, boxes):
        for window, box in zip(windows, boxes, strict=True):
            assert torch.equal(window, image[0, :, box.top : box.bottom, box.left : box.right])
        asked.extend(boxes)
        return torch.stack([grid[b.top // 16 : b.bottom // 16, b.left // 16 : b.right // 16] for b in boxes])

    options = {"window": 64, "stride": 32, "token_reduction": 0.6}
    logits = sliding_window_logits(model, image, batch_size=1, superpatch_scores=scores, **options)
    assert asked == window_boxes(64, 96, 64, 32)
    expected = torch.zeros(5, 64, 96)
    for box in asked:
        window = image[:, :, :, box.left : box.right]
        of_window = grid[None, :, box.left // 16 : box.right // 16]
        part = model(window, superpatch_scores=of_window, token_reduction=0.6).logits
        expected[:, :, box.left : box.right] += interpolate(part, (64, 64), mode="bilinear")[0]
    expected[:, :, 32:64] /= 2
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        segment(model, [View(image, superpatch_scores=scores)], (64, 96), **options), expected.softmax(0)
    )


def test_impossible_calls_are_refused():
    model, image = tiny_model(), random_images(1)
    with pytest.raises(ValueError, match="`stride` must be 1 to 64, the window, got 65"):
        sliding_window_logits(model, image, window=64, stride=65)
    with pytest.raises(ValueError, match="`window` must be a whole number, 1 or more, got 0"):
        sliding_window_logits(model, image, window=0, stride=0)
    with pytest.raises(ValueError, match="`batch_size` must be a whole number, 1 or more, got 0"):
        sliding_window_logits(model, image, window=64, stride=64, batch_size=0)
    with pytest.raises(ValueError, match="a single image"):
        segment(model, [View(random_images(2))], (64, 64))
    with pytest.raises(ValueError, match="at least one"):
        segment(model, [], (64, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be a whole number, 1 or more, got 0"),
        ({"window": 16.0}, "`window` must be a whole number, 1 or more, got 16.0"),
        ({"shortest_edge": -1}, "`shortest_edge` must be a whole number, 1 or more, got -1"),
        ({"batch_size": None}, "`batch_size` must be a whole number, 1 or more, got None"),
        ({"stride": 16}, "`stride` must be unset without `window`, got 16"),
        ({"window": 16, "stride": 32}, "`stride` must be 1 to 16, the window, got 32"),
        ({"scales": []}, r"`scales` must be one or more finite numbers above 0, got \[\]"),
        ({"scales": 1.0}, "`scales` must be one or more finite numbers above 0, got 1.0"),
        ({"scales": [1.0, 0.0]}, r"above 0, got \[1.0, 0.0\]"),
        ({"scales": [float("nan")]}, r"above 0, got \[nan\]"),
        ({"scales": [float("inf")]}, r"above 0, got \[inf\]"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InferenceOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 15}, "`window` must be at least 16 pixels, a superpatch of this model, got 15"),
        ({"shortest_edge": 15}, r"at least 16 pixels, .* got {'shortest_edge': 15} at scale 1:"),
        ({"scales": [1.0, 0.1]}, r"at least 16 pixels, .* got {'height': 6, 'width': 9} at scale 0.1:"),
        ({"window": 16, "shortest_edge": 15}, None),  # which is enlarged to the window
        ({"scales": [1.0, 0.3]}, None),
    ],
)
def test_inputs_smaller_than_a_superpatch_are_refused(options, message):
    processor = CtsImageProcessor(size={"height": 60, "width": 90})
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_input_sizes(InferenceOptions(**options), processor, superpatch_size=16)
    check_input_sizes(InferenceOptions(), CtsImageProcessor(do_resize=False), superpatch_size=16)


@pytest.mark.parametrize(
    ("size", "shortest_edge", "expected"),
    [
        ({"size": {"shortest_edge": 64}}, None, [(64, 96), (32, 48)]),
        ({"size": {"height": 60, "width": 40}}, None, [(60, 40), (30, 20)]),
        ({"do_resize": False}, None, [(80, 120), (40, 60)]),
        ({"do_resize": False}, 160, [(160, 240), (80, 120)]),
    ],
)
def test_images_have_the_processors_size_or_the_one_asked_for(size, shortest_edge, expected):
    image = Image.new("L", (120, 80), 255)
    options = InferenceOptions(shortest_edge=shortest_edge, scales=[1.0, 0.5])
    images = resized_images(image, CtsImageProcessor(**size), options)
    assert [tuple(image.shape) for image in images] == [(1, 3, *size) for size in expected]
    assert all(torch.equal(image, torch.ones_like(image)) for image in images)
