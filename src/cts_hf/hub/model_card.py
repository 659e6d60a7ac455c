# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained model: README.md of its folder, with the metadata that the Hub reads."""

import html
import re

from transformers import PreTrainedConfig, PreTrainedModel

from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_policy import CtsPolicyModel
from .sharing_folder import SHARING, shares_tokens


_CARD = """---
library_name: transformers
{metadata}
---

# {title}

{description} The method is that of [Lu et al., CVPR 2023]({paper}).
{recipe}{results}
## Use

```python
{example}
```
"""
_OWN_METADATA = """license: apache-2.0
pipeline_tag: {pipeline_tag}
tags: [semantic-segmentation, vision-transformer, token-sharing, cts, "arxiv:2306.02095"]"""
# The license is that of weights of others.
_SHARING_METADATA = """pipeline_tag: {pipeline_tag}
tags: [vision-transformer, token-sharing, cts, "arxiv:2306.02095"]"""
_RECIPE = """
Trained with cts_hf; its options are in [`train.yaml`](train.yaml).
"""
_RESULTS = """
## Results

| metric on the validation images | value |
|---|---|
{rows}
"""
_PAPER = "https://arxiv.org/abs/2306.02095"
_SEGMENTER_EXAMPLE = """from transformers import pipeline

segment = pipeline("image-segmentation", model={name}, trust_remote_code=True)
for region in segment("image.jpg"):
    print(region["label"], region["mask"].size)"""
_POLICY_EXAMPLE = """from cts_hf import CtsPolicyModel

policy = CtsPolicyModel.from_pretrained({name})  # or `--policy` of examples/train.py"""
_SHARING_EXAMPLE = """from cts_hf import load_cts

model = load_cts({name})"""
_SHARING_PIPELINE_EXAMPLE = """from transformers import AutoImageProcessor, pipeline

from cts_hf import load_cts

processor = AutoImageProcessor.from_pretrained({name})
pipe = pipeline("{pipeline_tag}", model=load_cts({name}), image_processor=processor)
result = pipe("image.jpg")"""
_PLAIN_EXAMPLE = """
```

Where cts_hf is not installed, the same weights are a plain {architecture}, which shares no tokens:

```python
from transformers import {architecture}

model = {architecture}.from_pretrained({name})"""
# What names of classes of transformers end with, and the pipeline that takes them.
_PIPELINES = {
    "Segmentation": "image-segmentation",
    "DepthEstimation": "depth-estimation",
    "ImageClassification": "image-classification",
}
# What has a meaning in a line of Markdown, a cell of a table included, and is no HTML. Underscores in words have none.
_MARKDOWN = re.compile(r"([\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_]))")


def _sharing(config: PreTrainedConfig) -> str:
    """What sharing does, as the end of a sentence."""
    if config.sharing_threshold is not None:
        return f"which shares tokens where its policy is at least {config.sharing_threshold:.1%} sure"
    return f"which removes {sum(per_level(config.token_reduction)):.1%} of the tokens"


def model_card(
    model: PreTrainedModel, metrics: dict[str, float], title: str, name: str, has_recipe: bool = True
) -> str:
    """
    Text of README.md.

    Args:
        model: Segmenter, policy, or a model of transformers that `apply_cts` has changed.
        metrics: what was measured, fractions of 1.
        title: headline, any text.
        name: folder or repository that the example opens, any text.
        has_recipe: whether the model was trained here, so that a `train.yaml` lies beside the card.
    """
    rows = [f"| {_as_markdown(label)} | {value:.4f} |" for label, value in metrics.items()]
    config, metadata, architecture = model.config, _OWN_METADATA, type(model).__name__
    if shares_tokens(model):
        description, metadata = _describe_sharing(model), _SHARING_METADATA
        tags = [tag for ending, tag in _PIPELINES.items() if architecture.endswith(ending)]
        pipeline_tag = tags[0] if tags else "image-feature-extraction"
        has_policy = model.token_sharing.policy is not None  # without which a pipeline could not share
        example = (_SHARING_PIPELINE_EXAMPLE if has_policy else _SHARING_EXAMPLE) + _PLAIN_EXAMPLE
    elif isinstance(model, CtsPolicyModel):
        size = config.superpatch_size
        description = f"Predicts which superpatches of {size} x {size} pixels show one class."
        example, pipeline_tag = _POLICY_EXAMPLE, "image-feature-extraction"
    else:
        description = (
            f"Semantic segmentation of {config.num_labels} classes by a Segmenter with content-aware token sharing, "
            f"{_sharing(config)}."
        )
        example, pipeline_tag = _SEGMENTER_EXAMPLE, "image-segmentation"
    return _CARD.format(
        metadata=metadata.format(pipeline_tag=pipeline_tag),
        title=_as_markdown(title),
        description=description,
        paper=_PAPER,
        recipe=_RECIPE if has_recipe else "",
        results=_RESULTS.format(rows="\n".join(rows)) if rows else "",
        example=example.format(name=_as_python(name), pipeline_tag=pipeline_tag, architecture=architecture),
    )


def _describe_sharing(model: PreTrainedModel) -> str:
    sharing = model.token_sharing
    text = (
        f"{type(model).__name__} of transformers with content-aware token sharing: 2 x 2 patches that show one class "
        f"are one token, which removes {sharing.token_reduction:.1%} of the patch tokens, or the fraction that a call "
        "gives as `token_reduction`. "
    )
    if sharing.policy is None:
        text += "It has no policy: calls must give `superpatch_scores`, or `token_reduction=0`."
    else:
        size = sharing.policy.config.superpatch_size
        text += (
            f"A policy of {sharing.policy.num_parameters():,} parameters chooses these superpatches of {size} x "
            f"{size} pixels; it lies in [`{SHARING}`]({SHARING})."
        )
    return f"{text} The weights have the license of the model that they come from."


def _as_markdown(text: str) -> str:
    """Markdown of one line that shows a text as it is, white space aside."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))


def _as_python(text: str) -> str:
    """A Python literal of a text, on one line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    # What is not printable is bytes of names that are no UTF-8, too.
    printable = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in escaped)
    return f'"{"".join(printable)}"'


__all__ = ["model_card"]
