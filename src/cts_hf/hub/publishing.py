# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A model on the Hugging Face Hub: its weights, image processor, card and code, and for a model of transformers that
shares tokens its policy, and nothing else. What is uploaded is chosen by name, so that checkpoints, logs and whatever
else lies in a folder stay at home.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import BaseImageProcessor, PreTrainedModel

from .loading import check_model_folder
from .model_card import model_card
from .sharing_folder import (
    OPTIONS_FILE,
    SHARING,
    check_sharing_folder,
    is_sharing_folder,
    shares_tokens,
    write_sharing_model,
)


WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What lies in the room of the model travels with it; folders of other versions may have further files of these forms.
CODE_FILES = (
    *sorted(path.name for path in (Path(__file__).parents[1] / "model").glob("[!_]*.py")),
    "configuration_cts*.py",
    "image_processing*_cts.py",
    "modeling_cts*.py",
)
# What lies in the subfolder of a model of transformers that shares tokens, as paths in the folder.
SHARING_FILES = tuple(f"{SHARING}/{name}" for name in (OPTIONS_FILE, "config.json", *WEIGHT_FILES, *CODE_FILES))
_PUBLISHED = (
    *WEIGHT_FILES,
    "config.json",
    "preprocessor_config.json",
    "train.yaml",
    "evaluation.json",
    "README.md",
    "LICENSE",
    "*.png",
    *CODE_FILES,
)
_REQUIRED = ("config.json", "preprocessor_config.json", "README.md")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True)
class Upload:
    """
    What was uploaded, or would be.

    Attributes:
        repo_id: repository on the Hub.
        files: paths of the files in the folder, POSIX.
        left_out: paths of what else lies in the folder; a folder's ends in `/`.
        url: address of the repository; `None` if nothing was uploaded.
    """

    repo_id: str
    files: list[str]
    left_out: list[str]
    url: str | None = None

    def __str__(self) -> str:
        verb = "would be uploaded" if self.url is None else "were uploaded"
        lines = [f"{len(self.files)} files {verb} to {self.url or self.repo_id}:", *(f"  {n}" for n in self.files)]
        if self.left_out:
            lines += ["left out:", *(f"  {name}" for name in self.left_out)]
        return "\n".join(lines)


def publish(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    repo_id: str,
    *,
    metrics: dict[str, float] | None = None,
    card: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """
    Uploads a model, its image processor, a card and the code that loads them without this package.

    Args:
        model: [`CtsForSemanticSegmentation`], [`CtsModel`] or [`CtsPolicyModel`], or one of transformers that
            [`apply_cts`] has changed.
        processor: its image processor, of either backend.
        repo_id: `"owner/name"`, or `"name"` of your own; created if it is not there.
        metrics: for the card, fractions of 1.
        card: text of `README.md`; one that says what the model is by default.
        private: whether a repository that is created is private; as your account has it by default.
        token: of the Hub; the one that you are logged in with by default. It is never written anywhere.
        endpoint: of the Hub, `https://huggingface.co` by default.
        dry_run: upload nothing, and do not ask the Hub anything.

    Returns:
        [`Upload`]: What was uploaded, or would be; it prints as a list.

    Raises:
        ValueError: as [`upload_folder`].
    """
    _check_repo_id(repo_id)
    name = repo_id.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        if shares_tokens(model):
            write_sharing_model(model, folder)
        else:
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        text = card or model_card(model, metrics or {}, title=name, name=repo_id, has_recipe=False)
        (Path(folder) / "README.md").write_text(text, encoding="utf-8")
        return upload_folder(folder, repo_id, private=private, token=token, endpoint=endpoint, dry_run=dry_run)


def upload_folder(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """
    Uploads the folder of a model: weights (safetensors only), configuration, image processor, card, recipe, code and
    pictures, in one commit. The arguments are those of [`publish`].

    Args:
        folder: what training, conversion, `save_pretrained` or `save_cts` wrote.
        repo_id: the folder's name by default.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the repository cannot have this name, a part of the model is missing in the folder, its weights
            are incomplete or not finite, its image processor does not normalize as its configuration says, or a file
            holds a token of the Hub.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` must be that of a model, got {folder}, which is absent: save a model there first."
        )
    repo_id = folder.resolve().name if repo_id is None else repo_id
    _check_repo_id(repo_id)
    files = _files_to_upload(folder)
    left_out = _left_out(folder, files)
    _check(folder, files)
    if dry_run:
        return Upload(repo_id, files, left_out)
    api = HfApi(endpoint=endpoint, token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
    api.create_commit(repository.repo_id, operations, commit_message="Upload model")
    return Upload(repository.repo_id, files, left_out, str(repository))


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        is_valid = isinstance(repo_id, str)  # `None` is valid for this function
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"`repo_id` must be 'owner/name' or 'name', of at most 96 letters, digits, '-', '_' and '.', got "
            f"{repo_id!r}: give the repository another name."
        )


def _files_to_upload(folder: Path) -> list[str]:
    """Paths of the folder's own files that belong to a model; links that lead elsewhere do not count."""
    patterns = [*_PUBLISHED, *(SHARING_FILES if is_sharing_folder(folder) else [])]
    root = folder.resolve()
    found = {
        path.relative_to(folder).as_posix()
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file() and path.resolve().parent == root / PurePosixPath(pattern).parent
    }
    return sorted(found)


def _left_out(folder: Path, files: list[str]) -> list[str]:
    """What else lies in the folders that files are taken from."""
    parents = {PurePosixPath(name).parent.as_posix() for name in files}
    there = {path.relative_to(folder).as_posix(): path for parent in parents for path in (folder / parent).iterdir()}
    return sorted(name + "/" * path.is_dir() for name, path in there.items() if name not in {*files, *parents})


def _check(folder: Path, files: list[str]) -> None:
    required = [*_REQUIRED]
    if is_sharing_folder(folder):  # of its policy, nothing may be left out, as a link would be
        required += [path.relative_to(folder).as_posix() for name in SHARING_FILES for path in folder.glob(name)]
    missing = sorted(set(required) - set(files))
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(
            f"{folder} must hold all parts of a model, but lacks {', '.join(missing)}: save model and image processor "
            "there with `save_pretrained`, and write a README.md; only weights in safetensors are uploaded."
        )
    for name in files:
        if not name.endswith((".safetensors", ".png")) and _TOKEN.search((folder / name).read_bytes()):
            raise ValueError(
                f"{folder / name} must hold no token of the Hub, got what looks like one: remove it, and revoke it."
            )
    if is_sharing_folder(folder):
        check_sharing_folder(folder)
    else:
        check_model_folder(folder)


__all__ = ["Upload", "publish", "upload_folder"]
