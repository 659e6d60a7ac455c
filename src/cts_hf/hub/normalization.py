# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The mean and standard deviation that images are normalized with: which ones weights expect, and whether a model and its
image processor agree.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging

from ..conversion.weight_files import read_description, read_weights
from ..model.configuration_cts import CtsConfig, CtsPolicyConfig, channel_values
from ..model.image_processing_pil_cts import CtsImageProcessingMixin


logger = logging.get_logger(__name__)


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    image_mean: list[float]
    image_std: list[float]


HALF = Normalization([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
IMAGENET = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def weights_normalization(
    source: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> Normalization | None:
    """
    What the weights of others expect images to be normalized with, as far as it is known: `config.json` of timm and of
    this package and `preprocessor_config.json` of transformers tell. Of a file without these, Google's AugReg and
    TensorFlow's EfficientNet-Lite0 are known by the names of their weights, and DeiT by its distillation token.

    Args:
        source (`str` or `Path`):
            What [`read_weights`] opens.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*):
            What is in it, if it has been read already.

    Returns:
        [`Normalization`], or `None` if nothing tells.

    Raises:
        FileNotFoundError: If there are no such weights, or a repository cannot be asked.
    """
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

    state_dict = read_weights(source) if state_dict is None else state_dict
    if "Transformer/posembed_input/pos_embedding" in state_dict or "_conv_stem.weight" in state_dict:
        return HALF
    if any(name.endswith(("dist_token", "distillation_token")) for name in state_dict):
        return IMAGENET
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
    told = {"image_mean": image_mean, "image_std": image_std}
    is_told = all(value is not None for value in told.values())
    known = None if is_told else weights_normalization(source, state_dict)
    chosen = {
        name: channel_values(name, other if value is None else value, len(default.image_mean))
        for (name, value), other in zip(told.items(), known or default, strict=True)
    }
    if known is None and not is_told:
        logger.warning(
            f"Nothing tells what the weights of {source} expect images to be normalized with: it is {chosen}. Give "
            "`image_mean` and `image_std` if they expect something else."
        )
    return Normalization(**chosen)


def check_normalization(config: CtsConfig | CtsPolicyConfig, processor: CtsImageProcessingMixin) -> None:
    """
    Refuses an image processor that does not normalize as the configuration of its model says.

    Raises:
        ValueError: If mean or standard deviation differ; both of both are named.
    """
    recorded = Normalization(config.image_mean, config.image_std)
    processed = processor_normalization(processor, config.num_channels)
    if recorded != processed:
        raise ValueError(
            f"The image processor must normalize as config.json says, with {recorded._asdict()}, got "
            f"{processed._asdict()}: correct `image_mean` and `image_std` of the one that is wrong. A config.json "
            "that has none means 0.5; its `policy_config` wants them as well, if the policy saw the same images."
        )


def processor_normalization(processor: CtsImageProcessingMixin, num_channels: int) -> Normalization:
    """What an image processor normalizes images of so many channels with; 0 and 1 if it does not."""
    values = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    named = zip(Normalization._fields, values, strict=True)
    return Normalization(*(channel_values(name, value, num_channels) for name, value in named))


__all__ = [
    "HALF",
    "IMAGENET",
    "Normalization",
    "check_normalization",
    "choose_normalization",
    "processor_normalization",
    "weights_normalization",
]
