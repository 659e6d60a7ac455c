# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009 - `option` is `dataclasses.field`
"""The options of a training run that are about its images."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset

from ..data import SegmentationData, StreamingSamples, TrainingSamples, TrainTransform
from ..data.arguments import DatasetArguments
from ..data.transforms import Transform
from ..evaluation.windows import InferenceOptions
from ..hub.normalization import Normalization
from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from .options import FROM_1, PIXELS, THREADS, option, refuse_outside


STREAM_SHUFFLE_BUFFER = 1000


@dataclass
class DataArguments(DatasetArguments):
    """Which data set, and how samples are made of it."""

    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(None, "Split to evaluate on, 'val' or 'validation' by default.")
    eval_window: int | None = option(None, "Evaluate in square sliding windows of so many pixels; else whole images.")
    eval_stride: int | None = option(None, "Pixels between windows, the window itself by default.")
    max_eval_samples: int | None = option(None, "Evaluate on the first images only.")

    crop_size: int = option(
        512, "Height and width of training crops, in pixels. For a model of transformers, its own if this is 512."
    )
    base_size: list[int] | None = option(
        None,
        "Long and short edge, in pixels, of scale 1, 4 * crop_size and crop_size if unset. Images are evaluated with "
        "that short edge.",
    )
    scale_range: list[float] = option([0.5, 2.0], "Images are resized by a random factor in this range.")
    max_class_share: float = option(0.75, "A crop is redrawn while one class covers this share of it. 1: never.")
    photometric_distortion: bool = option(True, "Change brightness, contrast, saturation and hue.")
    num_workers: int = option(2, "Processes that read and transform images.")

    def __post_init__(self):
        for name, count in (("base_size", 2), ("scale_range", 2)):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"`{name}` must be {count} numbers, got {value}.")
        refuse_outside(
            self,
            **dict.fromkeys(("crop_size", "base_size", "eval_window", "eval_stride"), PIXELS),
            scale_range=(-100, 100),  # the transform checks that it is above 0
            num_workers=(0, THREADS),
            max_eval_samples=FROM_1,
        )
        # Options that do not fit each other are refused now, not when they are first used.
        self.transform(CtsPolicyConfig())
        self.inference()

    @property
    def shortest_edge(self) -> int:
        """Shorter side, in pixels, of images in evaluation and in use."""
        return self.crop_size if self.base_size is None else min(self.base_size)

    @property
    def name(self) -> str:
        """A short name of the data set, for folders and titles."""
        return Path(self.dataset or self.data_dir or "scenes").name

    def transform(self, config: CtsConfig | CtsPolicyConfig | Normalization) -> TrainTransform:
        """The training transform of these options, for a model with this configuration or normalization."""
        return TrainTransform(
            self.crop_size,
            base_size=None if self.base_size is None else tuple(self.base_size),
            scale_range=tuple(self.scale_range),
            max_class_share=self.max_class_share,
            photometric_distortion=self.photometric_distortion,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )

    def training_samples(
        self, data: SegmentationData, seed: int, transform: Transform
    ) -> TrainingSamples | StreamingSamples:
        """The training split through `transform`."""
        rows = data.split(self.train_split)
        if isinstance(rows, IterableDataset):
            return StreamingSamples(rows.shuffle(seed, buffer_size=STREAM_SHUFFLE_BUFFER), transform, seed)
        return TrainingSamples(rows, transform, seed)

    def evaluation_rows(self, data: SegmentationData) -> Dataset | IterableDataset:
        """The split to evaluate on, cut to `max_eval_samples`."""
        return data.evaluation_rows(self.eval_split, self.max_eval_samples)

    def inference(self) -> InferenceOptions:
        """How images are segmented in evaluation."""
        return InferenceOptions(window=self.eval_window, stride=self.eval_stride)
