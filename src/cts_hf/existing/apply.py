# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Token sharing in models of transformers that know nothing of it: `apply_cts` and `remove_cts`."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..hub.loading import load_policy_folder
from ..model.configuration_cts_checks import channel_values, check_reductions
from ..model.modeling_cts_encoder_call import (
    EncoderCall,
    begin_call,
    current_call,
    end_call,
    forget_call_in_checkpoints,
    keep_call_in_checkpoints,
)
from ..model.modeling_cts_encoders import find_encoder, install_hooks, patch_projection
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_layout import check_scores
from ..model.modeling_cts_policy import CtsPolicyModel, check_policy_scores, renormalize
from ..model.token_sharing import (
    TokenLayout,
    build_layout,
    num_shared_superpatches,
)
from .normalization import find_normalization
from .outputs import prepare_output, with_sharing


# The attribute of a model, and so the prefix of what must not get into its state dict.
_NAME = "token_sharing"


class TokenSharing(nn.Module):
    """
    What a model of transformers shares tokens by, its attribute `token_sharing`: policy, budget and normalization. The
    model's state dict does not hold it.

    Args:
        policy ([`CtsPolicyModel`], *optional*): Frozen, and always in evaluation mode.
        token_reduction (`float`): Fraction of the patch tokens that calls remove which say nothing else.
        image_mean (`tuple[float, ...]`): Mean that the model's images are normalized with.
        image_std (`tuple[float, ...]`): Standard deviation, likewise.
    """

    def __init__(
        self,
        policy: CtsPolicyModel | None,
        token_reduction: float,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.policy, self.token_reduction = policy, token_reduction
        self.image_mean, self.image_std = image_mean, image_std
        self.num_channels = len(image_mean)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.train(False)

    @property
    def policy_config(self) -> Any:
        return self.policy.config

    def train(self, mode: bool = True) -> "TokenSharing":
        # Neither trained nor in training mode, or its batch-norm statistics drift: `from_pretrained` makes every
        # parameter trainable before it calls this.
        self.requires_grad_(False)
        return super().train(False)

    def choose(
        self,
        images: torch.Tensor,
        grid: tuple[int, int],
        token_reduction: float,
        superpatch_scores: torch.Tensor | None,
    ) -> TokenLayout | None:
        """
        Which tokens images are encoded with.

        Args:
            images (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): What the encoder gets.
            grid (`tuple[int, int]`): Rows and columns of patches.
            token_reduction (`float`): Fraction of the patch tokens to remove.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, rows // 2, columns // 2)`, *optional*):
                Scores that replace the policy's.

        Returns:
            [`TokenLayout`], or `None` if nothing is shared.
        """
        shape = (images.shape[0], grid[0] // 2, grid[1] // 2)
        if superpatch_scores is not None:
            (superpatch_scores,) = check_scores(superpatch_scores, [shape], levels=(2,))
        # An odd last row or column lies in no superpatch.
        num_shared = min(num_shared_superpatches(token_reduction, grid[0] * grid[1]), shape[1] * shape[2])
        if num_shared == 0:
            return None
        if superpatch_scores is None:
            superpatch_scores = self._policy_scores(images, shape)
        return build_layout(superpatch_scores.to(images.device), num_shared, shape=grid)

    @torch.no_grad()
    def _policy_scores(self, images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        if self.policy is None:
            raise ValueError(
                "This model shares tokens without a policy: give `superpatch_scores`, or `token_reduction=0` to run "
                "it as it was, or a policy to `apply_cts`."
            )
        size = self.policy.config.superpatch_size
        images = images[..., : shape[1] * size, : shape[2] * size]
        grid = PatchGrid.of_images(images, None, size // 2)
        images = renormalize(images, grid, self)
        logits = self.policy(images.to(self.policy.head.weight.device), return_dict=True).logits
        if isinstance(logits, tuple):  # of several levels, and padded to whole superpatches of the last
            logits = logits[0][:, :, : shape[1], : shape[2]]
        scores = logits[:, 1] - logits[:, 0]
        check_policy_scores(scores, images, self.policy)
        return scores


class SharingCall(EncoderCall):
    """A call of a model that `apply_cts` changed."""

    def __init__(self, model: nn.Module, token_reduction: float, superpatch_scores: torch.Tensor | None) -> None:
        super().__init__()
        self.model, self.token_reduction, self.superpatch_scores = model, token_reduction, superpatch_scores
        self.token = None

    def choose(self, images: torch.Tensor, grid: tuple[int, int]) -> TokenLayout | None:
        self.batch_size, self.device = images.shape[0], images.device
        return self.model.token_sharing.choose(images, grid, self.token_reduction, self.superpatch_scores)

    def describe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The superpatches that share a token, and the number of tokens of each image."""
        rows, columns = self.grid
        if self.layout is None:
            shape = (self.batch_size, rows // 2, columns // 2)
            shared, num_tokens = torch.zeros(shape, dtype=torch.bool, device=self.device), rows * columns
        else:
            shared, num_tokens = self.layout.shared_superpatches, self.layout.token_source.shape[1]
        return shared, torch.full((self.batch_size,), num_tokens, dtype=torch.int64, device=self.device)


def apply_cts(
    model: PreTrainedModel,
    policy: CtsPolicyModel | str | Path | None = None,
    token_reduction: float = 0.3,
    *,
    image_mean: float | list[float] | tuple[float, ...] | None = None,
    image_std: float | list[float] | tuple[float, ...] | None = None,
) -> PreTrainedModel:
    """
    Makes a model of transformers share tokens, in place: its vision transformer encodes 2 x 2 patches that show one
    class as one token, and what follows sees all patches as ever. Its weights, its configuration and its state dict
    stay as they are, and with `token_reduction=0` so do its outputs, to the bit.

    Calls then take, by name, `token_reduction` and `superpatch_scores` that replace the policy's, a `torch.Tensor` of
    shape `(batch_size, rows // 2, columns // 2)` for `rows` and `columns` of patches. Outputs have
    `shared_superpatches` (bool, of that shape) and `num_tokens` (int64, `(batch_size,)`). Attentions stay those of
    tokens. If rows or columns are odd, the last never shares.

    `Trainer` takes all fields of outputs but the loss for predictions: give its `train` the option
    `ignore_keys_for_eval=["shared_superpatches", "num_tokens"]`, and its `evaluate` and `predict` the same as
    `ignore_keys`, where `compute_metrics` expects logits alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            ViT, DeiT, BEiT, Data2VecVision, DINOv2 (with registers or without), DINOv3, DPT, EoMT, EoMT-DINOv3 or
            Pixio, or a model with one of them inside, such as UperNet, DepthAnything or Mask2Former.
        policy ([`CtsPolicyModel`], `str` or `Path`, *optional*):
            A policy, or its folder or id on the Hub, for superpatches of two patches' size. It becomes part of the
            model, on its device and in its dtype, frozen. Without one, calls must give `superpatch_scores`.
        token_reduction (`float`, *optional*, defaults to 0.3):
            Fraction of the patch tokens to remove, from 0 to 0.75, in calls that say nothing else.
        image_mean (`float` or `list[float]`, *optional*):
            Mean that images for the model are normalized with, where pixels go from 0 to 1: they are renormalized for
            the policy. By default that of the image processor where the model was loaded from, if it is a folder or
            cached; else what published checkpoints of its encoder expect: 0.5 for ViT, BEiT, Data2VecVision and DPT,
            and ImageNet's, (0.485, 0.456, 0.406), for the others (0.5 if there are not three channels).
        image_std (`float` or `list[float]`, *optional*):
            Standard deviation, likewise: 0.5, or (0.229, 0.224, 0.225).

    Returns:
        `model`.

    Raises:
        ValueError: If the model has no encoder that can share tokens, or shares already; if the policy is for
            superpatches of another size or for other channels; or if an option is out of range.

    Example:

    ```python
    >>> from transformers import AutoModelForSemanticSegmentation
    >>> from cts_hf import apply_cts

    >>> model = AutoModelForSemanticSegmentation.from_pretrained("microsoft/beit-base-finetuned-ade-640-640")
    >>> model = apply_cts(model, policy="runs/policy", token_reduction=0.3)
    ```"""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a model of transformers, got {type(model)}: load one by `from_pretrained`.")
    if model.config.model_type == "cts":
        raise ValueError(
            f"`model` must be one that does not share tokens by itself, got a {type(model).__name__}: give it a "
            "policy with `model.set_policy(policy)` and a budget with `model.config.token_reduction`."
        )
    if any(isinstance(module, TokenSharing) for module in model.modules()):
        raise ValueError(
            f"`model` must not share tokens yet, got a {type(model).__name__} that `apply_cts` has changed before: "
            "undo that with `remove_cts`."
        )
    token_reduction = _check_number(token_reduction)
    adapter, embeddings = find_encoder(model)
    projection = patch_projection(embeddings)
    default = adapter.normalization if projection.in_channels == 3 else (0.5, 0.5)
    mean, std = find_normalization(model, image_mean, image_std, default)
    mean, std = (
        tuple(channel_values(name, value, projection.in_channels))
        for name, value in (("image_mean", mean), ("image_std", std))
    )
    if policy is not None:
        policy = _prepare_policy(policy, projection)

    handles = install_hooks(model)  # may refuse, and so comes before anything is changed
    sharing = model.token_sharing = TokenSharing(policy, token_reduction, mean, std)
    prepare_output(model)
    sharing.handles = [
        *handles,
        model.register_forward_pre_hook(_before_model, with_kwargs=True, prepend=True),
        model.register_forward_hook(_after_model, always_call=True),
        model.register_state_dict_post_hook(_drop_from_state_dict),
        model.register_load_state_dict_post_hook(_do_not_miss),
    ]
    return model


def remove_cts(model: PreTrainedModel) -> PreTrainedModel:
    """
    Undoes [`apply_cts`], in place: the model is exactly as before. Returns it.

    Raises:
        ValueError: If the model does not share tokens.
    """
    if not isinstance(getattr(model, _NAME, None), TokenSharing):
        raise ValueError(
            f"`model` must be one that `apply_cts` has changed, got a {type(model).__name__} that shares no tokens: "
            "give the very model that `apply_cts` was given."
        )
    for handle in model.token_sharing.handles:
        handle.remove()
    del model.token_sharing
    forget_call_in_checkpoints(model)
    return model


def _prepare_policy(policy: CtsPolicyModel | str | Path, projection: nn.Conv2d) -> CtsPolicyModel:
    if isinstance(policy, str | Path):
        policy = load_policy_folder(policy)
    # By name: with remote code, the class of a policy can be a copy.
    if getattr(getattr(policy, "config", None), "model_type", None) != "cts_policy":
        raise ValueError(
            f"`policy` must be a CtsPolicyModel, or the folder or Hub id of one, got {type(policy)}: train one with "
            "examples/train_policy.py."
        )
    patch_height, patch_width = projection.kernel_size
    if patch_height != patch_width or policy.config.superpatch_size != 2 * patch_height:
        raise ValueError(
            f"`policy` must be for superpatches of two patches, which are {patch_height} x {patch_width} pixels here, "
            f"got one for superpatches of {policy.config.superpatch_size} pixels: train one for this model."
        )
    if policy.config.num_channels != projection.in_channels:
        raise ValueError(
            f"`policy` must be for images of {projection.in_channels} channels, got one for "
            f"{policy.config.num_channels}: train one for this model, or give `superpatch_scores` to every call."
        )
    weight = projection.weight
    device = weight.device if weight.device.type != "meta" else policy.device
    return policy.to(device=device, dtype=weight.dtype).requires_grad_(False).eval()


def _check_number(token_reduction: float) -> float:
    """Refuses what is no fraction for all images; budgets of each need attention masks, which these models lack."""
    token_reduction = check_reductions(token_reduction)
    return token_reduction[0] if isinstance(token_reduction, tuple) else token_reduction


def _before_model(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs = dict(kwargs)
    sharing = module.token_sharing
    token_reduction, scores = kwargs.pop("token_reduction", None), kwargs.pop("superpatch_scores", None)
    token_reduction = sharing.token_reduction if token_reduction is None else _check_number(token_reduction)
    returns_dict = kwargs.get("return_dict")
    if not (module.config.return_dict if returns_dict is None else returns_dict):
        raise ValueError(
            "`return_dict` must be True for a model that shares tokens, got False: read the fields of its output, or "
            "take its `to_tuple()`."
        )
    if token_reduction > 0:
        _refuse_patch_masks(module, args, kwargs)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        keep_call_in_checkpoints(module)
    call = SharingCall(module, token_reduction, scores)
    call.token = begin_call(call)
    return args, kwargs


def _refuse_patch_masks(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if len(args) > 1 else {}
    for name in ("attention_mask", "bool_masked_pos", "head_mask"):
        if {**given, **kwargs}.get(name) is not None:
            raise ValueError(
                f"`{name}` must be None where tokens are shared, got one: it has a value for every patch, and patches "
                "share tokens. Leave it out, or call the model with `token_reduction=0`."
            )


def _after_model(module: PreTrainedModel, args: tuple, output: Any) -> Any:
    call = current_call()
    if not isinstance(call, SharingCall) or call.model is not module:
        return None  # `_before_model` has refused the call
    end_call(call.token)
    if not isinstance(output, ModelOutput) or call.grid is None:
        return None
    return with_sharing(output, *call.describe())


def _drop_from_state_dict(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{_NAME}.")]:
        del state_dict[name]


def _do_not_miss(module: nn.Module, incompatible_keys: Any) -> None:
    names = incompatible_keys.missing_keys
    names[:] = [name for name in names if not name.startswith(f"{_NAME}.") and f".{_NAME}." not in name]


__all__ = ["TokenSharing", "apply_cts", "remove_cts"]
