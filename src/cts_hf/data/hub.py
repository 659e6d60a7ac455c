# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Any data set that `datasets.load_dataset` opens: from the Hub, or a local folder or script-free format."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from tqdm.auto import tqdm

from .base import (
    IGNORE_INDEX,
    DataError,
    ExampleReader,
    SegmentationData,
    check_classes,
    check_ignore_index,
    decode_ids,
    label_lookup,
    numbered_classes,
)


def load_hub(
    path: str | Path,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    classes: Sequence[str] | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce_labels: bool = False,
    streaming: bool = False,
    revision: str | None = None,
) -> SegmentationData:
    """
    Reads a data set with `datasets.load_dataset`.

    Args:
        path: id on the Hub, or a local folder that `load_dataset` understands.
        config_name: configuration of the data set, where it has several.
        image_column: column of pictures.
        label_column: column of label pictures: one channel, the class id of every pixel.
        classes: name of every class. Without it all labels are read once to count the classes, which streaming cannot.
        ignore_index: stored id of pixels that are neither learned nor measured; rows hold 255 there. 255 itself is
            always ignored.
        reduce_labels: whether labels count classes from 1 and 0 is ignored, as in ADE20K.
        streaming: whether to read rows as they are needed instead of downloading the data set first. The splits are
            then `IterableDataset`.
        revision: branch, tag or commit on the Hub.

    Returns:
        the splits as they are called there. Names are `<split>_<row>`, rows of a stream counted as they arrive.

    Raises:
        DataError: nothing that can be opened, unknown columns, columns that are not pictures, blank or repeated
            classes, or no classes for a stream. Rows raise it too, when they are read, for pictures that cannot be
            read, ids without class and labels of another size than their image.
    """
    check_ignore_index(ignore_index)
    if classes is not None:
        check_classes(classes, "`classes`")
    if classes is None and streaming:
        raise DataError("A stream cannot be read in advance to count its classes: pass classes, the name of each one.")
    try:
        opened = load_dataset(str(path), config_name, revision=revision, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{str(path)!r} must be a data set on the Hub, a folder that `datasets` can open, or one with "
            f"images/<split> and labels/<split>, which could not be found: {error}"
        ) from error
    splits = {split: _with_standard_columns(split, rows, image_column, label_column) for split, rows in opened.items()}
    if classes is None:
        classes = numbered_classes(_ids_of_labels(splits), ignore_index, reduce_labels)
    reader = ExampleReader(label_lookup(len(classes), ignore_index, reduce_labels))
    if streaming:
        # Without declared features the decoded pictures pass through, instead of being encoded and decoded again.
        read = {name: rows.map(reader, batched=True, batch_size=1) for name, rows in splits.items()}
        return SegmentationData(splits=IterableDatasetDict(read), classes=tuple(classes))
    read = {name: rows.with_transform(reader) for name, rows in splits.items()}
    return SegmentationData(splits=DatasetDict(read), classes=tuple(classes))


def _with_standard_columns(
    split: str, rows: Dataset | IterableDataset, image_column: str, label_column: str
) -> Dataset | IterableDataset:
    columns = rows.column_names
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            raise DataError(f"{option} is {column!r}, split {split} has the columns {', '.join(columns)}: choose one.")
        if not isinstance(rows.features[column], Image):
            raise DataError(
                f"{option} {column!r} of split {split} holds {rows.features[column]}, it must hold pictures."
            )
    rows = rows.select_columns([image_column, label_column])
    for column in (image_column, label_column):
        # The reader decodes. Before columns are renamed, which decodes the rows of a stream.
        rows = rows.cast_column(column, Image(decode=False))
    rows = rows.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    if isinstance(rows, IterableDataset):
        return rows.map(_Naming(split), with_indices=True)
    return rows.add_column("name", [f"{split}_{index:08d}" for index in range(len(rows))])


class _Naming:
    def __init__(self, split: str):
        self.split = split

    def __call__(self, row: dict, index: int) -> dict:
        return {**row, "name": f"{self.split}_{index:08d}"}


def _ids_of_labels(splits: dict[str, Dataset]) -> Iterator[np.ndarray]:
    for split, rows in splits.items():
        labels = rows.select_columns(["label", "name"])
        for row in tqdm(labels, desc=f"counting the classes of {split}", leave=False):
            yield np.unique(decode_ids(row["name"], row["label"]))
