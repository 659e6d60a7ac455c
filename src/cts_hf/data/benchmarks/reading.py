# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the readers of the official benchmark layouts have in common."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import DatasetDict

from ..base import DataError, dataset_of_pairs
from ..checks import check_headers, match_files, raise_problems
from ..pictures import by_name, is_hidden


class Source(NamedTuple):
    """The files of one split, each with the name that an image and its label share."""

    images: list[tuple[str, Path]]
    labels: list[tuple[str, Path]]


def named_files(folder: Path, pattern: str, ending: str) -> list[tuple[str, Path]]:
    """The files that `pattern` + `ending` match below `folder`, without hidden ones: name without `ending`, path."""
    return [
        (path.name.removesuffix(ending), path)
        for path in sorted(folder.glob(pattern + ending))
        if not any(map(is_hidden, path.relative_to(folder).parts))
    ]


def read_benchmark(root: Path, sources: dict[str, Source], lookup: np.ndarray, layout: str) -> DatasetDict:
    """
    Pairs and checks the files of a benchmark; splits without any file are left out.

    Only headers are read, tens of thousands of files take seconds; label ids are checked as rows are decoded.

    Raises:
        DataError: no files at all (the message shows `layout`), or a list of all that is wrong with them.
    """
    splits, problems = {}, []
    for split, source in sources.items():
        (images, same_images), (labels, same_labels) = map(by_name, source)
        pairs, unmatched = match_files(images, labels)
        problems += same_images + same_labels + unmatched + check_headers(pairs)
        if pairs:
            splits[split] = dataset_of_pairs(pairs, lookup)
    raise_problems(root, problems, "Correct or remove these files. " + layout)
    if not splits:
        raise DataError(f"No images and labels were found in {root}. {layout}")
    return DatasetDict(splits)
