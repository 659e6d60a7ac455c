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
The decoders of CTS: class logits for tokens, shared or not. They are those of Segmenter (Strudel et al., ICCV 2021);
as they treat tokens alike, they run on the few tokens, and the logits are unshared behind them.
"""

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cts import CtsConfig
from .modeling_cts_layers import CtsLayer, drop_path_schedule, padding_attention_mask


class CtsLinearDecoder(nn.Module):
    """A linear classifier of each token."""

    def __init__(self, config: CtsConfig):
        super().__init__()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Tokens of the encoder.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, num_labels)`.
        """
        # Of the bias, as quantized weights can be integers; with `torch.ao.quantization` it is a method.
        dtype = getattr(self.classifier.bias, "dtype", hidden_states.dtype)
        return self.classifier(hidden_states.to(dtype))


class CtsMaskTransformerDecoder(nn.Module):
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
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): Tokens of the encoder.
            token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*): `False` at filling.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_tokens, num_labels)`.
        """
        batch_size, num_tokens, _ = hidden_states.shape
        class_embeddings = self.class_embeddings.expand(batch_size, -1, -1)
        hidden_states = torch.cat([self.projection(hidden_states.to(class_embeddings.dtype)), class_embeddings], dim=1)
        attention_mask = padding_attention_mask(
            self.config, hidden_states, token_mask, after=class_embeddings.shape[1]
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)

        patches = self.patch_projection(hidden_states[:, :num_tokens])
        classes = self.class_projection(hidden_states[:, num_tokens:])
        patches = nn.functional.normalize(patches, dim=-1)
        classes = nn.functional.normalize(classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))


DECODERS = {"linear": CtsLinearDecoder, "mask_transformer": CtsMaskTransformerDecoder}


__all__ = ["DECODERS", "CtsLinearDecoder", "CtsMaskTransformerDecoder"]
