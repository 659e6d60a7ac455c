# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model of transformers sees images normalized with."""

from typing import Any

from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ..model.configuration_cts_checks import channel_values


Channels = float | list[float] | tuple[float, ...]


def find_normalization(
    model: PreTrainedModel,
    image_mean: Channels | None,
    image_std: Channels | None,
    default: tuple[Channels, Channels],
    num_channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    Mean and standard deviation of each channel of a model's images: those that are given, else those of the image
    processor that lies where the model was loaded from, 0 and 1 if it does not normalize, else the default. Nothing is
    downloaded.

    Raises:
        ValueError: If they are no numbers for so many channels, for instance as the image processor is for others.
    """
    given = {"image_mean": image_mean, "image_std": image_std}
    found = dict(zip(given, default, strict=True))
    if image_mean is None or image_std is None:
        known = _processor_options(model.config._name_or_path)
        if known.get("do_normalize") is False:
            found = {"image_mean": 0.0, "image_std": 1.0}
        elif all(known.get(name) is not None for name in given):
            found = {name: known[name] for name in given}
            for name, value in found.items():
                if given[name] is None and isinstance(value, list) and len(value) != num_channels:
                    raise ValueError(
                        f"`{name}` must be given for a model of {num_channels} channels whose image processor in "
                        f"{model.config._name_or_path} is for {len(value)}, got None: give `apply_cts` what the "
                        "model's images are normalized with."
                    )
    return tuple(
        tuple(channel_values(name, found[name] if value is None else value, num_channels))
        for name, value in given.items()
    )


def _processor_options(source: str) -> dict[str, Any]:
    if not source:
        return {}
    try:
        options, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)
    except (OSError, ValueError):
        return {}  # there is none, or it is not here
    return options


__all__ = ["find_normalization"]
