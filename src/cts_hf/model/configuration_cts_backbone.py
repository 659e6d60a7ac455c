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
"""The vision transformer of transformers that a [`CtsConfig`] can have as its encoder."""

from dataclasses import fields

from transformers import AutoConfig, PreTrainedConfig


_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
# The families that can be encoders, and what their published weights expect images to be normalized with.
_FAMILIES = {
    "vit": _HALF,
    "deit": _IMAGENET,
    "beit": _HALF,
    "data2vec-vision": _HALF,
    "dinov2": _IMAGENET,
    "dinov2_with_registers": _IMAGENET,
    "dinov3_vit": _IMAGENET,
    "dpt": _HALF,
    "pixio": _IMAGENET,
}
# What a model has of its encoder, and cannot have otherwise.
_FOLLOWED = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")


def complete_backbone(config: PreTrainedConfig) -> None:
    """
    Completes a [`CtsConfig`] that has a `backbone_config` with what follows from it, and refuses options that
    contradict it.
    """
    backbone = config.backbone_config
    options = backbone if isinstance(backbone, dict) else vars(backbone)
    model_type = options.get("model_type") if options is backbone else getattr(backbone, "model_type", None)
    is_nested = options.get("is_hybrid", False) or options.get("backbone_config") is not None
    if model_type not in _FAMILIES or is_nested:
        raise ValueError(
            f"`backbone_config` must be of a plain vision transformer, one of {', '.join(map(repr, _FAMILIES))}, got "
            f"{'a hybrid or nested one' if is_nested else repr(model_type or type(backbone))}: windowed and "
            "hierarchical encoders have no tokens that patches could share."
        )
    if options is backbone:
        options = {name: value for name, value in backbone.items() if name != "model_type"}
        backbone = config.backbone_config = AutoConfig.for_model(model_type, **options)
    for name in _FOLLOWED:
        _follow(config, name, getattr(backbone, name))
    if tuple(config.superpatch_levels) != (2,) or config.sharing_threshold is not None:
        raise ValueError(
            "`superpatch_levels` must be (2,) and `sharing_threshold` None with a `backbone_config`, got "
            f"{config.superpatch_levels} and {config.sharing_threshold}: its encoder has the same number of tokens "
            "for all images of a batch. Leave them out, or leave out `backbone_config`."
        )
    if config.superpatch_embedding != "projection":
        raise ValueError(
            f"`superpatch_embedding` must be 'projection' with a `backbone_config`, got "
            f"{config.superpatch_embedding!r}: its encoder embeds superpatches by its own weights alone. Leave it "
            "out, or leave out `backbone_config`."
        )
    if config.image_mean is None and config.image_std is None and config.num_channels == 3:
        config.image_mean, config.image_std = _FAMILIES[model_type]


def _follow(config: PreTrainedConfig, name: str, value: int | list[int] | tuple[int, ...]) -> None:
    if name == "patch_size" and not isinstance(value, int):
        raise ValueError(
            f"`backbone_config.patch_size` must be a whole number, got {value!r}: patches must be squares."
        )
    default = next(field.default for field in fields(config) if field.name == name)
    given = getattr(config, name)
    if given not in (default, value):
        raise ValueError(
            f"`{name}` must be that of the `backbone_config`, {value}, got {given}: leave it out, or change it there."
        )
    setattr(config, name, value)


__all__ = ["complete_backbone"]
