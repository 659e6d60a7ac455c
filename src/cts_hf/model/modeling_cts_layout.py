# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From images to the layout of their tokens: scores, of a policy or given, and a budget or a threshold."""

import math
from typing import Any

import torch

from .configuration_cts import CtsConfig
from .configuration_cts_checks import check_threshold
from .modeling_cts_checks import SCORE_ADVICE, check_tensor, has_values
from .modeling_cts_grid import PatchGrid
from .modeling_cts_outputs import per_level
from .modeling_cts_policy import CtsPolicyModel, check_policy_scores, renormalize
from .token_sharing import TokenLayout, build_layout, check_token_reduction, num_shared_superpatches


def choose_layout(
    images: torch.Tensor,
    grid: PatchGrid,
    config: CtsConfig,
    policy: CtsPolicyModel | None,
    superpatch_scores: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    token_reduction: float | tuple[float, ...] | torch.Tensor | None = None,
    sharing_threshold: float | None = None,
) -> tuple[TokenLayout, torch.Tensor | tuple[torch.Tensor, ...] | None]:
    """
    Chooses which superpatches of images share a token.

    Args:
        images (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): As the encoder gets them,
            but not padded to whole superpatches yet.
        grid ([`PatchGrid`]): Their grid.
        config ([`CtsConfig`]): Of the segmentation model.
        policy ([`CtsPolicyModel`], *optional*): Is run where scores are wanted and not given.
        superpatch_scores, token_reduction, sharing_threshold: As in [`CtsModel.forward`].

    Returns:
        The layout, and the logits of the policy if it was run: `(batch_size, 2, superpatch_rows,
        superpatch_columns)`, or a tuple of one for each level if there are several.
    """
    levels = grid.levels
    shapes = [(images.shape[0], *grid.shape(level)) for level in levels]
    token_reduction, sharing_threshold = _budget_or_threshold(config, token_reduction, sharing_threshold)
    budgets: list[int | torch.Tensor] = []
    if token_reduction is not None:
        budgets = _budgets(token_reduction, grid.num_patches, levels, images)
    if not grid.pads:  # superpatches may cover less than all patches
        budgets = _cap_budgets(budgets, shapes)

    policy_logits = None
    if superpatch_scores is not None:
        scores = [of_level.to(images.device) for of_level in check_scores(superpatch_scores, shapes, levels)]
    elif token_reduction is not None and not any(isinstance(budget, torch.Tensor) or budget for budget in budgets):
        scores = [images.new_zeros(shape) for shape in shapes]
    else:
        policy_logits = _run_policy(images, grid, config, policy)
        scores = [(logits[:, 1] - logits[:, 0]).detach() for logits in policy_logits]
        for of_level in scores:
            check_policy_scores(of_level, images, policy)
        policy_logits = policy_logits if len(levels) > 1 else policy_logits[0]

    superpatch_mask = grid.mask(levels[-1])
    max_tokens = None
    if sharing_threshold is not None:
        budgets = _budgets_of_threshold(scores, sharing_threshold, levels, superpatch_mask)
    elif superpatch_mask is not None:
        # Budgets are rounded: an image can need more tokens than one that fills the grid, by the savings of one
        # superpatch of each level.
        if not any(isinstance(budget, torch.Tensor) for budget in budgets):
            spare = sum(level**2 - 1 for level in levels)
            max_tokens = min(_num_tokens(grid.num_patches, budgets, levels) + spare, grid.num_patches)
        budgets = _budgets(token_reduction, grid.image_num_patches(), levels, images)
    if max_tokens is None and isinstance(budgets[0], torch.Tensor) and has_values(budgets[0]):
        num_patches = grid.num_patches if superpatch_mask is None else grid.image_num_patches()
        max_tokens = int(_num_tokens(num_patches, budgets, levels).clamp(min=0).max())
    shape = None if grid.pads else grid.shape()
    options = {"superpatch_mask": superpatch_mask, "max_tokens": max_tokens, "shape": shape}
    return build_layout(scores, budgets, levels=levels, **options), policy_logits


def _budget_or_threshold(
    config: CtsConfig, token_reduction: Any, sharing_threshold: float | None
) -> tuple[Any, float | None]:
    """One of the two: what the call says, or else the threshold of the configuration, or else its budget."""
    check_threshold(sharing_threshold)
    if token_reduction is not None and sharing_threshold is not None:
        raise ValueError(
            f"`sharing_threshold` must be None where `token_reduction` is given, got {sharing_threshold!r} and "
            f"{token_reduction!r}: give one of them."
        )
    if token_reduction is None and sharing_threshold is None:
        sharing_threshold = config.sharing_threshold
        token_reduction = config.token_reduction if sharing_threshold is None else None
    return token_reduction, sharing_threshold


def _budgets(
    token_reduction: Any, num_patches: int | torch.Tensor, levels: tuple[int, ...], images: torch.Tensor
) -> list[int | torch.Tensor]:
    token_reduction = check_token_reduction(token_reduction, levels)
    if isinstance(token_reduction, torch.Tensor):
        if token_reduction.shape[0] != images.shape[0]:
            raise ValueError(
                f"`token_reduction` must have one entry for each of {images.shape[0]} images if it is a tensor, got "
                f"shape {tuple(token_reduction.shape)}: give a number to treat all images alike."
            )
        token_reduction = token_reduction.to(images.device)
    budgets = num_shared_superpatches(token_reduction, num_patches, levels)
    return list(budgets) if len(levels) > 1 else [budgets]


def _cap_budgets(budgets: list[int | torch.Tensor], shapes: list[tuple[int, int, int]]) -> list[int | torch.Tensor]:
    if not budgets or any(isinstance(budget, torch.Tensor) for budget in budgets):
        raise ValueError(
            "`token_reduction` must be a number for a model with a `backbone_config`, got a tensor or a threshold: "
            "its encoder has the same number of tokens for all images of a batch. Give one fraction for all of them."
        )
    return [min(budget, rows * columns) for budget, (_, rows, columns) in zip(budgets, shapes, strict=True)]


def check_scores(
    superpatch_scores: torch.Tensor | tuple[torch.Tensor, ...],
    shapes: list[tuple[int, int, int]],
    levels: tuple[int, ...],
) -> tuple[torch.Tensor, ...]:
    """
    Refuses scores that are no real numbers of the shape of each level, `(batch_size, superpatch_rows,
    superpatch_columns)`; what makes a layout of them refuses NaN.
    """
    if not isinstance(superpatch_scores, tuple):
        check_tensor("superpatch_scores", superpatch_scores, "real", SCORE_ADVICE)
        superpatch_scores = (superpatch_scores,)
    if len(superpatch_scores) != len(levels):
        raise ValueError(
            f"`superpatch_scores` must be a tuple of one tensor for each of the levels {levels}, got "
            f"{len(superpatch_scores)}: give them in the order of the levels."
        )
    for of_level, shape in zip(superpatch_scores, shapes, strict=True):
        check_tensor("superpatch_scores", of_level, "real", SCORE_ADVICE)
        if of_level.shape != shape:
            raise ValueError(
                f"`superpatch_scores` must have shape (batch_size, superpatch_rows, superpatch_columns) = {shape} for "
                f"these images, got {tuple(of_level.shape)}."
            )
    return superpatch_scores


def _run_policy(
    images: torch.Tensor, grid: PatchGrid, config: CtsConfig, policy: CtsPolicyModel | None
) -> tuple[torch.Tensor, ...]:
    """The logits of each level: where the policy has no head for one, those of the least sure of its parts."""
    if policy is None:
        raise ValueError(
            "This model has no policy (`use_policy=False`): give `superpatch_scores`, or `token_reduction=0` to "
            "run it without sharing."
        )
    pixel_values = renormalize(images, grid, config)
    if not grid.pads or tuple(policy.config.superpatch_levels) != tuple(grid.levels):
        pixel_values = grid.pad(pixel_values)  # here, as the grid of a policy with fewer levels can end earlier
    is_frozen = config.policy_loss_weight == 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
        logits = policy(pixel_values, superpatch_mask=grid.mask(grid.levels[0]), return_dict=True).logits
        own_levels = policy.config.superpatch_levels
        of_level = dict(zip(own_levels, per_level(logits), strict=True))
        for finer, level in zip(grid.levels[:-1], grid.levels[1:], strict=True):
            if level not in of_level:
                of_level[level] = _least_sure(of_level[finer], level // finer)
    return tuple(of_level[level] for level in grid.levels)


def _least_sure(logits: torch.Tensor, ratio: int) -> torch.Tensor:
    """Logits, `(batch_size, 2, rows, columns)`, of the least sure of each `ratio` x `ratio` superpatches."""
    cells = logits.unfold(2, ratio, ratio).unfold(3, ratio, ratio).flatten(4)  # (B, 2, rows, columns, ratio ** 2)
    index = (cells[:, 1] - cells[:, 0]).argmin(dim=-1)[:, None, :, :, None]
    return cells.gather(4, index.expand(-1, 2, -1, -1, -1)).squeeze(4)


def _budgets_of_threshold(
    scores: list[torch.Tensor],
    sharing_threshold: float,
    levels: tuple[int, ...],
    superpatch_mask: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The number of superpatches of each image and level whose probability is at least `sharing_threshold`."""
    # A score is the logarithm of the odds, of which this is the threshold.
    odds = math.inf if sharing_threshold == 1 else sharing_threshold / (1 - sharing_threshold)
    lowest = math.log(odds) if odds > 0 else -math.inf
    budgets: list[torch.Tensor] = []
    available = superpatch_mask
    for index in reversed(range(len(levels))):
        # In full precision, as the threshold is rounded to the dtype of the scores.
        chosen = scores[index].to(torch.promote_types(scores[index].dtype, torch.float32)) >= lowest
        chosen = chosen if available is None else chosen & available
        budgets.insert(0, chosen.sum(dim=(1, 2)))
        if index > 0:
            ratio = levels[index] // levels[index - 1]
            available = ~chosen if available is None else available & ~chosen
            available = available.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2)
    return budgets


def _num_tokens(
    num_patches: int | torch.Tensor, budgets: list[int | torch.Tensor], levels: tuple[int, ...]
) -> int | torch.Tensor:
    return num_patches - sum((level**2 - 1) * budget for level, budget in zip(levels, budgets, strict=True))


__all__ = ["check_scores", "choose_layout"]
