# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from cts_hf import superpatch_targets
from cts_hf.data import SCENE_CLASSES, build_scenes, load_scenes, load_segmentation_data


@pytest.fixture(scope="module")
def scenes():
    return build_scenes(60)


def test_rows(scenes):
    row = scenes[0]
    assert row["image"].mode == "RGB"
    assert row["label"].mode == "L"
    assert row["image"].size == row["label"].size == (128, 128)
    assert len(set(scenes["name"])) == 60


def test_every_class_occurs_and_no_other_id(scenes):
    counts = np.bincount(_labels(scenes).ravel())
    assert len(counts) == len(SCENE_CLASSES)
    assert counts.min() > 0.005 * counts.sum()


def test_a_scene_depends_on_seed_and_index_only(scenes):
    again = build_scenes(3)
    for index in range(3):
        assert again[index]["image"].tobytes() == scenes[index]["image"].tobytes()
        assert again[index]["label"].tobytes() == scenes[index]["label"].tobytes()
    assert build_scenes(1, seed=1)[0]["image"].tobytes() != scenes[0]["image"].tobytes()


def test_about_half_of_the_superpatches_hold_one_class(scenes):
    targets = superpatch_targets(torch.from_numpy(_labels(scenes)).long(), 16)
    assert 0.5 < targets.float().mean() < 0.7


def test_sizes_scale_the_same_geometry():
    small, large = (np.asarray(build_scenes(1, size)[0]["label"]) for size in (64, 128))
    assert (small == large[1::2, 1::2]).mean() > 0.95


def test_splits_share_no_scene():
    data = load_scenes(num_train=4, num_val=2, image_size=32)
    assert len(data.train) == 4
    assert len(data.validation) == 2
    assert not set(data.train["name"]) & set(data.validation["name"])
    assert len(data.palette) == len(data.classes) == len(SCENE_CLASSES)
    assert load_segmentation_data("scenes", num_train=1, num_val=1).classes == SCENE_CLASSES


@pytest.mark.parametrize("options", [{"num_images": 0}, {"num_images": 1, "image_size": 16}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must be at least"):
        build_scenes(**options)


def _labels(scenes):
    return np.stack([np.array(label) for label in scenes["label"]])
