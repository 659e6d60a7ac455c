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
What the functions and models of CTS refuse. Types and shapes are always checked. Values are checked on the CPU, and on
an accelerator by assertions that run there, so that the host need not wait for them; while a graph is compiled or
exported there are no values.
"""

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensor


SCORE_ADVICE = "convert scores, for example with `torch.as_tensor(scores)`."

_IS_OF_KIND = {
    "floating-point": lambda dtype: dtype.is_floating_point,
    "integer": lambda dtype: not dtype.is_floating_point and not dtype.is_complex,
    "real": lambda dtype: not dtype.is_complex,
    "bool": lambda dtype: dtype == torch.bool,
}


def check_tensor(name: str, value: Any, kind: str, advice: str) -> None:
    """
    Refuses what is no tensor, and tensors of another kind of dtype.

    Args:
        name (`str`): The argument.
        value: What was given for it.
        kind (`str`): `"floating-point"`, `"integer"` (or bool), `"real"` (one of these) or `"bool"`.
        advice (`str`): What to do.
    """
    is_tensor = isinstance(value, torch.Tensor)
    if not is_tensor or not _IS_OF_KIND[kind](value.dtype):
        got = value.dtype if is_tensor else type(value)
        raise ValueError(f"`{name}` must be a torch.Tensor of {kind} dtype, got {got}: {advice}")


def check_count(name: str, value: Any, lowest: int = 0) -> None:
    """Refuses what is no whole number from `lowest` on."""
    is_count = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    if not is_count or value < lowest:
        raise ValueError(f"`{name}` must be a whole number from {lowest} on, got {value!r}.")


def check_images(pixel_values: torch.Tensor, num_channels: int, superpatch_size: int) -> None:
    """
    Refuses images that are not `(batch_size, num_channels, height, width)` of a floating-point dtype, or smaller than
    a superpatch.
    """
    check_tensor("pixel_values", pixel_values, "floating-point", "make and normalize them with the image processor.")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must have shape (batch_size, {num_channels}, height, width) as `num_channels` of the "
            f"configuration says, got {tuple(pixel_values.shape)}."
        )
    height, width = pixel_values.shape[-2:]
    if height < superpatch_size or width < superpatch_size:
        raise ValueError(
            f"Images must have at least one superpatch, {superpatch_size} x {superpatch_size} pixels, got {height} x "
            f"{width}. Resize them first, as the image processor does."
        )


def check_labels(
    labels: torch.Tensor, shape: tuple[int, int, int], num_labels: int, ignore_index: int, advice: str
) -> None:
    """
    Refuses labels that are no integers, of another shape than `shape`, or neither in [0, `num_labels`) nor
    `ignore_index`, which must not be a class itself. The advice is for the first two.
    """
    # To ignore class 0, the background, is common and meant; any other class is 255 with more classes than that.
    if 0 < ignore_index < num_labels:
        raise ValueError(
            f"`semantic_loss_ignore_index` must be the id of no class to train, got {ignore_index} with {num_labels} "
            "classes, of which that one would never be trained: set it to -100 in the model's configuration, and "
            "label what is to be ignored so (the image processor labels padding 255)."
        )
    check_tensor("labels", labels, "integer", advice)
    if labels.shape != shape:
        raise ValueError(f"`labels` must have shape {tuple(shape)}, got {tuple(labels.shape)}: {advice}")
    if not has_values(labels):
        return
    ids = labels.long()  # some unsigned integers cannot be compared
    valid = ((ids >= 0) & (ids < num_labels)) | (ids == ignore_index)
    refuse_unless(
        valid.all(),
        f"`labels` must be ids from 0 to {num_labels - 1}, or {ignore_index} to be ignored",
        lambda: ids[~valid].unique()[:10].tolist(),
        "check the number of labels, the ignore index, and whether ids count from 1 (`do_reduce_labels`).",
    )


def check_superpatch_mask(superpatch_mask: torch.Tensor, shape: tuple[int, int, int]) -> None:
    """Refuses a mask that is not bool of `shape`, `(batch_size, superpatch_rows, superpatch_columns)`."""
    check_tensor("superpatch_mask", superpatch_mask, "bool", "convert it with `torch.as_tensor(mask).bool()`.")
    if superpatch_mask.shape != shape:
        raise ValueError(
            f"`superpatch_mask` must have shape (batch_size, superpatch_rows, superpatch_columns) = {tuple(shape)} "
            f"for these images, got {tuple(superpatch_mask.shape)}: give one value for each superpatch."
        )


def check_patch_shape(shape: tuple[int, int], covered: tuple[int, ...], level: int) -> None:
    """Refuses rows and columns of patches that superpatches do not cover but for a part of one."""
    for side, covered_side in zip(shape, covered, strict=True):
        if not covered_side <= side < covered_side + level:
            raise ValueError(
                f"`shape` must be the rows and columns of patches of which {level} x {level} superpatches cover "
                f"{covered}, got {tuple(shape)}: give scores of every whole superpatch."
            )


def check_level_scores(scores: list[torch.Tensor], levels: tuple[int, ...]) -> None:
    """
    Refuses scores of superpatches, `(batch_size, superpatch_rows, superpatch_columns)` for each level, that are no
    real numbers, are NaN, or are not of the same images.
    """
    for level_scores in scores:
        check_tensor("scores", level_scores, "real", SCORE_ADVICE)
        if level_scores.ndim != 3:
            raise ValueError(
                "`scores` must have shape (batch_size, superpatch_rows, superpatch_columns), got "
                f"{tuple(level_scores.shape)}: give one score for each superpatch."
            )
    batch_size, rows, columns = scores[-1].shape
    for level, level_scores in zip(levels[:-1], scores[:-1], strict=True):
        ratio = levels[-1] // level
        expected = (batch_size, ratio * rows, ratio * columns)
        if level_scores.shape != expected:
            raise ValueError(
                f"`scores` of level {level} must have shape {expected}, as those of level {levels[-1]} have "
                f"{(batch_size, rows, columns)}, got {tuple(level_scores.shape)}: pad images to whole superpatches of "
                "the last level."
            )
    for level_scores in scores:
        if has_values(level_scores):
            is_nan = level_scores.isnan()
            refuse_unless(
                ~is_nan.any(),
                "Scores of superpatches must not be NaN, which has no rank",
                lambda is_nan=is_nan: f"{is_nan.sum()} NaN among {is_nan.numel()}",
                "replace it, for example with `torch.nan_to_num`.",
            )


def check_budget(budget: int | torch.Tensor, scores: torch.Tensor, available: torch.Tensor | None) -> None:
    """
    Refuses a budget, a number or `(batch_size,)`, beyond the number of superpatches that have scores, `(batch_size,
    superpatch_rows, superpatch_columns)`, and are available: `None` for all, or of the same shape, bool.
    """
    batch_size, num_superpatches = scores.shape[0], scores.shape[1] * scores.shape[2]
    if isinstance(budget, torch.Tensor):
        check_tensor("num_shared", budget, "integer", "give one budget for each image.")
        if budget.shape != (batch_size,):
            raise ValueError(
                f"`num_shared` must be a number or have shape ({batch_size},), got {tuple(budget.shape)}: give one "
                "budget for each image."
            )
    else:
        check_count("num_shared", budget)
        if budget > num_superpatches:
            raise ValueError(
                f"`num_shared` must be between 0 and {num_superpatches} superpatches, got {budget}: share fewer."
            )
        if available is None:
            return
    if has_values(scores):
        highest = scores.new_full((batch_size,), num_superpatches, dtype=torch.int64)
        if available is not None:
            highest = available.flatten(1).sum(dim=1)
        refuse_unless(
            ((highest >= budget) & (torch.as_tensor(budget, device=scores.device) >= 0)).all(),
            "`num_shared` must be between 0 and the number of superpatches of each image that lie in no larger shared "
            "one",
            lambda: f"{budget.tolist() if isinstance(budget, torch.Tensor) else budget} of {highest.tolist()}",
            "share fewer.",
        )


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are values to check, and not just shapes, as while a graph is compiled or exported."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def refuse_unless(valid: torch.Tensor, expected: str, got: Callable[[], Any], advice: str) -> None:
    """
    Refuses values by a condition on them, a bool tensor of one element: with a `ValueError` on the CPU, and by an
    assertion on an accelerator, where what was given cannot be named.

    Args:
        valid (`torch.BoolTensor`): Whether the values are accepted.
        expected (`str`): What must be.
        got (`Callable`): Describes what was given.
        advice (`str`): What to do.
    """
    # Those that can assert without the host's waiting; on a meta tensor nothing else is possible.
    if valid.device.type in ("cuda", "meta"):
        torch._assert_async(valid, f"{expected}: {advice}")
    elif not valid:
        raise ValueError(f"{expected}, got {got()}: {advice}")


__all__ = [
    "SCORE_ADVICE",
    "check_budget",
    "check_count",
    "check_images",
    "check_labels",
    "check_level_scores",
    "check_superpatch_mask",
    "check_tensor",
    "has_values",
    "refuse_unless",
]
