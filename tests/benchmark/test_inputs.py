# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from cts_hf import CtsImageProcessor, apply_cts
from cts_hf.benchmark.inputs import draw_batches, smooth_maps
from cts_hf.model.token_sharing import num_shared_superpatches

from ..helpers.existing_models import build_existing
from ..helpers.models import tiny_model


def test_every_picture_is_another_and_every_call_gives_the_same():
    model = tiny_model(image_mean=[0.4, 0.5, 0.6], image_std=0.25)
    batches, again = (list(islice(draw_batches(model, (64, 96), 3, 0.3, None), 4)) for _ in range(2))
    pictures = [picture for batch in batches for picture in batch.pictures]
    assert {(picture.shape, picture.dtype) for picture in pictures} == {((64, 96, 3), np.dtype(np.uint8))}
    assert len({picture.tobytes() for picture in pictures}) == 12
    assert [batch.index for batch in batches] == [0, 1, 2, 3]
    processor = CtsImageProcessor(
        do_resize=False, image_mean=model.config.image_mean, image_std=model.config.image_std
    )
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.pixel_values, same.pixel_values)
        assert batch.options == {}
        expected = processor(batch.pictures, return_tensors="pt").pixel_values
        torch.testing.assert_close(batch.pixel_values, expected, atol=1e-6, rtol=1e-6)  # of magnitude 2


def test_spots_grow_with_the_resolution():
    """Of maps with eight spots along a side, neighbours are alike, and more alike the more pixels there are."""
    steps = []
    for side in (32, 128):
        maps = smooth_maps((2, 4, side, side), torch.Generator().manual_seed(0))
        assert maps.shape == (2, 4, side, side)
        steps.append(maps.diff(dim=3).abs().mean() / maps.std())
    assert steps[0] / steps[1] == pytest.approx(4, rel=0.1)
    assert not torch.equal(*maps)


def test_pictures_of_files_are_taken_in_turn_and_resized(tmp_path):
    for index in range(2):
        color = (100 * index, 50, 0)
        Image.new("RGB", (30, 20), color).save(tmp_path / f"{index}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    batches = islice(draw_batches(tiny_model(), (48, 64), 1, None, 0.5, files), 3)
    colors = []
    for batch in batches:
        (picture,) = batch.pictures
        assert picture.shape == (48, 64, 3)
        colors.append(picture[0, 0].tolist())
    assert colors == [[0, 50, 0], [100, 50, 0], [0, 50, 0]]


@pytest.mark.parametrize("levels", [(2,), (2, 4)])
def test_without_policy_scores_are_random(levels):
    model = tiny_model(use_policy=False, superpatch_levels=levels)
    first, second = (
        batch.options["superpatch_scores"] for batch in islice(draw_batches(model, (64, 72), 2, 0.3, None), 2)
    )
    for level, scores, other in zip(levels, first, second, strict=True):
        columns = 12 if levels == (2, 4) else 10  # padded to whole superpatches of the last level
        assert scores.shape == (2, 8 // level, columns // level)
        assert not torch.equal(scores, other)
        assert not torch.equal(*scores)


def test_models_of_transformers_are_told_that_images_have_any_size():
    model = apply_cts(build_existing("vit"))
    (batch,) = islice(draw_batches(model, (72, 56), 1, 0.3, None), 1)
    assert batch.options["interpolate_pos_encoding"]
    assert batch.pixel_values.shape == (1, 3, 72, 56)


@pytest.mark.parametrize(
    ("levels", "token_reduction", "mean"),
    [
        ((2,), 0.3, 0.3),
        ((2, 4), 0.5, 0.5),
        ((2, 4), (0.2, 0.3), 0.5),
        ((2,), 0.75, 0.75),
        ((2,), 0.6, 0.6),
        ((2, 4), 0.0, 0.0),
    ],
)
@torch.no_grad()
def test_drawn_thresholds_share_as_differing_budgets(levels, token_reduction, mean):
    model = tiny_model(superpatch_levels=levels)
    tokens = []
    for batch in islice(draw_batches(model, (128, 128), 4, token_reduction, 0.9), 5):
        outputs = model(batch.pixel_values, sharing_threshold=0.9, **batch.options)
        tokens += outputs.num_tokens.tolist()
    reductions = 1 - np.array(tokens) / 256
    # Budgets are rounded, those of larger levels down: a superpatch of 2 x 2 removes 3 of 256 tokens, of 4 x 4 15.
    assert reductions.mean() == pytest.approx(mean, abs=3 / 256 if levels == (2,) else 15 / 256)
    assert reductions.max() <= mean * 1.45 + 0.01
    highest = 1 - 1 / levels[-1] ** 2
    if mean in (0.0, highest):
        assert reductions.tolist() == pytest.approx([mean] * 20)
    else:
        assert len(set(tokens)) > 8
    if (levels, mean) == ((2,), 0.3):
        low, high = np.percentile(reductions, (10, 90)) / mean
        assert low == pytest.approx(0.64, abs=0.09)  # of 20 images, in steps of 4 %
        assert high == pytest.approx(1.36, abs=0.09)


def test_drawn_thresholds_share_exactly_what_was_drawn():
    """The first image loses the mean exactly: 0.5 is the middle of the interval."""
    model = tiny_model(superpatch_levels=(2, 4))
    (batch,) = islice(draw_batches(model, (128, 128), 1, 0.5, 0.2), 1)
    with torch.no_grad():
        outputs = model(batch.pixel_values, sharing_threshold=0.2, **batch.options)
    expected = num_shared_superpatches(0.5, 256, (2, 4))
    assert tuple(int(of_level.sum()) for of_level in outputs.shared_superpatches) == expected
