# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A vision transformer of transformers that shares tokens, as the backbone of a head of transformers."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoBackbone, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin, filter_output_hidden_states
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput

from ..model.configuration_cts import CtsPolicyConfig
from ..model.configuration_cts_checks import (
    CheckedConfig,
    channel_values,
    check_reductions,
    refuse_outside,
    refuse_unknown_names,
)
from ..model.modeling_cts_encoders import patch_height_and_width
from ..model.modeling_cts_policy import CtsPolicyModel
from .apply import apply_cts, remove_cts
from .outputs import prepare_output, with_sharing


# Encoders that are backbones in transformers, and those of which transformers has the model only.
_BACKBONES = ("beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "pixio")
_MODELS = ("data2vec-vision", "deit", "vit")

# In checkpoints, weights go by the names that they have without sharing, and the policy's are beside them: those that
# were saved with the encoder alone load, and the other way round.
WEIGHT_NAMES = [WeightRenaming(r"^(?!backbone\.|policy\.)", "backbone.")]


def _of_encoder(name: str) -> property:
    """An option that heads read of their backbone's configuration."""
    return property(lambda config: getattr(config.backbone_config, name), doc=f"`{name}` of `backbone_config`.")


@strict
class CtsBackboneConfig(BackboneConfigMixin, CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of a [`CtsBackbone`], and the `backbone_config` of heads that have one.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the encoder: of a ViT, DeiT, BEiT, Data2VecVision, DINOv2 (with registers or without),
            DINOv3 ViT or Pixio; that of DINOv2-B by default. Its `reshape_hidden_states`, `apply_layernorm` and
            `return_class_token` mean what they do upstream. ViT, DeiT and Data2VecVision, which have no backbone
            upstream, take the first two as DINOv2 does, and both are `True` by default.
        policy_config (`CtsPolicyConfig` or `dict`, *optional*):
            Configuration of the policy network. Its superpatch size is twice the patch size. Without one, sharing
            needs `superpatch_scores`, which heads do not pass on.
        token_reduction (`float`, *optional*, defaults to 0.3):
            Fraction of the patch tokens that sharing removes, from 0 (the encoder as it is; the policy is not run) to
            0.75. It can be set at any time, which is how the budget of a head is changed.
        image_mean (`float` or `list[float]`, *optional*):
            Mean that images are normalized with, where pixels go from 0 to 1: they are renormalized for the policy. By
            default as for [`apply_cts`], and set when a model is built.
        image_std (`float` or `list[float]`, *optional*):
            Standard deviation, likewise.
        out_features (`list[str]`, *optional*):
            Stages to return: `"stem"`, the embeddings, and `"stage1"` to the last layer. By default those of
            `backbone_config`, or the last.
        out_indices (`list[int]`, *optional*):
            Stages to return by their index, where the stem is 0.

    Example:

    ```python
    >>> from transformers import Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation
    >>> from cts_hf import CtsBackboneConfig

    >>> stages = ["stage3", "stage6", "stage9", "stage12"]
    >>> backbone = CtsBackboneConfig(backbone_config=Dinov2Config(), policy_config={}, out_features=stages)
    >>> config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=backbone.hidden_size)
    >>> model = UperNetForSemanticSegmentation(config)
    ```"""

    model_type = "cts_backbone"
    sub_configs = {"backbone_config": AutoConfig, "policy_config": CtsPolicyConfig}  # noqa: RUF012 - as transformers

    backbone_config: PreTrainedConfig | dict | None = None
    policy_config: CtsPolicyConfig | dict | None = None
    token_reduction: float | int = 0.3
    image_mean: list[float | int] | tuple[float | int, ...] | float | int | None = None
    image_std: list[float | int] | tuple[float | int, ...] | float | int | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    hidden_size = _of_encoder("hidden_size")
    image_size = _of_encoder("image_size")
    num_attention_heads = _of_encoder("num_attention_heads")
    num_channels = _of_encoder("num_channels")
    num_hidden_layers = _of_encoder("num_hidden_layers")
    patch_size = _of_encoder("patch_size")

    def __post_init__(self, **kwargs: Any) -> None:
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if "model_type" in kwargs and self.transformers_version is None:
            # Of a head's file, which says the version of transformers once: names that others leave there are allowed.
            self.transformers_version = transformers_version
        refuse_unknown_names(self, kwargs)
        self.backbone_config = copy.deepcopy(self.backbone_config)  # its stages are set, and it may be another model's
        self.check_options()
        if out_features is None and out_indices is None and self.has_backbone:
            out_features = self.backbone_config.out_features
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """The embeddings and the layers."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    @property
    def has_backbone(self) -> bool:
        """Whether transformers has a backbone of the encoder, and not only its model."""
        return self.backbone_config.model_type in _BACKBONES

    @property
    def patch_height_and_width(self) -> tuple[int, int]:
        """`patch_size` as two numbers."""
        return patch_height_and_width(self)

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: list[int] | tuple[int, ...] | None
    ) -> None:
        """Sets the stages to return, by name or index, here and for the encoder."""
        super().set_output_features_output_indices(out_features, out_indices)
        if self.has_backbone:
            self.backbone_config.set_output_features_output_indices(list(self._out_features), list(self._out_indices))

    def check_options(self) -> None:
        """
        Refuses options that do not fit, with a `ValueError` that names them, and completes encoder, policy and
        normalization.
        """
        given = {"model_type": "dinov2"} if self.backbone_config is None else self.backbone_config
        model_type = given.get("model_type") if isinstance(given, dict) else given.model_type
        if model_type not in (*_BACKBONES, *_MODELS):
            raise ValueError(
                f"`backbone_config` must be that of one of {', '.join(sorted((*_BACKBONES, *_MODELS)))}, got "
                f"{model_type!r}: windowed, hierarchical and hybrid encoders have no tokens that patches could share."
            )
        self.backbone_config = AutoConfig.for_model(**given) if isinstance(given, dict) else given
        if isinstance(self.policy_config, dict):
            defaults = {
                "superpatch_size": 2 * self.patch_height_and_width[0],
                "num_channels": self.num_channels,
                "transformers_version": self.transformers_version,
            }
            self.policy_config = CtsPolicyConfig(**{**defaults, **self.policy_config})
        if self.policy_config is not None:
            self.policy_config.check_options()
        refuse_outside(self, "token_reduction", 0, 0.75)
        for name in ("image_mean", "image_std"):
            if getattr(self, name) is not None:
                setattr(self, name, channel_values(name, getattr(self, name), self.num_channels))


class CtsBackbone(BackboneMixin, PreTrainedModel):
    """
    A vision transformer of transformers that shares tokens by [`apply_cts`], with the maps of a backbone: those of all
    patches, so that heads are as ever, and with `token_reduction=0` equal to the bit to those of the encoder alone.

    `from_pretrained` of a head loads checkpoints that were saved with the encoder alone. They lack the weights of the
    policy, which [`~CtsBackbone.set_policy`] gives and which are saved with the rest. It is frozen, and always in
    evaluation mode. Most heads pass no options on to their backbone: set `backbone.config.token_reduction`, or use
    [`apply_cts`] on the head for budgets and scores per call. A new head gets the weights of an encoder by
    `head.backbone.backbone.load_state_dict(AutoBackbone.from_pretrained(name).state_dict())`.

    Args:
        config ([`CtsBackboneConfig`]): The configuration.

    Example:

    ```python
    >>> from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation
    >>> from cts_hf import CtsBackboneConfig

    >>> name = "depth-anything/Depth-Anything-V2-Small-hf"
    >>> config = DepthAnythingConfig.from_pretrained(name)
    >>> config.backbone_config = CtsBackboneConfig(backbone_config=config.backbone_config, token_reduction=0.3)
    >>> model = DepthAnythingForDepthEstimation.from_pretrained(name, config=config)
    >>> model.backbone.set_policy("runs/policy")
    ```"""

    config: CtsBackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # What the encoder does not support, it refuses itself.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CtsBackboneConfig):
        super().__init__(config)
        config.check_options()  # again: `from_pretrained` sets options behind the configuration's own check
        self.num_features = [config.hidden_size] * len(self.stage_names)
        # Before the encoder, which has it too, so that its weights go by this name.
        self.register_module("policy", None)
        if config.has_backbone:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
        else:
            self.backbone = AutoModel.from_config(config.backbone_config, add_pooling_layer=False)
            prepare_output(self)
        self._share_tokens(None if config.policy_config is None else CtsPolicyModel(config.policy_config))
        # A backbone has hooks that record its layers; twice installed, they would record every layer twice.
        self._output_capturing_hooks_installed = config.has_backbone
        self.post_init()

    def train(self, mode: bool = True) -> "CtsBackbone":
        super().train(mode)
        if self.policy is not None:
            # Here too, as `from_pretrained` makes every parameter trainable before its `eval()`.
            self.policy.requires_grad_(False).eval()
        return self

    def set_policy(self, policy: CtsPolicyModel | str | Path | None) -> None:
        """
        Gives the backbone a policy, in place of the one it may have; its configuration follows.

        Args:
            policy ([`CtsPolicyModel`], `str` or `Path`, *optional*): A policy, or its folder or id on the Hub. It
                or its copy becomes part of this model, frozen, on the device and in the dtype of the encoder. `None`
                for none.

        Raises:
            ValueError: If it is no policy, or one for other superpatches or images; the backbone is then as before.
        """
        remove_cts(self.backbone)
        try:
            self._share_tokens(policy)
        except Exception:
            self._share_tokens(self.policy)
            raise

    def _share_tokens(self, policy: CtsPolicyModel | str | Path | None) -> None:
        config = self.config
        apply_cts(self.backbone, policy, image_mean=config.image_mean, image_std=config.image_std)
        sharing = self.backbone.token_sharing
        config.image_mean, config.image_std = list(sharing.image_mean), list(sharing.image_std)
        self.policy, config.policy_config = sharing.policy, None
        if self.policy is not None:
            # Converted: with remote code, its class can be a copy.
            self.policy.config = config.policy_config = CtsPolicyConfig.from_dict(self.policy.config.to_dict())

    def forward(
        self,
        pixel_values: torch.Tensor,
        token_reduction: float | None = None,
        superpatch_scores: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalized images, of any size that the encoder takes.
            token_reduction (`float`, *optional*):
                Fraction of the patch tokens to remove, `config.token_reduction` by default.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, rows // 2, columns // 2)` of patches, *optional*):
                Scores that replace the policy's.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`]: As the encoder's. `feature_maps` has for each of
                `config.out_features` a map, `(batch_size, hidden_size, rows, columns)`; or, if `reshape_hidden_states`
                is `False`, what the encoder returns then, which for those without a backbone upstream is the class
                token and the patches, `(batch_size, 1 + rows * columns, hidden_size)`. Two fields more are
                `shared_superpatches`, bool, `(batch_size, rows // 2, columns // 2)`, those that were one token; and
                `num_tokens`, int64, `(batch_size,)`, of patches and superpatches.

        Raises:
            ValueError: If tokens are to be shared and there is neither a policy nor scores, or an option is out of
                range.
        """
        if token_reduction is None:
            token_reduction = self.config.token_reduction
        token_reduction = check_reductions(token_reduction)
        if token_reduction > 0 and self.policy is None and superpatch_scores is None:
            raise ValueError(
                f"`token_reduction` must be 0 without a policy, got {token_reduction}: give the backbone one with "
                "`set_policy`, or `superpatch_scores` to the call, or set `config.token_reduction` to 0."
            )
        run = self.backbone if self.config.has_backbone else self._run_model
        return run(pixel_values, token_reduction=token_reduction, superpatch_scores=superpatch_scores, **kwargs)

    @filter_output_hidden_states
    def _run_model(self, pixel_values: torch.Tensor, **kwargs: Any) -> ModelOutput:
        """What a backbone returns, of an encoder that transformers has the model of."""
        if self.config.backbone_config.model_type != "data2vec-vision":  # which takes any size
            kwargs["interpolate_pos_encoding"] = True
        outputs = self.backbone(pixel_values, **kwargs)
        feature_maps = tuple(
            self._feature_map(states, pixel_values)
            for name, states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if name in self.out_features
        )
        output = BackboneOutput(feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return with_sharing(output, outputs.shared_superpatches, outputs.num_tokens)

    def _feature_map(self, states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        config = self.config.backbone_config
        if getattr(config, "apply_layernorm", True):
            states = self.backbone.layernorm(states)
        sides = zip(pixel_values.shape[-2:], self.config.patch_height_and_width, strict=True)
        rows, columns = (length // patch for length, patch in sides)
        patches = states[:, -rows * columns :]
        if getattr(config, "reshape_hidden_states", True):
            return patches.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()
        return torch.cat([states[:, :1], patches], dim=1)


__all__ = ["WEIGHT_NAMES", "CtsBackbone", "CtsBackboneConfig"]
