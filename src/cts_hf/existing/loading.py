# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Opening models of transformers, whoever saved them."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..hub.loading import load_complete, read_config
from ..hub.sharing_folder import OPTIONS_FILE, SHARING, model_class
from .saving import load_cts


def load_existing(source: str | Path) -> PreTrainedModel:
    """
    Opens a model of transformers, complete and with finite weights: one that shares tokens if `save_cts` wrote it, and
    a plain one otherwise.

    Args:
        source (`str` or `Path`): Folder, or id of a repository on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration or weights.
        ValueError: If it is damaged or incomplete, or is of a class that transformers does not have.
    """
    config = read_config(source)
    try:
        cached_file(source, f"{SHARING}/{OPTIONS_FILE}")
    except OSError:
        return load_complete(model_class(config, source), source, use_safetensors=True)
    return load_cts(source)


__all__ = ["load_existing"]
