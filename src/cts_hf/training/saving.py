# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A trained model as a folder: weights, image processor, recipe and model card."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cts_hf.image_processing_pil_cts import CtsImageProcessingMixin
from cts_hf.model_card import model_card
from cts_hf.normalization import check_normalization
from cts_hf.publishing import upload_folder
from cts_hf.training.checkpoints import replace_files
from cts_hf.training.recipe import save_recipe


def save_model_folder(
    folder: str | Path,
    model: PreTrainedModel,
    processor: CtsImageProcessingMixin,
    arguments: Sequence[Any],
    metrics: dict[str, float],
    title: str | None = None,
) -> None:
    """
    Writes a model so that `from_pretrained` and `pipeline` take the folder. A folder that is there already keeps its
    old files until the new ones are complete.

    Args:
        folder: created if it is not there.
        model: Segmenter or policy.
        processor: its image processor.
        arguments: options dataclasses of the run, for `train.yaml`.
        metrics: numbers for the model card, fractions of 1.
        title: of the model card; the folder's name by default.

    Raises:
        ValueError: an image processor that does not normalize as the model's configuration says.
    """
    check_normalization(model.config, processor)
    folder = Path(folder)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    save_recipe(unfinished, arguments)
    card = model_card(model, metrics, title or folder.name, folder.name)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    replace_files(unfinished, folder)


def push_to_hub(folder: str | Path, repo_id: str | None = None) -> str:
    """
    Uploads a model folder, without the checkpoints to resume from.

    Args:
        folder: what `save_model_folder` wrote.
        repo_id: repository, created if it is not there; the folder's name by default.

    Returns:
        its address.
    """
    return upload_folder(folder, repo_id).url
