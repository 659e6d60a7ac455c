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
Token sharing in the vision transformers of transformers, by hooks on their modules: nothing of them is copied or
replaced, and without a call to share for they run as ever.

While a model runs, an [`EncoderCall`] says which tokens there are. Hooks find it and follow the patches:

    projection --patches, grid--> layout --dropout or embeddings--> tokens --layers--> encoder --unshare--> patches

A family is one [`EncoderAdapter`]: the names of the classes where this happens. Positions need none of its code: they
are what the embeddings add to the projection. Rotary and relative positions are in
`modeling_cts_encoder_positions.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from .modeling_cts_encoder_call import current_call, sharing_call
from .modeling_cts_encoder_positions import after_bias, after_rotary, before_bias, before_rotary
from .modeling_cts_encoder_queries import install_query_hooks


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class EncoderAdapter:
    """
    Where a family of transformers' models turns images into tokens, and where its patches are wanted back. Classes are
    given by name, as older versions of transformers lack some.

    Args:
        embeddings (`str`):
            Makes the tokens: prefix tokens, then patches in raster order. It has `patch_embeddings`, a convolution or
            a module with one named `projection`, and applies its `dropout`, if it has one, last.
        encoder (`str`):
            Returns `last_hidden_state` and `hidden_states` of all tokens, which become those of all patches.
        rotary (`str`, *optional*):
            Returns cosines and sines of the patches, each `(num_patches, head_dim)`.
        relative_bias (`str`, *optional*):
            Returns the bias of pairs of tokens, from a `relative_position_bias_table` as BEiT's.
        pooler (`str`, *optional*):
            Averages patches, and so needs them and not tokens.
        queries (`str`, *optional*):
            Runs its last `config.num_blocks` layers with queries in front of the tokens, as EoMT does.
        normalization (pair of `tuple[float, ...]`, *optional*, defaults to ImageNet's):
            Mean and standard deviation that its published checkpoints expect of images.
    """

    embeddings: str
    encoder: str
    rotary: str | None = None
    relative_bias: str | None = None
    pooler: str | None = None
    queries: str | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


ADAPTERS = (
    EncoderAdapter("ViTEmbeddings", "ViTModel", normalization=HALF),
    EncoderAdapter("DeiTEmbeddings", "DeiTModel"),
    EncoderAdapter(
        "BeitEmbeddings",
        "BeitModel",
        relative_bias="BeitRelativePositionBias",
        pooler="BeitPooler",
        normalization=HALF,
    ),
    EncoderAdapter(
        "Data2VecVisionEmbeddings",
        "Data2VecVisionEncoder",
        relative_bias="Data2VecVisionRelativePositionBias",
        normalization=HALF,
    ),
    EncoderAdapter("Dinov2Embeddings", "Dinov2Encoder"),
    EncoderAdapter("Dinov2WithRegistersEmbeddings", "Dinov2WithRegistersEncoder"),
    EncoderAdapter("DINOv3ViTEmbeddings", "DINOv3ViTEncoder", rotary="DINOv3ViTRopePositionEmbedding"),
    EncoderAdapter("DPTViTEmbeddings", "DPTModel", normalization=HALF),
    EncoderAdapter("PixioEmbeddings", "PixioModel"),
    EncoderAdapter("EomtEmbeddings", "EomtForUniversalSegmentation", queries="EomtForUniversalSegmentation"),
    EncoderAdapter(
        "EomtDinov3Embeddings",
        "EomtDinov3ForUniversalSegmentation",
        rotary="EomtDinov3RotaryEmbedding",
        queries="EomtDinov3ForUniversalSegmentation",
    ),
)


def find_encoder(model: nn.Module) -> tuple[EncoderAdapter, nn.Module]:
    """
    The family of the vision transformer in a model, and its embeddings.

    Raises:
        ValueError: If there is none that can share tokens, or more than one.
    """
    found = [
        (adapter, module) for module in model.modules() for adapter in ADAPTERS if _is(module, adapter.embeddings)
    ]
    if len(found) == 1 and any(_is(module, found[0][0].encoder) for module in model.modules()):
        return found[0]
    known = ", ".join(adapter.embeddings.removesuffix("Embeddings") for adapter in ADAPTERS)
    reason = f"{len(found)} of them" if len(found) > 1 else "none"
    raise ValueError(
        f"`model` must have one vision transformer of plain patches, of one of the families {known}, got {reason} in "
        f"a {type(model).__name__}: windowed, hierarchical and hybrid encoders (Swin, VitDet, SegFormer, hybrid DPT) "
        "have no tokens that patches could share."
    )


def patch_projection(embeddings: nn.Module) -> nn.Conv2d:
    """The convolution that makes patches of images."""
    projection = embeddings.patch_embeddings
    return getattr(projection, "projection", projection)


def install_hooks(model: nn.Module) -> list[RemovableHandle]:
    """
    Makes the encoder of a model share tokens while there is a call to share for.

    Raises:
        ValueError: As `find_encoder`, or if it shares tokens already.
    """
    adapter, embeddings = find_encoder(model)
    if _after_projection in patch_projection(embeddings)._forward_hooks.values():
        raise ValueError(
            f"`model` must not share tokens yet, got a {type(model).__name__} whose encoder does: give it what is to "
            "be changed with `token_reduction`, or build it anew."
        )
    handles = []
    for module in model.modules():
        if _is(module, adapter.queries):
            handles += install_query_hooks(module)  # may refuse, and so comes first
        elif _is(module, adapter.encoder):
            handles.append(module.register_forward_hook(_after_encoder))
    handles.append(patch_projection(embeddings).register_forward_hook(_after_projection))
    if isinstance(getattr(embeddings, "dropout", None), nn.Module):
        handles.append(embeddings.dropout.register_forward_pre_hook(_before_dropout))
    else:
        handles.append(embeddings.register_forward_hook(_after_embeddings))
    for module in model.modules():
        if _is(module, adapter.rotary):
            handles.append(module.register_forward_pre_hook(before_rotary))
            handles.append(module.register_forward_hook(after_rotary))
        if _is(module, adapter.relative_bias):
            handles.append(module.register_forward_pre_hook(before_bias, with_kwargs=True))
            handles.append(module.register_forward_hook(after_bias))
        if _is(module, adapter.pooler):
            handles.append(module.register_forward_pre_hook(_before_pooler))
    return handles


def _is(module: nn.Module, name: str | None) -> bool:
    """Whether a module is of a class of this name, or of one derived from it."""
    return any(base.__name__ == name for base in type(module).__mro__)


def _after_projection(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    call = current_call()
    if call is not None and not call.is_projecting:
        call.begin(module, args[0], output)


def _before_dropout(module: nn.Module, args: tuple) -> tuple | None:
    call = sharing_call()
    return (call.share_tokens(args[0]),) if call is not None else None


def _after_embeddings(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    call = sharing_call()
    return call.share_tokens(output) if call is not None else None


def _before_pooler(module: nn.Module, args: tuple) -> tuple | None:
    call = sharing_call()
    return (call.unshare_tokens(args[0]),) if call is not None else None


def _after_encoder(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput | None:
    call = sharing_call()
    if call is None or not call.unshares:
        return None
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(
            states if states is None else call.unshare_tokens(states) for states in output["hidden_states"]
        )
    output["last_hidden_state"] = call.unshare_tokens(output["last_hidden_state"])
    return output


__all__ = ["ADAPTERS", "EncoderAdapter", "find_encoder", "install_hooks", "patch_projection"]
