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

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
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
    if len(found) > 1:
        raise ValueError(
            f"`model` must have one vision transformer of plain patches, got {len(found)} of them in a "
            f"{type(model).__name__}: give those that are to share tokens by themselves."
        )
    known = ", ".join(adapter.embeddings.removesuffix("Embeddings") for adapter in ADAPTERS)
    raise ValueError(
        f"`model` must have one vision transformer of plain patches, of one of the families {known}, got none in a "
        f"{type(model).__name__}: windowed, hierarchical and hybrid encoders (Swin, VitDet, SegFormer, hybrid DPT) "
        "have no tokens that patches could share."
    )


def patch_projection(embeddings: nn.Module) -> nn.Module:
    """What makes patches of images: a convolution, or what it has been replaced by or wrapped in."""
    projection = embeddings.patch_embeddings
    return getattr(projection, "projection", projection)


def models_around(model: nn.Module, embeddings: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers that embeddings are a part of: `model`, and those inside it, the innermost last."""
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(part is embeddings for part in module.modules())
    ]


def encoder_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the encoder in a model, which has `patch_size` and `num_channels`."""
    _, embeddings = find_encoder(model)
    return models_around(model, embeddings)[-1].config


def patch_height_and_width(config: PreTrainedConfig) -> tuple[int, int]:
    """`patch_size` of an encoder, as two numbers."""
    sides = config.patch_size if isinstance(config.patch_size, Sequence) else [config.patch_size]
    return sides[0], sides[-1]


def install_hooks(model: nn.Module) -> list[RemovableHandle]:
    """
    Makes the encoder of a model share tokens while there is a call to share for.

    Raises:
        ValueError: As `find_encoder`, or if it shares tokens already.
    """
    adapter, embeddings = find_encoder(model)
    if any(isinstance(hook, _BeforeEmbeddings) for hook in embeddings._forward_pre_hooks.values()):
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
    follow = _BeforeEmbeddings(embeddings, patch_height_and_width(encoder_config(model)))
    handles += [follow, embeddings.register_forward_pre_hook(follow)]
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


class _BeforeEmbeddings:
    """
    A hook that looks the projection up in every call, as it may be replaced or wrapped at any time, for instance by
    adapters of PEFT: whichever makes patches of images is the one whose patches are shared, and which superpatches are
    projected by. Its `remove` takes back what it has installed, as that of a handle.
    """

    def __init__(self, embeddings: nn.Module, patch_size: tuple[int, int]):
        self.patch_size = patch_size
        self._install(patch_projection(embeddings))

    def __call__(self, embeddings: nn.Module, args: tuple) -> None:
        if patch_projection(embeddings) is self.projection:
            return
        if torch.compiler.is_compiling():
            raise ValueError(
                f"The projection of a {type(embeddings).__name__} must be that of the last call where a model is "
                "compiled or exported, got another one: call the model once before."
            )
        with _projection_lock:  # of several threads, one installs it
            if (projection := patch_projection(embeddings)) is not self.projection:
                self.remove()
                self._install(projection)

    def _install(self, projection: nn.Module) -> None:
        self._handle = projection.register_forward_hook(self.after_projection)
        self.projection = projection

    def remove(self) -> None:
        self._handle.remove()

    def after_projection(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call = current_call()
        if call is None or call.is_projecting:
            return
        if output.ndim != 4:
            raise ValueError(
                "The projection of patches must return a map, (batch_size, hidden_size, rows, columns), got shape "
                f"{tuple(output.shape)} from a {type(module).__name__}: replace or wrap the convolution alone."
            )
        call.begin(module, self.patch_size, args[0], output)


_projection_lock = threading.Lock()


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


__all__ = [
    "ADAPTERS",
    "EncoderAdapter",
    "encoder_config",
    "find_encoder",
    "install_hooks",
    "models_around",
    "patch_height_and_width",
    "patch_projection",
]
