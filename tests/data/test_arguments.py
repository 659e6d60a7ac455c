# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import HfArgumentParser

from cts_hf.data import SCENE_CLASSES, DataError, load_segmentation_data
from cts_hf.data.arguments import DatasetArguments

from ..helpers.trees import label_ids, write_image, write_label


def load(*command_line):
    return HfArgumentParser(DatasetArguments).parse_args_into_dataclasses(list(map(str, command_line)))[0].load()


def test_scenes_are_the_default():
    assert load().classes == SCENE_CLASSES


def test_folder(tmp_path):
    write_image(tmp_path / "images" / "val" / "a.png")
    write_label(tmp_path / "labels" / "val" / "a.png", [1, 2, 9])
    data = load("--data_dir", tmp_path, "--ignore_index", 9)
    assert label_ids(data.validation[0]) == [1, 2, 255]


def test_data_set_of_datasets(tmp_path):
    rows = {"photo": [PILImage.new("RGB", (4, 4))], "mask": [PILImage.new("L", (4, 4), 2)]}
    dataset = Dataset.from_dict(rows).cast_column("photo", Image()).cast_column("mask", Image())
    dataset.to_parquet(tmp_path / "train.parquet")
    columns = ["--image_column", "photo", "--label_column", "mask", "--reduce_labels"]
    data = load("--dataset", tmp_path, *columns, "--classes", "cat", "dog", "--streaming")
    assert data.classes == ("cat", "dog")
    assert label_ids(next(iter(data.train))) == [1]


def test_where_the_data_lies_has_to_be_clear(tmp_path):
    with pytest.raises(DataError, match="needs `data_dir`"):
        load("--dataset", "ade20k")
    with pytest.raises(DataError, match="got it with 'scenes'"):
        load("--dataset", "scenes", "--data_dir", tmp_path)


def test_a_data_dir_that_is_not_there_is_refused(tmp_path):
    for data_dir in (tmp_path / "absent", "absent"):
        with pytest.raises(DataError, match=r"`data_dir` must be a folder that exists, got .*absent"):
            load("--data_dir", data_dir)
        with pytest.raises(DataError, match=r"`data_dir` must be a folder that exists, got .*absent"):
            load("--data_dir", data_dir, "--dataset", "ade20k")


def test_no_name_is_no_data_set(tmp_path, monkeypatch):
    write_image(tmp_path / "images" / "val" / "a.png")
    write_label(tmp_path / "labels" / "val" / "a.png", [1])
    monkeypatch.chdir(tmp_path)  # which a path without name would be
    with pytest.raises(DataError, match="`name_or_path` must be the name or the folder of a data set, got ''"):
        load("--dataset", "")
    with pytest.raises(DataError, match="`data_dir` must be a folder that exists, got ''"):
        load("--data_dir", "")
    with pytest.raises(DataError, match="There is no folder ''"):
        load_segmentation_data("ade20k", "")


def test_a_folder_without_images_is_refused(tmp_path):
    write_label(tmp_path / "labels" / "val" / "a.png", [1])
    with pytest.raises(DataError, match=f"There is no folder {tmp_path / 'images'}. The layout"):
        load("--data_dir", tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--ignore_index", 7], "ignore_index"),
        (["--reduce_labels"], "reduce_labels"),
        (["--classes", "cat", "dog"], "classes"),
        (["--streaming"], "streaming"),
        (["--dataset_config", "small"], "config_name"),
    ],
)
def test_options_that_a_data_set_does_not_have_are_refused(options, name):
    with pytest.raises(DataError, match=rf"load_scenes has no options \['{name}'\].* Leave out others"):
        load(*options)


def test_classes_of_a_folder_are_those_of_its_file(tmp_path):
    write_image(tmp_path / "images" / "val" / "a.png")
    write_label(tmp_path / "labels" / "val" / "a.png", [0])
    with pytest.raises(DataError, match=r"load_folder has no options \['classes'\]"):
        load("--data_dir", tmp_path, "--classes", "cat", "dog")


def test_ignore_index_is_an_id(tmp_path, capsys):
    write_label(tmp_path / "labels" / "val" / "a.png", [0])
    with pytest.raises(DataError, match="`ignore_index` must be an id of label files, which are 8-bit, got 300"):
        load("--data_dir", tmp_path, "--ignore_index", 300)
    with pytest.raises(SystemExit):
        load("--data_dir", tmp_path, "--ignore_index", "x")
    assert "invalid int value: 'x'" in capsys.readouterr().err
