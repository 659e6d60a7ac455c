# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the weights of others expect images to be normalized with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from ..hub.normalization import HALF, IMAGENET, Normalization
from ..model.configuration_cts_checks import channel_values
from .weight_files import read_description, read_weights


logger = logging.get_logger(__name__)


def weights_normalization(
    source: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Normalization | None:
    """
    What the weights of others expect images to be normalized with, as far as it is known: `config.json` of timm and of
    this package and `preprocessor_config.json` of transformers say. Of a file without these, Google's AugReg and
    TensorFlow's EfficientNet-Lite0 are known by the names of their weights, and DeiT by its distillation token.

    Args:
        source (`str` or `Path`):
            What [`read_weights`] opens.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*):
            What is in it, if it has been read already.

    Returns:
        [`Normalization`], or `None` if nothing says.

    Raises:
        FileNotFoundError: If there are no such weights, or a repository cannot be asked.
    """
    if (described := described_normalization(source)) is not None:
        return described
    state_dict = read_weights(source) if state_dict is None else state_dict
    if "Transformer/posembed_input/pos_embedding" in state_dict or "_conv_stem.weight" in state_dict:
        return HALF
    if any(name.endswith(("dist_token", "distillation_token")) for name in state_dict):
        return IMAGENET
    return None


def described_normalization(source: str | Path) -> Normalization | None:
    """As [`weights_normalization`], of what lies beside the weights alone."""
    config = read_description(source, "config.json")
    # timm before 0.9 had the fields of `pretrained_cfg` at the top.
    for described, prefix in ((config.get("pretrained_cfg") or config, ""), (config, "image_")):
        if f"{prefix}mean" in described and f"{prefix}std" in described:
            return Normalization(described[f"{prefix}mean"], described[f"{prefix}std"])
    processor = read_description(source, "preprocessor_config.json")
    if not processor.get("do_normalize", True):
        return Normalization([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    if "image_mean" in processor and "image_std" in processor:
        return Normalization(processor["image_mean"], processor["image_std"])
    return None


def choose_normalization(
    source: str | Path,
    state_dict: Mapping[str, torch.Tensor],
    image_mean: float | Sequence[float] | None,
    image_std: float | Sequence[float] | None,
    default: Normalization,
) -> Normalization:
    """
    What images are normalized with for the weights of `source`: what the caller says, else what is known of them, else
    `default`, which a line of the log then says. The arguments are those of [`weights_normalization`].

    Returns:
        [`Normalization`]: With as many channels as `default`.

    Raises:
        ValueError: If the caller's numbers are none, or not as many as there are channels.
    """
    given = {"image_mean": image_mean, "image_std": image_std}
    is_given = all(value is not None for value in given.values())
    known = None if is_given else weights_normalization(source, state_dict)
    chosen = {
        name: channel_values(name, other if value is None else value, len(default.image_mean))
        for (name, value), other in zip(given.items(), known or default, strict=True)
    }
    if known is None and not is_given:
        logger.warning(
            f"It is not known what the weights of {source} expect images to be normalized with: {chosen} is taken. "
            "Give `image_mean` and `image_std` if they expect something else."
        )
    return Normalization(**chosen)


__all__ = ["choose_normalization", "described_normalization", "weights_normalization"]
