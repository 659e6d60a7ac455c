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
"""Token sharing in EoMT, whose last layers run with queries in front of the tokens."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from .modeling_cts_encoder_call import current_call, sharing_call


def install_query_hooks(model: nn.Module) -> list[RemovableHandle]:
    """
    Makes all that EoMT predicts from see patches. Tokens stay shared to the end, or to where queries come in if those
    are masked: their masks are made on the grid of patches, in training, and where `attn_mask_probs` are not annealed
    to 0 as they are in published models.

    Raises:
        ValueError: If there are no layers before the queries.
    """
    num_plain = len(model.layers) - model.config.num_blocks
    if num_plain < 1:
        raise ValueError(
            f"`config.num_blocks` must be below the number of layers, {len(model.layers)}, got "
            f"{model.config.num_blocks}: tokens are shared in the layers before the queries."
        )
    return [
        model.register_forward_pre_hook(_before_model),
        model.layers[num_plain - 1].register_forward_hook(_after_last_plain_layer),
        *(layer.register_forward_pre_hook(_before_layer, with_kwargs=True) for layer in model.layers[num_plain:]),
        model.layernorm.register_forward_hook(_after_norm),
        model.register_forward_hook(_after_model),
    ]


def _before_model(module: nn.Module, args: tuple) -> None:
    call = current_call()
    if call is not None:
        call.unshares_early = module.training or bool((module.attn_mask_probs > 0).any())


def _after_last_plain_layer(
    module: nn.Module, args: tuple, output: torch.Tensor | tuple
) -> torch.Tensor | tuple | None:
    call = sharing_call()
    if call is None or not call.unshares_early:
        return None
    if isinstance(output, tuple):
        return (call.unshare_tokens(output[0]), *output[1:])
    return call.unshare_tokens(output)


def _before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    call = sharing_call()
    if call is None or not call.unshares_early or kwargs.get("position_embeddings") is None:
        return None
    return args, {**kwargs, "position_embeddings": call.rotary}  # those of the patches


def _after_norm(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """The final normalization is applied to whatever EoMT predicts from, and to nothing else."""
    call = sharing_call()
    return call.unshare_tokens(output) if call is not None and not call.unshares_early else None


def _after_model(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
    call = sharing_call()
    hidden_states = None if call is None else output.get("hidden_states")
    if hidden_states is None:
        return None
    num_plain = len(module.layers) - module.config.num_blocks
    num_prefix = 1 + module.config.num_register_tokens
    num_shared_before_queries = num_prefix + call.layout.token_source.shape[1]
    output["hidden_states"] = tuple(
        call.unshare_tokens(states)
        if states is not None
        and states is not output.last_hidden_state
        and (states.shape[1] == num_shared_before_queries if index <= num_plain else not call.unshares_early)
        else states
        for index, states in enumerate(hidden_states)
    )
    return output


__all__ = ["install_query_hooks"]
