import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import HfArgumentParser

from cts_hf.data import SCENE_CLASSES, DataError
from cts_hf.data.arguments import DatasetArguments

from .trees import label_ids, write_image, write_label


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
    with pytest.raises(DataError, match="needs data_dir"):
        load("--dataset", "ade20k")
    with pytest.raises(DataError, match="not for 'scenes'"):
        load("--dataset", "scenes", "--data_dir", tmp_path)
