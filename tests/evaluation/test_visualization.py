# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cts_hf.evaluation.visualization import (
    IGNORED_COLOR,
    SHARED_COLOR,
    colorize,
    default_palette,
    draw_sharing_grid,
    overlay,
    prediction_panel,
    superpatch_sizes,
)

from ..helpers.figures import saved_figures
from ..helpers.models import tiny_config


@pytest.fixture
def segmentation():
    ids = np.zeros((64, 96), np.int64)
    ids[20:, 30:] = 1
    ids[50:, :10] = 255
    return ids


@pytest.fixture
def image():
    return Image.new("RGB", (96, 64), (40, 80, 120))


def test_default_colors_differ_and_do_not_change_with_their_number():
    palette = default_palette(150)
    assert len(set(palette)) == 150
    assert default_palette(10) == palette[:10]
    first = np.asarray(palette[:12], float)
    distances = np.linalg.norm(first[:, None] - first[None], axis=-1) + 1000 * np.eye(12)
    assert distances.min() > 30


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda ids: Image.fromarray(ids.astype(np.uint8))])
def test_colorize(segmentation, kind):
    picture = colorize(kind(segmentation), [(1, 2, 3), (4, 5, 6)])
    assert picture.size == (96, 64)
    assert picture.getpixel((0, 0)) == (1, 2, 3)
    assert picture.getpixel((95, 63)) == (4, 5, 6)
    assert picture.getpixel((0, 63)) == IGNORED_COLOR


def test_colorize_refuses_ids_without_color(segmentation):
    with pytest.raises(ValueError, match=r"ids from 0 to 0, .* or 255, which is ignored, got \[1\]"):
        colorize(segmentation, [(1, 2, 3)])
    with pytest.raises(ValueError, match=r"got \[-1\]"):
        colorize(segmentation - 1, default_palette(300), ignore_index=254)
    with pytest.raises(ValueError, match=r"must be \(H, W\)"):
        colorize(segmentation[None])


def test_overlay_blends_and_leaves_ignored_pixels_clear(segmentation, image):
    palette = [(200, 200, 200), (0, 0, 0)]
    picture = overlay(image, segmentation, palette, alpha=0.5)
    assert np.abs(np.subtract(picture.getpixel((0, 0)), (120, 140, 160))).max() <= 1
    assert picture.getpixel((0, 63)) == (40, 80, 120)
    assert np.array_equal(overlay(image, segmentation, palette, alpha=0), image)
    assert overlay(image, segmentation[::2, ::2], palette).size == image.size
    with pytest.raises(ValueError, match=r"`alpha` must be 0 .*, got 1\.5"):
        overlay(image, segmentation, palette, alpha=1.5)


def test_sharing_grid_marks_shared_superpatches_only(image):
    shared = torch.tensor([[True, False, False], [False, False, False]])
    picture = np.asarray(draw_sharing_grid(image, shared, superpatch_size=32, patch_size=16))
    assert picture.shape == (64, 96, 3)
    marked = (picture == SHARED_COLOR).all(-1)
    assert marked[:32, :32].any()
    assert not marked[:, 32:].any()
    assert not marked[32:].any()
    assert (picture[8:24, 8:24] == (40, 80, 120)).all()
    assert not (picture[:32, 48] == (40, 80, 120)).all()


def test_sharing_grid_covers_padded_images_and_small_patches():
    image = Image.new("L", (70, 40))
    assert draw_sharing_grid(image, np.ones((2, 3), bool), 32, 16).size == (70, 40)
    assert draw_sharing_grid(image, np.zeros((5, 9), bool), 8, 4).size == (280, 160)


def test_sharing_grid_shows_boxes_of_every_size():
    """Of 5 x 3 superpatches of 32, padded to 3 x 2 of 64; those of 64 that share hide the lines inside."""
    image = Image.new("RGB", (80, 150), "black")
    fine, coarse = np.zeros((6, 4), bool), np.zeros((3, 2), bool)
    plain = np.array(draw_sharing_grid(image, (fine, coarse), (32, 64)))
    assert (plain[16 * 3] != 0).any()  # a line between patches
    fine[5], coarse[0, 0] = True, True
    drawn = np.array(draw_sharing_grid(image, (torch.from_numpy(fine), torch.from_numpy(coarse)), (32, 64)))
    assert (drawn[8:56, 8:56] == 0).all()  # one box, nothing in it
    assert (drawn[1:63, 1] == SHARED_COLOR).all()
    assert (drawn[64:, :] == plain[64:, :]).all()  # the last row of superpatches is padding, and not seen
    with pytest.raises(ValueError, match=r"shape \(6, 4\) .* superpatches of 32, got \(5, 3\)"):
        draw_sharing_grid(image, (fine[:5, :3], coarse[:2, :1]), (32, 64))


def test_sharing_grid_takes_sizes_from_the_levels_of_the_model():
    """Of 7 x 5 patches that are not padded: 3 x 2 superpatches of 32 and 1 x 1 of 64, whose ratio does not say so."""
    config = tiny_config(superpatch_levels=(2, 4), patch_size=16)
    assert superpatch_sizes(config) == (32, 64)
    image = Image.new("RGB", (80, 112), "black")
    fine, coarse = np.zeros((3, 2), bool), np.ones((1, 1), bool)
    drawn = np.array(draw_sharing_grid(image, (fine, coarse), superpatch_sizes(config), config.patch_size))
    assert (drawn[8:56, 8:56] == 0).all()  # one box, nothing in it
    assert (drawn[1:63, 1] == SHARED_COLOR).all()
    assert not (drawn[64:] == SHARED_COLOR).all(-1).any()


def test_sharing_grid_refuses_what_does_not_fit(image):
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3\) of an image of 64 x 96 pixels"):
        draw_sharing_grid(image, np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="multiple of `patch_size`, and of the level before, got 32 and 12"):
        draw_sharing_grid(image, np.ones((2, 3), bool), 32, 12)
    with pytest.raises(ValueError, match=r"one number for each of the 2 levels .*, got 32"):
        draw_sharing_grid(image, (np.ones((2, 3), bool), np.ones((1, 2), bool)))


def test_panel_grows_with_what_it_shows(segmentation, image):
    shared = np.ones((2, 3), bool)
    alone = prediction_panel(image, np.minimum(segmentation, 1))
    full = prediction_panel(image, segmentation, segmentation, shared)
    legend = prediction_panel(image, segmentation, segmentation, shared, classes=("wall", "floor"))
    assert alone.width < full.width == legend.width
    assert alone.height == full.height < legend.height
    # All is in the picture: nothing but the background reaches its edge.
    for page in map(np.asarray, (alone, full, legend)):
        assert (np.concatenate([page[0], page[-1], page[:, 0], page[:, -1]]) == 255).all()
    # The colors of the classes and those of the image, which are not mixed where they are flat.
    for color in (*default_palette(2), (40, 80, 120), SHARED_COLOR):
        assert (np.asarray(full) == color).all(-1).any()


@pytest.mark.parametrize("classes", [("wall", "floor"), ("_", "$a^b^c$")])
def test_panel_shows_what_its_titles_say(monkeypatch, segmentation, image, classes):
    figures, shared, prediction = saved_figures(monkeypatch), np.eye(2, 3, dtype=bool), 1 - np.minimum(segmentation, 1)
    page = prediction_panel(image, prediction, segmentation, shared, classes=classes)
    assert page.mode == "RGB"
    (figure,) = figures
    assert {axes.get_title(): axes.images[0].get_array().tolist() for axes in figure.axes} == {
        "Image": np.asarray(image).tolist(),
        "Ground truth": np.asarray(colorize(segmentation)).tolist(),
        "Prediction": np.asarray(colorize(prediction)).tolist(),
        "Shared tokens (2 of 6 superpatches)": np.asarray(draw_sharing_grid(image, shared)).tolist(),
    }
    (legend,) = figure.legends
    assert tuple(text.get_text() for text in legend.get_texts()) == classes
    colors = [np.multiply(patch.get_facecolor()[:3], 255).round().tolist() for patch in legend.get_patches()]
    assert colors == list(map(list, default_palette(2)))


def test_titles_of_narrow_images_do_not_overlap(monkeypatch):
    figures = saved_figures(monkeypatch)
    image = Image.new("RGB", (32, 320))
    prediction_panel(image, np.zeros((320, 32), int), shared_superpatches=np.ones((10, 1), bool))
    boxes = [axes.title.get_window_extent() for axes in figures[0].axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
