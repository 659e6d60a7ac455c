# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What models are measured with: other pictures, scores and logits each time, drawn at random or read from files."""

import math
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel
from transformers.image_utils import load_image

from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_policy import CtsPolicyModel
from ..model.token_sharing import build_layout, num_shared_superpatches
from .existing import call_options, scores_shape


Model = CtsForSemanticSegmentation | PreTrainedModel
Reduction = float | tuple[float, ...]

# Random maps have about so many spots of one color or class along a side, whatever their resolution.
_NUM_SPOTS = 8
# By how much of the mean reduction images differ from it at most. Evenly spread, 80 % of them are within 64 and 136 %
# of it: about what was seen on photographs with perfect labels, 22 to 47 %.
_SPREAD = 0.45


class Batch(NamedTuple):
    """
    The images of a round, for a model with and without sharing alike.

    Attributes:
        index: of the round, a seed for whatever else is random in it.
        pictures: uint8 arrays `(height, width, num_channels)`.
        pixel_values: `(batch_size, num_channels, height, width)`, the normalized pictures as the model takes them.
        options: what else the model takes, by name: scores where its policy is not to decide.
    """

    index: int
    pictures: list[np.ndarray]
    pixel_values: Tensor
    options: dict[str, Any]


def policy_of(model: Model) -> CtsPolicyModel | None:
    """The policy of a model of either kind, if it has one."""
    return model.cts.policy if isinstance(model, CtsForSemanticSegmentation) else model.token_sharing.policy


def draw_batches(
    model: Model,
    image_size: tuple[int, int],
    batch_size: int,
    token_reduction: Reduction | None,
    sharing_threshold: float | None,
    images: Sequence[Path] | None = None,
) -> Iterator[Batch]:
    """
    Batches without end, no two of them alike but where there are few image files; the same ones in every call.

    Args:
        model: an own one, or one that [`apply_cts`] has changed. If it has no policy, there are random scores.
        image_size: height and width in pixels.
        batch_size: images of a batch.
        token_reduction: with a threshold, what images lose on average: scores are drawn so that each image loses
            another fraction. With a threshold alone, the policy decides.
        sharing_threshold: the probability that superpatches share from; `None` for a budget.
        images: files of pictures, which are taken in turn and resized to `image_size`; `None` for random ones.
    """
    is_own = isinstance(model, CtsForSemanticSegmentation)
    of_images = model.config if is_own else model.token_sharing
    generator = torch.Generator().manual_seed(0)
    if images is None:
        pictures = _random_pictures((of_images.num_channels, *image_size), generator)
    else:
        pictures = _read_pictures(images, image_size)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (of_images.image_mean, of_images.image_std))
    fixed_options = {} if is_own else call_options(model)
    scores = None
    if sharing_threshold is not None and token_reduction is not None:
        scores = _random_scores(model, image_size, batch_size, generator)
        scores = _scores_around(sharing_threshold, token_reduction, scores, tuple(model.config.superpatch_levels))
    elif policy_of(model) is None:
        scores = _random_scores(model, image_size, batch_size, generator)
    for index in count():
        taken = list(islice(pictures, batch_size))
        pixels = torch.from_numpy(np.stack(taken)).permute(0, 3, 1, 2) / 255
        pixel_values = ((pixels - mean) / std).contiguous().to(model.device, model.dtype)
        drawn = {} if scores is None else {"superpatch_scores": next(scores)}
        yield Batch(index, taken, pixel_values, {**fixed_options, **drawn})


def smooth_maps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """
    Random maps without jumps, whose spots grow with the resolution, as what pictures show does.

    Args:
        shape: of the maps, `(number, channels, height, width)`.
        generator: of the random numbers, on the CPU.

    Returns:
        `torch.FloatTensor` of this shape, about standard normal.
    """
    spots = torch.randn(*shape[:2], _NUM_SPOTS, _NUM_SPOTS, generator=generator)
    return interpolate(spots, tuple(shape[2:]), mode="bicubic", align_corners=False)


def _random_pictures(shape: tuple[int, int, int], generator: torch.Generator) -> Iterator[np.ndarray]:
    while True:
        (picture,) = smooth_maps((1, *shape), generator).sigmoid()
        yield (255 * picture).byte().permute(1, 2, 0).contiguous().numpy()


def _read_pictures(images: Sequence[Path], size: tuple[int, int]) -> Iterator[np.ndarray]:
    height, width = size
    for path in cycle(images):
        yield np.array(load_image(str(path)).resize((width, height)))


def _random_scores(
    model: Model, image_size: tuple[int, int], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """For each superpatch of each level a number from 0 to 1, batch after batch."""
    if isinstance(model, CtsForSemanticSegmentation):
        grid = PatchGrid.of_config(model.config, image_size)
        shapes = [grid.shape(level) for level in grid.levels]
    else:
        shapes = [scores_shape(model, image_size)]
    while True:
        yield tuple(torch.rand(batch_size, *shape, generator=generator).to(model.device) for shape in shapes)


def _differing_reductions(token_reduction: Reduction, levels: tuple[int, ...]) -> Iterator[tuple[float, ...]]:
    """What each level removes from image after image, or what all do: evenly spread around `token_reduction`."""
    parts = per_level(token_reduction)
    of_levels = levels if isinstance(token_reduction, tuple) else levels[-1:]
    covered = sum(part / (1 - 1 / level**2) for part, level in zip(parts, of_levels, strict=True))
    spread = min(_SPREAD, 1 / covered - 1) if covered > 0 else 0.0
    for index in count():
        # Multiples of the golden ratio: however many are taken, they fill the interval evenly.
        position = (0.5 + index * (math.sqrt(5) - 1) / 2) % 1
        yield tuple(part * (1 + spread * (2 * position - 1)) for part in parts)


def _scores_around(
    sharing_threshold: float,
    token_reduction: Reduction,
    random_scores: Iterator[tuple[Tensor, ...]],
    levels: tuple[int, ...],
) -> Iterator[tuple[Tensor, ...]]:
    """Scores by which the threshold shares what differing budgets share by random ones."""
    # A score is the logarithm of the odds.
    threshold_score = math.log(sharing_threshold / (1 - sharing_threshold))
    reductions = _differing_reductions(token_reduction, levels)
    for scores in random_scores:
        batch_size, rows, columns = scores[0].shape
        wanted = torch.tensor(list(islice(reductions, batch_size)), dtype=torch.float64)
        wanted = wanted if isinstance(token_reduction, tuple) else wanted[:, 0]
        budgets = num_shared_superpatches(wanted.to(scores[0].device), levels[0] ** 2 * rows * columns, levels)
        shared = build_layout(scores, budgets, levels=levels).shared_superpatches
        yield tuple(torch.where(of_level, threshold_score + 1, threshold_score - 1) for of_level in per_level(shared))


__all__ = ["Batch", "Model", "Reduction", "draw_batches", "policy_of", "smooth_maps"]
