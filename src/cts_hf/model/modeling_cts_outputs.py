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
"""What CTS models give."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from .token_sharing import TokenLayout


@dataclass
class CtsModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_prefix_tokens + num_tokens, hidden_size)`):
            The encoder's output: class token, distillation token if there is one, then the tokens of `token_layout`.
        token_layout (`TokenLayout`):
            Which token stands for which patch; `cts_hf.unshare` replicates the tokens to all patches.
        policy_logits (`torch.FloatTensor` of shape `(batch_size, 2, superpatch_rows, superpatch_columns)`,
        *optional*):
            Logits of "several classes" and "one class", if the policy was run; a tuple of one tensor per level if
            there are several. A level that the policy has no head for has those of the least sure of its parts.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            The embeddings and the output of each encoder layer, of the shape of `last_hidden_state`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Attention probabilities of each encoder layer, `(batch_size, num_heads, sequence_length, sequence_length)`.
        image_sizes (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*, returned when `pixel_mask` is
        provided):
            Height and width of each image in pixels.
        layer_outputs (`tuple(torch.FloatTensor)`, *optional*, returned when `layer_indices` is provided):
            The outputs of the encoder layers that were asked for, of the shape of `last_hidden_state`.
        num_tokens (`torch.LongTensor` of shape `(batch_size,)`):
            Number of tokens of each image, patches and shared superpatches, without prefix tokens and filling.
    """

    last_hidden_state: torch.FloatTensor | None = None
    token_layout: TokenLayout | None = None
    policy_logits: torch.FloatTensor | tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_sizes: torch.LongTensor | None = None
    layer_outputs: tuple[torch.FloatTensor, ...] | None = None
    num_tokens: torch.LongTensor | None = None


@dataclass
class CtsSemanticSegmenterOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
            Cross-entropy of the upsampled logits, plus the weighted losses of the decoder's auxiliary heads if it has
            some, and of the policy if it is trained too.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, ceil(n * height / patch_size), ceil(n * width /
        patch_size))`):
            Class logits, n x n of each patch: 1 for the decoders of Segmenter, 4 for `"setr_naive"` and `"setr_mla"`,
            and 16 for `"setr_pup"` with its four stages.
        policy_logits (`torch.FloatTensor` of shape `(batch_size, 2, superpatch_rows, superpatch_columns)`,
        *optional*):
            Logits of "several classes" and "one class", if the policy was run; a tuple of one tensor per level if
            there are several.
        shared_superpatches (`torch.BoolTensor` of shape `(batch_size, superpatch_rows, superpatch_columns)`):
            The superpatches whose patches shared a token; a tuple of one tensor per level if there are several.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
            The embeddings and the output of each encoder layer.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
            Attention probabilities of each encoder layer.
        logits_sizes (`torch.LongTensor` of shape `(batch_size, 2)`, *optional*, returned when `pixel_mask` is
        provided):
            Rows and columns of `logits` that belong to each image; the rest is padding.
        num_tokens (`torch.LongTensor` of shape `(batch_size,)`):
            Number of tokens of each image, patches and shared superpatches, without prefix tokens and filling.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    policy_logits: torch.FloatTensor | tuple[torch.FloatTensor, ...] | None = None
    shared_superpatches: torch.BoolTensor | tuple[torch.BoolTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    logits_sizes: torch.LongTensor | None = None
    num_tokens: torch.LongTensor | None = None


def per_level(values: Any) -> tuple[Any, ...]:
    """What there is for each level, be it scores, shared superpatches or fractions: a tuple for a single one, too."""
    return values if isinstance(values, tuple) else (values,)


__all__ = ["CtsModelOutput", "CtsSemanticSegmenterOutput", "per_level"]
