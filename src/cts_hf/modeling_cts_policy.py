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
The policy network of CTS: which superpatches show one class? An EfficientNet-Lite0 trunk (Liu, 2020: EfficientNet
without squeeze-and-excitation, ReLU6 instead of swish) with a 1 x 1 convolution on top (paper, section 3.2). The
parameters of the trunk have timm's names, so that its checkpoints load as they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_cts import CtsPolicyConfig


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
_NUM_STAGES_OF_STRIDE = {8: 3, 16: 5, 32: 7}


def scaled_channels(channels: int, width_coefficient: float) -> int:
    """Channels of a stage of a wider or narrower trunk: a multiple of 8 that is at most 10 % below the exact value."""
    exact = channels * width_coefficient
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


class CtsPolicyConv2d(nn.Conv2d):
    """A convolution without bias that keeps the size of the grid, or divides it by the stride rounding up."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, tf_padding=False
    ):
        # TensorFlow pads strided convolutions by need, which depends on the size of the input: see `forward`.
        self.pads_by_need = tf_padding and stride > 1
        padding = 0 if self.pads_by_need else (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.pads_by_need:
            kernel_size, stride = self.kernel_size[0], self.stride[0]
            height, width = (
                max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0)
                for side in hidden_states.shape[-2:]
            )
            padding = (width // 2, width - width // 2, height // 2, height - height // 2)
            hidden_states = nn.functional.pad(hidden_states, padding)
        return super().forward(hidden_states)


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
        self.act = nn.ReLU6()
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.act(self.bn1(self.conv_dw(hidden_states)))
        hidden_states = self.bn2(self.conv_pw(hidden_states))
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
        self.act = nn.ReLU6()
        self.has_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.act(self.bn1(self.conv_pw(hidden_states)))
        hidden_states = self.act(self.bn2(self.conv_dw(hidden_states)))
        hidden_states = self.bn3(self.conv_pwl(hidden_states))
        return residual + hidden_states if self.has_residual else hidden_states


class CtsPolicyBackbone(nn.Module):
    """The stem and the stages of EfficientNet-Lite0 down to `config.output_stride`."""

    def __init__(self, config: CtsPolicyConfig):
        super().__init__()
        self.conv_stem = CtsPolicyConv2d(config.num_channels, _STEM_CHANNELS, 3, 2, tf_padding=config.tf_padding)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS, eps=config.batch_norm_eps)
        self.act = nn.ReLU6()
        self.blocks = nn.ModuleList()
        channels = _STEM_CHANNELS
        for index in range(_NUM_STAGES_OF_STRIDE[config.output_stride]):
            stage = self._build_stage(config, index, channels)
            channels = scaled_channels(_STAGES[index][-1], config.width_coefficient)
            self.blocks.append(stage)
        self.num_features = channels

    @staticmethod
    def _build_stage(config: CtsPolicyConfig, index: int, in_channels: int) -> nn.Sequential:
        block_type, num_blocks, kernel_size, stride, expansion, out_channels = _STAGES[index]
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

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.act(self.bn1(self.conv_stem(pixel_values)))
        for stage in self.blocks:
            hidden_states = stage(hidden_states)
        return hidden_states


@dataclass
class CtsPolicyOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            Cross-entropy of the superpatches that are not ignored.
        logits (`torch.FloatTensor` of shape `(batch_size, 2, superpatch_rows, superpatch_columns)`):
            Logits of "several classes" (0) and "one class" (1) for each superpatch.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None


class CtsPolicyModel(PreTrainedModel):
    """
    Predicts for each superpatch of an image whether it shows one class.

    Args:
        config ([`CtsPolicyConfig`]): The configuration. Weights are random until they are loaded, from a checkpoint
        with
            `from_pretrained` or from others' weights with `cts_hf.conversion`.
    """

    config: CtsPolicyConfig
    base_model_prefix = "policy"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _no_split_modules = ["CtsPolicyDepthwiseSeparable", "CtsPolicyInvertedResidual"]  # noqa: RUF012
    _can_compile_fullgraph = True
    # There is no attention here: whatever the segmentation model around it uses is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CtsPolicyConfig):
        super().__init__(config)
        self.backbone = CtsPolicyBackbone(config)
        self.head = nn.Conv2d(self.backbone.num_features, 2, kernel_size=1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CtsPolicyConv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> CtsPolicyOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch on; padded with zeros on the right and the bottom to
                whole superpatches.
            labels (`torch.LongTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`, *optional*):
                Superpatch targets, as [`~cts_hf.superpatch_targets`] makes them from label maps.

        Returns:
            [`CtsPolicyOutput`]: The logits, and the loss if there are `labels`.

        Raises:
            ValueError: If the images have another number of channels or are smaller than a superpatch, or if `labels`
                are not on the grid of superpatches or hold other values than 0, 1 and the ignore index.
        """
        pixel_values = pad_to_superpatches(pixel_values, self.config.superpatch_size, self.config.num_channels)
        logits = self.head(self.backbone(self._resize(pixel_values.to(self.dtype))))

        loss = None
        if labels is not None:
            loss = policy_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return CtsPolicyOutput(loss=loss, logits=logits)

    def _resize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # One feature per superpatch: the trunk's stride must span a superpatch.
        superpatch_size, output_stride = self.config.superpatch_size, self.config.output_stride
        if superpatch_size == output_stride:
            return pixel_values
        if superpatch_size % output_stride == 0:
            return nn.functional.avg_pool2d(pixel_values, superpatch_size // output_stride)
        size = [side // superpatch_size * output_stride for side in pixel_values.shape[-2:]]
        return nn.functional.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


def pad_to_superpatches(pixel_values: torch.Tensor, superpatch_size: int, num_channels: int) -> torch.Tensor:
    """
    Pads normalized images, `(batch_size, num_channels, height, width)`, with zeros on the right and the bottom to
    whole superpatches.

    Raises:
        ValueError: If the shape is another one, or the images are smaller than a superpatch.
    """
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
    right, bottom = -width % superpatch_size, -height % superpatch_size
    return nn.functional.pad(pixel_values, (0, right, 0, bottom)) if right or bottom else pixel_values


def policy_loss(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """
    Cross-entropy of the superpatch targets that are not ignored; 0 if all of them are.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, 2, rows, columns)`): Logits of the policy.
        targets (`torch.LongTensor` of shape `(batch_size, rows, columns)`): 0, 1 or `ignore_index`.
    """
    if targets.shape != (logits.shape[0], *logits.shape[-2:]):
        raise ValueError(
            f"The policy's `labels` must be superpatch targets of shape {(logits.shape[0], *logits.shape[-2:])}, got "
            f"{tuple(targets.shape)}. Make them from label maps with `cts_hf.superpatch_targets`."
        )
    check_label_ids(targets, num_labels=2, ignore_index=ignore_index)
    losses = nn.functional.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")
    return losses / (targets != ignore_index).sum().clamp(min=1)


def check_label_ids(labels: torch.Tensor, num_labels: int, ignore_index: int) -> None:
    """
    Refuses labels that are neither in [0, `num_labels`) nor `ignore_index`. On an accelerator the check runs there, so
    that the host need not wait for it.
    """
    if torch.compiler.is_compiling():
        return
    valid = ((labels >= 0) & (labels < num_labels)) | (labels == ignore_index)
    advice = (
        f"Labels must be ids from 0 to {num_labels - 1}, or {ignore_index} for pixels to ignore. Check `num_labels`, "
        "the ignore index and `do_reduce_labels`."
    )
    if labels.device.type != "cpu":
        torch._assert_async(valid.all(), advice)
    elif not valid.all():
        raise ValueError(f"Found labels {labels[~valid].unique()[:10].tolist()}. {advice}")


__all__ = ["CtsPolicyModel", "CtsPolicyOutput"]
