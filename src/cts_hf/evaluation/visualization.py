# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Segmentations and sharing grids as pictures, with Pillow and NumPy only."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..model.modeling_cts_grid import num_cells


Color = tuple[int, int, int]
ArrayLike = np.ndarray | torch.Tensor | Image.Image

IGNORED_COLOR = (0, 0, 0)
SHARED_COLOR = (255, 214, 10)
PATCH_LINE_COLOR = (255, 255, 255)
PATCH_LINE_OPACITY = 0.3

# The golden ratio: hues that follow each other lie far apart, however many there are.
HUE_STEP = 0.618033988749895
SHADES = ((0.65, 0.95), (0.85, 0.72), (0.45, 0.85), (0.95, 0.5))

PANEL_HEIGHT = 360
MARGIN = 12
TITLE_HEIGHT = 30
BACKGROUND = (255, 255, 255)
TEXT_COLOR = (33, 37, 41)


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """
    Colors that are easy to tell apart, the same ones every time.

    Returns:
        one (red, green, blue) of 0..255 for every class; more classes do not change the colors of the first ones.
    """
    colors = []
    for index in range(num_classes):
        saturation, value = SHADES[index % len(SHADES)]
        red, green, blue = colorsys.hsv_to_rgb((0.58 + index * HUE_STEP) % 1, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colors)


def colorize(segmentation: ArrayLike, palette: Sequence[Color] | None = None, ignore_index: int = 255) -> Image.Image:
    """
    A segmentation in the colors of its classes.

    Args:
        segmentation: (H, W) class ids.
        palette: a color for every class; None takes `default_palette`.
        ignore_index: id that is drawn black.

    Raises:
        ValueError: ids without a color.
    """
    ids = _array(segmentation)
    if ids.ndim != 2:
        raise ValueError(f"segmentation has the shape {ids.shape}, it must be (H, W) class ids.")
    ids = ids.astype(np.int64)
    ignored = ids == ignore_index
    highest = int(ids.max(initial=0, where=~ignored))
    palette = default_palette(highest + 1) if palette is None else palette
    if highest >= len(palette) or ids.min(initial=0, where=~ignored) < 0:
        unknown = sorted(set(np.unique(ids[~ignored]).tolist()) - set(range(len(palette))))
        raise ValueError(
            f"segmentation holds the ids {unknown}; the palette has colors for 0 to {len(palette) - 1}, "
            f"and {ignore_index} is ignored. Give more colors or another ignore_index."
        )
    colors = np.asarray([*palette, IGNORED_COLOR], dtype=np.uint8)
    return Image.fromarray(colors[np.where(ignored, len(palette), ids)])


def overlay(
    image: Image.Image,
    segmentation: ArrayLike,
    palette: Sequence[Color] | None = None,
    alpha: float = 0.55,
    ignore_index: int = 255,
) -> Image.Image:
    """
    A segmentation laid over its image; ignored pixels show the image.

    Args:
        image: PIL image of any mode.
        segmentation: (H, W) class ids; resized to the image where it is smaller or larger.
        palette: a color for every class; None takes `default_palette`.
        alpha: opacity of the colors, 0 (image only) to 1 (colors only).
        ignore_index: id that is left clear.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, it must be 0 (image only) to 1 (colors only).")
    image = image.convert("RGB")
    ids = _array(segmentation)
    colors = colorize(ids, palette, ignore_index).resize(image.size, Image.Resampling.NEAREST)
    opacity = Image.fromarray(np.where(ids == ignore_index, 0, round(255 * alpha)).astype(np.uint8))
    return Image.composite(colors, image, opacity.resize(image.size, Image.Resampling.NEAREST))


def draw_sharing_grid(
    image: Image.Image, shared_superpatches: ArrayLike, superpatch_size: int = 32, patch_size: int = 16
) -> Image.Image:
    """
    The tokens of an image: a box around every shared superpatch, thin lines between the patches that share nothing.

    Args:
        image: PIL image as the model saw it, resized but not padded.
        shared_superpatches: (Hs, Ws) bool, from the model's output.
        superpatch_size: height and width of a superpatch in pixels.
        patch_size: height and width of a patch in pixels.

    Returns:
        RGB picture, enlarged by a whole number where patches are too small to draw lines between.

    Raises:
        ValueError: sizes that do not fit each other, or a grid that does not cover the image.
    """
    shared = _array(shared_superpatches).astype(bool)
    if superpatch_size % patch_size:
        raise ValueError(f"superpatch_size {superpatch_size} must be a multiple of patch_size {patch_size}.")
    # The last row and column may hang over the edge: the model pads images to whole superpatches.
    expected = (num_cells(image.height, superpatch_size), num_cells(image.width, superpatch_size))
    if shared.shape != expected:
        raise ValueError(
            f"shared_superpatches is {shared.shape}, an image of {image.width}x{image.height} pixels has {expected} "
            f"superpatches of {superpatch_size}: give the image in the size that the model saw, and a single one."
        )
    scale = max(1, num_cells(16, patch_size))
    picture = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR)
    _draw_patches(picture, shared, patch_size * scale, superpatch_size * scale)
    _draw_superpatches(picture, shared, superpatch_size * scale)
    return picture


def prediction_panel(
    image: Image.Image,
    prediction: ArrayLike,
    labels: ArrayLike | None = None,
    shared_superpatches: ArrayLike | None = None,
    palette: Sequence[Color] | None = None,
    superpatch_size: int = 32,
    patch_size: int = 16,
    classes: Sequence[str] | None = None,
    ignore_index: int = 255,
) -> Image.Image:
    """
    One picture of an image, its ground truth, its prediction and which superpatches shared a token, with titles.

    Args:
        image: PIL image as the model saw it, resized but not padded.
        prediction: (H, W) class ids.
        labels: (H, W) ground truth; None leaves it out.
        shared_superpatches: (Hs, Ws) bool, from the model's output; None leaves the grid out.
        palette: a color for every class; None takes `default_palette`.
        superpatch_size, patch_size: height and width in pixels, for the grid.
        classes: names of the classes, for a legend of those that occur; None leaves it out.
        ignore_index: id that is drawn black in the ground truth.
    """
    shown = [ids for ids in map(_optional_array, (labels, prediction)) if ids is not None]
    present = np.unique(np.concatenate([ids.ravel() for ids in shown])).astype(int)
    present = [index for index in present.tolist() if index != ignore_index]
    if palette is None:
        palette = default_palette(max(present, default=0) + 1)
    panels = [("Image", image.convert("RGB"))]
    if labels is not None:
        panels.append(("Ground truth", colorize(labels, palette, ignore_index)))
    panels.append(("Prediction", colorize(prediction, palette, ignore_index)))
    if shared_superpatches is not None:
        shared = _array(shared_superpatches).astype(bool)
        grid = draw_sharing_grid(image, shared, superpatch_size, patch_size)
        panels.append((f"Shared tokens ({shared.sum()} of {shared.size} superpatches)", grid))
    page = _side_by_side(panels)
    if classes is not None:
        page = _with_legend(page, [(classes[index], palette[index]) for index in present])
    return page


def _draw_patches(picture: Image.Image, shared: np.ndarray, patch: int, superpatch: int) -> None:
    lines = Image.new("L", picture.size)
    draw = ImageDraw.Draw(lines)
    opacity = round(255 * PATCH_LINE_OPACITY)
    for row, column in np.argwhere(~shared).tolist():
        top, left = row * superpatch, column * superpatch
        for offset in range(0, superpatch, patch):
            draw.line((left, top + offset, left + superpatch, top + offset), fill=opacity)
            draw.line((left + offset, top, left + offset, top + superpatch), fill=opacity)
    picture.paste(PATCH_LINE_COLOR, mask=lines)


def _draw_superpatches(picture: Image.Image, shared: np.ndarray, superpatch: int) -> None:
    draw = ImageDraw.Draw(picture)
    width = max(1, superpatch // 16)
    for row, column in np.argwhere(shared).tolist():
        left, top = column * superpatch, row * superpatch
        right, bottom = min(left + superpatch, picture.width) - 1, min(top + superpatch, picture.height) - 1
        # A gap of one pixel keeps neighbours apart that both are shared.
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=SHARED_COLOR, width=width)


def _side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(size=16)
    pictures = [_fit(picture) for _, picture in panels]
    cells = [
        max(picture.width, round(font.getlength(title))) for (title, _), picture in zip(panels, pictures, strict=True)
    ]
    page = Image.new(
        "RGB", (sum(cells) + MARGIN * (len(cells) + 1), PANEL_HEIGHT + TITLE_HEIGHT + 2 * MARGIN), BACKGROUND
    )
    draw = ImageDraw.Draw(page)
    left = MARGIN
    for (title, _), picture, width in zip(panels, pictures, cells, strict=True):
        draw.text((left + width / 2, MARGIN + TITLE_HEIGHT / 2), title, TEXT_COLOR, font, anchor="mm")
        page.paste(picture, (left + (width - picture.width) // 2, MARGIN + TITLE_HEIGHT))
        left += width + MARGIN
    return page


def _fit(picture: Image.Image) -> Image.Image:
    width = max(1, round(picture.width * PANEL_HEIGHT / picture.height))
    # Averaging keeps thin lines when a picture shrinks, sharp pixels show what a small one really holds.
    resample = Image.Resampling.LANCZOS if picture.height > PANEL_HEIGHT else Image.Resampling.NEAREST
    return picture.resize((width, PANEL_HEIGHT), resample)


def _with_legend(page: Image.Image, entries: list[tuple[str, Color]]) -> Image.Image:
    font = ImageFont.load_default(size=14)
    swatch, line_height = 14, 24
    places, left, row = [], MARGIN, 0
    for name, _ in entries:
        width = swatch + 6 + round(font.getlength(name)) + 18
        if left > MARGIN and left + width > page.width - MARGIN:
            left, row = MARGIN, row + 1
        places.append((left, page.height + row * line_height))
        left += width
    taller = Image.new("RGB", (page.width, page.height + (row + 1) * line_height + MARGIN), BACKGROUND)
    taller.paste(page)
    draw = ImageDraw.Draw(taller)
    for (name, color), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + swatch, top + swatch), fill=tuple(color))
        draw.text((left + swatch + 6, top + swatch / 2), name, TEXT_COLOR, font, anchor="lm")
    return taller


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _optional_array(values: ArrayLike | None) -> np.ndarray | None:
    return None if values is None else _array(values)
