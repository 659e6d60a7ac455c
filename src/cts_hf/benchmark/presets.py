# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Segmenters of real sizes with random weights, for measuring."""

from dataclasses import dataclass

from ..model.configuration_cts import CtsConfig


# The splits of the paper, as fractions of the tokens: 103 of 256 superpatches share at 512 pixels, 160 of 400 at 640,
# 336 of 576 at 768.
_REDUCTION_512, _REDUCTION_640, _REDUCTION_768 = 309 / 1024, 0.3, 0.4375
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}


@dataclass(frozen=True)
class Preset:
    """A Segmenter with patches of 16 pixels, 150 classes, random weights and a half-resolution policy."""

    size: dict[str, int]
    image_size: int
    token_reduction: float
    batch_size: int
    superpatch_levels: tuple[int, ...] = (2,)

    def config(self, superpatch_levels: tuple[int, ...] | None = None) -> CtsConfig:
        """The configuration of this Segmenter, with its own levels or others."""
        return CtsConfig(
            image_size=self.image_size,
            superpatch_levels=superpatch_levels or self.superpatch_levels,
            token_reduction=self.token_reduction,
            num_labels=150,
            policy_config={"output_stride": 16},
            **self.size,
        )


# Those up to 768 pixels are the paper's.
PRESETS = {
    "tiny-512": Preset(_TINY, 512, _REDUCTION_512, batch_size=4),
    "small-512": Preset(_SMALL, 512, _REDUCTION_512, batch_size=4),
    "small-768": Preset(_SMALL, 768, _REDUCTION_768, batch_size=2),
    "base-512": Preset(_BASE, 512, _REDUCTION_512, batch_size=4),
    "large-640": Preset(_LARGE, 640, _REDUCTION_640, batch_size=1),
    "small-1024": Preset(_SMALL, 1024, 0.6, batch_size=1, superpatch_levels=(2, 4)),
    "large-1024": Preset(_LARGE, 1024, 0.6, batch_size=1, superpatch_levels=(2, 4)),
}


__all__ = ["PRESETS", "Preset"]
