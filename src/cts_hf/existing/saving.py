# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that share tokens, as folders: `save_cts` and `load_cts`."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..hub.model_card import model_card
from ..hub.output_folder import OutputFolder
from ..hub.publishing import SHARING_FILES, WEIGHT_FILES
from ..hub.sharing_folder import (
    OPTIONS_FILE,
    check_can_be_written,
    load_sharing_model,
    write_sharing_model,
)
from .apply import apply_cts


_WRITER = "save_cts"
_CARD = "README.md"
_FILES = (*WEIGHT_FILES, "config.json", _CARD, *SHARING_FILES)


def save_cts(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Writes a model that shares tokens: the checkpoint that its own `save_pretrained` writes, which loads as a plain
    model where this package is missing, a model card, and a subfolder `token_sharing` with the policy and the options
    of [`apply_cts`]. Files appear when all are complete. Save the image processor beside it with `save_pretrained`.

    Args:
        model ([`~transformers.PreTrainedModel`]): One that [`apply_cts`] has changed.
        folder (`str` or `Path`): Created if it is not there. What is in it stays, but for an earlier model that this
            function has written there, which is replaced once the new one is complete.

    Raises:
        ValueError: If the model shares no tokens, is of a class that is not in transformers or has adapters of PEFT;
            or if the folder holds a model of others, is being written to, or cannot be.

    Example:

    ```python
    >>> from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    >>> from cts_hf import apply_cts, load_cts, save_cts

    >>> name = "microsoft/beit-base-finetuned-ade-640-640"
    >>> model = apply_cts(AutoModelForSemanticSegmentation.from_pretrained(name), policy="runs/policy")
    >>> save_cts(model, "runs/beit")
    >>> processor = AutoImageProcessor.from_pretrained(name)
    >>> _ = processor.save_pretrained("runs/beit")
    >>> model = load_cts("runs/beit")
    ```"""
    check_can_be_written(model)
    try:
        with OutputFolder(folder, _WRITER) as output:
            output.refuse_existing(_FILES, overwrite=True)  # but for what an earlier call has written
            earlier = [name for name, writer in output.written.items() if writer == _WRITER]
            with output.writing(last=OPTIONS_FILE) as unfinished:
                write_sharing_model(model, unfinished)
                name = output.path.resolve().name
                card = model_card(model, {}, title=name, name=name, has_recipe=False)
                (unfinished / _CARD).write_text(card, encoding="utf-8")
                new = {path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*")}
            output.delete([name for name in earlier if name not in new])
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The model could not be written to {folder}: {error}. Make room there or correct the cause, and save it "
            "again."
        ) from error


def load_cts(folder_or_id: str | Path, **from_pretrained_options: Any) -> PreTrainedModel:
    """
    Opens a model that [`save_cts`] wrote, which shares tokens as when it was saved. Weights that are missing, left
    over, misshaped or not finite are refused, and no code of the folder or repository runs.

    Args:
        folder_or_id (`str` or `Path`): Folder, or id of a repository on the Hub.
        from_pretrained_options:
            As for `from_pretrained` of the model, such as `dtype`, `device_map`, `attn_implementation`, `revision` or
            `token`. The policy comes from the same revision, and follows the model's device and dtype.

    Returns:
        [`~transformers.PreTrainedModel`]: Of the class that was saved, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it lacks a configuration or weights.
        ValueError: If it was not written by [`save_cts`], is damaged or incomplete, or is of a class that transformers
            does not have; or if an option would let incomplete weights through.
    """
    model, policy, options = load_sharing_model(folder_or_id, **from_pretrained_options)
    return apply_cts(
        model, policy, options.token_reduction, image_mean=options.image_mean, image_std=options.image_std
    )


__all__ = ["load_cts", "save_cts"]
