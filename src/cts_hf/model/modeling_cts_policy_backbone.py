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
The backbone of the policy network: EfficientNet-Lite0 (Liu, 2020), EfficientNet without squeeze-and-excitation and
with ReLU6 instead of swish. The parameters have timm's names, so that its checkpoints load as they are.
"""

import math

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .configuration_cts import CtsPolicyConfig
from .modeling_cts_grid import blank_padding


# Block type, blocks, kernel size, stride, expansion, output channels of each stage of EfficientNet-Lite0.
_STAGES = (
    ("depthwise_separable", 1, 3, 1, 1, 16),
    ("inverted_residual", 2, 3, 2, 6, 24),
    ("inverted_residual", 2, 5, 2, 6, 40),
    ("inverted_residual", 3, 3, 2, 6, 80),
    ("inverted_residual", 3, 5, 1, 6, 112),
    ("inverted_residual", 4, 5, 2, 6, 192),
    ("inverted_residual", 1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32


def scaled_channels(channels: int, width_coefficient: float) -> int:
    """Channels of a stage of a wider or narrower backbone: a multiple of 8, at most 10 % below the exact value."""
    exact = channels * width_coefficient
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class CtsPolicyConv2d(nn.Conv2d):
    """
    A convolution without bias, or with the batch normalization behind it folded in; keeps the size of the grid, or
    divides it by the stride rounding up.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        tf_padding: bool = False,
    ):
        # TensorFlow pads strided convolutions by need, which depends on the size of the input: see `forward`.
        self.pads_by_need = tf_padding and stride > 1
        padding = 0 if self.pads_by_need else (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        # What `fold` makes of the weights. Not persistent: a checkpoint has the weights that can be trained.
        self.register_buffer("folded_weight", None, persistent=False)
        self.register_buffer("folded_bias", None, persistent=False)
        self._folded_from = ()

    def forward(self, hidden_states: torch.Tensor, is_folded: bool = False) -> torch.Tensor:
        if self.pads_by_need:
            kernel_size, stride = self.kernel_size[0], self.stride[0]
            # As a remainder, not with the number of strides: torch.compile sees that it is 0 for whole superpatches,
            # and that padding does not depend on sizes that vary from call to call.
            height, width = (max(kernel_size - (side % stride or stride), 0) for side in hidden_states.shape[-2:])
            padding = (width // 2, width - width // 2, height // 2, height - height // 2)
            hidden_states = nn.functional.pad(hidden_states, padding)
        if is_folded:
            return self._conv_forward(hidden_states, self.folded_weight, self.folded_bias)
        return super().forward(hidden_states)

    @torch.no_grad()
    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Makes one convolution of this one and the batch normalization behind it, as it is in evaluation."""
        if self.weight.is_meta or norm.running_mean is None:
            self.unfold()
            return
        weight, bias = fuse_conv_bn_weights(
            self.weight.float(),
            None,
            norm.running_mean.float(),
            norm.running_var.float(),
            norm.eps,
            norm.weight.float(),
            norm.bias.float(),
        )
        self.folded_weight, self.folded_bias = weight.detach().to(self.weight), bias.detach().to(self.weight)
        self._folded_from = self._versions(norm)

    def unfold(self) -> None:
        self.folded_weight = self.folded_bias = None

    def is_folded_with(self, norm: nn.BatchNorm2d) -> bool:
        """Whether the folded weights are those of this convolution and this normalization as they are now."""
        if self.folded_weight is None or norm.training:
            return False
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return False  # the gradient goes to the weights themselves, never to what was made of them
        # What is compiled cannot ask, and has the weights that the model had then anyway.
        return torch.compiler.is_compiling() or self._folded_from == self._versions(norm)

    def _versions(self, norm: nn.BatchNorm2d) -> tuple[tuple[int, int], ...]:
        tensors = (self.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def convolve(hidden_states: torch.Tensor, convolution: CtsPolicyConv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    """
    Convolves and normalizes features, `(batch_size, channels, height, width)`. No module gets another one as an
    argument: accelerate moves all arguments of a module whose weights are offloaded, and would move those weights.
    """
    if convolution.is_folded_with(norm):
        return convolution(hidden_states, is_folded=True)
    return norm(convolution(hidden_states))


class CtsPolicyDepthwiseSeparable(nn.Module):
    """Depthwise, then pointwise convolution, on `(batch_size, channels, height, width)`."""

    def __init__(self, config: CtsPolicyConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__()
        self.conv_dw = CtsPolicyConv2d(
            in_channels, in_channels, kernel_size, stride, groups=in_channels, tf_padding=config.tf_padding
        )
        self.bn1 = nn.BatchNorm2d(in_channels, eps=config.batch_norm_eps)
        self.conv_pw = CtsPolicyConv2d(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=config.batch_norm_eps)
        self.act = nn.ReLU6(inplace=True)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor, superpatch_mask: torch.Tensor | None = None) -> torch.Tensor:
        residual = hidden_states
        hidden_states = blank_padding(hidden_states, superpatch_mask)
        hidden_states = self.act(convolve(hidden_states, self.conv_dw, self.bn1))
        hidden_states = convolve(hidden_states, self.conv_pw, self.bn2)
        return residual + hidden_states if self.has_residual else hidden_states


class CtsPolicyInvertedResidual(nn.Module):
    """Expanding, depthwise and projecting convolution, on `(batch_size, channels, height, width)`."""

    def __init__(
        self,
        config: CtsPolicyConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
    ):
        super().__init__()
        hidden_channels = expansion * in_channels
        self.conv_pw = CtsPolicyConv2d(in_channels, hidden_channels, 1)
        self.bn1 = nn.BatchNorm2d(hidden_channels, eps=config.batch_norm_eps)
        self.conv_dw = CtsPolicyConv2d(
            hidden_channels, hidden_channels, kernel_size, stride, hidden_channels, config.tf_padding
        )
        self.bn2 = nn.BatchNorm2d(hidden_channels, eps=config.batch_norm_eps)
        self.conv_pwl = CtsPolicyConv2d(hidden_channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=config.batch_norm_eps)
        self.act = nn.ReLU6(inplace=True)
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor, superpatch_mask: torch.Tensor | None = None) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.act(convolve(hidden_states, self.conv_pw, self.bn1))
        hidden_states = blank_padding(hidden_states, superpatch_mask)
        hidden_states = self.act(convolve(hidden_states, self.conv_dw, self.bn2))
        hidden_states = convolve(hidden_states, self.conv_pwl, self.bn3)
        return residual + hidden_states if self.has_residual else hidden_states


class CtsPolicyBackbone(nn.Module):
    """The stem and the first stages of EfficientNet-Lite0, which shrink images by `config.output_stride` at most."""

    def __init__(self, config: CtsPolicyConfig):
        super().__init__()
        self.conv_stem = CtsPolicyConv2d(config.num_channels, _STEM_CHANNELS, 3, 2, tf_padding=config.tf_padding)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS, eps=config.batch_norm_eps)
        self.act = nn.ReLU6(inplace=True)
        self.blocks = nn.ModuleList()
        channels, output_stride = _STEM_CHANNELS, 2
        for index in range(config.built_stages):
            stride = _STAGES[index][3] if output_stride < config.output_stride else 1
            output_stride *= stride
            stage = self._build_stage(config, index, channels, stride)
            channels = scaled_channels(_STAGES[index][-1], config.width_coefficient)
            self.blocks.append(stage)
        self.num_features = channels

    @staticmethod
    def _build_stage(config: CtsPolicyConfig, index: int, in_channels: int, stride: int) -> nn.Sequential:
        block_type, num_blocks, kernel_size, _, expansion, out_channels = _STAGES[index]
        out_channels = scaled_channels(out_channels, config.width_coefficient)
        if 0 < index < len(_STAGES) - 1:
            num_blocks = math.ceil(num_blocks * config.depth_coefficient)
        blocks = []
        for block_index in range(num_blocks):
            channels = in_channels if block_index == 0 else out_channels
            block_stride = stride if block_index == 0 else 1
            if block_type == "depthwise_separable":
                block = CtsPolicyDepthwiseSeparable(config, channels, out_channels, kernel_size, block_stride)
            else:
                block = CtsPolicyInvertedResidual(config, channels, out_channels, kernel_size, block_stride, expansion)
            blocks.append(block)
        return nn.Sequential(*blocks)

    def forward(self, pixel_values: torch.Tensor, superpatch_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = self.act(convolve(pixel_values, self.conv_stem, self.bn1))
        for stage in self.blocks:
            for block in stage:
                hidden_states = block(hidden_states, superpatch_mask)
        return hidden_states


__all__ = ["CtsPolicyBackbone", "CtsPolicyConv2d"]
