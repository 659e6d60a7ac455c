# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What every data set reader of this package returns, and how stored label ids become class ids."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value
from PIL import Image as PILImage

from ..model.image_processing_maps_cts import IGNORE_INDEX
from .pictures import UNREADABLE, printable, to_rgb


UNKNOWN_ID = -1
MAX_CLASSES = IGNORE_INDEX  # the ids below it

Palette = tuple[tuple[int, int, int], ...]


class DataError(ValueError):
    """A data set that cannot be trained on as it is; the message lists everything that is wrong with it."""


class NoIdsError(DataError):
    """A label picture that cannot hold class ids."""


class Pair(NamedTuple):
    """One image file and its label file."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class SegmentationData:
    """
    A semantic segmentation data set, the same whichever reader made it.

    Attributes:
        splits: by split name, data sets with the columns `image` (PIL, RGB), `label` (PIL "L" of the same size, class
            ids in [0, num_classes) or 255 where nothing is to be learned or measured) and `name` (str). Files are
            decoded when a row is read.
        classes: name of every class, in the order of their ids.
        palette: one (red, green, blue) of 0..255 for every class, or None where the data set has no colors.
    """

    splits: DatasetDict | IterableDatasetDict
    classes: tuple[str, ...]
    palette: Palette | None = None

    def __post_init__(self):
        check_classes(self.classes, "`classes`")
        if self.palette is not None and len(self.palette) != len(self.classes):
            raise DataError(
                f"`palette` must have a color for each of the {len(self.classes)} classes, got {len(self.palette)}: "
                "add or remove colors."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class by its id, as configurations of transformers have them."""
        return dict(enumerate(self.classes))

    @property
    def label2id(self) -> dict[str, int]:
        """Id of each class by its name."""
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def train(self) -> Dataset | IterableDataset:
        """The split called `train`."""
        return self._first_split("train")

    @property
    def validation(self) -> Dataset | IterableDataset:
        """The split called `val` or `validation`."""
        return self._first_split("val", "validation")

    def split(self, name: str) -> Dataset | IterableDataset:
        """The split of this name; raises `DataError` if there is none."""
        if name not in self.splits:
            raise DataError(f"There is no split {name!r}, the data set has {', '.join(self.splits)}.")
        return self.splits[name]

    def evaluation_rows(self, split: str | None = None, max_rows: int | None = None) -> Dataset | IterableDataset:
        """
        The rows to evaluate on.

        Args:
            split: name of a split; that for validation if it is `None`.
            max_rows: only so many of its first rows, if it has more.

        Raises:
            DataError: no such split, or one without rows.
        """
        rows = self.validation if split is None else self.split(split)
        if isinstance(rows, IterableDataset):
            return rows if max_rows is None else rows.take(max_rows)
        if not len(rows):
            raise DataError(f"The split {split or 'for validation'} is empty: there is nothing to evaluate.")
        return rows if max_rows is None else rows.take(min(max_rows, len(rows)))

    def _first_split(self, *names: str) -> Dataset | IterableDataset:
        for name in names:
            if name in self.splits:
                return self.splits[name]
        raise DataError(
            f"There is no split called {' or '.join(names)}: the data set has {', '.join(self.splits)}. "
            "Rename one, or choose a split by name."
        )


def label_lookup(num_classes: int, ignore_index: int = IGNORE_INDEX, reduce_labels: bool = False) -> np.ndarray:
    """
    The table from the ids stored in label files to the ids this package works with.

    Args:
        num_classes: number of classes, 1 to 255.
        ignore_index: stored id, 0 to 255, of pixels that are neither learned nor measured. 255 is always ignored too.
        reduce_labels: whether stored ids count classes from 1 and 0 is ignored, as in ADE20K.

    Returns:
        (256,) int16: class id, 255 (ignored) or -1 (not an id of this data set).
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise DataError(f"`num_classes` must be 1 to {MAX_CLASSES}, got {num_classes}: label files are 8-bit.")
    check_ignore_index(ignore_index)
    lookup = np.full(256, UNKNOWN_ID, dtype=np.int16)
    first = 1 if reduce_labels else 0
    lookup[first : first + num_classes] = np.arange(num_classes)
    if reduce_labels:
        lookup[0] = IGNORE_INDEX
    lookup[[ignore_index, IGNORE_INDEX]] = IGNORE_INDEX
    return lookup


def check_ignore_index(ignore_index: int) -> None:
    """Refuses what is no id of a label file. For readers to call before they read anything."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not 0 <= ignore_index <= 255:
        raise DataError(
            f"`ignore_index` must be an id of label files, which are 8-bit, got {ignore_index!r}: pass a whole number "
            "from 0 to 255."
        )


def check_classes(classes: Sequence[str], place: str) -> None:
    """
    Refuses class names if there are none or too many, or if one is blank, is repeated (several blanks count as one),
    or holds control characters or ends of lines or paragraphs.

    Args:
        classes: name of every class, in the order of their ids.
        place: where they are named, for the message.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{place} must be a list of names, got {classes!r}: pass one string for each class.")
    names = [" ".join(name.split()) for name in classes]
    blank = [number for number, name in enumerate(names, start=1) if not name]
    twice = repeated(filter(None, names))
    if not names or blank or twice:
        raise DataError(
            f"{place} must name every class once, got {len(names)} names, blank ones at {blank or 'none'}, repeated "
            f"ones {twice or 'none'}: give one name for each id, in their order."
        )
    if strange := [name for name in classes if any(map(_is_control, name))]:
        raise DataError(
            f"{place} must hold no control characters or ends of lines, got {', '.join(map(repr, strange))}: remove "
            "these characters."
        )
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{place} must name at most {MAX_CLASSES} classes, got {len(names)}: label files are 8-bit, and 255 is "
            "always ignored. Leave out or merge classes, in the label files too."
        )


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def numbered_classes(ids_of_labels: Iterable[np.ndarray], ignore_index: int, reduce_labels: bool) -> tuple[str, ...]:
    """
    Names, `class_0` and so on, for the classes of a data set that does not name them: as many as its highest id asks
    for, at least one.

    Args:
        ids_of_labels: for each label, the ids that occur in it. Ids that do not fit 8 bits are not counted, so that
            they are reported as unknown, with the label that holds them.
        ignore_index, reduce_labels: as for [`label_lookup`].
    """
    highest = 0
    for ids in ids_of_labels:
        highest = max(highest, int(ids[(ids != ignore_index) & (ids < IGNORE_INDEX)].max(initial=0)))
    count = highest if reduce_labels else highest + 1
    return tuple(f"class_{index}" for index in range(max(count, 1)))


def _is_control(char: str) -> bool:
    # Ends of lines and paragraphs have categories of their own; tabs are blanks like others.
    return char != "\t" and unicodedata.category(char) in ("Cc", "Zl", "Zp")


def read_text(path: Path) -> str:
    """The text of a small UTF-8 file, without the mark (BOM) that editors of Windows write at its start."""
    if not path.is_file():
        raise DataError(
            f"{printable(path)} must be a text file, got a folder, a special file or a broken link: "
            "correct or remove it."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    # UTF-16 may well decode: every other byte of Latin letters is 0.
    if "\0" in text:
        raise DataError(f"{printable(path)} must be text in UTF-8, got another encoding: save it as UTF-8.")
    return text


def stored_ids(label: PILImage.Image) -> np.ndarray:
    """The ids of a label picture, (H, W) of an integer type; a palette picture gives indices, not colors."""
    ids = np.asarray(label)
    if ids.ndim != 2 or ids.dtype.kind not in "bui":
        raise NoIdsError(f"the label picture has mode {label.mode}: it must have one channel that holds class ids")
    return ids


def unknown_ids(ids: np.ndarray, lookup: np.ndarray) -> list[int]:
    """The ids among `ids` that `lookup` has no class for, sorted."""
    present = np.unique(ids).astype(np.int64)
    inside = present[(present >= 0) & (present < len(lookup))]
    known = inside[lookup[inside] != UNKNOWN_ID]
    return np.setdiff1d(present, known).tolist()


class ExampleReader:
    """
    Turns stored rows into the rows that `SegmentationData` promises; for `Dataset.with_transform`.

    Rows hold pictures as `datasets.Image(decode=False)` gives them. They are decoded here, so that an error says which
    one is broken, and pictures of more than 8 bits become neither white nor black.

    Args:
        lookup: (256,) table of `label_lookup`.
    """

    def __init__(self, lookup: np.ndarray):
        self.lookup = lookup

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        pictures = {column: rows[column] for column in ("image", "label") if column in rows}
        count = len(next(iter(pictures.values()), ()))
        names = rows.get("name", [f"row {index}" for index in range(count)])
        read = {"image": self._read_image, "label": self._read_label}
        for column, stored in pictures.items():
            pictures[column] = [read[column](name, value) for name, value in zip(names, stored, strict=True)]
        if len(pictures) == 2:
            for name, image, label in zip(names, *pictures.values(), strict=True):
                if image.size != label.size:
                    raise DataError(
                        f"{name}: the image is {_by(image.size)} and its label is {_by(label.size)} pixels."
                    )
        return {**rows, **pictures}

    def _read_image(self, name: str, stored: dict[str, Any]) -> PILImage.Image:
        picture = decode(name, "image", stored)
        try:
            return to_rgb(picture)
        except UNREADABLE as error:
            raise DataError(f"{_place(name, 'image', stored)}: {error}") from error

    def _read_label(self, name: str, stored: dict[str, Any]) -> PILImage.Image:
        ids = decode_ids(name, stored)
        class_ids = self.lookup.take(ids, mode="clip")
        if class_ids.min() == UNKNOWN_ID or ids.max() >= len(self.lookup):
            unknown = unknown_ids(ids, self.lookup)
            raise DataError(f"{name}: label ids {unknown} are no class of this data set. {allowed_ids(self.lookup)}")
        return PILImage.fromarray(class_ids.astype(np.uint8))


def decode(name: str, kind: str, stored: dict[str, Any] | None) -> PILImage.Image:
    """
    A picture as a data set stores it, decoded and upright.

    Args:
        name: of its row, for messages.
        kind: "image" or "label".
        stored: what `datasets.Image(decode=False)` gives.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if stored is None:
        raise DataError(f"{name}: there is no {kind}. Remove this row.")
    try:
        return Image().decode_example(stored)
    except UNREADABLE as error:
        reason = error or type(error).__name__
        raise DataError(f"{_place(name, kind, stored)} cannot be read as a picture ({reason}).") from error


def decode_ids(name: str, stored: dict[str, Any] | None) -> np.ndarray:
    """The ids of a stored label picture, as `stored_ids`; errors name the row."""
    try:
        return stored_ids(decode(name, "label", stored))
    except NoIdsError as error:
        raise DataError(f"{name}: {error}.") from error


def _place(name: str, kind: str, stored: dict[str, Any]) -> str:
    return f"{name}: the {kind} {stored['path']}" if stored["path"] else f"{name}: the {kind}"


def allowed_ids(lookup: np.ndarray) -> str:
    """A sentence that says which stored ids `lookup` knows."""
    classes = np.flatnonzero((lookup != UNKNOWN_ID) & (lookup != IGNORE_INDEX))
    ignored = np.flatnonzero(lookup == IGNORE_INDEX)
    between = f"{classes.min()} to {classes.max()}" if len(classes) else "none"
    return f"Classes are stored as {between}, ignored pixels as {', '.join(map(str, ignored))}."


def dataset_of_pairs(pairs: list[Pair], lookup: np.ndarray) -> Dataset:
    """A lazily decoded data set with the columns image, label and name."""
    columns = {
        "image": [str(pair.image.absolute()) for pair in pairs],
        "label": [str(pair.label.absolute()) for pair in pairs],
        "name": [pair.name for pair in pairs],
    }
    stored = Image(decode=False)  # the reader decodes
    features = Features({"image": stored, "label": stored, "name": Value("string")})
    return Dataset.from_dict(columns, features=features).with_transform(ExampleReader(lookup))


def parse_names(names: str) -> tuple[str, ...]:
    """Names separated by commas, over any number of lines."""
    return tuple(" ".join(name.split()) for name in names.split(","))


def parse_palette(colors: str) -> Palette:
    """Colors from hexadecimal `rrggbb` words separated by blanks."""
    return tuple(tuple(bytes.fromhex(color)) for color in colors.split())


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
