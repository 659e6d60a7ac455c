# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training transforms of the paper's code base (mmsegmentation), and the data sets that apply them reproducibly.

Every random number comes from the generator of its sample, which depends on seed, epoch and sample only: batches are
the same whatever the number of worker processes, and no global random state is read or changed.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

from ..model.configuration_cts_checks import channel_values
from .base import IGNORE_INDEX


CROP_TRIES = 10
BRIGHTNESS = 32 / 255
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
# 18 of the 180 steps of OpenCV's hue circle.
HUE = 18 / 180

Box = tuple[int, int, int, int]


class Transform(Protocol):
    """Turns a decoded image and label into tensors, drawing all randomness from `rng`."""

    def __call__(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]: ...


class TrainTransform:
    """
    Random resize, crop, flip and photometric distortion, then normalization and padding.

    Args:
        crop_size: height and width of what it gives, in pixels.
        base_size: (long edge, short edge) in pixels: scale 1 is the largest size of the image's aspect ratio that fits
            in. None is (4 * crop_size, crop_size), which is (2048, 512) for ADE20K at 512.
        scale_range: the image is resized to a random multiple of scale 1 in this range.
        max_class_share: a crop is drawn again, up to ten times, while one class has at least this share of its pixels
            that are not ignored. 1 takes the first crop.
        photometric_distortion: whether to change brightness, contrast, saturation and hue.
        image_mean, image_std: what pixels from 0 to 1 are normalized with, one number or one for each channel: those
            of the model's configuration.

    Returns, when called with a PIL image (RGB), a PIL label ("L") and a `numpy.random.Generator`:
        `pixel_values` float32 (3, crop_size, crop_size), normalized, and `labels` int64 (crop_size, crop_size).
        Images smaller than the crop are padded at the right and bottom with 0 and 255.

    Source: mmsegmentation's Resize, RandomCrop, RandomFlip, PhotoMetricDistortion, Normalize and Pad.
    """

    def __init__(
        self,
        crop_size: int,
        base_size: tuple[int, int] | None = None,
        scale_range: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        photometric_distortion: bool = True,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
    ):
        if crop_size < 1:
            raise ValueError(f"`crop_size` must be at least 1 pixel, got {crop_size}.")
        if base_size is not None and min(base_size) < 1:
            raise ValueError(f"`base_size` must be two lengths of at least 1 pixel, got {base_size}.")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"`scale_range` must be (low, high) with 0 < low <= high, got {scale_range}.")
        if not 0 < max_class_share <= 1:
            raise ValueError(f"`max_class_share` must be above 0 and at most 1 (any crop), got {max_class_share}.")
        self.crop_size = crop_size
        self.base_size = (4 * crop_size, crop_size) if base_size is None else base_size
        self.scale_range = scale_range
        self.max_class_share = max_class_share
        self.photometric_distortion = photometric_distortion
        self.image_mean = channel_values("image_mean", image_mean, num_channels=3)
        self.image_std = channel_values("image_std", image_std, num_channels=3)

    def __call__(self, image: Image.Image, label: Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        size = self._random_size(image.size, rng)
        labels = F.pil_to_tensor(label.resize(size, Image.Resampling.NEAREST))[0]
        crop = self._random_crop(labels, rng)
        image = _resize_then_crop(image, size, crop)
        pixels, labels = _flip_and_convert(F.pil_to_tensor(image), _cut(labels, crop), rng)
        if self.photometric_distortion:
            pixels = distort_colors(pixels, rng)
        pixels = F.normalize(pixels, self.image_mean, self.image_std)
        padding = [0, self.crop_size - labels.shape[1], 0, self.crop_size - labels.shape[0]]
        return {"pixel_values": pad(pixels, padding), "labels": pad(labels, padding, value=IGNORE_INDEX)}

    def _random_size(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        scale = rng.uniform(*self.scale_range)
        long_edge, short_edge = max(self.base_size) * scale, min(self.base_size) * scale
        factor = min(long_edge / max(size), short_edge / min(size))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def _random_crop(self, labels: torch.Tensor, rng: np.random.Generator) -> Box:
        height, width = labels.shape
        crop = self._random_box((width, height), rng)
        if self.max_class_share == 1:
            return crop
        for _ in range(CROP_TRIES):
            counts = _cut(labels, crop).flatten().bincount(minlength=IGNORE_INDEX)[:IGNORE_INDEX]
            if counts.max().item() < self.max_class_share * counts.sum().item():
                break
            crop = self._random_box((width, height), rng)
        return crop

    def _random_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        width, height = min(size[0], self.crop_size), min(size[1], self.crop_size)
        left, top = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
        return left, top, left + width, top + height


class SquashTransform:
    """
    Whole images resized to a square whatever their aspect ratio, and flipped: how the paper's policy was trained.

    Args:
        image_size: height and width of what it gives, in pixels.
        image_mean, image_std: as for `TrainTransform`.

    Returns, when called like `TrainTransform`:
        `pixel_values` float32 (3, image_size, image_size) and `labels` int64 (image_size, image_size).
    """

    def __init__(
        self,
        image_size: int,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
    ):
        if image_size < 1:
            raise ValueError(f"`image_size` must be at least 1 pixel, got {image_size}.")
        self.size = (image_size, image_size)
        self.image_mean = channel_values("image_mean", image_mean, num_channels=3)
        self.image_std = channel_values("image_std", image_std, num_channels=3)

    def __call__(self, image: Image.Image, label: Image.Image, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        pixels = F.pil_to_tensor(image.resize(self.size, Image.Resampling.BILINEAR))
        labels = F.pil_to_tensor(label.resize(self.size, Image.Resampling.NEAREST))[0]
        pixels, labels = _flip_and_convert(pixels, labels, rng)
        return {"pixel_values": F.normalize(pixels, self.image_mean, self.image_std), "labels": labels}


class _Samples:
    def __init__(self, dataset: Dataset | IterableDataset, transform: Transform, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        # Shared memory, so that worker processes that outlive an epoch (persistent_workers) see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes the following samples those of `epoch`. Call it before iterating over a loader."""
        self._epoch.fill_(epoch)

    def _sample(self, row: dict[str, Any], number: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, int(self._epoch), number])
        return self.transform(row["image"], row["label"], rng)


class TrainingSamples(_Samples, torch.utils.data.Dataset):
    """
    The rows of a data set as training samples. Sample `index` of an epoch is always the same.

    Args:
        dataset: rows with image and label, as in `SegmentationData.splits`.
        transform: `TrainTransform` or another `Transform`.
        seed: other seeds give other samples.
    """

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._sample(self.dataset[index], index)


class StreamingSamples(_Samples, torch.utils.data.IterableDataset):
    """
    The rows of a streamed data set as training samples; the sample of a named row is the same in any order.

    Args:
        dataset: rows with image, label and name, as in `SegmentationData.splits` when streaming.
        transform: `TrainTransform` or another `Transform`.
        seed: other seeds give other samples.
    """

    def set_epoch(self, epoch: int) -> None:
        """Makes the following samples those of `epoch`, and a shuffled stream use that epoch's order."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in self.dataset:
            yield self._sample(row, zlib.crc32(row["name"].encode()))


def collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Stacks training samples.

    Returns:
        `pixel_values` float32 (B, 3, H, W) and `labels` int64 (B, H, W).

    Raises:
        ValueError: samples of different sizes.
    """
    sizes = {tuple(sample["labels"].shape) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(f"Samples of one batch have the sizes {sorted(sizes)}: use a transform that gives one size.")
    return {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels")}


def distort_colors(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    Changes brightness, contrast, saturation and hue, each with probability 0.5; contrast first or last, as likely.

    Args:
        pixels: float (3, H, W) in [0, 1].

    Returns:
        float (3, H, W) in [0, 1].
    """
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        pixels = (pixels + rng.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 1)
    if contrast_first:
        pixels = _random_contrast(pixels, rng)
    if rng.random() < 0.5:
        pixels = _scale_saturation(pixels, rng.uniform(*SATURATION))
    if rng.random() < 0.5:
        pixels = F.adjust_hue(pixels, rng.uniform(-HUE, HUE))
    return pixels if contrast_first else _random_contrast(pixels, rng)


def _random_contrast(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    # torchvision's contrast moves pixels away from their mean; the paper's code base multiplies them.
    return (pixels * rng.uniform(*CONTRAST)).clamp(0, 1) if rng.random() < 0.5 else pixels


def _scale_saturation(pixels: torch.Tensor, factor: float) -> torch.Tensor:
    # Multiplies S of HSV, up to 1, with H and V unchanged: every channel's distance to the largest one is scaled.
    # torchvision's saturation blends with grey, which changes V.
    value = pixels.amax(0, keepdim=True)
    span = value - pixels.amin(0, keepdim=True)
    scale = torch.where(span > 0, value / span.clamp(min=1e-6), 1.0).clamp(max=factor)
    return value - (value - pixels) * scale


def _cut(labels: torch.Tensor, box: Box) -> torch.Tensor:
    left, top, right, bottom = box
    return labels[top:bottom, left:right]


def _flip_and_convert(
    pixels: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    # Flips half of the samples; of 8 bits become float pixels in [0, 1] and int64 labels.
    if rng.random() < 0.5:
        pixels, labels = F.horizontal_flip(pixels), F.horizontal_flip(labels)
    return F.to_dtype(pixels, torch.float32, scale=True), labels.long()


def _resize_then_crop(image: Image.Image, size: tuple[int, int], crop: Box) -> Image.Image:
    # Only the pixels of the crop are computed: at scale 2 most of a resized street scene is cut off.
    across, down = image.width / size[0], image.height / size[1]
    source = (crop[0] * across, crop[1] * down, min(crop[2] * across, image.width), min(crop[3] * down, image.height))
    return image.resize((crop[2] - crop[0], crop[3] - crop[1]), Image.Resampling.BILINEAR, box=source)
