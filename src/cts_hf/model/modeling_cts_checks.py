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


__all__ = ["check_count", "check_images", "check_labels", "check_tensor", "has_values", "refuse_unless"]
