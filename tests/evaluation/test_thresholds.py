# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch

from cts_hf.evaluation.evaluator import evaluate_segmentation
from cts_hf.evaluation.scored_images import ScoredImage, score_images
from cts_hf.evaluation.thresholds import ThresholdCurve, check_wanted, find_threshold, format_threshold
from cts_hf.model.modeling_cts_targets import IGNORED_TARGET

from ..helpers.scenes import processor, scene_model, scenes


LEVELS = (2, 4)


def random_image(index, sides, levels=LEVELS, dtype=np.float32):
    """Scores, some of them equal, and targets of an image of so many superpatches of the last level."""
    rng = np.random.default_rng(index)
    grids = [tuple(side * levels[-1] // level for side in sides) for level in levels]
    scores = tuple(np.round(2 * rng.standard_normal(grid), 1).astype(dtype) for grid in grids)
    targets = tuple(rng.choice([0, 1, 1, IGNORED_TARGET], grid) for grid in grids)
    return ScoredImage(index, math.prod(sides) * levels[-1] ** 2, scores, targets)


def by_hand(images, threshold, levels=LEVELS):
    """Reductions of the images, and precision of what shares in all of them, by the rule in a loop."""
    lowest = -math.inf if threshold == 0 else math.inf if threshold == 1 else math.log(threshold / (1 - threshold))
    reductions, shared_targets = [], []
    for image in images:
        removed, covered = 0, set()
        for level, scores, targets in reversed(list(zip(levels, image.scores, image.targets, strict=True))):
            for row, column in np.ndindex(scores.shape):
                patch = (row * level, column * level)
                if scores[row, column] >= lowest and patch not in covered:
                    removed += level**2 - 1
                    shared_targets.append(targets[row, column])
                    covered |= {(patch[0] + i, patch[1] + j) for i in range(level) for j in range(level)}
        reductions.append(removed / image.num_patches)
    counted = [target for target in shared_targets if target != IGNORED_TARGET]
    return reductions, np.mean([target == 1 for target in counted]) if counted else math.nan


@pytest.mark.parametrize("levels", [(2,), LEVELS, (2, 4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_threshold_gives_what_the_rule_gives(levels, dtype):
    images = [random_image(index, sides, levels, dtype) for index, sides in enumerate([(1, 1), (2, 3), (1, 4)])]
    curve = ThresholdCurve(images, levels)
    for threshold in (0, 1e-9, 0.2, 0.5, 0.731, 0.9, 1):
        result = curve.at(threshold)
        reductions, precision = by_hand(images, threshold, levels)
        assert result["token_reduction"]["mean"] == math.fsum(reductions) / 3
        assert result["token_reduction"]["p50"] == np.median(reductions)
        assert result["precision"]["mean"] == pytest.approx(precision, abs=1e-12, nan_ok=True)
    assert curve.at(0)["token_reduction"]["mean"] == 1 - 1 / levels[-1] ** 2
    assert curve.at(1)["token_reduction"]["mean"] == 0


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.4, 0.6, 0.9, 0.9375])
def test_a_reduction_is_reached_by_the_highest_threshold(wanted):
    images = [random_image(index, (2, 2)) for index in range(3)]
    found = find_threshold(images, LEVELS, token_reduction=wanted)
    threshold, reduction = found["sharing_threshold"], found["token_reduction"]["mean"]
    assert reduction >= wanted - 1e-9
    # All that there can be: scores have one decimal.
    steps = [1 / (1 + math.exp(-score)) for score in np.arange(-8, 8, 0.1) + 0.05]
    for higher in (step for step in steps if step > threshold + 1e-3):
        less = np.mean(by_hand(images, higher)[0])
        assert less <= reduction
        assert less < wanted or less == reduction


@pytest.mark.parametrize("wanted", [0.5, 0.7, 0.75])
def test_a_precision_is_kept_by_the_threshold_that_shares_the_most(wanted):
    images = [random_image(index, (2, 2)) for index in range(3)]
    found = find_threshold(images, LEVELS, precision=wanted)
    assert found["precision"]["mean"] >= wanted
    assert found["precision"]["mean"] == pytest.approx(by_hand(images, found["sharing_threshold"])[1], abs=1e-12)
    steps = [1 / (1 + math.exp(-score)) for score in np.arange(-8, 8, 0.1) + 0.05]
    for lower in (step for step in steps if step < found["sharing_threshold"] - 1e-3):
        reductions, precision = by_hand(images, lower)
        assert precision < wanted or np.mean(reductions) == found["token_reduction"]["mean"]


def test_a_precision_that_is_not_reached_is_refused_with_what_is():
    image = random_image(0, (2, 2))
    targets = tuple(np.where(np.arange(target.size).reshape(target.shape) % 2, target, 0) for target in image.targets)
    images = [image._replace(targets=targets)]
    best = max(by_hand(images, 1 / (1 + math.exp(-score)))[1] for score in np.arange(-8, 8, 0.1) + 0.05)
    with pytest.raises(ValueError, match=rf"`precision` must be one that .* {best:.4f} at most, got 1.0: want less"):
        find_threshold(images, LEVELS, precision=1.0)
    ignored = tuple(np.full_like(target, IGNORED_TARGET) for target in image.targets)
    with pytest.raises(ValueError, match=r"no superpatch that can share at most, got 0\.5"):
        find_threshold([image._replace(targets=ignored)], LEVELS, precision=0.5)
    with pytest.raises(ValueError, match=r"`precision` must be None for images without labels, got 0\.5"):
        find_threshold([image._replace(targets=None)], LEVELS, precision=0.5)


def test_thresholds_have_few_decimals_and_tell_close_scores_apart():
    scores = np.array([[1.0, np.nextafter(np.float32(1), np.float32(2)), 3.0, -2.0]], np.float32)
    image = ScoredImage(0, 16, (scores,), (np.array([[0, 1, 1, 0]]),))
    curve = ThresholdCurve([image], (2,))
    # Of the probabilities 0.731 and 0.953, the one in the middle of the scores is 0.8808.
    assert [curve.find(token_reduction=wanted) for wanted in (3 / 16, 12 / 16)] == [0.88, 0.0]
    close = find_threshold([image], (2,), precision=1.0)
    assert close["token_reduction"]["mean"] in (3 / 16, 6 / 16)
    assert close["precision"]["mean"] == 1
    # Saturated: the probability of the highest score is 1, which no score reaches.
    saturated = ScoredImage(0, 16, (np.array([[60.0, 50.0, 0.0, -60.0]], np.float32),), None)
    found = find_threshold([saturated], (2,), token_reduction=3 / 16)
    assert found["token_reduction"]["mean"] == 6 / 16
    assert "precision" not in found
    equal = ScoredImage(0, 16, (np.zeros((1, 4), np.float32),), None)
    assert find_threshold([equal], (2,), token_reduction=0.1)["token_reduction"]["mean"] == 0.75


@torch.no_grad()
@pytest.mark.parametrize("levels", [(2,), LEVELS], ids=str)
@pytest.mark.parametrize("edge", [64, 72])  # 72 pixels are padded
def test_what_is_found_is_what_a_model_does(levels, edge):
    model = scene_model(superpatch_levels=levels)
    rows = [dict(row) for row in scenes()]
    rows[1] = {name: picture.crop((0, 0, 80, 48)) for name, picture in rows[1].items() if name != "name"}
    images = score_images(model.config, model.cts.policy, rows, processor(edge))
    for wanted in ({"token_reduction": 0.35}, {"precision": 0.34}):
        found = find_threshold(images, levels, **wanted)
        assert 0 <= found["sharing_threshold"] < 1
        threshold = {"sharing_threshold": found["sharing_threshold"]}
        result = evaluate_segmentation(model, rows, processor(edge), **threshold)
        assert result["mean_token_reduction"] == found["token_reduction"]["mean"]
        assert result["policy_precision_at_budget"] == found["precision"]["mean"]


def test_the_threshold_is_rounded_as_the_model_rounds_it():
    image = random_image(0, (4, 4), (2,))
    scores = torch.from_numpy(image.scores[0])[None]
    curve = ThresholdCurve([image], (2,))
    model = scene_model()
    pixel_values = torch.zeros(1, 3, 64, 64)
    for score in image.scores[0].flatten():
        threshold = 1 / (1 + math.exp(-float(score)))
        layout = model.cts(pixel_values.double(), scores, sharing_threshold=threshold).token_layout
        shared = layout.shared_superpatches.sum().item()
        assert curve.at(threshold)["token_reduction"]["mean"] == pytest.approx(3 * shared / 64, abs=1e-12)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((0.8, None), "`token_reduction` must be a number between 0"),
        (((0.1, 0.2), None), r"`token_reduction` must be one number, .* got \(0\.1, 0\.2\): give their sum"),
        ((None, 0.0), r"`precision` must be above 0 and at most 1, got 0\.0"),
        ((None, 95), "`precision` must be above 0 and at most 1, got 95: give a fraction"),
        ((None, float("nan")), "`precision` must be above 0 and at most 1, got nan"),
    ],
)
def test_what_no_threshold_gives_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        check_wanted(*wanted, levels=(2,))


@pytest.mark.parametrize("wanted", [{}, {"token_reduction": 0.3, "precision": 0.9}])
def test_one_thing_is_wanted(wanted):
    with pytest.raises(ValueError, match="Either `token_reduction` or `precision` must be wanted, got"):
        find_threshold([random_image(0, (1, 1))], LEVELS, **wanted)


def test_the_result_as_text():
    result = {
        "sharing_threshold": 0.914,
        "num_images": 101,
        "token_reduction": {"mean": 0.413, "p10": 0.281, "p50": 0.42, "p90": 0.552},
    }
    assert format_threshold(result).splitlines() == [
        "sharing_threshold 0.914, on 101 images",
        "fewer tokens: 41.30 % (10, 50, 90 % of the images have at most 28.10, 42.00, 55.20 %)",
    ]
