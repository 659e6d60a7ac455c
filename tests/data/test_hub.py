# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from cts_hf.data import DataError, StreamingSamples, TrainTransform, load_hub, load_segmentation_data

from .trees import label_ids, write_image, write_label


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


def test_a_folder_that_is_not_there():
    with pytest.raises(DataError, match="There is no folder /nowhere"):
        load_segmentation_data("/nowhere/data")


def _equal(one, two):
    return all(bool((one[key] == two[key]).all()) for key in one)
