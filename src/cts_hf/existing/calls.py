# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Calls of models of transformers that share tokens: what they take more, and what they return more."""

import inspect
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..model.configuration_cts_checks import check_reductions
from ..model.modeling_cts_encoder_call import (
    EncoderCall,
    begin_call,
    current_call,
    end_call,
    keep_call_in_checkpoints,
)
from ..model.modeling_cts_encoders import models_around
from ..model.token_sharing import TokenLayout
from .outputs import prepare_output, with_sharing
from .sharing import TokenSharing


class SharingCall(EncoderCall):
    """
    A call of a model that shares tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): The one that is called, which may lie inside another.
        sharing ([`TokenSharing`]): What it shares tokens by.
        token_reduction (`float`): Fraction of the patch tokens to remove.
        superpatch_scores (`torch.Tensor`, *optional*): Replace the policy's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sharing: TokenSharing,
        token_reduction: float,
        superpatch_scores: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.model, self.sharing = model, sharing
        self.token_reduction, self.superpatch_scores = token_reduction, superpatch_scores
        self.token = None

    def choose(self, images: torch.Tensor, grid: tuple[int, int]) -> TokenLayout | None:
        self.batch_size, self.device = images.shape[0], images.device
        return self.sharing.choose(images, grid, self.token_reduction, self.superpatch_scores)

    def describe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The superpatches that share a token, and the number of tokens of each image."""
        rows, columns = self.grid
        if self.layout is None:
            shape = (self.batch_size, rows // 2, columns // 2)
            shared, num_tokens = torch.zeros(shape, dtype=torch.bool, device=self.device), rows * columns
        else:
            shared, num_tokens = self.layout.shared_superpatches, self.layout.token_source.shape[1]
        return shared, torch.full((self.batch_size,), num_tokens, dtype=torch.int64, device=self.device)


def check_number(token_reduction: float) -> float:
    """Refuses what is no fraction for all images; budgets of each need attention masks, which these models lack."""
    token_reduction = check_reductions(token_reduction)
    return token_reduction[0] if isinstance(token_reduction, tuple) else token_reduction


class CallHooks:
    """
    The hooks of a model that `apply_cts` was given, and of each model inside it that its encoder is a part of: the one
    that is called begins a call, which those inside it belong to.

    Args:
        sharing ([`TokenSharing`]): What they share tokens by.
    """

    def __init__(self, sharing: TokenSharing) -> None:
        self.sharing = sharing

    def before_model(
        self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self.current_call() is not None:
            return None  # of a model around this one
        kwargs = dict(kwargs)
        token_reduction, scores = kwargs.pop("token_reduction", None), kwargs.pop("superpatch_scores", None)
        token_reduction = self.sharing.token_reduction if token_reduction is None else check_number(token_reduction)
        returns_dict = kwargs.get("return_dict")
        if not (module.config.return_dict if returns_dict is None else returns_dict):
            raise ValueError(
                "`return_dict` must be True for a model that shares tokens, got False: read the fields of its output, "
                "or take its `to_tuple()`."
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_call_in_checkpoints(module)
        call = SharingCall(module, self.sharing, token_reduction, scores)
        # Of what runs these hooks and the model's forward.
        frame = None if torch.compiler.is_dynamo_compiling() else sys._getframe(1)
        call.token = begin_call(call, frame)
        return args, kwargs

    def before_encoder(self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuses masks of patches. Models around the encoder may have others by these names, such as of text."""
        call = self.current_call()
        if call is None or call.token_reduction == 0:
            return
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if len(args) > 1 else {}
        for name in ("attention_mask", "bool_masked_pos", "head_mask"):
            if {**given, **kwargs}.get(name) is not None:
                raise ValueError(
                    f"`{name}` must be None where tokens are shared, got one: it has a value for every patch, and "
                    "patches share tokens. Leave it out, or call the model with `token_reduction=0`."
                )

    def after_model(self, module: PreTrainedModel, args: tuple, output: Any) -> ModelOutput | None:
        call = self.current_call()
        if call is None or call.model is not module:
            return None  # `before_model` has refused the call, or it is that of a model around this one
        end_call(call.token)
        if not isinstance(output, ModelOutput) or call.grid is None:
            return None
        return with_sharing(output, *call.describe())

    def current_call(self) -> SharingCall | None:
        """The call of one of these models that runs."""
        call = current_call()
        return call if isinstance(call, SharingCall) and call.sharing is self.sharing else None


def install_call_hooks(model: PreTrainedModel, embeddings: nn.Module, sharing: TokenSharing) -> list[RemovableHandle]:
    """Makes calls of a model, and of those inside it that `embeddings` are a part of, share tokens by `sharing`."""
    hooks, models = CallHooks(sharing), models_around(model, embeddings)
    handles = [models[-1].register_forward_pre_hook(hooks.before_encoder, with_kwargs=True, prepend=True)]
    for module in models:
        prepare_output(module)
        handles += [
            module.register_forward_pre_hook(hooks.before_model, with_kwargs=True, prepend=True),
            module.register_forward_hook(hooks.after_model, always_call=True),
        ]
    return handles


__all__ = ["SharingCall", "check_number", "install_call_hooks"]
