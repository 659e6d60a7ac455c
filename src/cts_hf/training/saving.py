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

from huggingface_hub import HfApi
from transformers import PreTrainedModel

from cts_hf.image_processing_pil_cts import CtsImageProcessingMixin
from cts_hf.modeling_cts_policy import CtsPolicyModel
from cts_hf.training.checkpoints import CHECKPOINTS, replace_files
from cts_hf.training.recipe import RECIPE_FILE, save_recipe


_CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: {pipeline_tag}
tags: [semantic-segmentation, token-sharing, cts]
---

# {title}

{description} Trained with [cts_hf]({paper}); every option is in [`{recipe}`]({recipe}).

## Results

{results}

## Use

```python
{example}
```
"""
_PAPER = "https://arxiv.org/abs/2306.02095"
_SEGMENTER_EXAMPLE = """from transformers import pipeline

segment = pipeline("image-segmentation", model="{name}", trust_remote_code=True)
for region in segment("image.jpg"):
    print(region["label"], region["mask"].size)"""
_POLICY_EXAMPLE = """from cts_hf import CtsPolicyModel

policy = CtsPolicyModel.from_pretrained("{name}")  # or: examples/train.py --policy {name}"""


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
    """
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


def model_card(model: PreTrainedModel, metrics: dict[str, float], title: str, name: str) -> str:
    """Text of README.md: what the model is, its metrics, and how to use it under `name`."""
    rows = [f"| {label} | {value:.4f} |" for label, value in metrics.items()]
    config = model.config
    if isinstance(model, CtsPolicyModel):
        size = config.superpatch_size
        description = f"Predicts which superpatches of {size} x {size} pixels show one class."
        example, pipeline_tag = _POLICY_EXAMPLE, "image-feature-extraction"
    else:
        description = (
            f"Semantic segmentation of {config.num_labels} classes by a Segmenter with content-aware token sharing, "
            f"which removes {config.token_reduction:.1%} of the tokens."
        )
        example, pipeline_tag = _SEGMENTER_EXAMPLE, "image-segmentation"
    return _CARD.format(
        title=title,
        description=description,
        pipeline_tag=pipeline_tag,
        paper=_PAPER,
        recipe=RECIPE_FILE,
        results="\n".join(["| metric on the validation images | value |", "|---|---|", *rows]),
        example=example.format(name=name),
    )


def push_to_hub(folder: str | Path, repo_id: str | None = None) -> str:
    """
    Uploads a model folder, without the checkpoints to resume from.

    Args:
        folder: what `save_model_folder` wrote.
        repo_id: repository, created if it is not there; the folder's name by default.

    Returns:
        its address.
    """
    folder, api = Path(folder), HfApi()
    repository = api.create_repo(repo_id or folder.resolve().name, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        ignore_patterns=[f"**{CHECKPOINTS}/*", "best/*", "policy/*", ".unfinished*/*"],
    )
    return str(repository)
