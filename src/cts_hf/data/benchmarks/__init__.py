# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Readers of the benchmarks in their official layout, one file each.

To add one, such as Roads, write `roads.py` here and add its name to `BENCHMARKS` below. Then `load_segmentation_data`
and `--dataset roads --data_dir FOLDER` of the scripts find it:

    ROADS_CLASSES = parse_names("road, car, sky")
    LAYOUT = "The layout of Roads is ..."

    def load_roads(data_dir: str | Path) -> SegmentationData:
        root = Path(data_dir)
        sources = {
            split: Source(
                images=named_files(root / "images" / split, "*", ".jpg"),
                labels=named_files(root / "labels" / split, "*", ".png"),
            )
            for split in ("train", "val")
        }
        splits = read_benchmark(root, sources, label_lookup(len(ROADS_CLASSES)), LAYOUT)
        return SegmentationData(splits=splits, classes=ROADS_CLASSES)

`read_benchmark` pairs the files, checks them and lists everything that is wrong with them. `label_lookup` is the table
from stored ids to classes; `cityscapes.py` has one of its own.
"""

from collections.abc import Callable
from importlib import import_module

from ..base import SegmentationData


# `NAME.py` has the reader `load_NAME`.
BENCHMARKS = ("ade20k", "cityscapes", "pascal_context")


def benchmark_reader(name: str) -> Callable[..., SegmentationData]:
    """The reader of one of `BENCHMARKS`, a function of the folder that the benchmark lies in."""
    return getattr(import_module(f".{name}", __package__), f"load_{name}")
