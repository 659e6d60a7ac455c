# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of image and label files before training starts: everything that is wrong, in one message."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags
from PIL import Image as PILImage

from ..model.image_processing_inputs_cts import to_eight_bit
from .base import DataError, NoIdsError, Pair, allowed_ids, stored_ids, unknown_ids
from .pictures import UNREADABLE, printable, special_file, unreadable


# Orientations that turn a picture by 90 degrees: the decoded picture has width and height exchanged.
SIDEWAYS = (5, 6, 7, 8)
CHECKING_THREADS = 8


def match_files(images: dict[str, Path], labels: dict[str, Path]) -> tuple[list[Pair], list[str]]:
    """
    Pairs image and label files of the same name.

    Returns:
        the pairs sorted by name, and one line for every file that has no counterpart or cannot be stored in a data
        set, whose texts are UTF-8.
    """
    pairs = [Pair(name, images[name], labels[name]) for name in sorted(images.keys() & labels.keys())]
    without_label, without_image = sorted(images.keys() - labels.keys()), sorted(labels.keys() - images.keys())
    problems = [f"{printable(images[name])}: no label file for this image" for name in without_label]
    problems += [f"{printable(labels[name])}: no image file for this label" for name in without_image]
    strange = [path for pair in pairs for path in (pair.image, pair.label) if printable(path) != str(path)]
    problems += [f"{printable(path)}: must have a name in UTF-8, rename it" for path in strange]
    return [pair for pair in pairs if not {pair.image, pair.label}.intersection(strange)], problems


def check_headers(pairs: Sequence[Pair]) -> list[str]:
    """One line for every file whose header cannot be read and every pair of different sizes; no pixel is decoded."""
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        return [line for lines in pool.map(_header_problems, pairs) for line in lines]


def check_contents(pairs: Sequence[Pair]) -> tuple[list[str], dict[Path, np.ndarray]]:
    """
    Decodes every file.

    Returns:
        one line for every file that is broken and every pair of different sizes, and the ids that occur in each label
        file.
    """
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        results = list(pool.map(_content_problems, pairs))
    lines = [line for problems, _ in results for line in problems]
    return lines, {pair.label: ids for pair, (_, ids) in zip(pairs, results, strict=True) if ids is not None}


def id_problems(ids_of_files: dict[Path, np.ndarray], lookup: np.ndarray) -> list[str]:
    """One line for every label file that holds ids without a class."""
    lines = []
    for path, ids in ids_of_files.items():
        if unknown := unknown_ids(ids, lookup):
            lines.append(f"{path}: label ids {unknown} are no class. {allowed_ids(lookup)}")
    return lines


def raise_problems(root: Path, problems: list[str], hint: str) -> None:
    """Raises a `DataError` that lists all `problems`, if there are any, with a hint on what to do."""
    if problems:
        counted = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError("\n".join([f"{counted} in {printable(root)}:", *(f"  {line}" for line in problems), hint]))


def _header_problems(pair: Pair) -> list[str]:
    problems, sizes = [], []
    for path in (pair.image, pair.label):
        if problem := special_file(path):
            problems.append(problem)
            continue
        try:
            with PILImage.open(path) as picture:
                sizes.append(_upright_size(picture))
        except UNREADABLE as error:
            problems.append(unreadable(path, error))
    return problems or _size_problems(pair, *sizes)


def _content_problems(pair: Pair) -> tuple[list[str], np.ndarray | None]:
    problems = _header_problems(pair)
    if problems:
        return problems, None
    try:
        with PILImage.open(pair.image) as image:
            # A JPEG decoded at an eighth of its size reads every byte of the file in a fraction of the time.
            image.draft("RGB", (1, 1))
            image.load()
            to_eight_bit(image)
    except UNREADABLE as error:
        problems.append(unreadable(pair.image, error))
    try:
        with PILImage.open(pair.label) as label:
            return problems, np.unique(stored_ids(label))
    except NoIdsError as error:
        problems.append(f"{pair.label}: {error}")
    except UNREADABLE as error:
        problems.append(unreadable(pair.label, error))
    return problems, None


def _upright_size(picture: PILImage.Image) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if picture.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else (width, height)


def _size_problems(pair: Pair, image_size: tuple[int, int], label_size: tuple[int, int]) -> list[str]:
    if image_size == label_size:
        return []
    sizes = "{}x{}, its label {{}} is {}x{} pixels".format(*image_size, *label_size)
    return [f"{pair.image}: is " + sizes.format(pair.label)]
