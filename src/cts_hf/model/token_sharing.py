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
Content-aware token sharing: four neighbouring patches that show one class share one token.

A grid of `H x W` patches is also a grid of `H/2 x W/2` superpatches of 2 x 2 patches. Given a score for every
superpatch (how sure a policy is that it shows one class) and a budget S, the S best superpatches are each represented
by *one* token instead of four:

    scores --build_layout--> TokenLayout          which token stands for which patch
    patches, superpatches --share--> tokens       N patches become T = N - 3 S tokens
    tokens --unshare--> patches                   every patch reads the token that stands for it

Everything here is a pure function of tensors: static shapes, batched, on any device, differentiable in the values that
are shared and unshared. References: Lu, de Geus, Dubbelman, "Content-aware Token Sharing for Efficient Semantic
Segmentation with Vision Transformers", CVPR 2023 (arXiv 2306.02095), sections 3.1 to 3.3.
"""

import numbers
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .modeling_cts_checks import check_count, check_tensor, has_values, refuse_unless


# A superpatch target that no loss or metric should count. It is fixed: any other value could be a label to ignore.
IGNORED_TARGET = 255

_LABEL_ADVICE = "convert label maps, class ids, to integers, for example with `torch.as_tensor(labels).long()`."
_SCORE_ADVICE = "convert scores, for example with `torch.as_tensor(scores)`."


@dataclass
class TokenLayout(ModelOutput):
    """
    Which tokens there are, and which token stands for which patch. Tokens are in the order of the reference
    implementation: unshared patches in raster order, then shared superpatches in raster order.

    Args:
        shared_superpatches (`torch.BoolTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`):
            The superpatches whose four patches share a token.
        token_source (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Where each token comes from: `i < N` is patch `i`, `N + j` is superpatch `j`, both in raster order.
        patch_to_token (`torch.LongTensor` of shape `(batch_size, num_patches)`):
            The token that stands for each patch.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            `False` at tokens that fill up the rows of a batch whose images differ in size; they come last.
    """

    shared_superpatches: torch.BoolTensor
    token_source: torch.LongTensor | None = None
    patch_to_token: torch.LongTensor | None = None
    token_mask: torch.BoolTensor | None = None


def num_shared_superpatches(token_reduction: float, num_patches: int) -> int:
    """
    The budget S: how many superpatches share a token so that `token_reduction` of the patch tokens disappear.

    Args:
        token_reduction (`float`): Fraction of the tokens to remove, between 0 and 0.75.
        num_patches (`int`): Number of patches N. Each shared superpatch saves three tokens.

    Raises:
        ValueError: If `token_reduction` is no number in [0, 0.75], or `num_patches` no whole number from 0 on.
    """
    check_count("num_patches", num_patches)
    return round(check_token_reduction(token_reduction) * num_patches / 3)


def check_token_reduction(token_reduction: float) -> float:
    """Refuses what is no number between 0 and 0.75; returns it as a Python float, whatever kind of number it is."""
    is_number = isinstance(token_reduction, numbers.Real) and not isinstance(token_reduction, bool)
    if not is_number or not 0 <= token_reduction <= 0.75:
        raise ValueError(
            f"`token_reduction` must be a number between 0 (no sharing) and 0.75 (all shared), got "
            f"{token_reduction!r}: give one number for all images, such as 0.3."
        )
    return float(token_reduction)


def padding_sizes(images: torch.Tensor, superpatch_size: int) -> tuple[int, int]:
    """Rows and columns of pixels that make images, `(..., height, width)`, whole superpatches."""
    height, width = images.shape[-2:]
    # Not `-height % superpatch_size`: torch.compile fails at remainders of sizes that vary from call to call.
    whole_height, whole_width = (-(-side // superpatch_size) * superpatch_size for side in (height, width))
    return whole_height - height, whole_width - width


def pad_labels(labels: torch.Tensor, superpatch_size: int, ignore_index: int = 255) -> torch.Tensor:
    """
    Pads label maps, `(batch_size, height, width)`, with `ignore_index` on the right and the bottom to whole
    superpatches of `superpatch_size` pixels, as the model pads images. Refuses labels of a dtype that cannot hold
    `ignore_index` where there is something to pad.
    """
    check_tensor("labels", labels, "integer", _LABEL_ADVICE)
    check_count("superpatch_size", superpatch_size, lowest=1)
    bottom, right = padding_sizes(labels, superpatch_size)
    bounds = None if labels.dtype == torch.bool else torch.iinfo(labels.dtype)
    holds_index = bounds is not None and bounds.min <= ignore_index <= bounds.max
    if not holds_index and (bottom or right):
        raise ValueError(
            f"`labels` must have a dtype that can hold the ignore index, {ignore_index}, to be padded, got "
            f"{labels.dtype}: convert them, for example with `labels.long()`."
        )
    return nn.functional.pad(labels, (0, right, 0, bottom), value=ignore_index)


def superpatch_targets(
    labels: torch.Tensor, superpatch_size: int, ignore_index: int = 255, superpatch_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    What a policy should predict: whether all pixels of a superpatch have one label (paper, section 3.2).

    Args:
        labels (`torch.Tensor` of shape `(batch_size, height, width)`): Label maps of any integer dtype.
        superpatch_size (`int`): Side of a superpatch in pixels; must divide height and width.
        ignore_index (`int`): The label of pixels without annotation.
        superpatch_mask (`torch.BoolTensor` of the shape of the result, *optional*): `False` at superpatches that are
            padding, in a batch of images of different sizes; their target is 255.

    Returns:
        `torch.LongTensor` of shape `(batch_size, height // superpatch_size, width // superpatch_size)`: 1 for one
        label (no annotation at all counts as one), 0 for several. One class together with unannotated pixels is 0
        inside the image and 255, to be ignored, in the superpatches along its border: there, it is most often padding.

    Raises:
        ValueError: If `labels` are no integers, not `(batch_size, height, width)` multiples of `superpatch_size`, or
            if `superpatch_mask` has another dtype or shape.
    """
    check_tensor("labels", labels, "integer", _LABEL_ADVICE)
    check_count("superpatch_size", superpatch_size, lowest=1)
    if labels.ndim != 3 or labels.shape[1] % superpatch_size or labels.shape[2] % superpatch_size:
        raise ValueError(
            f"`labels` must have shape (batch_size, height, width) with sides that are multiples of superpatch_size="
            f"{superpatch_size}, got {tuple(labels.shape)}. Pad them with the ignore index ({ignore_index})."
        )
    batch_size, height, width = labels.shape
    rows, columns = height // superpatch_size, width // superpatch_size
    cells = labels.long().view(batch_size, rows, superpatch_size, columns, superpatch_size)

    is_ignored = cells == ignore_index
    bounds = torch.iinfo(torch.int64)
    lowest = cells.masked_fill(is_ignored, bounds.max).amin(dim=(2, 4))
    highest = cells.masked_fill(is_ignored, bounds.min).amax(dim=(2, 4))
    all_ignored = lowest > highest
    one_class = lowest == highest
    partly_ignored = is_ignored.any(dim=4).any(dim=2) & ~all_ignored

    if superpatch_mask is None:
        superpatch_mask = torch.ones_like(one_class)
    check_superpatch_mask(superpatch_mask, one_class.shape)
    # Inside the image are those whose four neighbours are part of it, too.
    is_part = nn.functional.pad(superpatch_mask, (1, 1, 1, 1), value=False)
    is_inside = is_part[:, :-2, 1:-1] & is_part[:, 2:, 1:-1] & is_part[:, 1:-1, :-2] & is_part[:, 1:-1, 2:]

    targets = (all_ignored | (one_class & ~partly_ignored)).long()
    is_unclear = one_class & partly_ignored & ~is_inside
    return targets.masked_fill(is_unclear | ~superpatch_mask, IGNORED_TARGET)


def build_layout(scores: torch.Tensor, num_shared: int) -> TokenLayout:
    """
    Lets the `num_shared` superpatches with the highest scores of each image share a token. Of equal scores, the
    earlier superpatch in raster order is shared first.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`): One score per superpatch.
        num_shared (`int`): The budget S, between 0 and the number of superpatches.

    Raises:
        ValueError: If `scores` have another rank or hold NaN, or `num_shared` is out of range.
    """
    num_superpatches = _check_and_count(scores)
    check_count("num_shared", num_shared)
    if not 0 <= num_shared <= num_superpatches:
        raise ValueError(f"`num_shared` must be between 0 and {num_superpatches} superpatches, got {num_shared}.")
    chosen = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :num_shared]
    shared = torch.zeros_like(scores, dtype=torch.bool).flatten(1).scatter(1, chosen, True)
    return _number_tokens(shared.view(scores.shape), num_tokens=4 * num_superpatches - 3 * num_shared)


def build_padded_layout(scores: torch.Tensor, token_reduction: float, superpatch_mask: torch.Tensor) -> TokenLayout:
    """
    As [`build_layout`] for a batch of images of different sizes, padded to one grid. Each image gets the budget and
    the tokens that it gets alone; padding has no token of its own, and the rows of the batch are filled up behind the
    tokens of the smaller images, as `token_mask` says.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`): One score per superpatch.
        token_reduction (`float`): Fraction of each image's tokens to remove, between 0 and 0.75.
        superpatch_mask (`torch.BoolTensor` of the same shape): `False` at superpatches that are padding.

    Raises:
        ValueError: As [`build_layout`], or if `superpatch_mask` has another dtype or shape.
    """
    num_superpatches = _check_and_count(scores)
    check_superpatch_mask(superpatch_mask, scores.shape)
    token_reduction = check_token_reduction(token_reduction)
    most_shared = num_shared_superpatches(token_reduction, 4 * num_superpatches)
    # The arithmetic of `num_shared_superpatches`, which Python does in double precision; Apple's GPUs have none.
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    num_patches = 4 * superpatch_mask.flatten(1).sum(dim=1, keepdim=True).to(dtype)
    budgets = (token_reduction * num_patches / torch.full_like(num_patches, 3)).round()

    # By score, then padding behind all the rest: no score, not even -inf, could rank it there by itself.
    ranking = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    is_padding = (~superpatch_mask).flatten(1).gather(1, ranking)
    ranking = ranking.gather(1, is_padding.int().argsort(dim=1, stable=True))
    within_budget = torch.arange(num_superpatches, device=scores.device) < budgets
    shared = torch.zeros_like(within_budget).scatter(1, ranking, within_budget)
    # Budgets are rounded: a smaller image can need up to one superpatch's tokens more than the largest one's share.
    num_tokens = 4 * num_superpatches - 3 * max(most_shared - 1, 0)
    return _number_tokens(shared.view(scores.shape), num_tokens, superpatch_mask)


def check_scores(superpatch_scores: torch.Tensor, shape: tuple[int, int, int]) -> None:
    """
    Refuses scores that are no real numbers of `shape`, `(batch_size, superpatch_rows, superpatch_columns)`; what makes
    a layout of them refuses NaN.
    """
    check_tensor("superpatch_scores", superpatch_scores, "real", _SCORE_ADVICE)
    if superpatch_scores.shape != shape:
        raise ValueError(
            f"`superpatch_scores` must have shape (batch_size, superpatch_rows, superpatch_columns) = {shape} for "
            f"these images, got {tuple(superpatch_scores.shape)}."
        )


def check_superpatch_mask(superpatch_mask: torch.Tensor, shape: tuple[int, int, int]) -> None:
    """Refuses a mask that is not bool of `shape`, `(batch_size, superpatch_rows, superpatch_columns)`."""
    check_tensor("superpatch_mask", superpatch_mask, "bool", "convert it with `torch.as_tensor(mask).bool()`.")
    if superpatch_mask.shape != shape:
        raise ValueError(
            f"`superpatch_mask` must have shape (batch_size, superpatch_rows, superpatch_columns) = {tuple(shape)} "
            f"for these images, got {tuple(superpatch_mask.shape)}: give one value for each superpatch."
        )


def is_identity(layout: TokenLayout) -> bool:
    """
    Whether the tokens are the patches in order, as nothing is shared: as many tokens as patches, and no filling up.
    """
    return layout.token_mask is None and layout.token_source.shape == layout.patch_to_token.shape


def share(patches: torch.Tensor, superpatches: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """
    Picks the values of the tokens out of those of all patches and all superpatches.

    Args:
        patches (`torch.Tensor` of shape `(batch_size, num_patches, dim)`): Values of the patches, in raster order.
        superpatches (`torch.Tensor` of shape `(batch_size, num_patches // 4, dim)`): Values of the superpatches.
        layout (`TokenLayout`): Which tokens there are.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens, dim)`.

    Raises:
        ValueError: If the numbers of images, patches and superpatches are not those of the layout.
    """
    batch_size, num_patches = layout.patch_to_token.shape
    expected = (batch_size, num_patches), (batch_size, num_patches // 4)
    if (patches.shape[:2], superpatches.shape[:2]) != expected:
        raise ValueError(
            f"The layout is for {num_patches} patches and {num_patches // 4} superpatches of {batch_size} images, got "
            f"values of shape {tuple(patches.shape)} and {tuple(superpatches.shape)}. Build it from scores of these "
            "images and their grid."
        )
    if is_identity(layout):
        return patches
    return _take(torch.cat([patches, superpatches], dim=1), layout.token_source)


def unshare(tokens: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """
    Gives every patch the value of the token that stands for it: a shared token is replicated to its four patches.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`): Values of the tokens, without prefix tokens.
        layout (`TokenLayout`): Which token stands for which patch.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches, dim)`, in raster order.

    Raises:
        ValueError: If the numbers of images and tokens are not those of the layout.
    """
    batch_size, num_tokens = layout.token_source.shape
    if tokens.shape[:2] != (batch_size, num_tokens):
        raise ValueError(
            f"The layout is for {num_tokens} tokens of {batch_size} images, got values of shape "
            f"{tuple(tokens.shape)}. Remove prefix tokens first."
        )
    if is_identity(layout):
        return tokens
    return _take(tokens, layout.patch_to_token)


def _repeat_for_patches(values: torch.Tensor) -> torch.Tensor:
    """
    Repeats each value of a superpatch grid for its 2 x 2 patches: `(..., rows, columns)` to `(..., 2 rows, 2
    columns)`.
    """
    return values.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def _check_and_count(scores: torch.Tensor) -> int:
    check_tensor("scores", scores, "real", _SCORE_ADVICE)
    if scores.ndim != 3:
        raise ValueError(
            f"`scores` must have shape (batch_size, superpatch_rows, superpatch_columns), got {tuple(scores.shape)}."
        )
    if has_values(scores):
        is_nan = scores.isnan()
        refuse_unless(
            ~is_nan.any(),
            "Scores of superpatches must not be NaN, which has no rank",
            lambda: f"{is_nan.sum()} NaN among {scores.numel()}",
            "replace it, for example with `torch.nan_to_num`.",
        )
    return scores.shape[1] * scores.shape[2]


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # Copies whole rows of the flattened batch: on a CPU many times faster than `gather`, which goes value by value.
    batch_size, length = values.shape[:2]
    first_rows = length * torch.arange(batch_size, device=values.device)[:, None]
    return values.flatten(0, 1).index_select(0, (first_rows + index).flatten()).unflatten(0, index.shape)


def _number_tokens(shared: torch.Tensor, num_tokens: int, superpatch_mask: torch.Tensor | None = None) -> TokenLayout:
    """Numbers the tokens of a choice of superpatches, `(batch_size, superpatch_rows, superpatch_columns)`."""
    batch_size, rows, columns = shared.shape
    num_superpatches, num_patches = rows * columns, 4 * rows * columns
    device = shared.device

    patch_is_shared = _repeat_for_patches(shared).flatten(1)  # (B, N)
    is_token = torch.cat([~patch_is_shared, shared.flatten(1)], dim=1)  # (B, N + N/4): every possible token
    if superpatch_mask is not None:
        patch_is_real = _repeat_for_patches(superpatch_mask).flatten(1)
        is_token = is_token & torch.cat([patch_is_real, superpatch_mask.flatten(1)], dim=1)
    # (B, N + N/4): the number of each token, in the reference order; padding must only point at some token.
    position = (is_token.cumsum(dim=1) - 1).clamp(min=0)

    candidates = torch.arange(num_patches + num_superpatches, device=device)
    superpatch_of_patch = _repeat_for_patches(candidates[num_patches:].view(rows, columns)).flatten()
    stands_for = torch.where(patch_is_shared, superpatch_of_patch, candidates[:num_patches])  # (B, N)
    patch_to_token = position.gather(1, stands_for)

    # The inverse of `position`; what is no token lands in one column too many.
    column = torch.where(is_token, position, num_tokens)
    token_source = torch.zeros(batch_size, num_tokens + 1, dtype=torch.int64, device=device)
    token_source = token_source.scatter(1, column, candidates.expand(batch_size, -1))[:, :num_tokens]

    token_mask = None
    if superpatch_mask is not None:
        token_mask = torch.arange(num_tokens, device=device) < is_token.sum(dim=1, keepdim=True)
    return TokenLayout(shared, token_source, patch_to_token, token_mask)


__all__ = [
    "TokenLayout",
    "build_layout",
    "build_padded_layout",
    "check_scores",
    "check_superpatch_mask",
    "check_token_reduction",
    "is_identity",
    "num_shared_superpatches",
    "pad_labels",
    "padding_sizes",
    "share",
    "superpatch_targets",
    "unshare",
]
