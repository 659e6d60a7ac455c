# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The options of the benchmark."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..model.configuration_cts_checks import check_levels, check_threshold
from ..model.token_sharing import check_token_reduction
from .existing import EXISTING_PRESETS
from .inputs import Reduction
from .presets import PRESETS


_PRESET_NAMES = (*PRESETS, *EXISTING_PRESETS)


@dataclass
class BenchmarkArguments:
    """What to measure. Several sizes, reductions, thresholds or batch sizes are measured in every combination."""

    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(_PRESET_NAMES)}."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a preset: a checkpoint, or a folder with a config.json only, of this package or of a "
            "model that `apply_cts` takes."
        },
    )
    given_scores: bool = field(
        default=False,
        metadata={"help": "Share by random scores instead of a policy: what the encoder alone could gain."},
    )
    superpatch_levels: list[int] = field(
        default_factory=list,
        metadata={"help": "Sides of the superpatches in patches, such as 2 4, instead of the model's own."},
    )
    token_reduction: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fractions of the tokens to remove, instead of the model's own; what each level removes is joined "
            "by commas, such as 0.2,0.4."
        },
    )
    sharing_threshold: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Share from these probabilities on, instead of budgets. A trained policy decides on --images. "
            "With random weights or --given_scores, scores are drawn by which images lose --token_reduction on "
            "average, each another fraction."
        },
    )
    end_to_end: bool = field(
        default=False,
        metadata={"help": "Measure from picture to label map, too: image processor, forward and post-processing."},
    )
    images: str | None = field(
        default=None,
        metadata={"help": "Folder of pictures to measure with, resized to the image size, instead of random ones."},
    )
    image_size: list[int] = field(
        default_factory=list, metadata={"help": "Sides of square images in pixels, instead of the model's own."}
    )
    batch_size: list[int] = field(
        default_factory=list, metadata={"help": "Images per forward, instead of the preset's (a model's is 1)."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or cuda:1."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the model."})
    compile: bool = field(default=False, metadata={"help": "Compile the model, plain and sharing, as a whole."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Any that transformers has."})
    rounds: int | None = field(
        default=None, metadata={"help": "Pairs of runs; by default what fits in half a minute, 3 to 20."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the results."})
    plot: str | None = field(default=None, metadata={"help": "Picture of the results, .png or .svg."})
    overwrite: bool = field(default=False, metadata={"help": "Replace these two files if they exist."})

    def __post_init__(self):
        if (self.preset is None) == (self.model is None):
            raise ValueError(
                f"Either `preset`, one of {', '.join(_PRESET_NAMES)}, or `model` must be given, got {self.preset!r} "
                f"and {self.model!r}: give one of them."
            )
        if self.preset is not None and self.preset not in _PRESET_NAMES:
            raise ValueError(f"`preset` must be one of {', '.join(_PRESET_NAMES)}, got {self.preset!r}: choose one.")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}: choose more.")
        for name in ("image_size", "batch_size"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(
                    f"`{name}` must be whole numbers of 1 or more, got {getattr(self, name)}: correct it."
                )
        self._check_sharing()
        if self.plot is not None and Path(self.plot).suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"`plot` must be the path of a .png or .svg file, got {self.plot}: rename it.")
        if self.plot is not None and self.json is not None and _same_file(self.plot, self.json):
            raise ValueError(f"`plot` must be another file than `json`, got {self.plot} for both: rename one.")

    def _check_sharing(self) -> None:
        if self.superpatch_levels:
            check_levels(self.superpatch_levels, "superpatch_levels")
        if self.preset in PRESETS:
            self.check_reductions(tuple(self.superpatch_levels) or PRESETS[self.preset].superpatch_levels)
        elif self.superpatch_levels:
            self.check_reductions(tuple(self.superpatch_levels))
        for sharing_threshold in self.sharing_threshold:
            check_threshold(sharing_threshold)
        if self.sharing_threshold and self.compile:
            raise ValueError(
                f"`sharing_threshold` must be unset with `compile`, got {self.sharing_threshold}: a compiled graph "
                "has as many tokens as there are patches, whatever images share. Leave one of them out."
            )

    @property
    def reductions(self) -> list[Reduction]:
        """`token_reduction` as numbers, and tuples of what each level removes."""
        return [_parse_reduction(text) for text in self.token_reduction]

    def check_reductions(self, levels: tuple[int, ...]) -> None:
        """Refuses reductions that a model with these levels cannot have."""
        for token_reduction in self.reductions:
            check_token_reduction(token_reduction, levels)


def _parse_reduction(text: str) -> Reduction:
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"`token_reduction` must be numbers, or what each level removes joined by commas, got {text!r}: give for "
            "example 0.3 or 0.2,0.4."
        ) from error
    return parts if len(parts) > 1 else parts[0]


def _same_file(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


__all__ = ["BenchmarkArguments"]
