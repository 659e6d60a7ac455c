# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The folder that a run writes to. One run at a time writes there, files appear when they are whole, and nothing that
this package did not write is ever replaced or deleted: each folder holds a record of the package's own files.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout


RECORD = ".cts_hf.json"
LOCK = ".cts_hf.lock"
UNFINISHED = ".unfinished"
_MOST_NAMED = 10


class OutputFolder:
    """
    A folder for the results of a run. As a context manager it is made if it is not there, and locked until it is left;
    the process that has it may enter it again.

    Args:
        path (`str` or `Path`): The folder.
        writer (`str`): The kind of run, such as "training". Results of another kind are not replaced, as a model and
            what belongs to it would no longer be of one run.

    Raises:
        ValueError: On entering, if the path is a file, cannot be written to, or another run is writing there.
    """

    def __init__(self, path: str | Path, writer: str):
        if not isinstance(path, str | Path):
            raise ValueError(f"An output folder must be a `str` or `Path`, got {type(path)}: name a folder.")
        self.path, self.writer = Path(path), writer
        self._lock: FileLock | None = None
        self._written_now: set[str] = set()

    def __enter__(self) -> "OutputFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A singleton, so that one process can enter again what it has.
            lock = FileLock(self.path.resolve() / LOCK, timeout=0, is_singleton=True)
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"Another run is writing to {self.path}: wait for it to end, or choose another output folder."
            ) from error
        except OSError as error:
            raise ValueError(
                f"{self.path} must be a folder that can be written to, or the path of a new one, got: {error}. Choose "
                "another output folder."
            ) from error
        self._lock = lock
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    @property
    def written(self) -> dict[str, str]:
        """
        What runs have written here, as POSIX paths in this folder, and which kind of run it was. A path that ends in
        `/` is that of a folder that is theirs as a whole.
        """
        file = self.path / RECORD
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["written"]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(f"{file} cannot be read ({error}). Delete it to keep all files there.") from error
        # The record decides what is deleted: nothing outside of the folder may be in it, nor the folder itself.
        if not isinstance(names, dict) or not all(map(_is_below, names)) or not _are_strings(names.values()):
            raise ValueError(f"{file} must list files in {self.path}. Delete it to keep all files there.")
        return names

    def record(self, names: Iterable[str]) -> None:
        """Takes files, POSIX paths in this folder, for this package's own. To be called before they are written."""
        new = dict.fromkeys(names, self.writer)
        self._written_now |= new.keys()
        self._write_record(self.written, new)

    def refuse_existing(self, patterns: Sequence[str], overwrite: bool = False) -> None:
        """
        Refuses to go on where files exist that the run is going to write.

        Args:
            patterns (`Sequence[str]`): Glob patterns of these files, POSIX, relative to this folder.
            overwrite (`bool`): Whether files that an earlier run of this kind wrote may be replaced. Others never are,
                nor is anything else of such a name, such as a folder.

        Raises:
            ValueError: If there are such files; it names them.
        """
        own = self.written
        names = sorted({name for pattern in patterns for name in self._matching(pattern)} - {RECORD, LOCK})
        if foreign := [name for name in names if not self._is_own(name, own)]:
            raise ValueError(
                f"{self.path} holds {list_names(foreign)}, which this run would replace and which no earlier "
                f"{self.writer} is recorded to have written: choose another output folder, or move these files away."
            )
        if names and not overwrite:
            raise ValueError(
                f"{self.path} holds {list_names(names)} of an earlier run: choose another output folder, or replace "
                "the earlier results with --overwrite_output_dir."
            )

    @contextmanager
    def writing(self, subfolder: str = "", last: str = "") -> Iterator[Path]:
        """
        A new folder to write files into, which move to `subfolder` of this one when the context is left, one by one.
        If it is left with an error, nothing is left behind and nothing has changed.

        Args:
            subfolder (`str`): POSIX path in this folder.
            last (`str`): Name of the file that is moved last, so that all are there where it is.

        Raises:
            ValueError: If a file would replace something that no run wrote; the new files then stay where they are.
        """
        unfinished = self.scratch((PurePosixPath(subfolder) / UNFINISHED).as_posix())
        scratch = f"{unfinished.relative_to(self.path).as_posix()}/"
        try:
            yield unfinished
        except BaseException:
            self.delete([scratch])
            raise
        files = {
            (PurePosixPath(subfolder) / path.relative_to(unfinished).as_posix()).as_posix(): path
            for path in sorted(unfinished.rglob("*"), key=lambda path: (path.name == last, path))
            if path.is_file()
        }
        own = self.written
        if foreign := [name for name in files if os.path.lexists(self.path / name) and not self._is_own(name, own)]:
            # Forgotten, so that no later run empties the folder: the new files are nowhere else.
            self._write_record(own, forgotten={scratch})
            raise ValueError(
                f"{self.path} holds {list_names(foreign)}, which no {self.writer} wrote and which the new files "
                f"in {unfinished} would replace: move the old ones away, and the new ones to their place."
            )
        self.record(files)
        for name, path in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, self.path / name)
        self.delete([scratch])

    def scratch(self, name: str) -> Path:
        """
        A new, empty folder that is this package's as a whole, recorded as such. One that a killed run has left is
        emptied; where somebody else has something of this name, another one is taken.
        """
        own = self.written
        for candidate in chain([name], (f"{name}_{number}" for number in count(2))):
            path = self.path / candidate
            if not os.path.lexists(path) or (f"{candidate}/" in own and self.may_delete(f"{candidate}/")):
                break
        self.delete([f"{candidate}/"])
        self.record([f"{candidate}/"])
        path.mkdir(parents=True)
        return path

    def delete(self, names: Iterable[str]) -> None:
        """
        Deletes files that are this package's own, and the folders that this leaves empty.

        Args:
            names (`Iterable[str]`): Some of [`written`]. What is not there any more is only forgotten.

        Raises:
            ValueError: If a name is not recorded, or [`may_delete`] says no; the names before it are deleted.
        """
        own, gone = self.written, set()
        try:
            for name in names:
                path = self.path / name
                if os.path.lexists(path):
                    if name not in own:
                        raise ValueError(f"{path} is not deleted, as no run is recorded to have written it.")
                    if not self.may_delete(name):
                        raise ValueError(
                            f"{path} is not deleted, as it is another thing than a run wrote, or lies behind a link "
                            f"that leads out of {self.path}: delete it yourself."
                        )
                    shutil.rmtree(path) if name.endswith("/") else path.unlink()
                    self._remove_empty(path.parent)
                gone.add(name)
        finally:
            self._write_record(own, forgotten=gone)

    def may_delete(self, name: str) -> bool:
        """
        Whether a recorded name may be deleted: a file, or a folder if it ends in `/`, that is really in this folder,
        or that this process has written. A record can come from others, and so can links.
        """
        path, root = self.path / name, self.path.resolve()
        if path.is_symlink() or path.is_dir() != name.endswith("/"):
            return False
        parent = path.parent.resolve()
        return name in self._written_now or parent == root or root in parent.parents

    def _matching(self, pattern: str) -> list[str]:
        if "*" not in pattern:
            return [pattern] if os.path.lexists(self.path / pattern) else []
        return [path.relative_to(self.path).as_posix() for path in self.path.glob(pattern)]

    def _is_own(self, name: str, own: dict[str, str]) -> bool:
        is_recorded = own.get(name) == self.writer or any(name.startswith(path) for path in own if path.endswith("/"))
        return is_recorded and not (self.path / name).is_dir()

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.path and folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _write_record(
        self, own: dict[str, str], new: Mapping[str, str] = MappingProxyType({}), forgotten: Set[str] = frozenset()
    ) -> None:
        names = {name: writer for name, writer in sorted({**own, **new}.items()) if name not in forgotten}
        if names == own:
            return
        # A name of its own: a fixed one could be a link of somebody else's.
        with NamedTemporaryFile("w", encoding="utf-8", dir=self.path, prefix=f"{RECORD}_", delete=False) as unfinished:
            unfinished.write(json.dumps({"written": names}, indent=1) + "\n")
        os.replace(unfinished.name, self.path / RECORD)


def list_names(names: Sequence[str]) -> str:
    """The names in a sentence: the first ones of many, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _are_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_below(name: str) -> bool:
    """Whether a name in a record is the path of something below the folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and name.isprintable()


__all__ = ["OutputFolder", "list_names"]
