# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Data sets for semantic segmentation, their training transforms and batches.

Every reader gives the same `SegmentationData`; `load_segmentation_data` finds the reader.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .base import IGNORE_INDEX, DataError, SegmentationData
from .benchmarks import BENCHMARKS, benchmark_reader
from .benchmarks.ade20k import load_ade20k
from .benchmarks.cityscapes import load_cityscapes
from .benchmarks.pascal_context import load_pascal_context
from .folder import load_folder
from .hub import load_hub
from .pictures import printable
from .scenes import SCENE_CLASSES, build_scenes, load_scenes
from .transforms import (
    SquashTransform,
    StreamingSamples,
    TrainingSamples,
    TrainTransform,
    collate,
)


__all__ = [
    "IGNORE_INDEX",
    "SCENE_CLASSES",
    "DataError",
    "SegmentationData",
    "SquashTransform",
    "StreamingSamples",
    "TrainTransform",
    "TrainingSamples",
    "build_scenes",
    "collate",
    "load_ade20k",
    "load_cityscapes",
    "load_folder",
    "load_hub",
    "load_pascal_context",
    "load_scenes",
    "load_segmentation_data",
]


def load_segmentation_data(
    name_or_path: str | Path, data_dir: str | Path | None = None, **options: Any
) -> SegmentationData:
    """
    Opens a data set by name or place.

    Args:
        name_or_path: "scenes" (built in); one of `benchmarks.BENCHMARKS`, such as "ade20k" (official layout in
            `data_dir`); a folder with `images` and `labels`; or whatever else `datasets.load_dataset` opens, such as a
            Hub id.
        data_dir: where a benchmark lies; for benchmarks only.
        options: of the reader: see `load_scenes`, `load_folder` and `load_hub`. The benchmarks have none.

    Raises:
        DataError: an option the reader does not have, a missing `data_dir`, or what the reader finds wrong.
    """
    name = str(name_or_path)
    if not name:
        raise DataError("`name_or_path` must be the name or the folder of a data set, got '': give one.")
    if name in BENCHMARKS:
        if data_dir is None:
            raise DataError(f"{name!r} needs `data_dir`: give the folder that holds it.")
        _refuse_missing(data_dir)
        return _call(benchmark_reader(name), options, data_dir)
    if data_dir is not None:
        raise DataError(
            f"`data_dir` must be given only for {', '.join(BENCHMARKS)}, got it with {name!r}: correct the name or, "
            "for a folder of your own, give that as name_or_path."
        )
    if name == "scenes":
        return _call(load_scenes, options)
    path = Path(name_or_path)
    if (path / "images").is_dir() or (path / "labels").is_dir():
        return _call(load_folder, options, path)
    if not _is_hub_id(name):
        _refuse_missing(path)
    return _call(load_hub, options, name)


def _refuse_missing(folder: str | Path) -> None:
    # The path of no name would be the working folder.
    if not str(folder) or not Path(folder).is_dir():
        raise DataError(f"There is no folder {printable(folder) or repr(folder)}: give one that holds a data set.")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _call(reader: Callable[..., SegmentationData], options: dict[str, Any], *args: Any) -> SegmentationData:
    allowed = list(inspect.signature(reader).parameters)[len(args) :]
    if unknown := sorted(options.keys() - set(allowed)):
        raise DataError(f"{reader.__name__} has no options {unknown}; it has {allowed or 'none'}. Leave out others.")
    return reader(*args, **options)
