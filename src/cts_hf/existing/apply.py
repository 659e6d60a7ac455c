# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Token sharing in models of transformers that know nothing of it: `apply_cts` and `remove_cts`."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.loading import load_policy_folder
from ..model.modeling_cts_encoder_call import forget_call_in_checkpoints
from ..model.modeling_cts_encoders import encoder_config, find_encoder, install_hooks, patch_height_and_width
from ..model.modeling_cts_policy import CtsPolicyModel
from .calls import check_number, install_call_hooks
from .normalization import find_normalization
from .sharing import TokenSharing


# The attribute of a model, and so the prefix of what must not get into its state dict.
_NAME = "token_sharing"


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
    tokens. If rows or columns are odd, the last never shares. Models inside it, such as `model.vit` or the encoder
    that `generate` calls, share and take options alike where they are called by themselves; layers do not.

    `Trainer` takes all fields of outputs but the loss for predictions: give its `train` the option
    `ignore_keys_for_eval=["shared_superpatches", "num_tokens"]`, and its `evaluate` and `predict` the same as
    `ignore_keys`, where `compute_metrics` expects logits alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            ViT, DeiT, BEiT, Data2VecVision, DINOv2 (with registers or without), DINOv3, DPT, EoMT, EoMT-DINOv3 or
            Pixio, or a model with one of them inside, such as UperNet, DepthAnything or Mask2Former.
        policy ([`CtsPolicyModel`], `str` or `Path`, *optional*):
            A policy, or its folder or id on the Hub, for superpatches of two patches' size. A copy of it becomes part
            of the model, on its device and in its dtype, frozen. Without one, calls must give `superpatch_scores`.
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
    token_reduction = check_number(token_reduction)
    adapter, embeddings = find_encoder(model)
    config = encoder_config(model)
    default = adapter.normalization if config.num_channels == 3 else (0.5, 0.5)
    mean, std = find_normalization(model, image_mean, image_std, default, config.num_channels)
    if policy is not None:
        policy = _prepare_policy(policy, config, embeddings)

    handles = install_hooks(model)  # may refuse, and so comes before anything is changed
    sharing = model.token_sharing = TokenSharing(policy, token_reduction, mean, std)
    sharing.handles = [
        *handles,
        *install_call_hooks(model, embeddings, sharing),
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


def _prepare_policy(
    policy: CtsPolicyModel | str | Path, config: PreTrainedConfig, embeddings: nn.Module
) -> CtsPolicyModel:
    if isinstance(policy, str | Path):
        policy = load_policy_folder(policy)
    # By name: with remote code, the class of a policy can be a copy.
    if getattr(getattr(policy, "config", None), "model_type", None) != "cts_policy":
        raise ValueError(
            f"`policy` must be a CtsPolicyModel, or the folder or Hub id of one, got {type(policy)}: train one with "
            "examples/train_policy.py."
        )
    patch_height, patch_width = patch_height_and_width(config)
    if patch_height != patch_width or policy.config.superpatch_size != 2 * patch_height:
        raise ValueError(
            f"`policy` must be for superpatches of two patches, which are {patch_height} x {patch_width} pixels here, "
            f"got one for superpatches of {policy.config.superpatch_size} pixels: train one for this model."
        )
    if policy.config.num_channels != config.num_channels:
        raise ValueError(
            f"`policy` must be for images of {config.num_channels} channels, got one for "
            f"{policy.config.num_channels}: train one for this model, or give `superpatch_scores` to every call."
        )
    # A token's, as the projection may be quantized.
    weight = next(parameter for parameter in embeddings.parameters(recurse=False) if parameter.is_floating_point())
    device = weight.device if weight.device.type != "meta" else policy.device
    # A copy, as models of other dtypes and devices may be given the same.
    return copy.deepcopy(policy).to(device=device, dtype=weight.dtype).requires_grad_(False).eval()


def _drop_from_state_dict(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}{_NAME}.")]:
        del state_dict[name]


def _do_not_miss(module: nn.Module, incompatible_keys: Any) -> None:
    names = incompatible_keys.missing_keys
    names[:] = [name for name in names if not name.startswith(f"{_NAME}.") and f".{_NAME}." not in name]


__all__ = ["apply_cts", "remove_cts"]
