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
"""
Content-aware token sharing: neighbouring patches that show one class share one token.

A grid of `H x W` patches is also a grid of `H/2 x W/2` superpatches of 2 x 2 patches. Given a score for every
superpatch (how sure a policy is that it shows one class) and a budget S, the S best superpatches are each represented
by *one* token instead of four:

    scores, budget --build_layout--> TokenLayout       which token stands for which patch
    patches, superpatches --share--> tokens            N patches become T = N - 3 S tokens
    tokens --unshare--> patches                        every patch reads the token that stands for it

There can be several levels of superpatches. With levels (2, 4), superpatches of 4 x 4 patches may share one token too.
Levels nest: the largest superpatches are chosen first, and a smaller one is chosen among those that lie in no chosen
larger one. So every patch belongs to exactly one token, and a shared superpatch of level l saves l * l - 1 tokens.

Everything here is a pure function of tensors: static shapes, batched, on any device, differentiable in the values that
are shared and unshared. References: Lu, de Geus, Dubbelman, "Content-aware Token Sharing for Efficient Semantic
Segmentation with Vision Transformers", CVPR 2023 (arXiv 2306.02095), sections 3.1 to 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_cts_checks import check_levels, check_reductions
from .modeling_cts_budgets import split_budget
from .modeling_cts_checks import (
    check_budget,
    check_count,
    check_level_scores,
    check_patch_shape,
    check_superpatch_mask,
    check_tensor,
    has_values,
    refuse_unless,
)


@dataclass
class TokenLayout(ModelOutput):
    """
    Which tokens there are, and which token stands for which patch. Tokens are in the order of the reference
    implementation: unshared patches in raster order, then shared superpatches in raster order, level by level.

    Args:
        shared_superpatches (`torch.BoolTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`):
            The superpatches that are one token; a tuple of one tensor per level if there are several levels.
        token_source (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Where each token comes from: `i < N` is patch `i`, `N + j` is superpatch `j`, both in raster order. The
            superpatches of one level are counted after those of the level before.
        patch_to_token (`torch.LongTensor` of shape `(batch_size, num_patches)`):
            The token that stands for each patch.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            `False` at tokens that fill up the rows of a batch whose images differ in size or budget; they come last.
    """

    shared_superpatches: torch.Tensor | tuple[torch.Tensor, ...]
    # Always there: a `ModelOutput` may have one field without default.
    token_source: torch.Tensor = None  # type: ignore[assignment]
    patch_to_token: torch.Tensor = None  # type: ignore[assignment]
    token_mask: torch.Tensor | None = None


def num_shared_superpatches(
    token_reduction: float | tuple[float, ...] | torch.Tensor,
    num_patches: int | torch.Tensor,
    levels: Sequence[int] = (2,),
) -> int | torch.Tensor | tuple[int | torch.Tensor, ...]:
    """
    The budget S: how many superpatches share a token so that `token_reduction` of the patch tokens disappear.

    With several levels, a single fraction is split: each level but the first gets two thirds of what it and the
    smaller ones are to remove, or more where these could not remove the rest. Two thirds, as with perfect labels
    that is about what 4 x 4 superpatches can remove of all that levels (2, 4) can. Budgets of larger levels are
    rounded down, and the first level makes up for it where there is space.

    Args:
        token_reduction (`float`, `tuple[float, ...]` or `torch.FloatTensor`):
            Fraction of the tokens to remove, between 0 and `1 - 1 / level**2` of the largest level: 0.75 for (2,). A
            tuple has what each level removes; a tensor what each image loses, `(batch_size,)`, or what each level
            removes from each image, `(batch_size, num_levels)`.
        num_patches (`int` or `torch.LongTensor` of shape `(batch_size,)`):
            Number of patches N, or that of each image. Each shared superpatch saves `level**2 - 1` tokens.
        levels (`Sequence[int]`, *optional*, defaults to `(2,)`):
            Sides of the superpatches in patches, each a multiple of the one before.

    Returns:
        `int`, or `torch.LongTensor` of shape `(batch_size,)`: for each image what its number of patches alone gives.
        A tuple of one for each level if there are several.

    Raises:
        ValueError: If `token_reduction` is something else, or `num_patches` no whole number from 0 on.
    """
    levels = check_levels(levels)
    token_reduction = check_token_reduction(token_reduction, levels)
    if isinstance(num_patches, torch.Tensor):
        check_tensor("num_patches", num_patches, "integer", "count the patches of each image.")
    else:
        check_count("num_patches", num_patches)
    reduction: float | torch.Tensor | tuple[float | torch.Tensor, ...]
    # Python computes in double precision; Apple's GPUs have none.
    if isinstance(num_patches, torch.Tensor):
        num_patches = num_patches.to(torch.float32 if num_patches.device.type == "mps" else torch.float64)
    if isinstance(token_reduction, torch.Tensor):
        given = token_reduction.to(torch.float32 if token_reduction.device.type == "mps" else torch.float64)
        if not isinstance(num_patches, torch.Tensor):
            num_patches = given.new_full(given.shape[:1], num_patches)
        reduction = given if given.ndim == 1 else given.unbind(dim=1)
    else:
        reduction = token_reduction
    budgets = split_budget(reduction, num_patches, levels)
    return budgets[0] if len(levels) == 1 else budgets


def check_token_reduction(
    token_reduction: float | tuple[float, ...] | torch.Tensor, levels: tuple[int, ...] = (2,)
) -> float | tuple[float, ...] | torch.Tensor:
    """
    Refuses what is no fraction of the tokens that sharing can remove: a number, a tuple of one for each level, or a
    tensor of either for each image. Returns Python floats, whatever kind of numbers they are, and tensors as they are.
    """
    if not isinstance(token_reduction, torch.Tensor) or token_reduction.ndim == 0:
        return check_reductions(token_reduction, levels)
    check_tensor("token_reduction", token_reduction, "floating-point", "give fractions, such as 0.3.")
    if token_reduction.ndim > 2 or (token_reduction.ndim == 2 and token_reduction.shape[1] != len(levels)):
        raise ValueError(
            f"`token_reduction` must have shape (batch_size,) or (batch_size, {len(levels)}) if it is a tensor, got "
            f"{tuple(token_reduction.shape)}: give one fraction for each image, or for each image and level."
        )
    if has_values(token_reduction):
        per_level = token_reduction if token_reduction.ndim == 2 else token_reduction[:, None]
        of_levels = levels if token_reduction.ndim == 2 else levels[-1:]
        covered = sum(per_level[:, index] / (1 - 1 / level**2) for index, level in enumerate(of_levels))
        is_valid = (per_level >= 0).all(dim=1) & (covered <= 1 + torch.finfo(per_level.dtype).eps)
        refuse_unless(
            is_valid.all(),
            f"`token_reduction` must be between 0 (no sharing) and {1 - 1 / levels[-1] ** 2:g} (all shared) for each "
            "image, and what several levels remove must fit into it",
            lambda: token_reduction[~is_valid][:10].tolist(),
            "give smaller fractions, such as 0.3.",
        )
    return token_reduction


def build_layout(
    scores: torch.Tensor | Sequence[torch.Tensor],
    num_shared: int | torch.Tensor | Sequence[int | torch.Tensor],
    *,
    levels: Sequence[int] = (2,),
    superpatch_mask: torch.Tensor | None = None,
    max_tokens: int | None = None,
    shape: tuple[int, int] | None = None,
) -> TokenLayout:
    """
    Lets the `num_shared` superpatches with the highest scores of each image share a token. Of equal scores, the
    earlier superpatch in raster order is shared first.

    If budgets are numbers and images do not differ in size, all images have the same number of tokens. Otherwise each
    image gets the tokens that it gets alone; the rows of the batch are filled up behind those of images with fewer,
    as `token_mask` says.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`):
            One score per superpatch; a sequence of one tensor per level if there are several levels.
        num_shared (`int` or `torch.LongTensor` of shape `(batch_size,)`):
            The budget S of all images or of each, from 0 to the number of superpatches that lie in the image and in no
            larger shared superpatch; a sequence of one per level if there are several levels.
        levels (`Sequence[int]`, *optional*, defaults to `(2,)`):
            Sides of the superpatches in patches, each a multiple of the one before.
        superpatch_mask (`torch.BoolTensor` of the shape of the scores of the last level, *optional*):
            `False` at padding, in a batch of images of different sizes: it has no token of its own.
        max_tokens (`int`, *optional*):
            Length of the rows of a batch whose images differ in size or budget, at least the most tokens of an image;
            the number of patches by default.
        shape (`tuple[int, int]`, *optional*):
            Rows and columns of patches, where the last of them lie in no whole superpatch and never share; by default
            those that the superpatches cover.

    Raises:
        ValueError: If levels do not nest, scores are of other shapes or hold NaN, a budget is out of range,
            `superpatch_mask` has another dtype or shape, an image has more than `max_tokens` tokens, or `shape` is
            not covered but for a part of a superpatch.
    """
    levels = check_levels(levels)
    scores, budgets = _per_level("scores", scores, levels), _per_level("num_shared", num_shared, levels)
    check_level_scores(scores, levels)
    if superpatch_mask is not None:
        check_superpatch_mask(superpatch_mask, scores[-1].shape)

    # From the last level down. `available` is where nothing larger is shared, and no padding: `None` for everywhere.
    shared: list[torch.Tensor] = []
    available = superpatch_mask
    for index in reversed(range(len(levels))):
        check_budget(budgets[index], scores[index], available)
        chosen = _choose_best(scores[index], budgets[index], available)
        shared.insert(0, chosen)
        unshared = ~chosen if available is None else available & ~chosen
        finer_level = levels[index - 1] if index > 0 else 1
        unshared = available = _repeat(unshared, levels[index] // finer_level)

    if shape is not None:
        check_patch_shape(shape, tuple(unshared.shape[1:]), levels[-1])
        unshared = _extend(unshared, shape, value=True)
    num_patches = unshared.shape[1] * unshared.shape[2]
    if superpatch_mask is None and not any(isinstance(budget, torch.Tensor) for budget in budgets):
        saved = sum((level**2 - 1) * budget for level, budget in zip(levels, budgets, strict=True))
        return _number_tokens(unshared, shared, levels, num_patches - saved, is_padded=False)
    return _number_tokens(unshared, shared, levels, num_patches if max_tokens is None else max_tokens, is_padded=True)


def count_tokens(layout: TokenLayout) -> torch.Tensor:
    """Number of tokens of each image, without those that fill up a row of the batch: `(batch_size,)`, int64."""
    if layout.token_mask is not None:
        return layout.token_mask.sum(dim=1)
    batch_size, num_tokens = layout.token_source.shape
    return torch.full((batch_size,), num_tokens, device=layout.token_source.device)


def is_identity(layout: TokenLayout) -> bool:
    """
    Whether the tokens are the patches in order, as nothing is shared: as many tokens as patches, and no filling up.
    """
    return layout.token_mask is None and layout.token_source.shape == layout.patch_to_token.shape


def share(
    patches: torch.Tensor, superpatches: torch.Tensor | Sequence[torch.Tensor], layout: TokenLayout
) -> torch.Tensor:
    """
    Picks the values of the tokens out of those of all patches and all superpatches.

    Args:
        patches (`torch.Tensor` of shape `(batch_size, num_patches, ...)`): Values of the patches, in raster order.
        superpatches (`torch.Tensor` of shape `(batch_size, num_superpatches, ...)`):
            Values of the superpatches; a sequence of one tensor per level if there are several levels.
        layout (`TokenLayout`): Which tokens there are.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens, ...)`.

    Raises:
        ValueError: If the numbers of images, patches and superpatches are not those of the layout.
    """
    values = [patches, *([superpatches] if isinstance(superpatches, torch.Tensor) else superpatches)]
    shared = layout.shared_superpatches
    shared = (shared,) if isinstance(shared, torch.Tensor) else shared
    batch_size, num_patches = layout.patch_to_token.shape
    numbers_of_cells = [num_patches, *(of_level.shape[1] * of_level.shape[2] for of_level in shared)]
    if [of_level.shape[:2] for of_level in values] != [(batch_size, number) for number in numbers_of_cells]:
        raise ValueError(
            f"The layout is for {num_patches} patches and {', '.join(map(str, numbers_of_cells[1:]))} superpatches of "
            f"{batch_size} images, got values of shape {' and '.join(str(tuple(of.shape)) for of in values)}: build "
            "it from scores of these images and their grid."
        )
    if is_identity(layout):
        return patches
    return _take(torch.cat(values, dim=1), layout.token_source)


def unshare(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """
    Gives every patch the value of the token that stands for it: a shared token is replicated to all its patches.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, ...)`): Values of the tokens, without prefix tokens.
        layout (`TokenLayout`): Which token stands for which patch.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches, ...)`, in raster order.

    Raises:
        ValueError: If the numbers of images and tokens are not those of the layout.
    """
    batch_size, num_tokens = layout.token_source.shape
    if tokens.shape[:2] != (batch_size, num_tokens):
        raise ValueError(
            f"The layout is for {num_tokens} tokens of {batch_size} images, got values of shape "
            f"{tuple(tokens.shape)}: remove prefix tokens first."
        )
    if is_identity(layout):
        return tokens
    return _take(tokens, layout.patch_to_token)


def _per_level(name: str, values: Any, levels: tuple[int, ...]) -> list[Any]:
    if not isinstance(values, (tuple, list)):
        values = [values]
    if len(values) != len(levels):
        raise ValueError(
            f"`{name}` must be a sequence of one value for each of the levels {levels}, got {len(values)}: give them "
            "in the order of the levels."
        )
    return list(values)


def _choose_best(scores: torch.Tensor, budget: int | torch.Tensor, available: torch.Tensor | None) -> torch.Tensor:
    """The superpatches with the highest scores among those that are available, `(batch_size, rows, columns)`, bool."""
    ranking = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    if available is not None:
        # The rest behind all that are available: no score, not even -inf, could rank it there by itself.
        is_excluded = (~available).flatten(1).gather(1, ranking)
        ranking = ranking.gather(1, is_excluded.int().argsort(dim=1, stable=True))
    rank = torch.arange(ranking.shape[1], device=scores.device)
    within_budget = rank < (budget[:, None] if isinstance(budget, torch.Tensor) else budget)  # (B or none, H W)
    within_budget = within_budget.expand(ranking.shape)
    return torch.zeros_like(ranking, dtype=torch.bool).scatter(1, ranking, within_budget).view(scores.shape)


def _repeat(values: torch.Tensor, side: int) -> torch.Tensor:
    """Repeats each value for a square of cells: `(..., rows, columns)` to `(..., side * rows, side * columns)`."""
    return values.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)


def _extend(values: torch.Tensor, shape: tuple[int, int], value: int = 0) -> torch.Tensor:
    """Values of patches that lie in superpatches, with `value` for the rows and columns behind them."""
    rows, columns = shape[0] - values.shape[-2], shape[1] - values.shape[-1]
    return nn.functional.pad(values, (0, columns, 0, rows), value=value) if rows or columns else values


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # Copies whole rows of the flattened batch: on a CPU many times faster than `gather`, which goes value by value.
    batch_size, length = values.shape[:2]
    first_rows = length * torch.arange(batch_size, device=values.device)[:, None]
    return values.flatten(0, 1).index_select(0, (first_rows + index).flatten()).unflatten(0, index.shape)


def _number_tokens(
    unshared: torch.Tensor, shared: list[torch.Tensor], levels: tuple[int, ...], num_tokens: int, is_padded: bool
) -> TokenLayout:
    """
    Numbers the tokens: patches that share none, `(batch_size, rows, columns)`, bool, and the superpatches of each
    level that are one token. What neither of them covers is padding.
    """
    (batch_size, height, width), device = unshared.shape, unshared.device
    shape, num_patches = (height, width), height * width
    is_token = torch.cat([unshared.flatten(1), *(chosen.flatten(1) for chosen in shared)], dim=1)  # (B, N + N/4 ...)
    # The number of each token, in the reference order; padding must only point at some token.
    position = (is_token.cumsum(dim=1) - 1).clamp(min=0)

    candidates = torch.arange(is_token.shape[1], device=device)
    stands_for, first = candidates[:num_patches], num_patches  # (N,), later (B, N)
    for level, chosen in zip(levels, shared, strict=True):
        rows, columns = chosen.shape[1:]
        superpatch = candidates[first : first + rows * columns].view(rows, columns)
        is_shared, of_superpatch = (_extend(_repeat(cells, level), shape) for cells in (chosen, superpatch))
        stands_for = torch.where(is_shared.flatten(1), of_superpatch.flatten(), stands_for)
        first = first + rows * columns
    patch_to_token = position.gather(1, stands_for)

    tokens_per_image = is_token.sum(dim=1, keepdim=True)
    if is_padded and has_values(tokens_per_image):
        refuse_unless(
            (tokens_per_image <= num_tokens).all(),
            f"`max_tokens` must be at least the most tokens of an image, not {num_tokens}",
            lambda: f"images of {tokens_per_image.flatten().tolist()} tokens",
            "give a larger number, or none.",
        )
    # The inverse of `position`; what is no token lands in one column too many.
    column = torch.where(is_token, position, num_tokens)
    token_source = torch.zeros(batch_size, num_tokens + 1, dtype=torch.int64, device=device)
    token_source = token_source.scatter(1, column, candidates.expand(batch_size, -1))[:, :num_tokens]
    token_mask = torch.arange(num_tokens, device=device) < tokens_per_image if is_padded else None
    return TokenLayout(shared[0] if len(shared) == 1 else tuple(shared), token_source, patch_to_token, token_mask)


__all__ = [
    "TokenLayout",
    "build_layout",
    "check_token_reduction",
    "count_tokens",
    "is_identity",
    "num_shared_superpatches",
    "share",
    "unshare",
]
