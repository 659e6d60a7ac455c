# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A trained model as a folder: weights, image processor, recipe and model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import BaseImageProcessor, PreTrainedModel

from ..hub.model_card import model_card
from ..hub.normalization import check_normalization
from ..hub.output_folder import OutputFolder
from ..hub.publishing import upload_folder
from ..hub.sharing_folder import shares_tokens, write_sharing_model
from .recipe import RECIPE_FILE, save_recipe


def save_model_folder(
    folder: str | Path,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    arguments: Sequence[Any],
    metrics: dict[str, float],
    title: str | None = None,
    subfolder: str = "",
) -> None:
    """
    Writes a model so that `from_pretrained` and `pipeline` take the folder, one of transformers as `save_cts` does. A
    folder that is there already keeps its old files until the new ones are complete.

    Args:
        folder: created if it is not there.
        model: Segmenter, policy, or a model of transformers that `apply_cts` has changed.
        processor: its image processor.
        arguments: options dataclasses of the run, for `train.yaml`.
        metrics: numbers for the model card, fractions of 1.
        title: of the model card; the folder's name by default.
        subfolder: where in the folder the model goes; the folder's record of what runs wrote has it too.

    Raises:
        ValueError: an image processor that does not normalize as the model's configuration says, files that no run
            wrote in the way, another run that is writing there, or a disk that is full.
    """
    if not shares_tokens(model):
        check_normalization(model.config, processor)
    try:
        with OutputFolder(folder, "training") as output, output.writing(subfolder, last=RECIPE_FILE) as unfinished:
            if shares_tokens(model):
                write_sharing_model(model, unfinished)
            else:
                model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            save_recipe(unfinished, arguments)
            _write_card(unfinished, model, metrics, title, (output.path / subfolder).resolve().name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The model could not be written to {Path(folder) / subfolder}: {error}. Make room there or correct "
            "the cause; a run that has checkpoints is resumed with --resume_from_checkpoint latest."
        ) from error


def save_card(folder: str | Path, model: PreTrainedModel, metrics: dict[str, float], title: str | None = None) -> None:
    """Replaces the model card in a folder of [`save_model_folder`] by one with metrics that were measured since."""
    with OutputFolder(folder, "training") as output, output.writing() as unfinished:
        _write_card(unfinished, model, metrics, title, output.path.resolve().name)


def _write_card(folder: Path, model: PreTrainedModel, metrics: dict[str, float], title: str | None, name: str) -> None:
    (folder / "README.md").write_text(model_card(model, metrics, title or name, name), encoding="utf-8")


def push_to_hub(folder: str | Path, repo_id: str | None = None) -> str:
    """
    Uploads a model folder, without the checkpoints to resume from.

    Args:
        folder: what `save_model_folder` wrote.
        repo_id: repository, created if it is not there; the folder's name by default.

    Returns:
        its address.

    Raises:
        ValueError: the upload failed; the folder is as it was.
    """
    try:
        return upload_folder(folder, repo_id).url
    except Exception as error:  # no login, no network, no right to write: each has an error of its own
        raise ValueError(
            f"The model is in {folder}, but it could not be uploaded: {error}. Correct that, and upload it with "
            f"examples/push_to_hub.py --folder {folder}."
        ) from error
