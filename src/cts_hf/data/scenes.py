# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Built-in scenes: street and country views drawn by rule, for trying everything out without a download.

Every scene has large regions of one class beside thin structures, so that it matters which superpatches share a token.
"""

import io

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from .base import SegmentationData, parse_palette


SCENE_CLASSES = ("sky", "hill", "building", "tree", "grass", "road", "water", "car", "pole", "fence")
SCENE_PALETTE = parse_palette("8ecae6 b79ced c8553d 2d6a4f 95d55a 6c757d 277da1 f15bb5 f9c74f f3722c")

SKY, HILL, BUILDING, TREE, GRASS, ROAD, WATER, CAR, POLE, FENCE = range(len(SCENE_CLASSES))

# Typical colors of each class; every region draws one and varies it.
COLORS = {
    SKY: ((140, 185, 235), (185, 205, 225), (235, 190, 160)),
    HILL: ((120, 105, 140), (105, 115, 150)),
    BUILDING: ((170, 95, 75), (190, 160, 120), (150, 130, 115)),
    TREE: ((35, 75, 40), (50, 85, 35)),
    GRASS: ((120, 165, 60), (150, 165, 75)),
    ROAD: ((85, 85, 90), (100, 98, 98)),
    WATER: ((40, 95, 150), (45, 120, 140)),
    CAR: ((205, 35, 45), (235, 195, 40), (240, 240, 245), (190, 60, 160)),
    POLE: ((40, 30, 30), (55, 45, 35)),
    FENCE: ((225, 215, 200), (205, 170, 120)),
}
COLOR_JITTER = 12.0
# Standard deviation, in grey levels, of each class's pixel noise and of its noise in patches of 1/16 of the image.
FINE_NOISE = np.array([2, 5, 5, 16, 12, 6, 5, 5, 6, 5], dtype=np.float32)
COARSE_NOISE = np.array([5, 8, 4, 12, 10, 6, 6, 4, 4, 4], dtype=np.float32)

# Width of thin structures and size of noise patches, as a share of the image: one 8-pixel patch of a 128-pixel image.
THIN = 1 / 16
MIN_IMAGE_SIZE = 32


def load_scenes(num_train: int = 500, num_val: int = 100, image_size: int = 128, seed: int = 0) -> SegmentationData:
    """
    The built-in scenes as a data set with the splits train and val, which share no scene.

    Args:
        num_train, num_val: number of scenes of each split.
        image_size: height and width in pixels.
        seed: other seeds give other scenes.
    """
    scenes = build_scenes(num_train + num_val, image_size, seed)
    splits = {"train": scenes.select(range(num_train)), "val": scenes.select(range(num_train, num_train + num_val))}
    return SegmentationData(splits=DatasetDict(splits), classes=SCENE_CLASSES, palette=SCENE_PALETTE)


def build_scenes(num_images: int, image_size: int = 128, seed: int = 0) -> Dataset:
    """
    Draws scenes; a scene depends on its index, the seed and the size only.

    Args:
        num_images: number of scenes.
        image_size: height and width in pixels, at least 32.
        seed: other seeds give other scenes.

    Returns:
        data set with the columns image (RGB), label (mode "L", ids of `SCENE_CLASSES`) and name.

    Raises:
        ValueError: `num_images` below 1 or `image_size` below 32.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be at least 1, got {num_images}.")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"`image_size` must be at least {MIN_IMAGE_SIZE} for things to be visible, got {image_size}.")
    columns = {"image": [], "label": [], "name": []}
    for index in range(num_images):
        image, label = draw_scene(np.random.default_rng([seed, index]), image_size)
        columns["image"].append({"path": None, "bytes": _png(image)})
        columns["label"].append({"path": None, "bytes": _png(label)})
        columns["name"].append(f"scene_{seed}_{index:05d}")
    features = Features({"image": Image(mode="RGB"), "label": Image(), "name": Value("string")})
    return Dataset.from_dict(columns, features=features)


def draw_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Draws one scene: sky and grass, and three or four other things.

    Returns:
        image (size, size, 3) uint8 and label (size, size) uint8.
    """
    canvas = _Canvas(rng, size)
    horizon = rng.uniform(0.35, 0.55)
    canvas.paint(canvas.y < 1, SKY)
    canvas.paint(canvas.y > horizon, GRASS)
    # In the order of the list, so that what stands in front is painted last.
    for index in sorted(rng.choice(len(THINGS), rng.integers(3, 5), replace=False)):
        THINGS[index](canvas, rng, horizon)
    label = canvas.label
    return canvas.render(rng, label), label


class _Canvas:
    """A label map that is painted region by region; `x` and `y` are 0 at the upper left and 1 at the lower right."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng = rng
        self.size = size
        self.y, self.x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
        self.region = np.zeros((size, size), np.uint8)
        self.labels: list[int] = []
        self.colors: list[np.ndarray] = []

    def paint(self, region: np.ndarray, label: int) -> None:
        """Gives the pixels where `region` is true a class and a color of it, over what was painted there before."""
        colors = COLORS[label]
        color = np.asarray(colors[self.rng.integers(len(colors))]) + self.rng.normal(0, COLOR_JITTER, 3)
        self.region[region] = len(self.labels)
        self.labels.append(label)
        self.colors.append(color)

    @property
    def label(self) -> np.ndarray:
        """The class of each pixel."""
        return np.asarray(self.labels, np.uint8)[self.region]

    def render(self, rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
        """The image: colors, with texture and light drawn from `rng`."""
        image = np.asarray(self.colors, np.float32)[self.region] + self._texture(rng, label)[..., None]
        direction = rng.normal(0, 0.12, 2)
        light = rng.uniform(0.8, 1.15) + direction[0] * (self.x - 0.5) + direction[1] * (self.y - 0.5)
        tint = rng.uniform(0.94, 1.06, 3).astype(np.float32)
        return np.clip(image * light[..., None] * tint, 0, 255).astype(np.uint8)

    def _texture(self, rng: np.random.Generator, label: np.ndarray) -> np.ndarray:
        fine = rng.standard_normal((self.size, self.size), dtype=np.float32)
        cells = rng.standard_normal((round(1 / THIN), round(1 / THIN)), dtype=np.float32)
        coarse = np.asarray(PILImage.fromarray(cells).resize((self.size, self.size), PILImage.Resampling.BICUBIC))
        texture = fine * FINE_NOISE[label] + coarse * COARSE_NOISE[label]
        windows = (np.sin(self.x * rng.uniform(110, 140)) > 0.2) & (np.sin(self.y * rng.uniform(100, 130)) > 0)
        ripples = np.sin(self.y * rng.uniform(140, 180) + np.sin(self.x * 12))
        slats = np.sin(self.x * rng.uniform(180, 220)) < -0.3
        texture += np.where(label == BUILDING, -45 * windows, 0)
        texture += np.where(label == WATER, 16 * ripples, 0)
        texture += np.where(label == FENCE, -60 * slats, 0)
        return texture


def _draw_hill(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    x, y = canvas.x, canvas.y
    waves = np.sin(x * rng.uniform(3, 7) + rng.uniform(0, 6)) + 0.5 * np.sin(x * rng.uniform(8, 12))
    canvas.paint((y > horizon - rng.uniform(0.12, 0.2) - 0.05 * waves) & (y < horizon), HILL)


def _draw_water(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    side = int(rng.integers(2)) + rng.uniform(-0.1, 0.1)
    width, height = rng.uniform(0.4, 0.6), rng.uniform(0.2, 0.35)
    middle = rng.uniform(horizon + 0.2, 0.9)
    canvas.paint(
        (((canvas.x - side) / width) ** 2 + ((canvas.y - middle) / height) ** 2 < 1) & (canvas.y > horizon), WATER
    )


def _draw_road(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    far = rng.uniform(0.3, 0.7)
    near = far + rng.uniform(-0.2, 0.2)
    down = np.clip((canvas.y - horizon) / (1 - horizon), 0, 1)
    half_width = rng.uniform(0.03, 0.1) + rng.uniform(0.15, 0.3) * down
    canvas.paint((np.abs(canvas.x - far - (near - far) * down) < half_width) & (canvas.y > horizon), ROAD)


def _draw_building(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    left, top = rng.uniform(-0.2, 0.8), horizon - rng.uniform(0.15, 0.33)
    canvas.paint(_box(canvas, left, top, left + rng.uniform(0.3, 0.5), horizon + rng.uniform(0, 0.06)), BUILDING)


def _draw_fence(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    left, top = rng.uniform(-0.2, 0.5), horizon + rng.uniform(0, 0.3)
    box = _box(canvas, left, top, left + rng.uniform(0.5, 0.8), top + THIN * rng.uniform(1.3, 1.8))
    canvas.paint(box, FENCE)


def _draw_tree(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    middle, radius = rng.uniform(0, 1), rng.uniform(0.12, 0.22)
    foot = horizon + rng.uniform(0.02, 0.3)
    height = foot - radius - rng.uniform(0.06, 0.14)
    dx, dy = canvas.x - middle, canvas.y - height
    bumps = 1 + 0.08 * np.sin(np.arctan2(dy, dx) * int(rng.integers(5, 9)) + rng.uniform(0, 6))
    trunk = _box(canvas, middle - THIN / 2, height, middle + THIN / 2, foot)
    canvas.paint((dx**2 + dy**2 < (radius * bumps) ** 2) | trunk, TREE)


def _draw_car(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    down = rng.uniform(0.3, 0.9)
    foot, middle = horizon + down * (1 - horizon), rng.uniform(0.2, 0.8)
    half, height = 0.1 + 0.08 * down, 0.06 + 0.05 * down
    body = _box(canvas, middle - half, foot - height, middle + half, foot)
    cabin = _box(canvas, middle - 0.6 * half, foot - 1.8 * height, middle + 0.6 * half, foot)
    canvas.paint(body | cabin, CAR)


def _draw_pole(canvas: _Canvas, rng: np.random.Generator, horizon: float) -> None:
    left, width = rng.uniform(0.02, 0.9), THIN * rng.uniform(1.1, 1.4)
    foot = horizon + rng.uniform(0.05, 0.25)
    canvas.paint(_box(canvas, left, foot - rng.uniform(0.4, 0.6), left + width, foot), POLE)


# From the back to the front.
THINGS = (_draw_hill, _draw_water, _draw_road, _draw_building, _draw_fence, _draw_tree, _draw_car, _draw_pole)


def _box(canvas: _Canvas, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return (canvas.x > left) & (canvas.x < right) & (canvas.y > top) & (canvas.y < bottom)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()
