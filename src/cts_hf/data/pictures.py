# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Picture files: finding them in folders and reading them, the same for training, evaluation and prediction."""

import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from PIL import Image, ImageOps

from ..model.image_processing_inputs_cts import to_opaque_rgb


# What Pillow raises on files that are broken, hostile or no pictures.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    # An error where warnings are errors.
    Image.DecompressionBombWarning,
)


class PictureError(ValueError):
    """A picture that cannot be used; the message names the file and what is wrong with it."""


def read_picture(path: str | Path) -> Image.Image:
    """
    Reads a picture file.

    Args:
        path: file of any picture format; of several frames the first one is read.

    Returns:
        PIL image in RGB, upright.

    Raises:
        PictureError: the file cannot be read as a picture, or its values have no certain meaning, see `to_rgb`.
    """
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except UNREADABLE as error:
        raise PictureError(unreadable(path, error)) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    A picture of any mode in RGB, turned upright as its EXIF orientation says.

    Transparency is dropped: what was drawn below it shows. Grey pictures of 16 bits are scaled to 8.

    Raises:
        ValueError: values that are out of range or have no certain meaning, such as floats from 0 to 1, or values
            from 0 to 255 in a picture of 16 bits.
    """
    upright = ImageOps.exif_transpose(picture)
    upright.format = picture.format  # says what the values of mode "I" are
    return to_opaque_rgb(upright)


def unreadable(path: str | Path, error: BaseException) -> str:
    """The line that names a file and why it cannot be read."""
    return f"{printable(path)}: cannot be read as a picture ({error or type(error).__name__})"


def printable(path: str | Path) -> str:
    r"""A path as text that any UTF-8 stream takes: bytes of its name that are no UTF-8 are written as \udcXX."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def find_pictures(
    folder: str | Path, suffixes: Collection[str], leave_out: Callable[[Path], bool] = lambda path: False
) -> tuple[dict[str, Path], list[str]]:
    """
    The picture files in a folder and the folders below it. Links to folders are followed, but not back to a folder
    that they lie in; hidden files and folders, and the `__MACOSX` of archives, are skipped.

    Args:
        folder: a folder that exists.
        suffixes: of the files to find, in lower case with their dot.
        leave_out: whether a file with such a suffix is none of those to find.

    Returns:
        the files by name, which is the path in the folder without suffix, sorted; and one line for every file whose
        name another one has, every folder that is found under two names, every folder that cannot be listed, and
        every pipe, socket or device with such a suffix.
    """
    folder = Path(folder)
    paths, problems = _files_below(folder)
    found = []
    for path in sorted(paths):
        if path.suffix.lower() not in suffixes:
            continue
        if problem := special_file(path):
            problems.append(problem)
        elif not leave_out(path):
            found.append((path.relative_to(folder).with_suffix("").as_posix(), path))
    files, same_names = by_name(found)
    return files, problems + same_names


def by_name(named: Iterable[tuple[str, Path]]) -> tuple[dict[str, Path], list[str]]:
    """Files by their names, and one line for every file whose name another one has."""
    files: dict[str, Path] = {}
    problems = []
    for name, path in named:
        if name in files:
            problems.append(f"{printable(path)} and {printable(files[name])} have the same name")
        files[name] = path
    return files, problems


def special_file(path: Path) -> str | None:
    """
    The line that says why a path must not be opened: a pipe, socket or device could keep a reader waiting for ever.
    `None` for files, folders, and broken links.
    """
    if path.is_file() or path.is_dir() or not path.exists():
        return None
    return f"{printable(path)}: must be a file, not a pipe, socket or device"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no content: hidden, or what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _files_below(root: Path) -> tuple[list[Path], list[str]]:
    files, problems = [], []
    first_names: dict[str, Path] = {}  # of each folder by its real path
    waiting: list[tuple[Path, frozenset[str]]] = [(root, frozenset())]  # with the real paths of the folders above
    while waiting:
        folder, above = waiting.pop()
        real = os.path.realpath(folder)
        if real in above:
            continue
        if real in first_names:
            problems.append(f"{printable(folder)} and {printable(first_names[real])} are the same folder")
            continue
        first_names[real] = folder
        try:
            entries = sorted(folder.iterdir(), reverse=True)
        except OSError as error:
            problems.append(f"{printable(folder)}: cannot be listed ({error.strerror})")
            continue
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if os.path.isdir(entry):
                waiting.append((entry, above | {real}))
            else:
                files.append(entry)
    return files, problems


__all__ = [
    "UNREADABLE",
    "PictureError",
    "by_name",
    "find_pictures",
    "is_hidden",
    "printable",
    "read_picture",
    "special_file",
    "to_rgb",
    "unreadable",
]
