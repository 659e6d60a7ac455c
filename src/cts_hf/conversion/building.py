# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A model that is built from weights: whatever can be read off their shapes is."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..model.configuration_cts import CtsConfig
from ..model.modeling_cts import CtsForSemanticSegmentation
from .weight_names import backbone_output_stride, count_blocks, load_renamed, require_weight


def encoder_shapes(
    state_dict: Mapping[str, torch.Tensor],
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
) -> dict[str, Any]:
    """The options of [`CtsConfig`] for encoder and policy that follow from the shapes of weights of the original."""
    _, num_channels, kernel_size, _ = require_weight(state_dict, "encoder.patch_embed.proj.weight", num_dims=4).shape
    if patch_size not in (None, kernel_size):
        raise ValueError(
            f"`patch_size` must be that of the weights, {kernel_size}, got {patch_size}: leave the option out."
        )
    intermediate_size, hidden_size = require_weight(state_dict, "encoder.blocks.0.mlp.fc1.weight", num_dims=2).shape
    policy_config = None
    if use_policy := any(name.startswith("policy_net.") for name in state_dict):
        policy_config = {"output_stride": backbone_output_stride(state_dict, "policy_net.backbone.")}
    use_distillation_token = "encoder.dist_token" in state_dict
    if image_size is None:
        num_patches = require_weight(state_dict, "encoder.pos_embed", num_dims=3).shape[1] - 1 - use_distillation_token
        image_size = _square_size(num_patches, kernel_size)
    return {
        "image_size": image_size,
        "patch_size": kernel_size,
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(state_dict, "encoder.blocks."),
        "intermediate_size": intermediate_size,
        "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in state_dict,
        "use_distillation_token": use_distillation_token,
        "use_policy": use_policy,
        "policy_config": policy_config,
    }


def decoder_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The options of [`CtsConfig`] for the decoder that follow from the shapes of a Segmenter's weights."""
    is_linear = "decoder.head.weight" in state_dict
    classifier, num_dims = ("decoder.head.weight", 2) if is_linear else ("decoder.mask_norm.weight", 1)
    return {
        "decoder_type": "linear" if is_linear else "mask_transformer",
        "decoder_num_hidden_layers": 2 if is_linear else count_blocks(state_dict, "decoder.blocks."),
        "num_labels": len(require_weight(state_dict, classifier, num_dims)),
    }


def build_model(
    state_dict: Mapping[str, torch.Tensor],
    shapes: dict[str, Any],
    source_name: Callable[[str], str],
    options: dict[str, Any],
) -> CtsForSemanticSegmentation:
    """
    Makes a model of weights.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The weights.
        shapes (`dict`): The options of [`CtsConfig`] that follow from their shapes.
        source_name (`Callable[[str], str]`): Gives the name in `state_dict` of a weight of the model.
        options (`dict`): Further options of [`CtsConfig`].

    Returns:
        [`CtsForSemanticSegmentation`]: In float32 and evaluation mode.

    Raises:
        ValueError: If weights are missing, left over or misshaped, or contradict an option.
    """
    if shapes["use_policy"]:
        _merge_policy_config(options, shapes)
    if contradicted := sorted(name for name in options.keys() & shapes.keys() if options[name] != shapes[name]):
        pairs = ", ".join(f"{name}={options[name]!r} (weights: {shapes[name]!r})" for name in contradicted)
        raise ValueError(f"Options must be those of the weights, got {pairs}: leave them out.")
    num_names = len(options.get("id2label") or {})
    if num_names not in (0, shapes["num_labels"]):
        raise ValueError(
            f"`id2label` must name the {shapes['num_labels']} classes of the weights, got {num_names} names: give one "
            "for each class."
        )
    # No shape depends on the number of heads.
    num_attention_heads = options.get("num_attention_heads") or max(1, shapes["hidden_size"] // 64)
    config = CtsConfig(**{"token_reduction": 0.0, **options, **shapes, "num_attention_heads": num_attention_heads})
    model = CtsForSemanticSegmentation(config)
    load_renamed(model, {name: source_name(name) for name in model.state_dict()}, state_dict)
    return model.eval()


def _merge_policy_config(options: dict[str, Any], shapes: dict[str, Any]) -> None:
    # The stage of the backbone that is read shows in the shapes, its padding and epsilon do not.
    given = options.pop("policy_config", None) or {}
    given = given if isinstance(given, Mapping) else given.to_dict()
    read = shapes["policy_config"]
    if given.get("output_stride", read["output_stride"]) != read["output_stride"]:
        options["policy_config"] = {"output_stride": given["output_stride"]}
    else:
        shapes["policy_config"] = {**given, **read}


def _square_size(num_patches: int, patch_size: int) -> int:
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(
            f"`image_size` must be given where position embeddings are those of no square, got {num_patches} of them "
            "and no size: give (height, width) of the training."
        )
    return side * patch_size


__all__ = ["build_model", "decoder_shapes", "encoder_shapes"]
