# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of transformers that share tokens, as backbones: for training new heads on top of them."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from ..model.configuration_cts_checks import CheckedConfig
from ..model.modeling_cts_encoder_call import begin_call, end_call, keep_call_in_checkpoints
from ..model.modeling_cts_encoders import find_encoder, install_hooks, patch_projection
from ..model.modeling_cts_policy import CtsPolicyModel
from .apply import SharingCall, TokenSharing, check_number, prepare_policy
from .outputs import sharing_output, with_sharing


# Upstream has no backbones of these; the second takes images of all sizes without being asked to.
_WITHOUT_BACKBONE = ("vit", "deit", "data2vec-vision")
_OF_ONE_SIZE = ("vit", "deit")
# What heads read of the configuration of a backbone.
_READ_BY_HEADS = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers")
# `save_pretrained` applies the mapping that a model was loaded with in reverse, and what it wrote would load with that
# alone. transformers leaves lookaheads out of new names, but looks for them in reverse: this one is nowhere.
_NOT_IN_REVERSE = "(?!.)"
# Where models keep their backbone.
_PREFIXES = {"mask2former": "model.pixel_level_module.encoder", "maskformer": "model.pixel_level_module.encoder"}


@strict
class CtsBackboneConfig(BackboneConfigMixin, CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of a [`CtsBackbone`].

    Args:
        backbone_config ([`~transformers.PreTrainedConfig`] or `dict`, *optional*):
            Of the vision transformer: ViT, DeiT, BEiT, Data2VecVision, DINOv2 (with or without registers), DINOv3 or
            Pixio. That of DINOv2-B by default.
        policy_config (`CtsPolicyConfig` or `dict`, *optional*):
            Of the policy network, for superpatches of two patches' size. Without one, sharing needs
            `superpatch_scores`.
        token_reduction (`float`, *optional*, defaults to 0.3):
            Fraction of the patch tokens to remove, from 0 to 0.75. Heads cannot hand over another one for a call: set
            `backbone.config.token_reduction`.
        image_mean (`float` or `list[float]`, *optional*):
            Mean that images are normalized with, where pixels go from 0 to 1: they are renormalized for the policy.
            What published checkpoints of the transformer expect by default.
        image_std (`float` or `list[float]`, *optional*):
            Standard deviation, likewise.
        reshape_hidden_states (`bool`, *optional*):
            Whether features are maps, `(batch_size, hidden_size, rows, columns)`, or sequences with prefix tokens. As
            `backbone_config` says by default, or maps.
        out_features, out_indices (`list`, *optional*):
            Stages to return, as for every backbone: those of `backbone_config` by default.

    Example:

    ```python
    >>> from transformers import Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation
    >>> from cts_hf import CtsBackboneConfig

    >>> stages = ["stage3", "stage6", "stage9", "stage12"]
    >>> backbone_config = CtsBackboneConfig(backbone_config=Dinov2Config(), policy_config={}, out_features=stages)
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config))
    ```"""

    model_type = "cts_backbone"
    sub_configs = {"backbone_config": AutoConfig, "policy_config": CtsPolicyConfig}  # noqa: RUF012

    backbone_config: PreTrainedConfig | dict | None = None
    policy_config: CtsPolicyConfig | dict | None = None
    token_reduction: float | int = 0.3
    image_mean: list[float | int] | tuple[float | int, ...] | float | int | None = None
    image_std: list[float | int] | tuple[float | int, ...] | float | int | None = None
    reshape_hidden_states: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if self.backbone_config is None:
            self.backbone_config = {"model_type": "dinov2"}
        has_policy = self.policy_config is not None
        # What a Segmenter with this encoder would have: the same encoders, the same policies.
        as_segmenter = CtsConfig(
            backbone_config=self.backbone_config,
            policy_config=self.policy_config,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )
        # A copy, as what follows changes it, and others may have it too.
        inner = self.backbone_config = copy.deepcopy(as_segmenter.backbone_config)
        if inner.model_type == "dpt":
            raise ValueError(
                "`backbone_config` must not be of a DPT, got one, whose vision transformer is a part of its model: "
                "give `ViTConfig`, or change the whole model with `apply_cts`."
            )
        self.policy_config = as_segmenter.policy_config if has_policy else None
        self.image_mean, self.image_std = as_segmenter.image_mean, as_segmenter.image_std
        if self.reshape_hidden_states is None:
            self.reshape_hidden_states = getattr(inner, "reshape_hidden_states", True)
        self.check_options()
        names = ["stem", *(f"stage{number}" for number in range(1, inner.num_hidden_layers + 1))]
        self.stage_names = list(getattr(inner, "stage_names", None) or names)
        if out_features is None and out_indices is None:
            out_features = getattr(inner, "out_features", None)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if hasattr(inner, "reshape_hidden_states"):
            inner.reshape_hidden_states = self.reshape_hidden_states
        for name in _READ_BY_HEADS:
            kwargs.pop(name, None)  # of a saved configuration
            setattr(self, name, getattr(inner, name))
        super().__post_init__(**kwargs)

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None) -> None:
        """Sets the stages to return, also those of `backbone_config`, whose backbone computes them."""
        super().set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if hasattr(self.backbone_config, "out_features"):
            self.backbone_config.out_features = self.out_features

    def check_options(self) -> None:
        """Refuses a budget that is none."""
        check_number(self.token_reduction)


class CtsBackbone(BackboneMixin, PreTrainedModel):
    """
    A vision transformer of transformers that shares tokens, and gives features of all patches.

    Args:
        config ([`CtsBackboneConfig`]): The configuration.
    """

    config: CtsBackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: CtsBackboneConfig) -> None:
        super().__init__(config)
        inner = config.backbone_config
        if inner.model_type in _WITHOUT_BACKBONE:
            self.backbone = AutoModel.from_config(inner, add_pooling_layer=False)
        else:
            self.backbone = AutoBackbone.from_config(inner)
        policy = CtsPolicyModel(config.policy_config) if config.policy_config is not None else None
        self.token_sharing = TokenSharing(policy, config.token_reduction, config.image_mean, config.image_std)
        install_hooks(self.backbone)
        sharing_output(BackboneOutput)
        self.num_features = [config.hidden_size] * len(self.stage_names)
        # `post_init` would install the hooks that record hidden states a second time, and every layer be recorded
        # twice.
        self._output_capturing_hooks_installed = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_policy(self, policy: CtsPolicyModel | str | Path) -> None:
        """
        Gives the backbone a policy, in place of the one it may have; its configuration follows.

        Args:
            policy ([`CtsPolicyModel`], `str` or `Path`): A policy, or its folder or id on the Hub.

        Raises:
            ValueError: If it is for superpatches of another size or for other channels.
        """
        _, embeddings = find_encoder(self.backbone)
        self.token_sharing.policy = prepare_policy(policy, patch_projection(embeddings))
        self.config.policy_config = self.token_sharing.policy.config

    def forward(
        self,
        pixel_values: torch.Tensor,
        token_reduction: float | None = None,
        superpatch_scores: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images.
            token_reduction (`float`, *optional*):
                Fraction of the patch tokens to remove, from 0 to 0.75; `config.token_reduction` by default.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, rows // 2, columns // 2)` of patches, *optional*):
                Scores that replace those of the policy.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`]: Feature maps of all patches, and the fields
            `shared_superpatches` and `num_tokens`.

        Raises:
            ValueError: If an argument has a wrong type or shape, or sharing is asked for without a policy or scores.
        """
        token_reduction = check_number(self.config.token_reduction if token_reduction is None else token_reduction)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep_call_in_checkpoints(self.backbone)
        if output_attentions is not None:
            kwargs["output_attentions"] = output_attentions
        call = SharingCall(self, token_reduction, superpatch_scores)
        token = begin_call(call)
        try:
            outputs = self._features(pixel_values, output_hidden_states, **kwargs)
        finally:
            end_call(token)
        outputs = with_sharing(outputs, *call.describe())
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _features(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None, **kwargs: Any
    ) -> BackboneOutput:
        if self.config.backbone_config.model_type not in _WITHOUT_BACKBONE:
            return self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True, **kwargs)
        if self.config.backbone_config.model_type in _OF_ONE_SIZE:
            kwargs["interpolate_pos_encoding"] = True
        outputs = self.backbone(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        features = [
            states
            for name, states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if name in self.out_features
        ]
        if self.config.reshape_hidden_states:
            num_patches = grid[0] * grid[1]
            features = [
                states[:, -num_patches:].transpose(1, 2).unflatten(2, grid).contiguous() for states in features
            ]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(features),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


def backbone_key_mapping(config: PreTrainedConfig) -> dict[str, str]:
    """
    What `from_pretrained(..., config=config, key_mapping=...)` needs to load a checkpoint of upstream into a model
    with a [`CtsBackbone`]: only the policy's weights, if `config` has one, are then missing. What `save_pretrained`
    writes of the model loads without it.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of a model with a [`CtsBackboneConfig`] as its `backbone_config`,
            or a [`CtsBackboneConfig`] itself.

    Example:

    ```python
    >>> config = UperNetConfig.from_pretrained(upstream_id)
    >>> config.backbone_config = CtsBackboneConfig(backbone_config=config.backbone_config)
    >>> mapping = backbone_key_mapping(config)
    >>> model = UperNetForSemanticSegmentation.from_pretrained(upstream_id, config=config, key_mapping=mapping)
    ```"""
    backbone = (
        config if config.model_type == CtsBackboneConfig.model_type else getattr(config, "backbone_config", None)
    )
    if getattr(backbone, "model_type", None) != CtsBackboneConfig.model_type:
        raise ValueError(
            f"`config` must have a `CtsBackboneConfig` as its `backbone_config`, got {type(backbone)}: wrap it with "
            "`CtsBackboneConfig(backbone_config=...)`."
        )
    if backbone is config:
        return {r"^(?!backbone\.|token_sharing\.)": f"{_NOT_IN_REVERSE}backbone."}
    prefix = _PREFIXES.get(config.model_type, "backbone")
    pattern = prefix.replace(".", r"\.")
    return {rf"^{pattern}\.(?!backbone\.|token_sharing\.)": f"{_NOT_IN_REVERSE}{prefix}.backbone."}


__all__ = ["CtsBackbone", "CtsBackboneConfig", "backbone_key_mapping"]
