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
"""What patches that shared a token get back besides a copy of what the token gave."""

import torch
from torch import nn

from .configuration_cts import CtsConfig
from .modeling_cts_grid import PatchGrid, cut_patches, resolutions
from .modeling_cts_layers import CtsZeroLinear
from .token_sharing import TokenLayout, share, unshare


# Channels of the difference. On the built-in scenes, half as many gave nearly the same, and twice as many little more.
_RANK = 64


class CtsUnsharingResidual(nn.Module):
    """
    What a patch has over the token that stands for it, seen in the light of what the encoder made of that token: a
    projection of the difference of their pixels, times a gate for each of its channels that the token computes, and
    projected to the channels of what is unshared. The gate starts at zero, and the difference of a patch that shares
    no token is zero.

    The difference is not one of the encoder's embeddings: they are linear too, so that the projection can learn what a
    projection of theirs could, at a fraction of the cost.

    Args:
        config ([`CtsConfig`]): The configuration.
        num_channels (`int`): Channels of what is unshared: features, or logits.
    """

    def __init__(self, config: CtsConfig, num_channels: int):
        super().__init__()
        self.patch_size = config.patch_size
        self.gate = CtsZeroLinear(config.hidden_size, _RANK)
        self.difference_projection = nn.Linear(config.num_channels * config.patch_size**2, _RANK, bias=False)
        self.output_projection = nn.Linear(_RANK, num_channels, bias=False)

    def forward(
        self, pixel_values: torch.Tensor, tokens: torch.Tensor, layout: TokenLayout, grid: PatchGrid
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): The images.
            tokens (`torch.FloatTensor` of shape `(batch_size, num_tokens, hidden_size)`): The encoder's output.
            layout (`TokenLayout`): Which token stands for which patch.
            grid ([`PatchGrid`]): The grid of the images.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_patches, num_channels)`.
        """
        # Of the bias, as quantized weights can be integers; with `torch.ao.quantization` it is a method.
        dtype = getattr(self.gate.bias, "dtype", tokens.dtype)
        differences = self._differences(pixel_values, layout, grid).to(dtype)
        gates = unshare(self.gate(tokens.to(dtype)), layout)
        return self.output_projection(gates * self.difference_projection(differences))

    def _differences(self, pixel_values: torch.Tensor, layout: TokenLayout, grid: PatchGrid) -> torch.Tensor:
        """The pixels of patches minus those of their tokens, `(batch_size, num_patches, num_channels * size**2)`."""
        pixel_values = grid.blank(pixel_values)
        images = resolutions(grid.pad(pixel_values), grid.levels)
        patches, *superpatches = (cut_patches(image, self.patch_size) for image in images)
        if not grid.pads:  # patches that lie in no superpatch are cut off above
            height, width = (self.patch_size * length for length in grid.shape())
            patches = cut_patches(pixel_values[:, :, :height, :width], self.patch_size)
        return patches - unshare(share(patches, superpatches, layout), layout)


__all__ = ["CtsUnsharingResidual"]
