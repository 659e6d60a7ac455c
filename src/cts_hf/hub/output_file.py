# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A single file that a command writes to a path of the user's: refused at the start, or written whole at the end."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .output_folder import UNFINISHED


def prepare_file(name: str, path: Path, overwrite: bool) -> None:
    """
    Makes the folder of a file that will be written, before all that takes time. Pipes and devices replace nothing.

    Args:
        name (`str`): The option that gives the path.
        path (`Path`): The file.
        overwrite (`bool`): Whether it may exist.

    Raises:
        ValueError: If the file cannot be written, or exists and may not be replaced.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if path.is_file() and not overwrite:
            raise ValueError(
                f"`{name}` must be the path of a new file, got {path}, which exists: choose another, or replace it "
                "with --overwrite."
            )
        if not path.is_fifo():  # whose reader would take this for the end
            path.open("ab").close()
        if is_new:
            Path(os.path.realpath(path)).unlink()  # what a link leads to, not the link
        if is_new or path.is_file():
            _folder_beside(path).cleanup()
    except OSError as error:
        raise ValueError(
            f"`{name}` must be the path of a file that can be written, got {path} ({error.strerror}): choose another."
        ) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Gives a path to write to, and moves what is there to `path` when the context is left: until then, and if it is left
    with an error, what `path` held stays. Links are followed; a pipe or a device is written to itself.

    Args:
        path (`Path`): The file, which [`prepare_file`] has accepted.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    with _folder_beside(path) as folder:
        unfinished = Path(folder) / path.name  # with its suffix, which says what kind of picture is drawn
        yield unfinished
        os.replace(unfinished, os.path.realpath(path))


def _folder_beside(path: Path) -> tempfile.TemporaryDirectory:
    # On the same disk as the file, which can only be replaced at once from there.
    return tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=Path(os.path.realpath(path)).parent)


__all__ = ["prepare_file", "written_whole"]
