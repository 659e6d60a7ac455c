# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models of transformers that share tokens, in folders and on the Hub. The folder is the checkpoint that the model has
without sharing, which loads everywhere; what is shared by is in a folder of its own inside.
"""

import json
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from ..hub.loading import check_finite, load_policy_folder, loading_problems
from ..model.configuration_cts_checks import channel_values, check_reductions
from .apply import TokenSharing, apply_cts


FOLDER, OPTIONS_FILE = "token_sharing", "token_sharing.json"
_OPTIONS = ("policy", "token_reduction", "image_mean", "image_std")
# Options of `from_pretrained` that say where a repository is.
_PLACE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_cts(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Saves a model that [`apply_cts`] has changed: the checkpoint that it has without sharing, as `save_pretrained`
    writes it, and in `token_sharing/` its policy and how it shares. An earlier model in the folder is replaced. Where
    this package is missing, the folder loads as the plain model.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        folder (`str` or `Path`): Is made if it is not there.

    Raises:
        ValueError: If the model does not share tokens, or `folder` is a file.
    """
    sharing = getattr(model, "token_sharing", None)
    if not isinstance(sharing, TokenSharing):
        raise ValueError(
            f"`model` must be one that `apply_cts` has changed, got a {type(model)} that shares no tokens: call "
            "`apply_cts` first, or save it with `save_pretrained`."
        )
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got {folder}, which is a file: give another name.")
    inner = folder / FOLDER
    # First, and written again last: without it, what is half-written is no model that shares tokens.
    (inner / OPTIONS_FILE).unlink(missing_ok=True)
    model.save_pretrained(folder)
    inner.mkdir(exist_ok=True)
    if sharing.policy is not None:
        sharing.policy.save_pretrained(inner)
    values = (sharing.policy is not None, sharing.token_reduction, sharing.image_mean, sharing.image_std)
    unfinished = inner / f"{OPTIONS_FILE}.tmp"
    unfinished.write_text(json.dumps(dict(zip(_OPTIONS, values, strict=True)), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, inner / OPTIONS_FILE)


def load_cts(source: str | Path, **options: Any) -> PreTrainedModel:
    """
    Opens a model that [`save_cts`] wrote, complete and with finite weights, and makes it share tokens as it did.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        options: As for `from_pretrained`, such as `dtype`, `device_map`, `attn_implementation` or `revision`.

    Returns:
        [`~transformers.PreTrainedModel`]: In evaluation mode, of the class that was saved.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or nothing in it says how tokens are shared.
        ValueError: If weights are missing, left over, misshaped or not finite, or if what says how tokens are shared
            is damaged.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from cts_hf import load_cts

    >>> model = load_cts("runs/beit-shared")
    >>> segment = pipeline("image-segmentation", model=model, image_processor="runs/beit-shared")
    ```"""
    place = {name: options[name] for name in _PLACE if name in options}
    inner = "/".join(filter(None, (place.get("subfolder"), FOLDER)))
    sharing = _read_options(source, {**place, "subfolder": inner})
    model = _load_plain(source, place, options)
    policy = load_policy_folder(source, **{**place, "subfolder": inner}) if sharing.pop("policy") else None
    return apply_cts(model, policy, **sharing)


def load_existing(source: str | Path, **options: Any) -> PreTrainedModel:
    """
    Opens a model of transformers, complete and with finite weights: as [`load_cts`] if [`save_cts`] wrote it, and
    otherwise without sharing.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        options: As for `from_pretrained`.

    Raises:
        ValueError: As [`load_cts`].
    """
    place = {name: options[name] for name in _PLACE if name in options}
    try:
        _find_options(source, {**place, "subfolder": "/".join(filter(None, (place.get("subfolder"), FOLDER)))})
    except FileNotFoundError:
        return _load_plain(source, place, options)
    return load_cts(source, **options)


def _load_plain(source: str | Path, place: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    model_class = _model_class(source, place)
    model, info = model_class.from_pretrained(source, **{**options, "output_loading_info": True})
    if problems := loading_problems(info):
        raise ValueError(
            f"The weights in {source} do not fit the {model_class.__name__} that its config.json describes. "
            f"{problems}. Save it again with `save_cts`, or with `save_pretrained` if it shares no tokens."
        )
    check_finite(model, source)
    return model


def _find_options(source: str | Path, place: dict[str, Any]) -> str:
    try:
        return cached_file(source, OPTIONS_FILE, **place)
    except OSError as error:
        raise FileNotFoundError(
            f"{source} must be a folder, or the id of a repository ('owner/name') on the Hub, that `save_cts` wrote, "
            f"got none with {place['subfolder']}/{OPTIONS_FILE}: open other models with `from_pretrained`, and then "
            "call `apply_cts`."
        ) from error


def _read_options(source: str | Path, place: dict[str, Any]) -> dict[str, Any]:
    path = _find_options(source, place)
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(options, dict) or options.keys() != set(_OPTIONS) or type(options["policy"]) is not bool:
            raise ValueError(f"it must be a mapping of {', '.join(_OPTIONS)}")
        check_reductions(options["token_reduction"])
        for name in ("image_mean", "image_std"):
            channel_values(name, options[name], len(options[name]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{OPTIONS_FILE} in {source} cannot be read ({error}): save the model there again with `save_cts`."
        ) from error
    return options


def _model_class(source: str | Path, place: dict[str, Any]) -> type[PreTrainedModel]:
    """The class of transformers that a checkpoint is of; nothing else is looked for, and no code of it is run."""
    names = AutoConfig.from_pretrained(source, **place).architectures or ["no architecture"]
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"{source} must hold a model of transformers {transformers.__version__}, got {names[0]!r} in its "
            "config.json: install the version that it was saved with, or later."
        )
    return found


__all__ = ["load_cts", "load_existing", "save_cts"]
