# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cts_hf.data import DataError, benchmarks, load_segmentation_data
from cts_hf.data.benchmarks.ade20k import ADE20K_CLASSES
from cts_hf.data.benchmarks.cityscapes import CITYSCAPES_CLASSES
from cts_hf.data.benchmarks.pascal_context import PASCAL_CONTEXT_CLASSES

from ..helpers.trees import label_ids, write_image, write_label


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(root / f"images/{folder}/{name}.jpg")
        write_label(root / f"annotations/{folder}/{name}.png", [0, 1, 150])
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split in ("train", "val", "test"):
        name = f"{split}/aachen/aachen_000000_000019"
        write_image(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png")
        write_label(tmp_path / f"gtFine/{name}_gtFine_labelIds.png", np.arange(34))
        write_image(tmp_path / f"gtFine/{name}_gtFine_color.png", mode="RGBA")
    return tmp_path


@pytest.fixture
def pascal_context(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2010"
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    write_image(root / "JPEGImages/2007_000001.jpg")
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        (root / f"ImageSets/SegmentationContext/{split}.txt").write_text(f"{name}\n")
        write_image(root / f"JPEGImages/{name}.jpg")
        write_label(root / f"SegmentationClassContext/{name}.png", [0, 1, 59])
    return tmp_path


def test_class_lists():
    for classes, count, some in (
        (ADE20K_CLASSES, 150, {0: "wall", 1: "building", 20: "car", 91: "dirt track", 149: "flag"}),
        (CITYSCAPES_CLASSES, 19, {0: "road", 11: "person", 18: "bicycle"}),
        (PASCAL_CONTEXT_CLASSES, 60, {0: "background", 1: "aeroplane", 37: "person", 59: "wood"}),
    ):
        assert len(set(classes)) == len(classes) == count
        assert {index: classes[index] for index in some} == some


def test_a_file_and_a_line_in_the_registry_add_a_benchmark(pascal_context, tmp_path, monkeypatch):
    source = Path(benchmarks.__file__).with_name("pascal_context.py").read_text()
    (tmp_path / "roads.py").write_text(source.replace("load_pascal_context", "load_roads"))
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    monkeypatch.setattr("cts_hf.data.BENCHMARKS", (*benchmarks.BENCHMARKS, "roads"))
    assert load_segmentation_data("roads", pascal_context).num_classes == 60


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_splits_classes_and_colors(name, request):
    data = load_segmentation_data(name, request.getfixturevalue(name))
    assert list(data.splits) == ["train", "val"]
    assert len(data.train) == len(data.validation) == 1
    assert len(set(data.palette)) >= data.num_classes - 1
    assert data.train[0]["image"].mode == "RGB"


def test_ade20k_counts_from_one(ade20k):
    for root in (ade20k, ade20k / "ADEChallengeData2016"):
        row = load_segmentation_data("ade20k", root).train[0]
        assert label_ids(row) == [0, 149, 255]
        assert row["name"] == "ADE_train_00000001"


def test_cityscapes_label_ids_become_train_ids(cityscapes):
    label = np.asarray(load_segmentation_data("cityscapes", cityscapes).train[0]["label"]).ravel()[:34]
    evaluated = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert label[evaluated].tolist() == list(range(19))
    assert set(np.delete(label, evaluated).tolist()) == {255}


def test_cityscapes_train_ids_are_read_where_there_are_no_label_ids(cityscapes):
    for path in list(cityscapes.rglob("*_labelIds.png")):
        write_label(path.with_name(path.name.replace("labelIds", "labelTrainIds")), [0, 18, 255])
        path.unlink()
    assert label_ids(load_segmentation_data("cityscapes", cityscapes).validation[0]) == [0, 18, 255]


def test_pascal_context_keeps_background_and_reads_listed_images_only(pascal_context):
    data = load_segmentation_data("pascal_context", pascal_context / "VOCdevkit")
    assert data.train["name"][:] == ["2008_000002"]
    assert label_ids(data.train[0]) == [0, 1, 59]


def test_ids_that_are_no_class_are_named_when_a_row_is_read(pascal_context):
    write_label(pascal_context / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png", [0, 60, 77])
    data = load_segmentation_data("pascal_context", pascal_context)
    with pytest.raises(DataError, match=r"2008_000002: label ids \[60, 77\] .* 0 to 59"):
        data.train[0]


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_problem_is_listed_at_once(name, request):
    root = request.getfixturevalue(name)
    images = sorted(path for path in root.rglob("*") if path.suffix == ".jpg" or "leftImg8bit.png" in path.name)
    train, val = (next(path for path in images if word in str(path)) for word in _SPLIT_WORDS[name])
    write_image(train, size=(13, 8))
    val.unlink()
    with pytest.raises(DataError) as error:
        load_segmentation_data(name, root)
    message = str(error.value)
    assert "2 problems" in message
    assert f"{train}: is 13x8" in message
    assert val.name.split(".")[0].removesuffix("_leftImg8bit") in message


def test_files_of_one_name_are_refused(cityscapes):
    for path in sorted(cityscapes.glob("*/train/aachen/*")):
        other = cityscapes / path.relative_to(cityscapes).parents[1] / "bochum" / path.name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(path.read_bytes())
    name = "train/bochum/aachen_000000_000019_leftImg8bit.png"
    with pytest.raises(DataError, match=rf"2 problems .*\n.*{name} and .* have the same name"):
        load_segmentation_data("cityscapes", cityscapes)


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_hidden_files_are_skipped(name, request):
    root = request.getfixturevalue(name)
    for path in list(root.rglob("*.jpg")) + list(root.rglob("*_leftImg8bit.png")):
        path.with_name(f"._{path.name}").write_text("what macOS adds to archives")
    assert len(load_segmentation_data(name, root).train) == 1


def test_a_byte_order_mark_is_no_part_of_a_listed_name(pascal_context):
    listing = pascal_context / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt"
    listing.write_text("2008_000002\n", encoding="utf-8-sig")
    assert load_segmentation_data("pascal_context", pascal_context).train["name"][:] == ["2008_000002"]


def test_a_listing_that_is_no_file_is_refused(pascal_context):
    """Else its split would be left out without a word."""
    listing = pascal_context / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt"
    listing.unlink()
    listing.symlink_to("absent.txt")
    with pytest.raises(DataError, match=r"val\.txt must be a text file, got a folder, .* broken link"):
        load_segmentation_data("pascal_context", pascal_context)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_bombs_are_named(name, request, monkeypatch):
    root = request.getfixturevalue(name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(DataError, match=r"cannot be read as a picture \(Image size \(96 pixels\) exceeds limit"):
        load_segmentation_data(name, root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipes_named_like_images_are_reported(ade20k):
    path = ade20k / "ADEChallengeData2016/images/training/ADE_train_00000001.jpg"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"ADE_train_00000001\.jpg: must be a file, not a pipe, socket or device"):
        load_segmentation_data("ade20k", ade20k)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_a_missing_folder_is_named(name, tmp_path):
    with pytest.raises(DataError, match=f"There is no folder {tmp_path / 'absent'}"):
        load_segmentation_data(name, tmp_path / "absent")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_a_wrong_folder_is_told_the_layout(name, tmp_path):
    with pytest.raises(DataError, match="The layout of"):
        load_segmentation_data(name, tmp_path)


def test_a_benchmark_needs_its_folder(tmp_path):
    with pytest.raises(DataError, match="'ade20k' needs `data_dir`"):
        load_segmentation_data("ade20k")
    with pytest.raises(DataError, match="`data_dir` must be given only for ade20k"):
        load_segmentation_data("scenes", tmp_path)


def test_unknown_options_are_refused(ade20k):
    with pytest.raises(DataError, match=r"load_scenes has no options \['images'\]; it has .*image_size"):
        load_segmentation_data("scenes", images=3)
    with pytest.raises(DataError, match=r"load_ade20k has no options \['ignore_index'\]; it has none"):
        load_segmentation_data("ade20k", ade20k, ignore_index=3)


_SPLIT_WORDS = {
    "ade20k": ("training", "validation"),
    "cityscapes": ("train", "val"),
    "pascal_context": ("2008_000002", "2008_000003"),
}
