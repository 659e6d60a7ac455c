# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind on the command line."""

import numpy as np
import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import DataError, build_scenes
from cts_hf.evaluation.prediction import find_images

from ..helpers.models import tiny_model
from ..helpers.scripts import run_main


@pytest.fixture
def options(tmp_path):
    tiny_model(num_labels=10).save_pretrained(tmp_path / "model")
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    output_dir = tmp_path / "out"
    return {"model": tmp_path / "model", "images": tmp_path / "images", "output_dir": output_dir, "num_workers": 0}


def scene():
    return np.asarray(build_scenes(1, image_size=64)[0]["image"].convert("L"))


def masks(options):
    folder = options["output_dir"] / "masks"
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


def test_sixteen_bits_give_the_mask_of_eight(monkeypatch, options):
    Image.fromarray(scene()).save(options["images"] / "eight.png")
    Image.fromarray(scene() * np.uint16(257)).save(options["images"] / "sixteen.png")
    assert run_main(monkeypatch, "predict.py", **options) == 0
    found = masks(options)
    assert np.array_equal(found["eight.png"], found["sixteen.png"])


def test_float_pictures_are_named_and_others_done(monkeypatch, options, capsys):
    Image.fromarray(scene()).save(options["images"] / "good.png")
    Image.fromarray(scene() / np.float32(255)).save(options["images"] / "float.tif")
    assert run_main(monkeypatch, "predict.py", **options) == 1
    assert f"{options['images'] / 'float.tif'}: cannot be read as a picture" in capsys.readouterr().err
    assert list(masks(options)) == ["good.png"]


def test_linked_folders_are_predicted_and_hidden_ones_are_not(monkeypatch, options, tmp_path):
    for folder in (tmp_path / "elsewhere", options["images"] / ".ipynb_checkpoints"):
        folder.mkdir()
        Image.fromarray(scene()).save(folder / "a.png")
    (options["images"] / "linked").symlink_to(tmp_path / "elsewhere")
    assert run_main(monkeypatch, "predict.py", **options) == 0
    assert list(masks(options)) == ["linked/a.png"]


def test_folders_that_are_not_there_are_refused(monkeypatch, options, tmp_path):
    with pytest.raises(ValueError, match=f"There is no folder {tmp_path / 'absent'}: give one that holds images"):
        find_images(tmp_path / "absent")
    with pytest.raises(DataError, match=r"`data_dir` must be a folder that exists, got .*absent"):
        run_main(monkeypatch, "evaluate.py", model=options["model"], data_dir=tmp_path / "absent")
