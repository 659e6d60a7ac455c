# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Cityscapes, the 19 classes that its benchmark evaluates (Cordts et al., CVPR 2016)."""

from pathlib import Path

import numpy as np

from ..base import IGNORE_INDEX, UNKNOWN_ID, SegmentationData, label_lookup, parse_palette
from .reading import Source, named_files, read_benchmark


# Name, id in *_labelIds.png and color, in the order of the train ids.
TRAIN_CLASSES = (
    ("road", 7, "804080"),
    ("sidewalk", 8, "f423e8"),
    ("building", 11, "464646"),
    ("wall", 12, "66669c"),
    ("fence", 13, "be9999"),
    ("pole", 17, "999999"),
    ("traffic light", 19, "faaa1e"),
    ("traffic sign", 20, "dcdc00"),
    ("vegetation", 21, "6b8e23"),
    ("terrain", 22, "98fb98"),
    ("sky", 23, "4682b4"),
    ("person", 24, "dc143c"),
    ("rider", 25, "ff0000"),
    ("car", 26, "00008e"),
    ("truck", 27, "000046"),
    ("bus", 28, "003c64"),
    ("train", 31, "005064"),
    ("motorcycle", 32, "0000e6"),
    ("bicycle", 33, "770b20"),
)
CITYSCAPES_CLASSES = tuple(name for name, _, _ in TRAIN_CLASSES)
CITYSCAPES_PALETTE = parse_palette(" ".join(color for _, _, color in TRAIN_CLASSES))
NUM_LABEL_IDS = 34

LAYOUT = """The layout of Cityscapes (https://www.cityscapes-dataset.com, leftImg8bit and gtFine) is
  leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
  gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png   or NAME_gtFine_labelTrainIds.png, where every image has one"""

IMAGE_ENDING = "_leftImg8bit.png"
LABEL_IDS_ENDING = "_gtFine_labelIds.png"
TRAIN_IDS_ENDING = "_gtFine_labelTrainIds.png"


def load_cityscapes(data_dir: str | Path) -> SegmentationData:
    """
    Reads Cityscapes from its official layout. The test split is left out: its labels are not public.

    Args:
        data_dir: folder with `leftImg8bit` and `gtFine`. `*_labelIds.png` are read where there are any (they belong
            to the download), `*_labelTrainIds.png` otherwise.

    Returns:
        splits train and val of 19 classes; every other id of the data set is 255.

    Raises:
        DataError: nothing found, or a list of every file without counterpart, unreadable file and pair of different
            sizes.
    """
    root = Path(data_dir)
    has_label_ids = bool(named_files(root / "gtFine", "*/*/*", LABEL_IDS_ENDING))
    ending = LABEL_IDS_ENDING if has_label_ids else TRAIN_IDS_ENDING
    sources = {
        split: Source(
            images=named_files(root / "leftImg8bit" / split, "*/*", IMAGE_ENDING),
            labels=named_files(root / "gtFine" / split, "*/*", ending),
        )
        for split in ("train", "val")
    }
    lookup = _label_id_lookup() if has_label_ids else label_lookup(len(CITYSCAPES_CLASSES))
    splits = read_benchmark(root, sources, lookup, LAYOUT)
    return SegmentationData(splits=splits, classes=CITYSCAPES_CLASSES, palette=CITYSCAPES_PALETTE)


def _label_id_lookup() -> np.ndarray:
    lookup = np.full(256, UNKNOWN_ID, dtype=np.int16)
    lookup[:NUM_LABEL_IDS] = IGNORE_INDEX
    lookup[IGNORE_INDEX] = IGNORE_INDEX
    for train_id, (_, label_id, _) in enumerate(TRAIN_CLASSES):
        lookup[label_id] = train_id
    return lookup
