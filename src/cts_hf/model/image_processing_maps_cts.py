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
"""Label maps and logits of images, resized to other sizes."""

import torch
import torch.nn.functional as F


IGNORE_INDEX = 255  # label of pixels that belong to no class, and of padding


def upsample(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Bilinear interpolation (align_corners=False) of the logits of one image.

    Args:
        logits (`torch.Tensor` of shape `(num_labels, height, width)`): scores of floating-point type.
        size (`tuple[int, int]`): height and width of the result, in pixels.

    Returns:
        `torch.Tensor` of shape `(num_labels, *size)`.
    """
    # Channels-last logits, which token decoders give, would be rounded differently depending on their strides.
    return F.interpolate(logits[None].contiguous(), size=size, mode="bilinear", align_corners=False)[0]


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Nearest-neighbour resizing of label maps of any integer type; the neighbours are those of Pillow's NEAREST.

    Args:
        labels (`torch.Tensor` of shape `(..., height, width)`): class ids.
        size (`tuple[int, int]`): height and width of the result, in pixels.

    Returns:
        `torch.Tensor` of shape `(..., *size)`, with no id that `labels` does not have.
    """
    # Integer arithmetic of floor((i + 0.5) * old / new): Pillow itself would cut ids down to 8 bits.
    rows, columns = (
        (2 * torch.arange(new, device=labels.device) + 1) * old // (2 * new)
        for old, new in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def reduce_labels(labels: torch.Tensor) -> torch.Tensor:
    """
    Class ids that start at 1 made to start at 0: 0 becomes the ignore index 255, which itself stays.

    Args:
        labels (`torch.LongTensor` of any shape): class ids.

    Returns:
        `torch.LongTensor` of the same shape.
    """
    ignored = (labels == 0) | (labels == IGNORE_INDEX)
    return torch.where(ignored, IGNORE_INDEX, labels - 1)


__all__ = ["IGNORE_INDEX", "reduce_labels", "resize_labels", "upsample"]
