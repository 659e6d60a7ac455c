# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The mean and standard deviation that images are normalized with, and whether a model and its image processor agree.
"""

from typing import NamedTuple

from transformers import BaseImageProcessor

from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from ..model.configuration_cts_checks import channel_values
from ..model.image_processing_base_cts import CtsImageProcessingMixin


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, of pixels from 0 to 1."""

    image_mean: list[float]
    image_std: list[float]


HALF = Normalization([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
IMAGENET = Normalization([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


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


def processor_normalization(processor: BaseImageProcessor, num_channels: int) -> Normalization:
    """What an image processor normalizes images of so many channels with; 0 and 1 if it does not."""
    values = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    named = zip(Normalization._fields, values, strict=True)
    return Normalization(*(channel_values(name, value, num_channels) for name, value in named))


__all__ = [
    "HALF",
    "IMAGENET",
    "Normalization",
    "check_normalization",
    "processor_normalization",
]
