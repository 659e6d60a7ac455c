# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny picture files for the tests of the data set readers."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> None:
    """Writes a picture of (width, height) `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 128 if mode == "L" else (90, 120, 30, 255)[: len(mode)]).save(path)


def write_label(path: Path, ids: np.ndarray | list[int], size: tuple[int, int] = (12, 8)) -> None:
    """Writes a label map of (width, height) `size` in which all `ids` occur."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.asarray(ids, np.uint8), size[::-1])).save(path)


def label_ids(row: dict) -> list[int]:
    """The ids that occur in the label of a row."""
    return np.unique(np.asarray(row["label"])).tolist()
