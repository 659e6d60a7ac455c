# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""From pictures to label maps: what is around the forward, and takes as long with sharing as without."""

from typing import Any, NamedTuple

from torch import Tensor
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from ..model.modeling_cts import CtsForSemanticSegmentation
from .inputs import Batch, Model


class EndToEnd(NamedTuple):
    """
    How a model gets from pictures to label maps.

    Attributes:
        model: an own one, or one that [`apply_cts`] has changed.
        processor: its image processor.
    """

    model: Model
    processor: BaseImageProcessor

    def preprocess(self, batch: Batch) -> dict[str, Any]:
        """What the image processor makes of pictures without resizing them, with `pixel_values` as the model's."""
        height, width = batch.pixel_values.shape[-2:]
        is_own = isinstance(self.model, CtsForSemanticSegmentation)
        options = {"size": {"height": height, "width": width}} if is_own else {}
        features = dict(self.processor(batch.pictures, return_tensors="pt", **options))
        if features["pixel_values"].shape != batch.pixel_values.shape:
            raise ValueError(
                f"`image_size` must be one that the image processor leaves as it is, got ({height}, {width}), which "
                f"becomes {tuple(features['pixel_values'].shape[-2:])}: give the size that its "
                "preprocessor_config.json names, or change it there."
            )
        features["pixel_values"] = features["pixel_values"].to(self.model.device, self.model.dtype)
        return features

    def postprocess(self, outputs: ModelOutput, features: dict[str, Any]) -> list[Tensor]:
        """Label maps, int64 of the pictures' size, on the CPU."""
        batch_size, _, height, width = features["pixel_values"].shape
        outputs.patch_offsets = features.get("patch_offsets")  # EoMT's image processor wants to find them there
        target_sizes = [(height, width)] * batch_size
        maps = self.processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)
        return [label_map.cpu() for label_map in maps]


__all__ = ["EndToEnd"]
