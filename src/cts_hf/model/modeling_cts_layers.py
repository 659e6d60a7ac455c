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
"""The transformer layer that the encoder and the mask-transformer decoder of CTS are made of."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_cts import CtsConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class CtsAttention(nn.Module):
    def __init__(self, config: CtsConfig, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.head_dim = config.hidden_size // num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


class CtsMLP(nn.Module):
    def __init__(self, config: CtsConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CtsDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops the whole residual branch of a sample, in training."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        kept = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) < keep_prob
        return hidden_states * kept / max(keep_prob, torch.finfo(hidden_states.dtype).tiny)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class CtsZeroLinear(nn.Linear):
    """A linear layer that starts at zero: what it adds to a trained model changes nothing at first."""


class CtsLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer on `hidden_states` of shape `(batch_size, sequence_length, hidden_size)`."""

    def __init__(
        self,
        config: CtsConfig,
        num_attention_heads: int,
        layer_norm_eps: float,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.attention = CtsAttention(config, num_attention_heads)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=layer_norm_eps)
        self.mlp = CtsMLP(config)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = CtsDropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # Of a weight by name, here and elsewhere: quantized layers and replicas of `nn.DataParallel` list none.
        hidden_states = hidden_states.to(self.layernorm_before.weight.dtype)
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attention_output))

        mlp_output = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(mlp_output))


def padding_attention_mask(
    config: CtsConfig, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, before: int = 0, after: int = 0
) -> torch.Tensor | None:
    """
    The attention mask, in the form that the attention implementation takes, which hides tokens that only fill up a
    batch.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, before + num_tokens + after, hidden_size)`): The sequence.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*): `False` at filling.
        before (`int`), after (`int`): Number of further tokens, never hidden, at each end of the sequence.
    """
    if token_mask is None:
        return None
    token_mask = nn.functional.pad(token_mask, (before, after), value=True)
    return create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=token_mask)


def drop_path_schedule(rate: float, num_layers: int) -> list[float]:
    """The drop probability of each layer: grows linearly from 0 at the first to `rate` at the last."""
    return [rate * index / max(num_layers - 1, 1) for index in range(num_layers)]


__all__ = ["CtsLayer", "CtsZeroLinear", "drop_path_schedule", "padding_attention_mask"]
