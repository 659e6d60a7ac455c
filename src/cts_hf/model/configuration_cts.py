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
"""CTS model configuration"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_cts_backbone import complete_backbone
from .configuration_cts_checks import (
    NUM_STAGES_OF_STRIDE,
    CheckedConfig,
    check_image_size,
    check_levels,
    check_policy_fits,
    check_reductions,
    check_stages,
    check_threshold,
    complete_normalization,
    refuse_below_one,
    refuse_below_zero,
    refuse_indivisible,
    refuse_outside,
    refuse_unknown_names,
    refuse_unlisted,
    without_defaults,
)
from .configuration_cts_setr import SETR_OPTIONS, SETR_TYPES, complete_setr


# Where the code saved beside a checkpoint is found, for those who load it without cts_hf.
_AUTO_MAP = {
    "AutoConfig": "configuration_cts.CtsConfig",
    "AutoModel": "modeling_cts.CtsModel",
    "AutoModelForSemanticSegmentation": "modeling_cts.CtsForSemanticSegmentation",
}

# The decoders that there are: the names in `DECODERS`.
DECODER_TYPES = ("mask_transformer", "linear", *SETR_TYPES)
# What superpatches are embedded as, and what patches that shared a token get back; the defaults first.
SUPERPATCH_EMBEDDINGS = ("projection", "multiscale")
UNSHARINGS = ("copy", "residual")


@strict
class CtsPolicyConfig(CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of a [`CtsPolicyModel`]: the network that predicts which superpatches show one class.

    Args:
        superpatch_size (`int`, *optional*, defaults to 32):
            Side of the smallest superpatches in pixels: twice the patch size of the segmentation model, where the
            first of its levels is 2.
        superpatch_levels (`tuple[int, ...]`, *optional*, defaults to `(2,)`):
            Sides of the superpatches in patches, each a multiple of the one before. Each level has its own classifier;
            those of larger ones see the mean of the features. A policy also serves a model with larger levels besides.
        output_stride (`int`, *optional*, defaults to 32):
            Stage of the EfficientNet-Lite0 backbone that is read: 32, 16 or 8 input pixels per feature; later stages
            are not built. The input is resized by `output_stride / superpatch_size`, so that the features lie on the
            grid of superpatches. 32 is the network of the paper; 16 sees the image at half resolution and is several
            times cheaper, 8 at a quarter.
        num_stages (`int`, *optional*):
            Stages of the backbone that are built: 3, 5 or 7 by default, as `output_stride` is 8, 16 or 32. More of
            them, up to 7, see more around each superpatch; they shrink the features no further.
        width_coefficient (`float`, *optional*, defaults to 1.0):
            Scales the channels of every stage.
        depth_coefficient (`float`, *optional*, defaults to 1.0):
            Scales the number of blocks of every stage but the first and the last.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        batch_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the batch normalizations; 1e-3 for weights that come from TensorFlow.
        tf_padding (`bool`, *optional*, defaults to `False`):
            Whether strided convolutions pad as TensorFlow does ("SAME": more on the right and the bottom).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of the classifier.
        image_mean (`float` or `list[float]`, *optional*):
            Mean that the policy's weights expect images to be normalized with, where pixels go from 0 to 1: a number
            for each channel, or one for all. 0.5 by default, or what a [`CtsConfig`] has that is given these options
            as a `dict`. A [`CtsModel`] renormalizes its images for its policy where the two differ.
        image_std (`float` or `list[float]`, *optional*):
            Standard deviation, likewise.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Superpatch target that the loss ignores; [`superpatch_targets`] makes 255, whatever labels ignore.

    Example:

    ```python
    >>> from cts_hf import CtsPolicyConfig, CtsPolicyModel

    >>> model = CtsPolicyModel(CtsPolicyConfig(output_stride=16))
    ```"""

    model_type = "cts_policy"
    base_config_key = "policy_config"

    superpatch_size: int = 32
    superpatch_levels: list[int] | tuple[int, ...] = (2,)
    output_stride: int = 32
    num_stages: int | None = None
    width_coefficient: float | int = 1.0
    depth_coefficient: float | int = 1.0
    num_channels: int = 3
    batch_norm_eps: float | int = 1e-5
    tf_padding: bool = False
    initializer_range: float | int = 0.02
    image_mean: list[float | int] | tuple[float | int, ...] | float | int | None = None
    image_std: list[float | int] | tuple[float | int, ...] | float | int | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_names(self, kwargs)
        self.check_options()
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, without the levels where there are none but 2 x 2."""
        return without_defaults(super().to_dict())

    @property
    def built_stages(self) -> int:
        """Number of stages of the backbone."""
        return self.num_stages or NUM_STAGES_OF_STRIDE[self.output_stride]

    def check_options(self) -> None:
        """Refuses options that do not fit, with a `ValueError` that names them, and completes the normalization."""
        refuse_below_one(self, "num_channels")
        complete_normalization(self)
        self.superpatch_levels = check_levels(self.superpatch_levels, "superpatch_levels")
        smallest = self.superpatch_levels[0]
        if self.superpatch_size < smallest or self.superpatch_size % smallest:
            raise ValueError(
                f"`superpatch_size` must be a multiple of {smallest} pixels, the patches along a side of the smallest "
                f"superpatch, got {self.superpatch_size}: give the side of that in pixels."
            )
        check_stages(self.output_stride, self.num_stages)
        for name in ("width_coefficient", "depth_coefficient"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a finite number above 0, got {getattr(self, name)}.")
        refuse_below_zero(self, "batch_norm_eps", "initializer_range")


@strict
class CtsConfig(CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of a [`CtsModel`] or [`CtsForSemanticSegmentation`]. The defaults are those of a ViT-S/16 Segmenter
    at 512 x 512 pixels with 30 % fewer tokens (Lu et al., CVPR 2023, table 1).

    Args:
        backbone_config ([`~transformers.PreTrainedConfig`] or `dict`, *optional*):
            Of an encoder of transformers in place of the own one: ViT, DeiT, BEiT, Data2VecVision, DINOv2 (with or
            without registers), DINOv3, DPT or Pixio. Sizes, layers, heads, channels and normalization are then its.
            Images are not padded: the last row and column of patches never share if there is an odd number of them.
        image_size (`int` or pair of `int`, *optional*, defaults to 512):
            Height and width, in pixels, that the position embeddings are made for. Any other size can be segmented.
        patch_size (`int`, *optional*, defaults to 16):
            Side of a patch in pixels.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        hidden_size (`int`, *optional*, defaults to 384):
            Width of encoder and decoder.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Layers of the encoder.
        num_attention_heads (`int`, *optional*, defaults to 6):
            Attention heads of each encoder layer.
        intermediate_size (`int`, *optional*, defaults to 1536):
            Width of the hidden layer of each MLP, in encoder and decoder.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer normalizations.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout in the embeddings and after the attention and MLP of each encoder layer.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last encoder layer; grows linearly from 0 at the first.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        use_distillation_token (`bool`, *optional*, defaults to `False`):
            Whether the encoder has a distillation token behind the class token, as DeiT.
        superpatch_levels (`tuple[int, ...]`, *optional*, defaults to `(2,)`):
            Sides in patches of the superpatches that can share a token, each a multiple of the one before: with
            (2, 4), 4 x 4 patches can share one too. Images are padded to whole superpatches of the largest.
        token_reduction (`float` or `tuple[float, ...]`, *optional*, defaults to 0.3):
            Fraction of the patch tokens that sharing removes, between 0 (a plain Segmenter; the policy is not run) and
            `1 - 1 / level**2` of the largest level (0.75 for 2 x 2: every superpatch shared), or what each of several
            levels removes; [`num_shared_superpatches`] says how a single fraction is split. Can be given to each call
            of the model.
        superpatch_embedding (`str`, *optional*, defaults to `"projection"`):
            `"projection"`: a superpatch is embedded as a patch of the image at a lower resolution. `"multiscale"`:
            plus what a projection of its own, which starts at zero, makes of it at the resolution of the level before.
        unsharing (`str`, *optional*, defaults to `"copy"`):
            `"copy"`: patches that share a token get what the decoder, or the encoder for a convolutional decoder, gave
            for it. `"residual"`: plus a residual from the pixels of each patch, with a gate that starts at zero.
        sharing_threshold (`float`, *optional*):
            Instead of a budget: superpatches share a token where the policy's probability of one class is at least
            this, so that images have as few tokens as they need. Can be given to each call of the model.
        freeze_encoder (`bool`, *optional*, defaults to `False`):
            Whether the encoder stays in evaluation mode and gets no gradient, so that only decoder and policy train.
        use_policy (`bool`, *optional*, defaults to `True`):
            Whether the model has a policy network. Without one, sharing needs `superpatch_scores`.
        policy_config (`CtsPolicyConfig` or `dict`, *optional*):
            Configuration of the policy network. By default it has the superpatches of this model.
        policy_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the policy's own loss in the loss of [`CtsForSemanticSegmentation`]. At 0 the policy is frozen:
            it stays in evaluation mode and gets no gradient. Set it when the model is built or loaded
            (`from_pretrained(..., policy_loss_weight=1.0)`), not afterwards.
        decoder_type (`str`, *optional*, defaults to `"mask_transformer"`):
            `"mask_transformer"` or `"linear"`, the decoders of Segmenter; or `"setr_naive"`, `"setr_pup"` or
            `"setr_mla"`, the convolutional ones of SETR, which run on all patches and give logits at a higher
            resolution.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 2):
            Layers of the mask transformer.
        decoder_num_attention_heads (`int`, *optional*):
            Attention heads of the mask transformer, `hidden_size // 64` by default.
        decoder_layer_norm_eps (`float`, *optional*):
            Epsilon of the layer normalizations of the mask transformer, `layer_norm_eps` by default.
        decoder_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the attention and MLP of each decoder layer.
        decoder_drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the decoder layers.
        decoder_hidden_size (`int`, *optional*, defaults to 256):
            Channels of the convolutions of SETR's decoders.
        decoder_layer_indices (`list[int]`, *optional*):
            Encoder layers, counted from 0 and in their order, whose outputs SETR's decoders see; the last of them is
            the encoder's last. By default those of SETR, in proportion to the number of layers: of 24, 9, 14, 19 and
            23, or 5, 11, 17 and 23 for `"setr_mla"`.
        decoder_num_upsampling_layers (`int`, *optional*):
            Convolutions of `"setr_naive"`, each with an upsampling by 4, 1 by default; or of `"setr_pup"`, each with
            an upsampling by 2, 4 by default.
        auxiliary_num_upsampling_layers (`int`, *optional*, defaults to 1):
            Convolutions of their auxiliary heads, each with an upsampling by 4.
        auxiliary_loss_weight (`float`, *optional*, defaults to 0.4):
            Weight, in the loss, of each auxiliary head of SETR's decoders. At 0 there are none.
        image_mean (`float` or `list[float]`, *optional*):
            Mean that the weights expect images to be normalized with, where pixels go from 0 to 1: a number for each
            channel, or one for all. 0.5 by default, as for the ViTs of AugReg; DeiT's weights expect ImageNet's. The
            image processor has to normalize with the same, and the policy may have been trained with another.
        image_std (`float` or `list[float]`, *optional*):
            Standard deviation, likewise.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label that the loss ignores.

    Example:

    ```python
    >>> from cts_hf import CtsConfig, CtsForSemanticSegmentation

    >>> model = CtsForSemanticSegmentation(CtsConfig(num_labels=150))
    ```"""

    model_type = "cts"
    sub_configs = {"policy_config": CtsPolicyConfig, "backbone_config": AutoConfig}  # noqa: RUF012 - transformers declares it so

    backbone_config: PreTrainedConfig | dict | None = None
    image_size: int | list[int] | tuple[int, int] = 512
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    use_distillation_token: bool = False
    superpatch_levels: list[int] | tuple[int, ...] = (2,)
    token_reduction: float | int | list[float | int] | tuple[float | int, ...] = 0.3
    superpatch_embedding: str = "projection"
    unsharing: str = "copy"
    sharing_threshold: float | int | None = None
    freeze_encoder: bool = False
    use_policy: bool = True
    policy_config: CtsPolicyConfig | dict | None = None
    policy_loss_weight: float | int = 0.0
    decoder_type: str = "mask_transformer"
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int | None = None
    decoder_layer_norm_eps: float | int | None = None
    decoder_dropout_prob: float | int = 0.0
    decoder_drop_path_rate: float | int = 0.0
    decoder_hidden_size: int = 256
    decoder_layer_indices: list[int] | tuple[int, ...] | None = None
    decoder_num_upsampling_layers: int | None = None
    auxiliary_num_upsampling_layers: int = 1
    auxiliary_loss_weight: float | int = 0.4
    image_mean: list[float | int] | tuple[float | int, ...] | float | int | None = None
    image_std: list[float | int] | tuple[float | int, ...] | float | int | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_names(self, kwargs)
        self.check_options()
        # `register_for_auto_class` records a single auto class; a checkpoint serves two.
        kwargs["auto_map"] = {**_AUTO_MAP, **kwargs.get("auto_map", {})}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, without those that have no effect: of other decoders, and of sharing by default."""
        options = without_defaults(super().to_dict())
        if "superpatch_levels" in options and options["policy_config"] is not None:
            options["policy_config"].setdefault("superpatch_levels", (2,))  # or it would inherit those of the model
        if self.decoder_type in ("mask_transformer", "linear"):
            for name in SETR_OPTIONS:
                options.pop(name, None)
        return options

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """`image_size` as two numbers."""
        sides = [self.image_size] if isinstance(self.image_size, int) else self.image_size
        return sides[0], sides[-1]

    def check_options(self) -> None:
        """
        Refuses options that do not fit, or do not fit each other, with a `ValueError` that names them, and completes
        decoder, normalization and policy.
        """
        if self.backbone_config is not None:
            complete_backbone(self)
        if self.decoder_num_attention_heads is None:
            self.decoder_num_attention_heads = max(1, self.hidden_size // 64)
        if self.decoder_layer_norm_eps is None:
            self.decoder_layer_norm_eps = self.layer_norm_eps
        refuse_below_one(self, "patch_size", "num_channels", "hidden_size", "intermediate_size")
        refuse_below_one(self, "num_hidden_layers", "num_attention_heads")
        complete_normalization(self)
        self.superpatch_levels = check_levels(self.superpatch_levels, "superpatch_levels")
        policy_config = self.policy_config = self._complete_policy_config()
        if isinstance(self.token_reduction, list):  # as JSON has no tuples
            self.token_reduction = tuple(self.token_reduction)
        check_reductions(self.token_reduction, self.superpatch_levels)
        check_threshold(self.sharing_threshold)
        of_decoder = ("decoder_dropout_prob", "decoder_drop_path_rate")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", *of_decoder):
            refuse_outside(self, name, 0, 1)
        refuse_below_zero(self, "layer_norm_eps", "decoder_layer_norm_eps", "initializer_range", "policy_loss_weight")
        refuse_below_zero(self, "auxiliary_loss_weight")
        refuse_unlisted(self, "decoder_type", DECODER_TYPES)
        refuse_unlisted(self, "superpatch_embedding", SUPERPATCH_EMBEDDINGS)
        refuse_unlisted(self, "unsharing", UNSHARINGS)
        if self.decoder_type in SETR_TYPES:
            complete_setr(self)
        refuse_indivisible(self, "num_attention_heads")
        if self.decoder_type == "mask_transformer":
            refuse_below_one(self, "decoder_num_hidden_layers", "decoder_num_attention_heads")
            refuse_indivisible(self, "decoder_num_attention_heads")
        if self.backbone_config is None:  # upstream takes any
            check_image_size(self)
        policy_config.check_options()
        self.check_policy_config(policy_config)

    @property
    def superpatch_size(self) -> int:
        """Side of the smallest superpatches in pixels."""
        return self.superpatch_levels[0] * self.patch_size

    def _complete_policy_config(self) -> CtsPolicyConfig:
        defaults: dict[str, Any] = {
            "superpatch_size": self.superpatch_size,
            "superpatch_levels": self.superpatch_levels,
            "num_channels": self.num_channels,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }
        if self.policy_config is None:
            return CtsPolicyConfig(**defaults)
        if not isinstance(self.policy_config, dict):
            return self.policy_config
        defaults["transformers_version"] = self.transformers_version
        given = {name: value for name, value in self.policy_config.items() if value is not None}
        return CtsPolicyConfig(**{**defaults, **given})

    def check_policy_config(self, policy_config: CtsPolicyConfig) -> None:
        """Refuses the configuration of a policy for superpatches of another size, or for other channels."""
        check_policy_fits(self, policy_config)


__all__ = ["CtsConfig", "CtsPolicyConfig"]
