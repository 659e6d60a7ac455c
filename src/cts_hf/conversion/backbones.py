# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of transformers as the encoders of Segmenters."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ..hub.loading import check_finite
from ..hub.normalization import IMAGENET, Normalization
from ..model.configuration_cts import CtsConfig
from ..model.modeling_cts import CtsForSemanticSegmentation, CtsModel
from .normalization import described_normalization


# What segmentation does not use, and published checkpoints often lack.
_UNUSED = ("pooler.", "embeddings.mask_token")


def load_backbone_config(source: str | Path) -> PreTrainedConfig:
    """
    The configuration of a vision transformer that can be an encoder.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is of a model that cannot be an encoder.
    """
    return CtsConfig(backbone_config=_read_config(source)).backbone_config  # refuses those of other models


def load_encoder_config(source: str | Path) -> PreTrainedConfig:
    """
    The configuration of the encoder of any model of transformers, which may be nested in the model's.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it has no patches, or patches that are no squares.
    """
    config = _read_config(source)
    encoder = getattr(config, "backbone_config", None) or config
    if not isinstance(getattr(encoder, "patch_size", None), int) or getattr(encoder, "image_size", None) is None:
        raise ValueError(
            f"{source} must hold a model with square patches and an image size, got a {config.model_type!r} whose "
            f"`patch_size` is {getattr(encoder, 'patch_size', None)!r}: give a model that `apply_cts` takes."
        )
    return encoder


def _read_config(source: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} must be the folder of a model of transformers, or the id of a repository ('owner/name') on the "
            f"Hub, got neither: {str(error).splitlines()[0]}"
        ) from error


def backbone_normalization(source: str | Path, config: PreTrainedConfig) -> Normalization:
    """What a vision transformer sees images normalized with: as its image processor says, else as its family does."""
    if (described := described_normalization(source)) is not None:
        return described
    try:
        own = CtsConfig(backbone_config=config)
    except ValueError:
        return IMAGENET  # an encoder that is a part of its model only, such as EoMT's
    return Normalization(own.image_mean, own.image_std)


def load_backbone(model: CtsModel | CtsForSemanticSegmentation, source: str | Path) -> None:
    """
    Loads the weights of a vision transformer of transformers, or of a model that has it as its base, into the encoder
    of a model whose `backbone_config` is its.

    Args:
        model ([`CtsModel`] or [`CtsForSemanticSegmentation`]): Its encoder gets the weights.
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        ValueError: If weights are missing, misshaped or not finite.
    """
    backbone = model.base_model.backbone
    weights, info = AutoModel.from_pretrained(
        source, config=backbone.config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    missing = [name for name in info["missing_keys"] if not name.startswith(_UNUSED)]
    misshaped = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or misshaped:
        raise ValueError(
            f"The weights in {source} must be those of a {type(backbone).__name__} as its config.json says, got "
            f"{len(missing)} missing {sorted(missing)[:3]} and {len(misshaped)} misshaped {misshaped[:3]}: "
            "download or save it again."
        )
    check_finite(weights, source)
    state_dict = {name: value for name, value in weights.state_dict().items() if not name.startswith("pooler.")}
    backbone.load_state_dict(state_dict)


__all__ = ["backbone_normalization", "load_backbone", "load_backbone_config", "load_encoder_config"]
