# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The result files of predictions. Each one says in its metadata which settings and which image made it, and what it
showed then. So a run knows which results are done and intact, tells its own from those of another model or budget, and
never replaces a file that it did not write, such as a result that was edited.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from transformers import BaseImageProcessor

from ..data.pictures import UNREADABLE, printable
from ..hub.output_folder import LOCK, UNFINISHED, list_names
from .existing_models import ExistingSegmenter, Segmenter
from .sharing import Sharing
from .windows import InferenceOptions


# Each is a folder of the output, with pictures of this type.
OUTPUTS = {"masks": ".png", "overlays": ".jpg", "grids": ".png"}

# The key of the stamp in a PNG file, and its first word in both.
_KEY = "cts_hf"
# Errors of writing one file that mean that no other can be written either.
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Entries of configurations that do not change the results.
_NAMES = ("_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "transformers_version")
_NAMES += ("image_processor_type", "processor_class")


class Stamp(NamedTuple):
    """
    What made a result.

    Attributes:
        output: one of `OUTPUTS`.
        settings: digest of model, image processor and options, as `settings_digest` gives it.
        image: digest of the image file.
        content: digest of what the result shows.
    """

    output: str
    settings: str
    image: str
    content: str


class ResultError(ValueError):
    """A result of one image that cannot be made or written; the message says why."""


class Results:
    """
    The results of images in a folder, `folder/<output>/<name of the image>`.

    Args:
        folder (`Path`): The folder, which exists.
        outputs (`Sequence[str]`): The kinds of results to make, of `OUTPUTS`.
        settings (`str`): Digest of what makes them.
    """

    def __init__(self, folder: Path, outputs: Sequence[str], settings: str):
        self.folder, self.outputs, self.settings = folder, outputs, settings

    def path(self, output: str, name: str) -> Path:
        """
        The file of one result.

        Args:
            output (`str`): Its kind, of `OUTPUTS`.
            name (`str`): Name of the image.
        """
        return self.folder / output / f"{name}{OUTPUTS[output]}"

    def pending(self, images: Mapping[str, Path], overwrite: bool = False) -> dict[str, list[str]]:
        """
        What is still to be made: results that are missing, those that cannot be decoded, such as files that were cut,
        and those of images that have changed since.

        Args:
            images (`Mapping[str, Path]`): Name and path of each image.
            overwrite (`bool`): Whether results of other settings may be replaced; those of these images that are not
                made again are deleted. Files of others never are.

        Returns:
            `dict[str, list[str]]`: for the images that are not done, the kinds of results to make.

        Raises:
            ValueError: If results would replace files that are no results, results that were edited, results of other
                settings without `overwrite`, or each other; it names them.
        """
        self._refuse_one_path_for_two(images)
        pending: dict[str, list[str]] = {}
        foreign, others = [], []
        for name, path in images.items():
            image = None
            for output in OUTPUTS:
                result, is_asked_for = self.path(output, name), output in self.outputs
                stamp = read_stamp(result)
                content = stamp and _content_of(result)
                if not os.path.lexists(result):
                    is_due = is_asked_for
                elif stamp is None or content not in (None, stamp.content):
                    foreign += [result] if is_asked_for else []
                    continue
                elif (stamp.output, stamp.settings) != (output, self.settings):
                    others.append(result)
                    is_due = is_asked_for
                else:
                    image = image or _digest_or_none(path)
                    is_due = content is None or stamp.image != image
                if is_due:
                    pending.setdefault(name, []).append(output)
        foreign += [self.folder / output for output in self.outputs if _is_in_the_way(self.folder / output)]
        if foreign:
            raise ValueError(
                f"{printable(self.folder)} holds {self._list(foreign)}, which the results would replace and which are "
                "no results of this package, or were edited: choose another output folder, or move these files away."
            )
        if others and not overwrite:
            raise ValueError(
                f"{printable(self.folder)} holds {self._list(others)} of another model, budget or other options: "
                "choose another output folder, or replace the earlier results with --overwrite_output_dir."
            )
        for result in others:
            if result.parts[len(self.folder.parts)] not in self.outputs:
                result.unlink()
        return pending

    def save(self, picture: Image.Image, output: str, name: str, image: str) -> None:
        """
        Writes one result, first under a temporary name.

        Args:
            picture (`PIL.Image.Image`): The result.
            output (`str`): Its kind.
            name (`str`): Name of the image.
            image (`str`): Digest of the image.

        Raises:
            ResultError: If this picture or name is one that the file type or the file system cannot have.
            OSError: If no file can be written any more, as on a full disk.
        """
        path = self.path(output, name)
        try:
            content = _encode(picture, path.suffix, " ".join((_KEY, output, self.settings, image)))
        except (OSError, ValueError) as error:
            raise ResultError(f"its {output} cannot be a {path.suffix} file ({error})") from error
        # Short, as the name itself may be as long as names can be; and the same in the next run, should this one end.
        unfinished = path.with_name(f"{UNFINISHED}_{_digest(path.name.encode('utf-8', 'surrogateescape'))}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        except OSError as error:
            _unlink(unfinished)
            if error.errno in _FATAL:
                message = (
                    f"{error.strerror}, so that {printable(path)} could not be written. The results so far are whole: "
                    "start again when there is space, and the run goes on from there."
                )
                raise OSError(error.errno, message) from error
            raise ResultError(f"{printable(path)} cannot be written ({error.strerror})") from error
        except BaseException:
            _unlink(unfinished)
            raise

    def _refuse_one_path_for_two(self, images: Iterable[str]) -> None:
        # Where case is ignored, as on most disks of macOS and Windows, A.png and a.jpg have one name as well.
        if not _ignores_case(self.folder):
            return
        first: dict[str, str] = {}
        clashes = [
            f"{other} and {name}" for name in images if (other := first.setdefault(name.casefold(), name)) != name
        ]
        if clashes:
            raise ValueError(
                f"Every image must have a name of its own, for its results, and upper case counts as lower case in "
                f"{printable(self.folder)}: {printable(list_names(clashes))}. Rename one of each."
            )

    def _list(self, paths: Sequence[Path]) -> str:
        return printable(list_names([path.relative_to(self.folder).as_posix() for path in paths]))


def read_stamp(path: Path) -> Stamp | None:
    """What made a file; `None` if it is no result of this package."""
    if path.suffix.lower() not in OUTPUTS.values() or not path.is_file():
        return None
    try:
        with Image.open(path) as picture:
            text = picture.info.get(_KEY) or picture.info.get("comment")
    except UNREADABLE:
        return None
    words = text.decode("utf-8", "replace").split() if isinstance(text, bytes) else str(text).split()
    return Stamp(*words[1:]) if len(words) == 1 + len(Stamp._fields) and words[0] == _KEY else None


def settings_digest(
    model: Segmenter,
    processor: BaseImageProcessor,
    sharing: Sharing,
    options: InferenceOptions,
    mixed_precision: str = "no",
) -> str:
    """
    A digest of all that decides what the results of an image are, apart from the image itself.

    Args:
        model: its weights, their types and its configuration count, but neither its name nor those of its classes.
        processor: its options count.
        sharing: the budget or the threshold, given or of the configuration.
        options: how images are segmented; not how many at once.
        mixed_precision: type that the forward pass computes in.
    """
    own = {name: value for name, value in model.config.to_diff_dict().items() if name != "sharing_threshold"}
    configs = {"model": own | {"token_reduction": None} | sharing.budget}
    configs["processor"] = {name: value for name, value in processor.to_dict().items() if value is not None}
    if isinstance(model, ExistingSegmenter) and model.cts.policy is not None:
        configs["policy"] = model.cts.policy.config.to_diff_dict()
    settings = {kind: {n: v for n, v in config.items() if n not in _NAMES} for kind, config in configs.items()}
    settings["options"] = {
        "shortest_edge": options.shortest_edge,
        "window": options.window,
        "stride": options.stride or options.window,
        "scales": list(map(float, options.scales)),
        "flip": options.flip,
        "mixed_precision": mixed_precision,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """A digest of the content of a file."""
    return _digest(path.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _digest_or_none(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None  # reading it will say why


def _content_of(result: Path) -> str | None:
    """A digest of what a file with a stamp shows; `None` if it cannot be decoded."""
    try:
        content = result.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            if picture.format == "PNG":
                return _pixel_digest(picture)
            return _jpeg_digest(content, picture.info["comment"])
    except UNREADABLE:
        return None


def _pixel_digest(picture: Image.Image) -> str:
    # The same for all modes that a file of these pixels may be opened in: they depend on Pillow, and on optimizers.
    values = np.asarray(picture if picture.mode.startswith("I") else picture.convert("RGB"))
    return _digest(f"{values.shape} ".encode() + values.astype("<u2").tobytes())


def _jpeg_digest(content: bytes, comment: bytes) -> str:
    # Not of the pixels, which decoders round differently: tables and compressed data follow the comment.
    return _digest(content.partition(comment)[2])


def _encode(picture: Image.Image, suffix: str, stamp: str) -> bytes:
    """A picture as a file with a stamp, which the digest of what the file shows is added to."""
    buffer = io.BytesIO()
    if suffix == ".png":
        metadata = PngImagePlugin.PngInfo()
        metadata.add_text(_KEY, f"{stamp} {_pixel_digest(picture)}")
        picture.save(buffer, "PNG", pnginfo=metadata)
        return buffer.getvalue()
    comment = f"{stamp} {_digest(b'')}".encode()
    picture.save(buffer, "JPEG", quality=90, comment=comment)
    content = buffer.getvalue()
    return content.replace(comment, f"{stamp} {_jpeg_digest(content, comment)}".encode(), 1)


def _ignores_case(folder: Path) -> bool:
    return (folder / LOCK.upper()).exists()


def _is_in_the_way(folder: Path) -> bool:
    return os.path.lexists(folder) and not folder.is_dir()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # of a file that could not even be made
        path.unlink()


__all__ = ["OUTPUTS", "ResultError", "Results", "Stamp", "file_digest", "read_stamp", "settings_digest"]
