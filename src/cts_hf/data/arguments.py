# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which data set, as command-line options that all example scripts share."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from . import IGNORE_INDEX, DataError, SegmentationData, load_segmentation_data
from .benchmarks import BENCHMARKS


@dataclass
class DatasetArguments:
    """Which data set, for `transformers.HfArgumentParser`."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "'scenes' (built in, the default), "
            f"{', '.join(map(repr, BENCHMARKS))} (with --data_dir), or a Hub id."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with images/<split>, labels/<split> and classes.txt; with --dataset, the folder of that "
            "benchmark."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of pictures of a Hub data set."})
    label_column: str = field(default="label", metadata={"help": "Column of label maps of a Hub data set."})
    classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes of a Hub data set; needed for --streaming."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read a Hub data set row by row, not as a download; training needs --max_steps."},
    )
    ignore_index: int = field(
        default=IGNORE_INDEX, metadata={"help": "Stored id of pixels to ignore, of a folder or Hub data set."}
    )
    reduce_labels: bool = field(
        default=False,
        metadata={"help": "Stored ids count classes from 1, 0 is ignored; of a folder or Hub data set."},
    )

    def load(self) -> SegmentationData:
        """Opens the data set; raises `cts_hf.data.DataError` that lists everything wrong with it."""
        # Options of other data sets are refused where they were given, rather than ignored.
        defaults = {option.name: option.default for option in fields(DatasetArguments)}
        options = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        dataset, data_dir = options.pop("dataset", None), options.pop("data_dir", None)
        if "dataset_config" in options:
            options["config_name"] = options.pop("dataset_config")
        # The path of no name would be the working folder.
        if data_dir is not None and not (data_dir and Path(data_dir).is_dir()):
            raise DataError(f"`data_dir` must be a folder that exists, got {data_dir!r}: correct it.")
        if dataset is None and data_dir is not None:
            return load_segmentation_data(data_dir, **options)
        return load_segmentation_data("scenes" if dataset is None else dataset, data_dir, **options)
