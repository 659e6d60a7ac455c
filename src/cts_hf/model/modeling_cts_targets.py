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
"""What a policy learns: which superpatches of a label map show one class."""

import torch
from torch import nn

from .modeling_cts_checks import check_count, check_superpatch_mask, check_tensor
from .modeling_cts_grid import PatchGrid


# A superpatch target that no loss or metric should count. It is fixed: any other value could be a label to ignore.
IGNORED_TARGET = 255

_LABEL_ADVICE = "convert label maps, class ids, to integers, for example with `torch.as_tensor(labels).long()`."


def pad_labels(labels: torch.Tensor, superpatch_size: int, ignore_index: int = 255) -> torch.Tensor:
    """
    Pads label maps, `(batch_size, height, width)`, with `ignore_index` on the right and the bottom to whole
    superpatches of `superpatch_size` pixels, as the model pads images. Refuses labels of a dtype that cannot hold
    `ignore_index` where there is something to pad.
    """
    check_tensor("labels", labels, "integer", _LABEL_ADVICE)
    check_count("superpatch_size", superpatch_size, lowest=1)
    height, width = labels.shape[-2:]
    grid = PatchGrid((height, width), superpatch_size, levels=(1,))
    bounds = None if labels.dtype == torch.bool else torch.iinfo(labels.dtype)
    holds_index = bounds is not None and bounds.min <= ignore_index <= bounds.max
    if not holds_index and any(grid.padding):
        raise ValueError(
            f"`labels` must have a dtype that can hold the ignore index, {ignore_index}, to be padded, got "
            f"{labels.dtype}: convert them, for example with `labels.long()`."
        )
    return grid.pad(labels, ignore_index)


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


__all__ = ["IGNORED_TARGET", "pad_labels", "superpatch_targets"]
