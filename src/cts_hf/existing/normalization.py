# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model of transformers sees images normalized with."""

from typing import Any

from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin


Channels = float | list[float] | tuple[float, ...]


def find_normalization(
    model: PreTrainedModel,
    image_mean: Channels | None,
    image_std: Channels | None,
    default: tuple[Channels, Channels],
) -> tuple[Channels, Channels]:
    """
    Mean and standard deviation of a model's images: those that are given, else those of the image processor that lies
    where the model was loaded from, 0 and 1 if it does not normalize, else the default. Nothing is downloaded.
    """
    if image_mean is None or image_std is None:
        known = _processor_options(model.config._name_or_path)
        if known.get("do_normalize") is False:
            default = (0.0, 1.0)
        elif known.get("image_mean") is not None and known.get("image_std") is not None:
            default = (known["image_mean"], known["image_std"])
    return default[0] if image_mean is None else image_mean, default[1] if image_std is None else image_std


def _processor_options(source: str) -> dict[str, Any]:
    if not source:
        return {}
    try:
        options, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=True)
    except (OSError, ValueError):
        return {}  # there is none, or it is not here
    return options


__all__ = ["find_normalization"]
