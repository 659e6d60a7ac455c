# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
from PIL import Image

from cts_hf.data import DataError, load_folder, load_segmentation_data

from ..helpers.trees import label_ids, write_image, write_label


@pytest.fixture
def folder(tmp_path):
    for split, names in {"train": ("a", "deep/b"), "val": ("c",)}.items():
        for name in names:
            write_image(tmp_path / f"images/{split}/{name}.jpg")
            write_label(tmp_path / f"labels/{split}/{name}.png", [0, 1, 2, 7])
    (tmp_path / "classes.txt").write_text("sky\nroad\ngreen car\n")
    return tmp_path


def test_rows_hold_rgb_images_and_class_ids(folder):
    data = load_folder(folder, ignore_index=7)
    assert data.classes == ("sky", "road", "green car")
    assert data.label2id["green car"] == 2
    assert data.train["name"][:] == ["a", "deep/b"]
    row = data.validation[0]
    assert row["image"].mode == "RGB"
    assert row["label"].mode == "L"
    assert row["image"].size == row["label"].size == (12, 8)
    assert label_ids(row) == [0, 1, 2, 255]


def test_the_factory_recognises_a_folder(folder):
    assert load_segmentation_data(str(folder), ignore_index=7).classes == load_folder(folder, ignore_index=7).classes


def test_classes_are_counted_without_a_list_of_them(folder):
    (folder / "classes.txt").unlink()
    assert load_folder(folder).num_classes == 8
    assert load_folder(folder, ignore_index=7).num_classes == 3
    reduced = load_folder(folder, reduce_labels=True)
    assert reduced.num_classes == 7
    assert label_ids(reduced.train[0]) == [0, 1, 6, 255]


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_of_any_mode_become_rgb(folder, mode):
    (folder / "images/train/a.jpg").unlink()
    write_image(folder / "images/train/a.png", mode=mode)
    assert load_folder(folder, ignore_index=7).train[0]["image"].mode == "RGB"


def test_rotated_photos_fit_their_upright_labels(folder):
    photo = Image.new("RGB", (8, 12))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(folder / "images/train/a.jpg", exif=exif)
    assert load_folder(folder, ignore_index=7).train[0]["image"].size == (12, 8)


def test_palette_labels_are_read_as_indices(folder):
    label = Image.fromarray(np.resize(np.array([0, 2], np.uint8), (8, 12)), mode="P")
    label.putpalette([200, 10, 10, 0, 0, 0, 10, 200, 10])
    label.save(folder / "labels/val/c.png")
    assert label_ids(load_folder(folder, ignore_index=7).validation[0]) == [0, 2]


def test_every_problem_is_listed_at_once(folder):
    write_image(folder / "images/train/no_label.jpg")
    write_label(folder / "labels/val/no_image.png", [0])
    write_image(folder / "images/train/large.jpg", size=(13, 8))
    write_label(folder / "labels/train/large.png", [0])
    write_image(folder / "images/train/ids.jpg")
    write_label(folder / "labels/train/ids.png", [0, 3, 9])
    write_image(folder / "images/train/twice.jpg")
    write_image(folder / "images/train/twice.png")
    write_label(folder / "labels/train/twice.png", [0])
    write_image(folder / "images/train/color.jpg")
    write_image(folder / "labels/train/color.png")
    write_image(folder / "images/train/torn.jpg", size=(64, 64))
    torn = folder / "images/train/torn.jpg"
    torn.write_bytes(torn.read_bytes()[:-40])
    write_label(folder / "labels/train/torn.png", [0], size=(64, 64))
    write_image(folder / "images/train/text.jpg")
    (folder / "labels/train/text.png").write_text("no picture")
    with pytest.raises(DataError) as error:
        load_folder(folder, ignore_index=7)
    message = str(error.value)
    assert "8 problems" in message
    for problem in (
        "no_label.jpg: no label file",
        "no_image.png: no image file",
        "large.png is 12x8 pixels",
        "ids.png: label ids [3, 9]",
        "twice.jpg have the same name",
        "color.png: the label picture has mode RGB",
        "torn.jpg: cannot be read",
        "text.png: cannot be read",
    ):
        assert problem in message


def test_an_id_that_should_be_ignored_is_explained(folder):
    with pytest.raises(DataError, match="pass it as ignore_index"):
        load_folder(folder)


def test_an_empty_folder_is_told_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"images/<split>/NAME\.jpg"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got 0 names"),
        ("sky\n\nroad\n", r"blank ones at \[2\]"),
        ("sky\nsky\nroad\n", r"repeated ones \['sky'\]"),
        ("sky\ngreen car\ngreen \t car\n", r"repeated ones \['green car'\]"),
        ("\n".join(map(str, range(300))), "at most 255 classes, got 300: label files are 8-bit"),
    ],
)
def test_a_bad_list_of_classes_is_refused(folder, text, message):
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=f"classes.txt, one class name a line, must name .*{message}"):
        load_folder(folder)


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1b"])
def test_control_characters_in_names_are_refused(folder, char):
    """Most of them end lines for Python, so that all names after them would move to the next id."""
    (folder / "classes.txt").write_text(f"sky\nro{char}ad\ngreen car\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"classes\.txt.* must hold no control characters .* got 'ro\\.*ad': remove"):
        load_folder(folder, ignore_index=7)


def test_names_in_any_script_and_line_ends_of_windows_are_read(folder):
    names = ("\u0645\u06cc\u200c\u0634\u0648\u062f", "\u7a7a\u3000\u5730", "green\tcar")
    (folder / "classes.txt").write_bytes("\r\n".join(names).encode())
    assert load_folder(folder, ignore_index=7).classes == names


def test_a_list_of_classes_that_is_no_file_is_refused(folder):
    path = folder / "classes.txt"
    for make in (lambda: path.symlink_to(folder / "absent"), path.mkdir):
        path.unlink()
        make()
        with pytest.raises(DataError, match=r"classes\.txt must be a text file, got a folder, .* broken link"):
            load_folder(folder, ignore_index=7)


def test_a_byte_order_mark_is_no_part_of_a_name(folder):
    (folder / "classes.txt").write_text("sky\nroad\ngreen car\n", encoding="utf-8-sig")
    assert load_folder(folder, ignore_index=7).classes == ("sky", "road", "green car")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_a_list_of_classes_in_another_encoding_is_refused(folder, encoding):
    (folder / "classes.txt").write_text("stra\xdfe\nroad\ngreen car\n", encoding=encoding)
    with pytest.raises(DataError, match=r"classes\.txt must be text in UTF-8, got another encoding: save it as"):
        load_folder(folder, ignore_index=7)


def test_linked_folders_are_read(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "images/d.jpg")
    write_label(elsewhere / "labels/d.png", [0])
    for kind in ("images", "labels"):
        (folder / kind / "train" / "linked").symlink_to(elsewhere / kind)
        (folder / kind / "train" / "deep" / "back").symlink_to(folder / kind / "train")
    assert load_folder(folder, ignore_index=7).train["name"][:] == ["a", "deep/b", "linked/d"]


def test_a_folder_that_is_linked_twice_is_a_problem(folder):
    for kind in ("images", "labels"):
        (folder / kind / "train" / "again").symlink_to(folder / kind / "train" / "deep")
    with pytest.raises(DataError, match=r"(?s)2 problems .*train/deep and .*train/again are the same folder"):
        load_folder(folder, ignore_index=7)


def test_hidden_folders_are_skipped(folder):
    write_image(folder / "images/train/.ipynb_checkpoints/a-checkpoint.jpg")
    write_image(folder / "images/.ipynb_checkpoints/a-checkpoint.jpg")
    write_label(folder / "labels/.git/a.png", [0])
    write_label(folder / "labels/val/__MACOSX/c.png", [0])
    assert list(load_folder(folder, ignore_index=7).splits) == ["train", "val"]


def test_sixteen_bit_images_are_scaled(folder):
    (folder / "images/train/a.jpg").unlink()
    levels = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    Image.fromarray(levels * np.uint16(257)).save(folder / "images/train/a.png")
    image = load_folder(folder, ignore_index=7).train[0]["image"]
    assert np.array_equal(image, Image.fromarray(levels).convert("RGB"))


def test_pictures_without_a_certain_meaning_and_bombs_are_problems(folder, monkeypatch):
    (folder / "images/train/a.jpg").unlink()
    Image.fromarray(np.full((8, 12), 0.5, np.float32)).save(folder / "images/train/a.tif")
    write_image(folder / "images/val/c.jpg", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(DataError) as error:
        load_folder(folder, ignore_index=7)
    message = str(error.value)
    assert "2 problems" in message
    assert "a.tif: cannot be read as a picture (A picture of mode 'F' must have values from 0 to 255" in message
    assert "c.jpg: cannot be read as a picture (Image size (4096 pixels) exceeds limit" in message


def test_a_file_that_breaks_later_is_named_when_its_row_is_read(folder):
    data = load_folder(folder, ignore_index=7)
    for kind, path in (("image", folder / "images/train/a.jpg"), ("label", folder / "labels/val/c.png")):
        path.write_text("no picture")
        rows = data.train if kind == "image" else data.validation
        with pytest.raises(DataError, match=f": the {kind} {path} cannot be read as a picture"):
            rows[0]


def test_names_that_are_no_utf8_are_problems(folder):
    strange = os.fsdecode(b"\xff")
    write_image(folder / f"images/train/{strange}.jpg")
    write_label(folder / f"labels/train/{strange}.png", [0])
    with pytest.raises(DataError, match=r"(?s)2 problems .*\\udcff\.jpg: must have a name in UTF-8") as error:
        load_folder(folder, ignore_index=7)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_missing_folder_of_pictures_is_named(folder, kind):
    (folder / kind).rename(folder / "pictures")
    with pytest.raises(DataError, match=f"There is no folder {folder / kind}. The layout"):
        load_segmentation_data(folder)


@pytest.mark.parametrize("ignore_index", [-1, 256, 300, "7", 7.0, True, None])
def test_ignore_index_must_fit_a_label_file(folder, ignore_index):
    message = (
        f"`ignore_index` must be an id of label files, which are 8-bit, got {ignore_index!r}: pass a whole number"
    )
    with pytest.raises(DataError, match=message):
        load_folder(folder, ignore_index=ignore_index)


@pytest.mark.parametrize(("ignore_index", "reduce_labels", "name"), [(0, False, "sky"), (3, True, "green car")])
def test_ignore_index_must_not_be_the_id_of_a_named_class(folder, ignore_index, reduce_labels, name):
    with pytest.raises(
        DataError, match=f"`ignore_index` must not be .* got {ignore_index}, which .*classes.txt names '{name}'"
    ):
        load_folder(folder, ignore_index, reduce_labels)


def test_ignore_index_may_follow_the_last_class(folder):
    (folder / "classes.txt").write_text("\n".join("abcdefg"))
    assert load_folder(folder, ignore_index=7).num_classes == 7


def test_a_missing_split_is_named(folder):
    with pytest.raises(DataError, match="no split called train"):
        _ = _without_train(folder).train


def _without_train(folder):
    for kind in ("images", "labels"):
        (folder / kind / "train").rename(folder / kind / "training")
    return load_folder(folder, ignore_index=7)
