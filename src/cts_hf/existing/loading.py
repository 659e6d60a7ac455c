# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Opening models of transformers, whoever saved them."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..hub.loading import load_complete, read_config
from ..hub.sharing_folder import OPTIONS_FILE, SHARING, model_class
from .saving import load_cts


def load_existing(source: str | Path, ignore: tuple[str, ...] = (), **options: Any) -> PreTrainedModel:
    """
    Opens a model of transformers, complete and with finite weights: one that shares tokens if `save_cts` wrote it, and
    a plain one otherwise.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.
        ignore (`tuple[str, ...]`): Prefixes of weights that may be misshaped, and are then random ones.
        options: As for `from_pretrained` of the model.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration or weights.
        ValueError: If it is damaged or incomplete, or is of a class that transformers does not have.
    """
    config = read_config(source)
    try:
        cached_file(source, f"{SHARING}/{OPTIONS_FILE}")
    except OSError:
        return load_complete(model_class(config, source), source, ignore, use_safetensors=True, **options)
    return load_cts(source, ignore=ignore, **options)


__all__ = ["load_existing"]
