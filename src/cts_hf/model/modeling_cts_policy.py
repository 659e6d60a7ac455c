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
The policy network of CTS: which superpatches show one class? An EfficientNet-Lite0 backbone with a 1 x 1 convolution
on top (paper, section 3.2).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_cts import CtsConfig, CtsPolicyConfig
from .configuration_cts_checks import channel_values
from .modeling_cts_checks import check_images, check_labels, check_superpatch_mask, has_values, refuse_unless
from .modeling_cts_grid import PatchGrid, blank_padding, repeat_borders, shrink
from .modeling_cts_policy_backbone import CtsPolicyBackbone, CtsPolicyConv2d


@dataclass
class CtsPolicyOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            Cross-entropy of the superpatches that are not ignored.
        logits (`torch.FloatTensor` of shape `(batch_size, 2, superpatch_rows, superpatch_columns)`):
            Logits of "several classes" (0) and "one class" (1) for each superpatch; a tuple of one tensor per level if
            there are several.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | tuple[torch.FloatTensor, ...] | None = None


class CtsPolicyModel(PreTrainedModel):
    """
    Predicts for each superpatch of an image whether it shows one class.

    Args:
        config ([`CtsPolicyConfig`]): The configuration. Weights are random until they are loaded, from a checkpoint
            with `from_pretrained` or from others' weights with `cts_hf.conversion`.
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
        config.check_options()
        self.backbone = CtsPolicyBackbone(config)
        self.head = nn.Conv2d(self.backbone.num_features, 2, kernel_size=1)
        self.larger_heads = nn.ModuleList(
            nn.Conv2d(self.backbone.num_features, 2, kernel_size=1) for _ in config.superpatch_levels[1:]
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, CtsPolicyConv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))

    def train(self, mode: bool = True) -> "CtsPolicyModel":
        super().train(mode)
        return self.unfuse_batch_norm() if mode else self.fuse_batch_norm()

    def _apply(self, *args, **kwargs) -> "CtsPolicyModel":
        super()._apply(*args, **kwargs)
        # Of the weights as they are in the new dtype and on the new device.
        return self if self.training else self.fuse_batch_norm()

    def __setstate__(self, state: dict):
        super().__setstate__(state)
        if not self.training:
            self.fuse_batch_norm()  # a copy's weights are others

    def fuse_batch_norm(self) -> "CtsPolicyModel":
        """
        Folds the batch normalizations into the convolutions, for faster inference. `eval()` and `.to(...)` do so by
        themselves. The logits change by rounding errors only. State dict and checkpoints stay as they are; training
        mode undoes it. Weights that are loaded or changed in place are used unfolded until the next `eval()`; only
        changes through `.data`, which PyTorch does not count, need it.

        Returns:
            [`CtsPolicyModel`]: This model.

        Raises:
            ValueError: If the model is in training mode, where the statistics are those of each batch.
        """
        if self.training:
            raise ValueError("`fuse_batch_norm` is for inference, and the policy is in training mode: call `eval()`.")
        # Every convolution of the backbone is registered just before its normalization.
        for convolution, norm in pairwise(self.backbone.modules()):
            if isinstance(convolution, CtsPolicyConv2d):
                convolution.fold(norm)
        return self

    def unfuse_batch_norm(self) -> "CtsPolicyModel":
        """Undoes [`~CtsPolicyModel.fuse_batch_norm`], exactly, until the next `eval()`. Returns this model."""
        for module in self.backbone.modules():
            if isinstance(module, CtsPolicyConv2d):
                module.unfold()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        superpatch_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CtsPolicyOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images of any size from one superpatch on; padded with zeros on the right and the bottom to
                whole superpatches.
            labels (`torch.LongTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`, *optional*):
                Superpatch targets, as [`~cts_hf.superpatch_targets`] makes them from label maps; a tuple of one tensor
                per level if there are several.
            superpatch_mask (`torch.BoolTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`,
            *optional*):
                `False` at superpatches of the first level that are padding, in a batch of images of different sizes.
                Each image then gets the logits that it gets alone.

        Returns:
            [`CtsPolicyOutput`]: The logits, and the loss if there are `labels`.

        Raises:
            ValueError: If the images are not floating-point, have another number of channels or are smaller than a
                superpatch, if `superpatch_mask` has another dtype or shape, or if `labels` are not on the grid of
                superpatches or hold other values than 0, 1 and the ignore index.
        """
        check_images(pixel_values, self.config.num_channels, self.config.superpatch_size)
        levels = self.config.superpatch_levels
        grid = PatchGrid.of_images(pixel_values, None, self.config.superpatch_size // levels[0], levels)
        shape = grid.shape(levels[0])
        if superpatch_mask is not None:
            check_superpatch_mask(superpatch_mask, (pixel_values.shape[0], *shape))
        pixel_values = grid.pad(pixel_values)
        pixel_values = self._resize(pixel_values.to(self.head.weight.dtype), shape, superpatch_mask)
        # Depthwise convolutions are about twice as fast with channels last, the layout that all that follows inherits.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.backbone(pixel_values, superpatch_mask)
        logits = [self.head(features)]
        for finer, level, head in zip(levels[:-1], levels[1:], self.larger_heads, strict=True):
            features = nn.functional.avg_pool2d(features, level // finer)
            logits.append(head(features))
        logits = tuple(logits) if len(levels) > 1 else logits[0]

        loss = None
        if labels is not None:
            loss = policy_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return CtsPolicyOutput(loss=loss, logits=logits)

    def _resize(
        self, pixel_values: torch.Tensor, shape: tuple[int, int], superpatch_mask: torch.Tensor | None
    ) -> torch.Tensor:
        # One feature per superpatch: the backbone's stride must span a superpatch.
        superpatch_size, output_stride = self.config.superpatch_size, self.config.output_stride
        if superpatch_size == output_stride:
            return pixel_values
        if superpatch_size % output_stride == 0:
            return shrink(pixel_values, superpatch_size // output_stride)
        size = [output_stride * length for length in shape]
        # Upsampling looks beyond the border of an image: alone it sees the last pixels again, in a batch the padding.
        if superpatch_mask is not None:
            pixel_values = repeat_borders(pixel_values, superpatch_mask, superpatch_size)
        pixel_values = nn.functional.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        return blank_padding(pixel_values, superpatch_mask)


def renormalize(pixel_values: torch.Tensor, grid: PatchGrid, config: CtsConfig) -> torch.Tensor:
    """
    Images normalized with the mean and standard deviation of a segmentation model as those of its policy want them.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            Images that are not padded to whole superpatches yet: padding is 0 whatever the normalization.
        grid ([`PatchGrid`]):
            Says where images are padded to the size of others, which becomes 0.
        config ([`CtsConfig`]):
            Of the segmentation model.

    Returns:
        `torch.FloatTensor` of the same shape, in float32 at least; `pixel_values` itself if both are the same.

    Raises:
        ValueError: If a mean or standard deviation of the configuration is none.
    """
    given, wanted = ([of.image_mean, of.image_std] for of in (config, config.policy_config))
    if not torch.compiler.is_compiling():
        # Checked and completed again, as they may have been set since the configuration was made.
        given, wanted = (
            [channel_values(prefix + name, getattr(of, name), of.num_channels) for name in ("image_mean", "image_std")]
            for of, prefix in ((config, ""), (config.policy_config, "policy_config."))
        )
    if given == wanted:
        return pixel_values
    # In full precision, as what comes of it is rounded to the policy's.
    pixel_values = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
    # Numbers rather than tensors: those would be copied to the device in every call.
    channels = [
        pixel_values[:, index] * (std / wanted_std) + (mean - wanted_mean) / wanted_std
        for index, (mean, std, wanted_mean, wanted_std) in enumerate(zip(*given, *wanted, strict=True))
    ]
    pixel_values = torch.stack(channels, dim=1)
    return grid.blank(pixel_values)


def policy_loss(
    logits: torch.Tensor | tuple[torch.Tensor, ...],
    targets: torch.Tensor | tuple[torch.Tensor, ...],
    ignore_index: int,
) -> torch.Tensor:
    """
    Cross-entropy of the superpatch targets that are not ignored; 0 if all of them are. The mean of it over the levels
    if there are several.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, 2, rows, columns)`): Logits of the policy; a tuple of one
            tensor per level if there are several.
        targets (`torch.LongTensor` of shape `(batch_size, rows, columns)`): 0, 1 or `ignore_index`; likewise.
    """
    if isinstance(logits, tuple):
        if not isinstance(targets, tuple) or len(targets) != len(logits):
            got = f"{len(targets)} of them" if isinstance(targets, tuple) else type(targets)
            raise ValueError(
                f"`labels` must be a tuple of superpatch targets, one tensor for each of {len(logits)} levels, got "
                f"{got}: make them from label maps with `cts_hf.superpatch_targets`, one for each size."
            )
        losses = [policy_loss(*of_level, ignore_index) for of_level in zip(logits, targets, strict=True)]
        return sum(losses) / len(losses)
    shape = (logits.shape[0], *logits.shape[-2:])
    advice = "make them from label maps with `cts_hf.superpatch_targets`."
    check_labels(targets, shape, num_labels=2, ignore_index=ignore_index, advice=advice)
    losses = nn.functional.cross_entropy(logits.float(), targets.long(), ignore_index=ignore_index, reduction="sum")
    return losses / (targets != ignore_index).sum().clamp(min=1)


def check_policy_scores(scores: torch.Tensor, pixel_values: torch.Tensor, policy: nn.Module) -> None:
    """
    Refuses scores of a policy that are NaN, and says whether that comes from the images or from its weights.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`): What it gave.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): What it was given.
        policy ([`CtsPolicyModel`]): The policy.
    """
    if not has_values(scores):
        return
    is_valid = ~scores.isnan().any()
    if is_valid.device.type == "cpu" and is_valid:
        return  # before the images are looked at, which takes longer
    is_finite = pixel_values.isfinite()
    refuse_unless(
        is_valid | is_finite.all().to(is_valid.device),  # they may be on two devices
        "`pixel_values` must be finite",
        lambda: f"NaN or infinity in {(~is_finite).flatten(1).any(dim=1).sum()} of {len(is_finite)} images",
        "check how the images are read and normalized.",
    )
    refuse_unless(
        is_valid,
        "The policy's weights and features must be finite",
        lambda: f"NaN for finite images from {_describe_weights(policy)}",
        "load or train the policy again, or run it in float32 (`model.base_model.policy.float()`).",
    )


def _describe_weights(policy: nn.Module) -> str:
    broken = [name for name, tensor in policy.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        return f"a policy whose weights hold NaN or infinity ({len(broken)} tensors, the first is {broken[0]})"
    return f"a policy with finite weights, whose features are too large for {policy.head.weight.dtype}"


__all__ = ["CtsPolicyModel", "CtsPolicyOutput"]
