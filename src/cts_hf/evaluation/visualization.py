# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Segmentations and sharing grids as pictures."""

import colorsys
import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw
from transformers import PreTrainedConfig

from ..model.modeling_cts_grid import num_cells
from ..model.modeling_cts_outputs import per_level


Color = tuple[int, int, int]
ArrayLike = np.ndarray | torch.Tensor | Image.Image

IGNORED_COLOR = (0, 0, 0)
SHARED_COLOR = (255, 214, 10)
PATCH_LINE_COLOR = (255, 255, 255)
PATCH_LINE_OPACITY = 0.3

# The golden ratio: hues that follow each other lie far apart, however many there are.
HUE_STEP = 0.618033988749895
SHADES = ((0.65, 0.95), (0.85, 0.72), (0.45, 0.85), (0.95, 0.5))

# In inches, of 100 pixels.
PANEL_HEIGHT, TITLE_WIDTH, MARGIN = 3.6, 2.8, 0.12


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
        raise ValueError(f"`segmentation` must be (H, W) class ids, got the shape {ids.shape}: give a single map.")
    ids = ids.astype(np.int64)
    ignored = ids == ignore_index
    highest = int(ids.max(initial=0, where=~ignored))
    palette = default_palette(highest + 1) if palette is None else palette
    if highest >= len(palette) or ids.min(initial=0, where=~ignored) < 0:
        unknown = sorted(set(np.unique(ids[~ignored]).tolist()) - set(range(len(palette))))
        raise ValueError(
            f"`segmentation` must be ids from 0 to {len(palette) - 1}, for which `palette` has colors, or "
            f"{ignore_index}, which is ignored, got {unknown}: give more colors or another `ignore_index`."
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
        raise ValueError(f"`alpha` must be 0 (image only) to 1 (colors only), got {alpha}: choose between these.")
    image = image.convert("RGB")
    ids = _array(segmentation)
    colors = colorize(ids, palette, ignore_index).resize(image.size, Image.Resampling.NEAREST)
    opacity = Image.fromarray(np.where(ids == ignore_index, 0, round(255 * alpha)).astype(np.uint8))
    return Image.composite(colors, image, opacity.resize(image.size, Image.Resampling.NEAREST))


def superpatch_sizes(config: PreTrainedConfig) -> tuple[int, ...]:
    """Height and width of the superpatches of each level of a model, in pixels."""
    return tuple(level * config.patch_size for level in config.superpatch_levels)


def draw_sharing_grid(
    image: Image.Image,
    shared_superpatches: ArrayLike | tuple[ArrayLike, ...],
    superpatch_size: int | Sequence[int] = 32,
    patch_size: int = 16,
) -> Image.Image:
    """
    The tokens of an image: a box around every shared superpatch, thin lines between the patches that share nothing.

    Args:
        image: PIL image as the model saw it, resized but not padded.
        shared_superpatches: (Hs, Ws) bool, from the model's output; a tuple of one per level if there are several.
        superpatch_size: height and width of a superpatch in pixels; one number per level if there are several, as
            `superpatch_sizes` gives them.
        patch_size: height and width of a patch in pixels.

    Returns:
        RGB picture, enlarged by a whole number where patches are too small to draw lines between.

    Raises:
        ValueError: sizes that do not fit each other, or a grid that does not cover the image.
    """
    levels = [_array(of_level).astype(bool) for of_level in per_level(shared_superpatches)]
    sizes = (superpatch_size,) if isinstance(superpatch_size, int) else tuple(superpatch_size)
    if len(sizes) != len(levels):
        raise ValueError(
            f"`superpatch_size` must be one number for each of the {len(levels)} levels of `shared_superpatches`, got "
            f"{superpatch_size}: give `superpatch_sizes(model.config)`."
        )
    if any(size % finer for finer, size in pairwise((patch_size, *sizes))):
        raise ValueError(
            f"`superpatch_size` must be a multiple of `patch_size`, and of the level before, got {superpatch_size} "
            f"and {patch_size}: give those of the model."
        )
    # The last row and column may hang over the edge: the model pads images to whole superpatches.
    whole = [num_cells(side, sizes[-1]) * sizes[-1] for side in image.size[::-1]]
    for index, (shared, size) in enumerate(zip(levels, sizes, strict=True)):
        expected = (whole[0] // size, whole[1] // size)
        if shared.shape == (image.height // size, image.width // size):
            # Encoders of transformers do not pad: what is behind the last whole superpatch never shares.
            behind = [(0, side - own) for side, own in zip(expected, shared.shape, strict=True)]
            levels[index] = np.pad(shared, behind)
        elif shared.shape != expected:
            raise ValueError(
                f"`shared_superpatches` must have the shape {expected} of an image of {image.height} x {image.width} "
                f"pixels with superpatches of {size}, got {shared.shape}: give a single image, in the size that the "
                "model saw."
            )
    scale = max(1, num_cells(16, patch_size))
    picture = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR)
    covered = np.zeros_like(levels[0])
    for shared, size in zip(levels, sizes, strict=True):
        covered |= np.kron(shared, np.ones((size // sizes[0],) * 2, dtype=bool))
    _draw_patches(picture, covered, patch_size * scale, sizes[0] * scale)
    for shared, size in zip(levels, sizes, strict=True):
        _draw_superpatches(picture, shared, size * scale)
    return picture


def prediction_panel(
    image: Image.Image,
    prediction: ArrayLike,
    labels: ArrayLike | None = None,
    shared_superpatches: ArrayLike | tuple[ArrayLike, ...] | None = None,
    palette: Sequence[Color] | None = None,
    superpatch_size: int | Sequence[int] = 32,
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
        shared_superpatches: as for `draw_sharing_grid`; None leaves the grid out.
        palette: a color for every class; None takes `default_palette`.
        superpatch_size, patch_size: as for `draw_sharing_grid`.
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
        grid = draw_sharing_grid(image, shared_superpatches, superpatch_size, patch_size)
        levels = [_array(of_level).astype(bool) for of_level in per_level(shared_superpatches)]
        counts = [f"{shared.sum()} of {shared.size}" for shared in levels]
        panels.append((f"Shared tokens ({' and '.join(counts)} superpatches)", grid))
    return _draw_panels(panels, [(classes[index], palette[index]) for index in present] if classes is not None else [])


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
        if right - 1 < left + 1 or bottom - 1 < top + 1:
            continue  # padding to whole superpatches
        # A gap of one pixel between shared neighbors.
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=SHARED_COLOR, width=width)


def _draw_panels(panels: list[tuple[str, Image.Image]], legend: list[tuple[str, Color]]) -> Image.Image:
    """Pictures of one shape beside each other, titles above them and the names of colors below."""
    cell = max(TITLE_WIDTH, *(PANEL_HEIGHT * picture.width / picture.height for _, picture in panels))
    width = (cell + MARGIN) * len(panels) - MARGIN
    figure = Figure(figsize=(width, PANEL_HEIGHT), dpi=100)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=MARGIN / cell)
    for axes, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(picture)
        axes.set_title(title, fontsize="medium")
        axes.set_axis_off()
    if legend:
        patches = [Patch(facecolor=np.divide(color, 255)) for _, color in legend]
        columns = max(1, round(width / 1.5))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
        drawn = figure.legend(patches, [str(index) for index in range(len(legend))], ncols=columns, **below)
        for label, (name, _) in zip(drawn.get_texts(), legend, strict=True):
            label.set(text=name, parse_math=False)  # a name may hold dollars, or begin as what legends leave out
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=MARGIN)
    return Image.open(buffer).convert("RGB")


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _optional_array(values: ArrayLike | None) -> np.ndarray | None:
    return None if values is None else _array(values)
