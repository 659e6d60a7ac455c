# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which threshold of a policy gives a wanted mean reduction or precision."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..model.modeling_cts_targets import IGNORED_TARGET
from ..model.token_sharing import check_token_reduction
from .scored_images import ScoredImage


PERCENTILES = (10, 50, 90)
# Means are sums of many fractions.
_TOLERANCE = 1e-9


class ThresholdCurve:
    """
    What each threshold gives on images whose scores are known.

    Superpatches of a level share where their score reaches the threshold and that of no larger one around them does:
    in an interval of thresholds each, so that everything changes at scores only.

    Args:
        images: of `score_images`.
        levels: sides of the superpatches in patches.
    """

    def __init__(self, images: Sequence[ScoredImage], levels: Sequence[int]):
        self.num_patches = np.array([image.num_patches for image in images])
        self.has_targets = all(image.targets is not None for image in images)
        columns = [_superpatches(index, image, levels) for index, image in enumerate(images)]
        # Of each superpatch that can share: its image, the tokens it saves, its target, its own score, and the highest
        # of the larger ones around it.
        self.image, self.saved, self.target, self.score, self.above = map(np.concatenate, zip(*columns, strict=True))

    def find(self, *, token_reduction: float | None = None, precision: float | None = None) -> float:
        """
        The threshold that shares the least to lose a fraction of the tokens, the mean over the images; or the one that
        shares the most at a precision.

        Args:
            token_reduction: the fraction of the tokens.
            precision: how many of the superpatches that share, of all images and levels, show one class.

        Returns:
            the probability, with as few decimals as tell it from others.

        Raises:
            ValueError: both or neither are given, a precision without labels, or one that no threshold reaches.
        """
        if (token_reduction is None) == (precision is None):
            raise ValueError(
                f"Either `token_reduction` or `precision` must be wanted, got {token_reduction} and {precision}: give "
                "one of them."
            )
        # From the highest on: between one value and the next, what shares is the same.
        ends = np.array([np.inf, -np.inf], self.score.dtype)
        values = np.unique(np.concatenate([self.score, self.above, ends]))[::-1]
        thresholds = _between(values)
        if token_reduction is not None:
            weights = self.saved / (self.num_patches[self.image] * len(self.num_patches))
            reached = self._cumulated(values, weights) >= token_reduction - _TOLERANCE
            return _shortest(values, thresholds, np.flatnonzero(reached & ~np.isnan(thresholds))[0])
        if not self.has_targets:
            raise ValueError(f"`precision` must be None for images without labels, got {precision}: give labels.")
        with np.errstate(invalid="ignore"):
            one_class = self._cumulated(values, self.target == 1)
            precisions = one_class / self._cumulated(values, self.target != IGNORED_TARGET)
        precisions[np.isnan(thresholds)] = np.nan  # none: of the values it would lie between, it rounds to one
        reached = np.flatnonzero(precisions >= precision)
        if not len(reached):
            best = "no superpatch that can share" if np.isnan(precisions).all() else f"{np.nanmax(precisions):.4f}"
            raise ValueError(
                f"`precision` must be one that the policy reaches on these images, {best} at most, got {precision}: "
                "want less, or train the policy further."
            )
        return _shortest(values, thresholds, reached[-1])

    def at(self, sharing_threshold: float) -> dict[str, Any]:
        """
        What a threshold gives.

        Returns:
            `num_images`, `token_reduction` and, with labels, `precision`: each a mean (the precision that of all
            superpatches together) and percentiles over the images.
        """
        lowest = np.maximum(_score_of(sharing_threshold, self.score.dtype), np.finfo(self.score.dtype).min)
        shared = (self.score >= lowest) & (self.above < lowest)
        num_images = len(self.num_patches)

        def per_image(weights: np.ndarray) -> np.ndarray:
            return np.bincount(self.image[shared], weights[shared], minlength=num_images)

        reductions = per_image(self.saved) / self.num_patches
        result = {
            "sharing_threshold": sharing_threshold,
            "num_images": num_images,
            "token_reduction": {"mean": math.fsum(reductions) / num_images, **_percentiles(reductions)},
        }
        if self.has_targets:
            one_class, counted = per_image(self.target == 1), per_image(self.target != IGNORED_TARGET)
            total = counted.sum()
            result["precision"] = {
                "mean": one_class.sum() / total if total else math.nan,
                **_percentiles(one_class[counted > 0] / counted[counted > 0]),
            }
        return result

    def _cumulated(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The sum of the weights of what shares, for a threshold at each of the values, which descend."""
        starts, ends = (len(values) - 1 - np.searchsorted(values[::-1], of) for of in (self.score, self.above))
        changes = np.bincount(starts, weights, len(values)) - np.bincount(ends, weights, len(values))
        return np.cumsum(changes)[:-1]  # at the last, -inf, everything has ended


def find_threshold(
    images: Sequence[ScoredImage],
    levels: Sequence[int],
    *,
    token_reduction: float | None = None,
    precision: float | None = None,
) -> dict[str, Any]:
    """
    The threshold for a wanted mean reduction or precision, and what it gives.

    Args:
        images: of `score_images`.
        levels: sides of the superpatches in patches.
        token_reduction, precision: what is wanted, one of both; see [`ThresholdCurve.find`].

    Returns:
        what [`ThresholdCurve.at`] gives.

    Raises:
        ValueError: a reduction or a precision that there cannot be.
    """
    check_wanted(token_reduction, precision, levels)
    curve = ThresholdCurve(images, levels)
    return curve.at(curve.find(token_reduction=token_reduction, precision=precision))


def check_wanted(token_reduction: float | None, precision: float | None, levels: Sequence[int]) -> None:
    """Refuses, before a policy runs, what no threshold can give."""
    if isinstance(token_reduction, tuple):
        raise ValueError(
            f"`token_reduction` must be one number, of all levels together, got {token_reduction}: give their sum."
        )
    if token_reduction is not None:
        check_token_reduction(token_reduction, tuple(levels))
    if precision is not None and not 0 < precision <= 1:
        raise ValueError(f"`precision` must be above 0 and at most 1, got {precision}: give a fraction, such as 0.95.")


def format_threshold(result: dict[str, Any]) -> str:
    """What [`find_threshold`] gives, as text."""
    lines = [f"sharing_threshold {result['sharing_threshold']}, on {result['num_images']} images"]
    titles = {"token_reduction": "fewer tokens", "precision": "one class, of what shares"}
    for name, title in titles.items():
        if name in result:
            mean, *spread = (f"{100 * value:.2f}" for value in result[name].values())
            percentiles = ", ".join(map(str, PERCENTILES))
            lines.append(f"{title}: {mean} % ({percentiles} % of the images have at most {', '.join(spread)} %)")
    return "\n".join(lines)


def _superpatches(index: int, image: ScoredImage, levels: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The columns of `ThresholdCurve`, of one image."""
    parts, above = [], None
    for position in reversed(range(len(levels))):
        score, level = image.scores[position], levels[position]
        above = np.full_like(score, -np.inf) if above is None else above
        target = np.full(score.shape, IGNORED_TARGET) if image.targets is None else image.targets[position]
        can_share = score > above
        number = np.count_nonzero(can_share)
        saved = np.full(number, level**2 - 1)
        parts.append((np.full(number, index), saved, target[can_share], score[can_share], above[can_share]))
        if position > 0:
            above = np.maximum(score, above)
            for axis in (0, 1):
                above = above.repeat(level // levels[position - 1], axis=axis)
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _score_of(probability: float | np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The score from which on superpatches share, as the model computes it: the logarithm of the odds, rounded."""
    probability = np.asarray(probability, np.float64)
    with np.errstate(divide="ignore"):
        return np.log(probability / (1 - probability)).astype(dtype)


def _between(values: np.ndarray) -> np.ndarray:
    """A threshold from each of descending scores down to the next one, as a probability; NaN if it rounds to one."""
    middle = values[:-1].astype(np.float64)
    is_finite = np.isfinite(values[:-1]) & np.isfinite(values[1:])
    middle[is_finite] = (middle[is_finite] + values[1:][is_finite]) / 2
    middle[np.isneginf(values[1:])] = -np.inf  # everything shares
    probabilities = torch.from_numpy(middle).sigmoid().numpy()
    return np.where(_is_between(probabilities, values[:-1], values[1:]), probabilities, np.nan)


def _is_between(probability: float | np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Whether a threshold shares what has the score `high`, and not what has `low`, which has nothing if infinite."""
    lowest = _score_of(probability, high.dtype)
    return (lowest <= high) & ((lowest > low) | np.isneginf(low))


def _shortest(values: np.ndarray, thresholds: np.ndarray, index: int) -> float:
    """The threshold of an interval with as few decimals as it takes."""
    threshold = float(thresholds[index])
    high, low = values[index], values[index + 1]
    rounded = (round(threshold, digits) for digits in range(2, 17))
    return next((short for short in rounded if _is_between(short, high, low)), threshold)


def _percentiles(values: np.ndarray) -> dict[str, float]:
    percentiles = np.percentile(values, PERCENTILES) if len(values) else [math.nan] * len(PERCENTILES)
    return {f"p{of}": float(value) for of, value in zip(PERCENTILES, percentiles, strict=True)}


__all__ = ["PERCENTILES", "ThresholdCurve", "check_wanted", "find_threshold", "format_threshold"]
