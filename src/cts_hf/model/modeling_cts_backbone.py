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
"""A vision transformer of transformers as the encoder of a [`CtsModel`]."""

from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from .configuration_cts import CtsConfig
from .modeling_cts_checks import has_values, refuse_unless
from .modeling_cts_encoder_call import EncoderCall, begin_call, end_call, keep_call_in_checkpoints
from .modeling_cts_encoders import install_hooks
from .token_sharing import TokenLayout, is_identity


# These have a pooler that nothing would use.
_WITH_POOLER = ("vit", "deit", "beit", "data2vec-vision", "dpt")
# These take images of other sizes than the configuration's only where they are asked to.
_OF_ONE_SIZE = ("vit", "deit")


def build_backbone(config: CtsConfig) -> PreTrainedModel:
    """The encoder that `config.backbone_config` describes, with random weights, ready to share tokens."""
    backbone_config = config.backbone_config
    options = {"add_pooling_layer": False} if backbone_config.model_type in _WITH_POOLER else {}
    backbone = AutoModel.from_config(backbone_config, **options)
    install_hooks(backbone)
    return backbone


def freeze_unused(backbone: PreTrainedModel) -> None:
    """Freezes the token for masked patches, which gets no gradient: training on several devices would wait for it."""
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def encode(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    layout: TokenLayout,
    layer_indices: tuple[int, ...],
    output_hidden_states: bool | int | list[int] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    The states of tokens, after prefix tokens.

    Args:
        backbone (`PreTrainedModel`): What `build_backbone` has built.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): Images, not padded.
        layout (`TokenLayout`): Which tokens there are.
        layer_indices (`tuple[int, ...]`): Layers whose outputs are wanted.
        output_hidden_states (`bool`, `int` or `list[int]`, *optional*): Whether those of all layers are wanted, or
            which of them by their index, where others are `None`; as configured by default.

    Returns:
        `last_hidden_state`, `layer_outputs`, `hidden_states` and `attentions` of a [`CtsModelOutput`].
    """
    model_type = backbone.config.model_type
    if model_type in _OF_ONE_SIZE:
        kwargs["interpolate_pos_encoding"] = True
    if output_hidden_states is None:
        output_hidden_states = backbone.config.output_hidden_states
    kwargs.update(output_hidden_states=bool(layer_indices) or output_hidden_states, return_dict=True)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        keep_call_in_checkpoints(backbone)
    pixel_values = pixel_values.to(next(backbone.parameters()).dtype)
    token = begin_call(EncoderCall(None if is_identity(layout) else layout, unshares=False))
    try:
        outputs = backbone(pixel_values, **kwargs)
    finally:
        end_call(token)
    hidden_states = outputs.hidden_states
    return {
        "last_hidden_state": outputs.last_hidden_state,
        "layer_outputs": tuple(hidden_states[index + 1] for index in layer_indices) or None,
        "hidden_states": _select(hidden_states, output_hidden_states) if layer_indices else hidden_states,
        "attentions": outputs.attentions,
    }


def _select(
    hidden_states: tuple[torch.Tensor, ...], output_hidden_states: bool | int | list[int]
) -> tuple[torch.Tensor | None, ...] | None:
    """Of the states of all layers, which a decoder has asked for, those that transformers would return."""
    if not output_hidden_states:
        return None
    if output_hidden_states is True:
        return hidden_states
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    number = len(hidden_states)
    chosen = {index % number for index in indices if -number <= index < number}
    return tuple(states if index in chosen else None for index, states in enumerate(hidden_states))


def refuse_padding(pixel_mask: torch.Tensor | None) -> None:
    """Refuses images of different sizes in a batch, which encoders of transformers cannot tell from each other."""
    if pixel_mask is None or not has_values(pixel_mask):
        return
    refuse_unless(
        pixel_mask.bool().all(),
        "`pixel_mask` must be 1 everywhere for a model with a `backbone_config`",
        lambda: "padding",
        "give images of one size to each call.",
    )


__all__ = ["build_backbone", "encode", "freeze_unused", "refuse_padding"]
