# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Any folder `images/<split>` and `labels/<split>`."""

import os
from pathlib import Path

from datasets import DatasetDict

from .base import (
    IGNORE_INDEX,
    DataError,
    Pair,
    SegmentationData,
    check_classes,
    check_ignore_index,
    dataset_of_pairs,
    label_lookup,
    numbered_classes,
    read_text,
)
from .checks import check_contents, id_problems, match_files, raise_problems
from .pictures import find_pictures, is_hidden


IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
LABEL_SUFFIXES = frozenset({".png"})

LAYOUT = """The layout of a folder data set is
  images/<split>/NAME.jpg   any picture format; folders and links to folders below <split> are allowed
  labels/<split>/NAME.png   same size, one channel, the class id of every pixel
  classes.txt               optional: one class name a line, line 1 is id 0
with splits such as train, val and test."""

ID_HINT = """If an id stands for pixels to ignore, pass it as ignore_index. If ids count classes from 1 and 0 is to be
ignored, pass reduce_labels. """


def load_folder(
    data_dir: str | Path, ignore_index: int = IGNORE_INDEX, reduce_labels: bool = False
) -> SegmentationData:
    """
    Reads a folder of images and label maps.

    Every file is decoded once, so that whatever is wrong is known before training starts. Without `classes.txt` there
    are as many classes as the highest id found, plus one.

    Args:
        data_dir: folder with `images/<split>/*` and `labels/<split>/*.png`, and `classes.txt` if there is one.
        ignore_index: id in the label files of pixels that are neither learned nor measured; rows hold 255 there.
            255 itself is always ignored.
        reduce_labels: whether the label files count classes from 1 and 0 is ignored, as ADE20K's do.

    Raises:
        DataError: nothing found, or a list of every file without counterpart, unreadable file, pair of different
            sizes, and label file with ids that have no class. If `ignore_index` is the id of a class in `classes.txt`.
    """
    root = Path(data_dir)
    check_ignore_index(ignore_index)
    splits, problems = _find_pairs(root)
    classes = _read_classes(root / "classes.txt")
    if classes is not None:
        _refuse_named_ignore_index(root / "classes.txt", classes, ignore_index, reduce_labels)
    contents, ids_of_files = check_contents([pair for pairs in splits.values() for pair in pairs])
    problems += contents
    if classes is None:
        classes = numbered_classes(ids_of_files.values(), ignore_index, reduce_labels)
    lookup = label_lookup(len(classes), ignore_index, reduce_labels)
    unknown_ids = id_problems(ids_of_files, lookup)
    hint = ID_HINT if unknown_ids else ""
    raise_problems(root, problems + unknown_ids, f"Correct or remove these files. {hint}{LAYOUT}")
    data = DatasetDict({split: dataset_of_pairs(pairs, lookup) for split, pairs in splits.items()})
    return SegmentationData(splits=data, classes=classes)


def _find_pairs(root: Path) -> tuple[dict[str, list[Pair]], list[str]]:
    kinds = {"images": IMAGE_SUFFIXES, "labels": LABEL_SUFFIXES}
    if missing := [kind for kind in kinds if not (root / kind).is_dir()]:
        raise DataError(f"There is no folder {' and no '.join(str(root / kind) for kind in missing)}. {LAYOUT}")
    names = {folder.name for kind in kinds for folder in (root / kind).iterdir() if folder.is_dir()}
    splits, problems = {}, []
    for split in sorted(name for name in names if not is_hidden(name)):
        found = []
        for kind, suffixes in kinds.items():
            files = {}
            if (root / kind / split).is_dir():
                files, unusable = find_pictures(root / kind / split, suffixes)
                problems += unusable
            found.append(files)
        pairs, unmatched = match_files(*found)
        problems += unmatched
        if pairs:
            splits[split] = pairs
    if not splits and not problems:
        raise DataError(f"No images and labels were found in {root}. {LAYOUT}")
    return splits, problems


def _read_classes(path: Path) -> tuple[str, ...] | None:
    if not os.path.lexists(path):
        return None
    text = read_text(path).rstrip()
    # At newlines alone: `splitlines` makes two classes of a name with any other character that ends lines.
    classes = tuple(line.strip() for line in text.split("\n")) if text else ()
    check_classes(classes, f"{path}, one class name a line,")
    return classes


def _refuse_named_ignore_index(path: Path, classes: tuple[str, ...], ignore_index: int, reduce_labels: bool) -> None:
    # Otherwise this class would silently be neither learned nor measured.
    first = 1 if reduce_labels else 0
    if first <= ignore_index < first + len(classes):
        raise DataError(
            f"`ignore_index` must not be the id of a class, got {ignore_index}, which {path} names "
            f"{classes[ignore_index - first]!r}: leave ignore_index out to learn this class. To ignore it, store its "
            "pixels as 255, which is always ignored, or if it is id 0, remove its line and pass reduce_labels instead."
        )
