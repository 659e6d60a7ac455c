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
"""From the pixels of an image to the tokens that the encoder of CTS sees."""

import torch
from torch import nn

from .configuration_cts import CtsConfig
from .modeling_cts_grid import cut_patches, resolutions
from .modeling_cts_layers import CtsZeroLinear
from .token_sharing import TokenLayout, is_identity, share


class CtsPatchEmbeddings(nn.Module):
    """
    The patch projection. It is linear and takes the pixels of the tokens only, so that dropped patches cost nothing; a
    superpatch of l x l patches is projected as a patch of the image at 1 / l of its resolution.

    With `superpatch_embedding="multiscale"`, the superpatches of each level have a projection besides, which sees them
    at the resolution of the level before. It starts at zero, as in APT (Choudhury et al., 2025, arXiv 2510.18091).
    """

    def __init__(self, config: CtsConfig):
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.superpatch_projections = None
        if config.superpatch_embedding == "multiscale":
            self.superpatch_projections = nn.ModuleList(
                CtsZeroLinear(config.num_channels * size**2, config.hidden_size, bias=False)
                for size in self._superpatch_sizes()
            )

    def forward(self, pixel_values: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        if is_identity(layout):
            return self.projection(cut_patches(pixel_values, self.patch_size))
        images = resolutions(pixel_values, self.config.superpatch_levels)
        # (B, N, C * P * P), and (B, N / level ** 2, C * P * P) of each level
        patches, *superpatches = (cut_patches(image, self.patch_size) for image in images)
        embeddings = self.projection(share(patches, superpatches, layout))
        if self.superpatch_projections is None:
            return embeddings
        projections = zip(self.superpatch_projections, images[:-1], self._superpatch_sizes(), strict=True)
        terms = [projection(cut_patches(image, size)) for projection, image, size in projections]
        of_patches = embeddings.new_zeros(*patches.shape[:2], embeddings.shape[2])
        return embeddings + share(of_patches, terms, layout)

    def _superpatch_sizes(self) -> list[int]:
        """The side of a superpatch of each level, in pixels of the image at the resolution of the level before."""
        levels = self.config.superpatch_levels
        return [self.patch_size * level // finer for finer, level in zip((1, *levels[:-1]), levels, strict=True)]


class CtsEmbeddings(nn.Module):
    """Class token, distillation token if there is one, and the embedded tokens, with their positions."""

    def __init__(self, config: CtsConfig):
        super().__init__()
        # The grid that the position embeddings are made for.
        height, width = config.image_height_and_width
        self.grid = (height // config.patch_size, width // config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = None
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.num_prefix_tokens = 1 + config.use_distillation_token
        num_positions = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.patch_embeddings = CtsPatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: torch.Tensor, layout: TokenLayout, image_grids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images of whole superpatches.
            layout (`TokenLayout`):
                Which tokens there are.
            image_grids (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*):
                Rows and columns of patches of each image, where padding makes the grid larger.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_prefix_tokens + num_tokens, hidden_size)`.
        """
        batch_size = pixel_values.shape[0]
        patch_size = self.patch_embeddings.patch_size
        grid = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)

        embeddings = self.patch_embeddings(pixel_values.to(self.cls_token.dtype), layout)
        embeddings = embeddings + self._token_positions(layout, grid, image_grids)
        prefix = self.cls_token
        if self.distillation_token is not None:
            prefix = torch.cat([prefix, self.distillation_token], dim=1)
        prefix = prefix + self.position_embeddings[:, : self.num_prefix_tokens]
        return self.dropout(torch.cat([prefix.expand(batch_size, -1, -1), embeddings], dim=1))

    def _token_positions(
        self, layout: TokenLayout, grid: tuple[int, int], image_grids: torch.Tensor | None
    ) -> torch.Tensor:
        positions = self.position_embeddings[:, self.num_prefix_tokens :]
        positions = positions.transpose(1, 2).unflatten(2, self.grid)  # (1, D, rows, columns)
        positions = _resample_positions(positions, grid, image_grids)  # (1 or B, D, rows, columns)
        if is_identity(layout):
            return positions.flatten(2).transpose(1, 2)  # (1 or B, N, D)
        levels = self.patch_embeddings.config.superpatch_levels
        patches, *superpatches = (
            values.flatten(2).transpose(1, 2).expand(layout.token_source.shape[0], -1, -1)
            for values in (positions, *(nn.functional.avg_pool2d(positions, level) for level in levels))
        )
        return share(patches, superpatches, layout)


def _resample_positions(
    positions: torch.Tensor, grid: tuple[int, int], image_grids: torch.Tensor | None
) -> torch.Tensor:
    """
    Bilinear interpolation of position embeddings, `(1, hidden_size, rows, columns)`, to a grid of patches, or to that
    of each image, `(batch_size, 2)`, in its top left corner: each image has the positions that it has alone.
    """
    if image_grids is None:
        if grid == tuple(positions.shape[2:]):
            return positions
        return nn.functional.interpolate(positions, size=grid, mode="bilinear", align_corners=False)
    # The same interpolation, which `interpolate` cannot do for a size that is a tensor. It stays for a single size, as
    # it is faster, and as the two differ in their last bits.
    axes = []
    for axis in (0, 1):
        centers = torch.arange(grid[axis], dtype=torch.float32, device=positions.device) + 0.5
        axes.append(centers / image_grids[:, axis, None] * 2 - 1)  # (B, length), -1 and 1 are the image's borders
    rows, columns = axes[0][:, :, None].expand(-1, -1, grid[1]), axes[1][:, None, :].expand(-1, grid[0], -1)
    sampling_grid = torch.stack([columns, rows], dim=-1)  # grid_sample wants (x, y)
    positions_per_image = positions.float().expand(image_grids.shape[0], -1, -1, -1)
    sampled = nn.functional.grid_sample(
        positions_per_image, sampling_grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.to(positions.dtype)


__all__ = ["CtsEmbeddings", "CtsPatchEmbeddings"]
