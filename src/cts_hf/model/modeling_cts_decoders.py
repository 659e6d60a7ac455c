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
The decoders of CTS, by the name that a configuration has for them, and here those of Segmenter (Strudel et al., ICCV
2021): as they treat tokens alike, they run on the few tokens, and the logits are unshared behind them.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cts import CtsConfig
from .modeling_cts_decoder_base import CtsDecoder
from .modeling_cts_layers import CtsLayer, drop_path_schedule, padding_attention_mask
from .modeling_cts_setr import CtsSetrAggregationDecoder, CtsSetrUpsamplingDecoder


class CtsLinearDecoder(CtsDecoder):
    """A linear classifier of each token."""

    def __init__(self, config: CtsConfig):
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        with_auxiliary: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor]:
        (tokens,) = hidden_states
        # Of the bias, as quantized weights can be integers; with `torch.ao.quantization` it is a method.
        dtype = getattr(self.classifier.bias, "dtype", tokens.dtype)
        return (self.classifier(tokens.to(dtype)),)


class CtsMaskTransformerDecoder(CtsDecoder):
    """
    A transformer over the tokens and one learned embedding per class; the logits are the scalar products of the two,
    after projection and normalization.
    """

    def __init__(self, config: CtsConfig):
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.class_embeddings = nn.Parameter(torch.zeros(1, config.num_labels, config.hidden_size))
        drop_path = drop_path_schedule(config.decoder_drop_path_rate, config.decoder_num_hidden_layers)
        self.layers = nn.ModuleList(
            CtsLayer(
                config,
                config.decoder_num_attention_heads,
                config.decoder_layer_norm_eps,
                config.decoder_dropout_prob,
                rate,
            )
            for rate in drop_path
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.decoder_layer_norm_eps)
        self.patch_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.class_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=config.decoder_layer_norm_eps)

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        with_auxiliary: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor]:
        (tokens,) = hidden_states
        batch_size, num_tokens, _ = tokens.shape
        class_embeddings = self.class_embeddings.expand(batch_size, -1, -1)
        tokens = torch.cat([self.projection(tokens.to(class_embeddings.dtype)), class_embeddings], dim=1)
        attention_mask = padding_attention_mask(self.config, tokens, mask, after=class_embeddings.shape[1])
        for layer in self.layers:
            tokens = layer(tokens, attention_mask, **kwargs)
        tokens = self.layernorm(tokens)

        patches = self.patch_projection(tokens[:, :num_tokens])
        classes = self.class_projection(tokens[:, num_tokens:])
        patches = nn.functional.normalize(patches, dim=-1)
        classes = nn.functional.normalize(classes, dim=-1)
        return (self.mask_norm(patches @ classes.transpose(1, 2)),)

    def init_own_weights(self, std: float) -> None:
        init.trunc_normal_(self.class_embeddings, mean=0.0, std=std)


# The names are those of `DECODER_TYPES` of the configuration.
DECODERS = {
    "mask_transformer": CtsMaskTransformerDecoder,
    "linear": CtsLinearDecoder,
    "setr_naive": CtsSetrUpsamplingDecoder,
    "setr_pup": CtsSetrUpsamplingDecoder,
    "setr_mla": CtsSetrAggregationDecoder,
}


__all__ = ["DECODERS", "CtsLinearDecoder", "CtsMaskTransformerDecoder"]
