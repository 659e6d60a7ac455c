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
The three heads of SETR (Zheng et al., CVPR 2021, arXiv 2012.15840) as decoders of CTS, in the form that mmsegmentation
gives them. They are convolutional, so they run on the maps of all patches, whose tokens were unshared before.

In a batch of images of different sizes, each image gets what it gets alone: before a convolution the padding is
zeroed, and before an upsampling it is filled with the last row and column of the image, as the border of an image is
alone. In training this is not so: batch normalization mixes the images of a batch, and counts the padding too.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cts import CtsConfig
from .modeling_cts_decoder_base import CtsDecoder
from .modeling_cts_grid import blank_padding, repeat_borders


# What mmsegmentation gives the heads, and no configuration of it changes.
_LAYER_NORM_EPS = 1e-6
# By the type of the decoder: the side of its convolutions, and how much each of its stages upsamples.
_KERNEL_SIZE = {"setr_naive": 1, "setr_pup": 3}
_UPSAMPLING = {"setr_naive": 4, "setr_pup": 2}
# Of auxiliary heads, and of the multi-level aggregation.
_UPSAMPLING_AT_ONCE = 4


class CtsSetrLayer(nn.Module):
    """Convolution, batch normalization, ReLU, on maps `(batch_size, channels, rows, columns)` of the same size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: torch.Tensor, superpatch_mask: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.relu(self.batch_norm(self.conv(blank_padding(maps, superpatch_mask))))


class CtsSetrUpsamplingHead(nn.Module):
    """Stages of a convolution and a bilinear upsampling, and a classifier."""

    def __init__(self, config: CtsConfig, num_stages: int, upsampling: int):
        super().__init__()
        channels = [config.hidden_size] + num_stages * [config.decoder_hidden_size]
        kernel_size = _KERNEL_SIZE[config.decoder_type]
        self.upsampling = upsampling
        self.layers = nn.ModuleList(
            CtsSetrLayer(channels[stage], channels[stage + 1], kernel_size) for stage in range(num_stages)
        )
        self.classifier = nn.Conv2d(channels[-1], config.num_labels, 1)

    def forward(self, maps: torch.Tensor, superpatch_mask: torch.Tensor | None) -> torch.Tensor:
        maps = self.layers[0](maps, superpatch_mask)
        for layer in self.layers[1:]:
            maps = layer(_upsample(maps, self.upsampling, superpatch_mask), superpatch_mask)
        return _classify_and_upsample(self.classifier, maps, self.upsampling, superpatch_mask)


class CtsSetrDecoder(CtsDecoder):
    """What the heads of SETR have in common: they see several layers, and learn from auxiliary logits too."""

    takes_maps = True

    def __init__(self, config: CtsConfig):
        super().__init__()
        self.layer_indices = tuple(config.decoder_layer_indices[:-1])  # the last is that of the encoder's output
        self.auxiliary_loss_weight = config.auxiliary_loss_weight

    def loss(self, logits: Sequence[torch.Tensor], criterion: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        loss = criterion(logits[0])
        for auxiliary_logits in logits[1:]:
            loss = loss + self.auxiliary_loss_weight * criterion(auxiliary_logits)
        return loss


class CtsSetrUpsamplingDecoder(CtsSetrDecoder):
    """
    SETR-Naive and SETR-PUP: the encoder's output through 1 x 1 convolutions, each with an upsampling by 4, or through
    3 x 3 convolutions, each with an upsampling by 2. Auxiliary heads, which upsample by 4, see earlier layers.
    """

    def __init__(self, config: CtsConfig):
        super().__init__(config)
        self.head = CtsSetrUpsamplingHead(
            config, config.decoder_num_upsampling_layers, _UPSAMPLING[config.decoder_type]
        )
        if not config.auxiliary_loss_weight:
            self.layer_indices = ()
        self.auxiliary_layernorms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS) for _ in self.layer_indices
        )
        self.auxiliary_heads = nn.ModuleList(
            CtsSetrUpsamplingHead(config, config.auxiliary_num_upsampling_layers, _UPSAMPLING_AT_ONCE)
            for _ in self.layer_indices
        )

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        with_auxiliary: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        *earlier, maps = hidden_states
        logits = [self.head(maps.to(self.head.classifier.weight.dtype), mask)]
        if with_auxiliary:
            for maps, layernorm, head in zip(earlier, self.auxiliary_layernorms, self.auxiliary_heads, strict=True):
                logits.append(head(_normalize(layernorm, maps), mask))
        return tuple(logits)


class CtsSetrAggregationDecoder(CtsSetrDecoder):
    """
    SETR-MLA: the outputs of several layers, each summed with all deeper ones, and convolved; their concatenation is
    classified and upsampled by 4. Auxiliary classifiers see the sums.
    """

    def __init__(self, config: CtsConfig):
        super().__init__(config)
        num_layers = len(config.decoder_layer_indices)
        channels, head_channels = config.decoder_hidden_size, config.decoder_hidden_size // 2
        self.layernorms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS) for _ in self.layer_indices
        )
        self.projections = nn.ModuleList(CtsSetrLayer(config.hidden_size, channels, 1) for _ in range(num_layers))
        # From here on the deepest layer comes first.
        self.aggregations = nn.ModuleList(CtsSetrLayer(channels, channels, 3) for _ in range(num_layers))
        self.layers = nn.ModuleList(
            nn.ModuleList([CtsSetrLayer(channels, head_channels, 3), CtsSetrLayer(head_channels, head_channels, 3)])
            for _ in range(num_layers)
        )
        self.classifier = nn.Conv2d(num_layers * head_channels, config.num_labels, 1)
        self.auxiliary_heads = nn.ModuleList(
            nn.Conv2d(channels, config.num_labels, 1) for _ in range(num_layers if config.auxiliary_loss_weight else 0)
        )

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        with_auxiliary: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        *earlier, last = hidden_states
        maps = [_normalize(layernorm, each) for layernorm, each in zip(self.layernorms, earlier, strict=True)]
        maps.append(last.to(self.classifier.weight.dtype))
        projected = [layer(each, mask) for layer, each in zip(self.projections, maps, strict=True)]

        sums = accumulate(reversed(projected))
        aggregated = [layer(each, mask) for layer, each in zip(self.aggregations, sums, strict=True)]
        features = [
            second(first(each, mask), mask) for (first, second), each in zip(self.layers, aggregated, strict=True)
        ]
        logits = [_classify_and_upsample(self.classifier, torch.cat(features, dim=1), _UPSAMPLING_AT_ONCE, mask)]
        if with_auxiliary and self.auxiliary_loss_weight:
            logits += [head(each) for head, each in zip(self.auxiliary_heads, aggregated, strict=True)]
        return tuple(logits)


def _normalize(layernorm: nn.LayerNorm, maps: torch.Tensor) -> torch.Tensor:
    return layernorm(maps.to(layernorm.weight.dtype).movedim(1, -1)).movedim(-1, 1).contiguous()


def _classify_and_upsample(
    classifier: nn.Conv2d, maps: torch.Tensor, factor: int, superpatch_mask: torch.Tensor | None
) -> torch.Tensor:
    # SETR upsamples first. Both are linear and the weights of an interpolation sum to 1, so that the order makes no
    # difference but to the time and memory.
    return _upsample(classifier(maps), factor, superpatch_mask)


def _upsample(maps: torch.Tensor, factor: int, superpatch_mask: torch.Tensor | None) -> torch.Tensor:
    if superpatch_mask is not None:
        maps = repeat_borders(maps, superpatch_mask, maps.shape[-1] // superpatch_mask.shape[-1])
    return nn.functional.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


__all__ = ["CtsSetrAggregationDecoder", "CtsSetrUpsamplingDecoder"]
