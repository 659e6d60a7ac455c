# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from cts_hf.data import DataError, StreamingSamples, TrainTransform, load_hub, load_segmentation_data

from ..helpers.trees import label_ids, write_image, write_label


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for split in ("train", "validation"):
        for index in range(3):
            write_image(root / f"files/{index}.png", mode=("RGB", "L", "RGBA")[index])
            write_label(root / f"files/{index}_label.png", [0, 1, 2, 7])
        columns = {
            "photo": [str(root / f"files/{index}.png") for index in range(3)],
            "mask": [str(root / f"files/{index}_label.png") for index in range(3)],
            "caption": ["a", "b", "c"],
        }
        features = Features({"photo": Image(), "mask": Image(), "caption": Value("string")})
        rows = Dataset.from_dict(columns, features=features)
        (root / "set/data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(root / f"set/data/{split}-00000-of-00001.parquet")
    return root / "set"


@pytest.fixture
def parquet_of(tmp_path):
    def write(image, label):
        rows = {
            column: [_encoded(value) for value in values] for column, values in (("image", image), ("label", label))
        }
        features = Features({"image": Image(), "label": Image()})
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train.parquet")
        return tmp_path / "set"

    (tmp_path / "set").mkdir()
    return write


COLUMNS = {"image_column": "photo", "label_column": "mask"}


def test_rows_have_the_standard_columns(parquet):
    data = load_segmentation_data(parquet, **COLUMNS, ignore_index=7, classes=["a", "b", "c"])
    assert data.classes == ("a", "b", "c")
    assert data.validation["name"][:] == [f"validation_0000000{index}" for index in range(3)]
    for row in data.train:
        assert set(row) == {"image", "label", "name"}
        assert row["image"].mode == "RGB"
        assert label_ids(row) == [0, 1, 2, 255]


def test_classes_are_counted(parquet):
    assert load_hub(parquet, **COLUMNS, ignore_index=7).num_classes == 3
    assert load_hub(parquet, **COLUMNS, reduce_labels=True).num_classes == 7


def test_a_stream_gives_the_same_rows(parquet):
    options = {**COLUMNS, "ignore_index": 7, "classes": ["a", "b", "c"]}
    stored, stream = load_hub(parquet, **options), load_hub(parquet, streaming=True, **options)
    rows = list(stream.train)
    assert len(rows) == 3
    for row, same in zip(rows, stored.train, strict=True):
        assert set(row) == set(same)
        assert row["name"] == same["name"]
        assert all(np.array_equal(row[column], same[column]) for column in ("image", "label"))


def test_streamed_training_samples_depend_on_epoch_and_row(parquet):
    stream = load_hub(parquet, **COLUMNS, ignore_index=7, classes=["a", "b", "c"], streaming=True)
    samples = StreamingSamples(stream.train, TrainTransform(8, base_size=(32, 32)), seed=3)
    first = list(samples)
    assert len(first) == 3
    assert all(_equal(one, two) for one, two in zip(first, samples, strict=True))
    samples.set_epoch(1)
    assert not all(_equal(one, two) for one, two in zip(first, samples, strict=True))


def test_a_stream_needs_classes(parquet):
    with pytest.raises(DataError, match="pass classes"):
        load_hub(parquet, **COLUMNS, streaming=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "photo"}, "label_column is 'label', split train has the columns photo, mask, caption"),
        ({"image_column": "caption", "label_column": "mask"}, "image_column 'caption' of split train"),
    ],
)
def test_wrong_columns_are_named(parquet, columns, message):
    with pytest.raises(DataError, match=message):
        load_hub(parquet, **columns)


def test_ids_without_a_class_are_named_when_a_row_is_read(parquet):
    data = load_hub(parquet, **COLUMNS, classes=["a", "b"])
    with pytest.raises(DataError, match=r"train_00000000: label ids \[2, 7\]"):
        data.train[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_sixteen_bit_images_are_scaled(parquet_of, streaming):
    levels = np.arange(32, dtype=np.uint8).reshape(4, 8) * 8
    root = parquet_of([levels * np.uint16(257)], [levels // 64])
    row = next(iter(load_hub(root, classes=["a", "b", "c", "d"], streaming=streaming).train))
    assert np.array_equal(row["image"], np.repeat(levels[..., None], 3, axis=2))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image", np.full((4, 8), 0.5, np.float32), "the image: A picture of mode 'F' must have values from 0 to 255"),
        ("image", b"no picture", r"the image cannot be read as a picture"),
        ("label", b"no picture", r"the label cannot be read as a picture"),
        ("label", np.zeros((4, 8), np.float32), r"the label picture has mode F"),
        ("image", None, "there is no image. Remove this row"),
        ("label", None, "there is no label. Remove this row"),
    ],
)
def test_broken_rows_are_named(parquet_of, streaming, column, value, message):
    good = np.zeros((4, 8), np.uint8)
    columns = {"image": [good, good], "label": [good, good]}
    columns[column][1] = value
    data = load_hub(parquet_of(**columns), classes=["a"], streaming=streaming)
    with pytest.raises(DataError, match=f"train_00000001: {message}"):
        list(data.train)


def test_a_broken_label_is_named_when_classes_are_counted(parquet_of):
    with pytest.raises(DataError, match="train_00000000: the label cannot be read as a picture"):
        load_hub(parquet_of([np.zeros((4, 8), np.uint8)], [b"no picture"]))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "name every class once, got 0 names"),
        (["cat", "cat"], r".*repeated ones \['cat'\]"),
        (["cat", "dog", " cat"], r".*repeated ones \['cat'\]"),
        (["cat", ""], r".*blank ones at \[2\]"),
        ([f"class {index}" for index in range(300)], "name at most 255 classes, got 300"),
        ("cat", "be a list of names, got 'cat'"),
        ([1, 2], r"be a list of names, got \[1, 2\]"),
    ],
)
def test_bad_classes_are_refused(parquet, classes, message):
    with pytest.raises(DataError, match=f"`classes` must {message}"):
        load_hub(parquet, **COLUMNS, classes=classes)


def test_ignore_index_is_checked_before_anything_is_opened():
    with pytest.raises(DataError, match="`ignore_index` must be an id of label files, which are 8-bit, got 300"):
        load_hub("nobody/nothing", ignore_index=300)


@pytest.mark.parametrize("folder", ["/nowhere/data", "./nowhere", "no/where/data"])
def test_a_folder_that_is_not_there(folder):
    with pytest.raises(DataError, match=r"There is no folder .*where"):
        load_segmentation_data(folder)


def test_a_folder_that_holds_no_data(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(DataError, match="or one with images/<split> and labels/<split>, which could not be found"):
        load_segmentation_data(tmp_path)


def _encoded(value):
    return {"path": None, "bytes": value} if isinstance(value, bytes) else value


def _equal(one, two):
    return all(bool((one[key] == two[key]).all()) for key in one)
