# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Pascal Context, 59 classes and background (Mottaghi et al., CVPR 2014)."""

import os
from pathlib import Path

from ..base import DataError, SegmentationData, label_lookup, parse_names, read_text
from .ade20k import ADE20K_PALETTE
from .reading import Source, read_benchmark


PASCAL_CONTEXT_CLASSES = parse_names("""
background, aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car,
cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground,
horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep,
shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
""")
# Pascal Context has no colors of its own; the common code bases borrow the first ones of ADE20K.
PASCAL_CONTEXT_PALETTE = ADE20K_PALETTE[: len(PASCAL_CONTEXT_CLASSES)]

LAYOUT = """The layout of Pascal Context is that of VOC 2010 with the label maps of 59 classes beside it:
  VOCdevkit/VOC2010/JPEGImages/NAME.jpg
  VOCdevkit/VOC2010/SegmentationClassContext/NAME.png           0 is background, 1 to 59 are classes
  VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt   one NAME a line"""


def load_pascal_context(data_dir: str | Path) -> SegmentationData:
    """
    Reads Pascal Context from the layout in which it is commonly kept; background is a class, as in the paper's 60.

    Args:
        data_dir: `VOC2010`, or the folder that `VOCdevkit/VOC2010` or `VOC2010` lies in.

    Returns:
        splits train and val of 60 classes.

    Raises:
        DataError: nothing found, or a list of every file without counterpart, unreadable file and pair of different
            sizes.
    """
    candidates = [Path(data_dir) / below for below in ("VOCdevkit/VOC2010", "VOC2010", "")]
    root = next((path for path in candidates if (path / "ImageSets/SegmentationContext").is_dir()), None)
    if root is None:
        raise DataError(f"There is no ImageSets/SegmentationContext in {data_dir}. {LAYOUT}")
    sources = {}
    for split in ("train", "val"):
        listing = root / "ImageSets/SegmentationContext" / f"{split}.txt"
        names = read_text(listing).split() if os.path.lexists(listing) else []
        sources[split] = Source(
            images=_listed(root / "JPEGImages", names, ".jpg"),
            labels=_listed(root / "SegmentationClassContext", names, ".png"),
        )
    splits = read_benchmark(root, sources, label_lookup(len(PASCAL_CONTEXT_CLASSES)), LAYOUT)
    return SegmentationData(splits=splits, classes=PASCAL_CONTEXT_CLASSES, palette=PASCAL_CONTEXT_PALETTE)


def _listed(folder: Path, names: list[str], suffix: str) -> list[tuple[str, Path]]:
    # Whether a listed file exists shows when its header is read, in one list with all other problems.
    return [(name, folder / f"{name}{suffix}") for name in dict.fromkeys(names)]
