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
"""The grid of an image: its patches, the superpatches of every level, what of it is padding, and maps on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from .modeling_cts_checks import check_tensor, has_values, refuse_unless


Length = TypeVar("Length", int, torch.Tensor)


def num_cells(length: Length, cell_size: int) -> Length:
    """How many cells of `cell_size` cover `length`: the last one may hang over the end."""
    # Not by `length % cell_size`: torch.compile fails at remainders of sizes that vary from call to call.
    return (length + cell_size - 1) // cell_size


@dataclass
class PatchGrid:
    """
    The geometry of a batch of images, padded on the right and the bottom to whole superpatches of the last level.
    Images that differ in size are padded to a common one before; each of them also has the grid that it has alone, in
    the top left corner.

    Args:
        size (`tuple[int, int]`):
            Height and width of the images in pixels, as they are given.
        patch_size (`int`):
            Side of a patch in pixels.
        levels (`tuple[int, ...]`, *optional*, defaults to `(2,)`):
            Sides of the superpatches in patches, each a multiple of the one before.
        image_sizes (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*):
            Height and width of each image in pixels, where they differ.
        pads (`bool`, *optional*, defaults to `True`):
            Whether images are padded. Otherwise, what is behind the last whole patch is cut off, and the last rows and
            columns of patches may lie in no superpatch.
    """

    size: tuple[int, int]
    patch_size: int
    levels: tuple[int, ...] = (2,)
    image_sizes: torch.Tensor | None = None
    pads: bool = True

    @classmethod
    def of_config(
        cls, config: PreTrainedConfig, size: tuple[int, int], image_sizes: torch.Tensor | None = None
    ) -> "PatchGrid":
        """The grid that a model with this [`CtsConfig`] has of images: encoders of transformers do not pad them."""
        pads = config.backbone_config is None
        height, width = size
        return cls((height, width), config.patch_size, tuple(config.superpatch_levels), image_sizes, pads)

    @classmethod
    def of_images(
        cls,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None,
        patch_size: int,
        levels: tuple[int, ...] = (2,),
    ) -> "PatchGrid":
        """
        The grid of images, `(batch_size, num_channels, height, width)`, with a mask, `(batch_size, height, width)`,
        that is 0 at padding. Refuses a mask other than 1 in a rectangle of at least a superpatch of the first level
        in the top left corner, and 0 elsewhere.
        """
        height, width = pixel_values.shape[2:]
        grid = cls((height, width), patch_size, levels)
        if pixel_mask is not None:
            check_tensor("pixel_mask", pixel_mask, "real", "take it from the image processor.")
            shape = (pixel_values.shape[0], *grid.size)
            if pixel_mask.shape != shape:
                raise ValueError(
                    f"`pixel_mask` must have shape {shape} for these `pixel_values`, got {tuple(pixel_mask.shape)}: "
                    "take both from the image processor."
                )
            is_real = pixel_mask.bool()
            grid.image_sizes = torch.stack([is_real[:, :, 0].sum(dim=1), is_real[:, 0, :].sum(dim=1)], dim=1)
            _check_pixel_mask(pixel_mask, grid, grid.image_sizes)
        return grid

    def shape(self, level: int = 1) -> tuple[int, int]:
        """Rows and columns of superpatches of a level, padding included; those of patches for 1."""
        rows, columns = (self._whole(side, level) for side in self.size)
        return rows, columns

    @property
    def num_patches(self) -> int:
        """Number of patches, padding included."""
        rows, columns = self.shape()
        return rows * columns

    def begun_patches(self, parts: int = 1) -> tuple[int, int]:
        """
        Rows and columns of patches that hold pixels of the images: the rest is padding to whole superpatches. Patches
        can be cut in `parts` along each side, of which those with pixels are counted.
        """
        if not self.pads:
            rows, columns = self.shape()
            return parts * rows, parts * columns
        rows, columns = (num_cells(parts * side, self.patch_size) for side in self.size)
        return rows, columns

    def image_shapes(self, level: int = 1) -> torch.Tensor | None:
        """As `shape`, of each image alone: `(batch_size, 2)`, int64. `None` if images do not differ in size."""
        return None if self.image_sizes is None else self._whole(self.image_sizes, level)

    def image_num_patches(self) -> torch.Tensor | None:
        """As `num_patches`, of each image alone: `(batch_size,)`, int64. `None` if images do not differ in size."""
        shapes = self.image_shapes()
        return None if shapes is None else shapes[:, 0] * shapes[:, 1]

    def image_begun_patches(self, parts: int = 1) -> torch.Tensor | None:
        """As `begun_patches`, of each image alone: `(batch_size, 2)`. `None` if images do not differ in size."""
        return None if self.image_sizes is None else num_cells(parts * self.image_sizes, self.patch_size)

    def mask(self, level: int = 1) -> torch.Tensor | None:
        """
        Where a grid of a level is part of an image, and no padding to the size of others: `(batch_size, rows,
        columns)`, bool. `None` if images do not differ in size.
        """
        shapes = self.image_shapes(level)
        return None if shapes is None else _is_within(shapes, self.shape(level))

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of pixels between the images and the last whole superpatch: less than 0 to be cut off."""
        largest = self.levels[-1]
        bottom, right = (self._whole(side, largest) * largest * self.patch_size - side for side in self.size)
        return bottom, right

    def pad(self, images: torch.Tensor, value: int = 0) -> torch.Tensor:
        """Pads images or label maps, `(..., height, width)`, to whole superpatches, or cuts off the rest."""
        bottom, right = self.padding
        return nn.functional.pad(images, (0, right, 0, bottom), value=value) if right or bottom else images

    def blank(self, images: torch.Tensor) -> torch.Tensor:
        """Images, `(batch_size, num_channels, height, width)`, with 0 where they are padded to the size of others."""
        if self.image_sizes is None:
            return images
        return images.masked_fill(~_is_within(self.image_sizes, self.size)[:, None], 0)

    def _whole(self, side: Length, level: int = 1) -> Length:
        if not self.pads:
            return side // (level * self.patch_size)
        largest = self.levels[-1]
        return num_cells(side, largest * self.patch_size) * (largest // level)


def blank_padding(hidden_states: torch.Tensor, superpatch_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Zeros features, `(batch_size, channels, height, width)`, of superpatches that are padding, `False` in a mask of
    shape `(batch_size, rows, columns)`. A convolution then sees beyond the border of each image what it sees beyond
    that of an image alone.
    """
    if superpatch_mask is None:
        return hidden_states
    superpatch_mask = superpatch_mask[:, None].to(hidden_states.dtype)
    return hidden_states * nn.functional.interpolate(superpatch_mask, size=hidden_states.shape[-2:], mode="nearest")


def repeat_borders(pixel_values: torch.Tensor, superpatch_mask: torch.Tensor, superpatch_size: int) -> torch.Tensor:
    """
    Fills the padding of images or maps, `(batch_size, num_channels, height, width)`, with the last row and column of
    each; a mask of shape `(batch_size, superpatch_rows, superpatch_columns)` is `False` there. A superpatch has
    `superpatch_size` rows and columns of them.
    """
    for axis in (2, 3):
        length = superpatch_size * superpatch_mask.any(dim=4 - axis).sum(dim=1)  # (B,), in pixels
        positions = torch.arange(pixel_values.shape[axis], device=pixel_values.device)
        positions = torch.minimum(positions, (length[:, None] - 1).clamp(min=0))  # (B, height or width)
        positions = positions[:, None, :, None] if axis == 2 else positions[:, None, None, :]
        pixel_values = pixel_values.gather(axis, positions.expand_as(pixel_values))
    return pixel_values


def shrink(pixel_values: torch.Tensor, factor: int) -> torch.Tensor:
    """
    The images at a lower resolution, `(batch_size, num_channels, height / factor, width / factor)`: the means of
    `factor` x `factor` pixels. Height and width must be multiples of `factor`.
    """
    if factor != 2:
        return nn.functional.avg_pool2d(pixel_values, factor)
    # The same at half the resolution, and faster on a CPU.
    return nn.functional.interpolate(pixel_values, scale_factor=0.5, mode="bilinear", align_corners=False)


def resolutions(pixel_values: torch.Tensor, levels: Sequence[int]) -> list[torch.Tensor]:
    """The images as they are, and for each level l at 1 / l of their resolution."""
    images = [pixel_values]
    for finer, level in zip((1, *levels[:-1]), levels, strict=True):
        images.append(shrink(images[-1], level // finer))
    return images


def cut_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """
    The pixels of the patches of images whose sides are multiples of `patch_size`, `(batch_size, num_patches,
    num_channels * patch_size**2)`, in raster order.
    """
    batch_size, num_channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch_size, num_channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, num_channels * patch_size**2)


def _check_pixel_mask(pixel_mask: torch.Tensor, grid: PatchGrid, image_sizes: torch.Tensor) -> None:
    if not has_values(pixel_mask):
        return
    smallest = grid.levels[0] * grid.patch_size
    expected = _is_within(image_sizes, grid.size).to(pixel_mask.dtype)
    is_mask = pixel_mask.eq(expected).flatten(1).all(dim=1)
    valid = is_mask & image_sizes.ge(smallest).all(dim=1)
    refuse_unless(
        valid.all(),
        f"`pixel_mask` must be 1 in the top left corner of each image, in a rectangle of at least {smallest} x "
        f"{smallest} pixels, and 0 elsewhere",
        lambda: f"something else for the images {(~valid).nonzero()[:10, 0].tolist()}",
        "pad images on the right and the bottom, as the image processor does.",
    )


def _is_within(shapes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Where a grid of `shape` is within `shapes`, `(batch_size, 2)`: `(batch_size, rows, columns)`, bool."""
    row_is_real = torch.arange(shape[0], device=shapes.device) < shapes[:, :1]
    column_is_real = torch.arange(shape[1], device=shapes.device) < shapes[:, 1:]
    return row_is_real[:, :, None] & column_is_real[:, None, :]


__all__ = [
    "PatchGrid",
    "blank_padding",
    "cut_patches",
    "num_cells",
    "repeat_borders",
    "resolutions",
    "shrink",
]
