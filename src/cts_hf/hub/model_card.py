# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained model: README.md of its folder, with the metadata that the Hub reads."""

import html
import re

from transformers import PreTrainedConfig, PreTrainedModel

from ..model.modeling_cts_policy import CtsPolicyModel


_CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: {pipeline_tag}
tags: [semantic-segmentation, vision-transformer, token-sharing, cts, "arxiv:2306.02095"]
---

# {title}

{description} The method is that of [Lu et al., CVPR 2023]({paper}).
{recipe}{results}
## Use

```python
{example}
```
"""
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
# What has a meaning in a line of Markdown, a cell of a table included, and is no HTML. Underscores in words have none.
_MARKDOWN = re.compile(r"([\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_]))")


def _sharing(config: PreTrainedConfig) -> str:
    """What sharing does, as the end of a sentence."""
    if config.sharing_threshold is not None:
        return f"which shares tokens where its policy is at least {config.sharing_threshold:.1%} sure"
    given = config.token_reduction
    return f"which removes {sum(given) if isinstance(given, tuple) else given:.1%} of the tokens"


def model_card(
    model: PreTrainedModel, metrics: dict[str, float], title: str, name: str, has_recipe: bool = True
) -> str:
    """
    Text of README.md.

    Args:
        model: Segmenter or policy.
        metrics: what was measured, fractions of 1.
        title: headline, any text.
        name: folder or repository that the example opens, any text.
        has_recipe: whether the model was trained here, so that a `train.yaml` lies beside the card.
    """
    rows = [f"| {_as_markdown(label)} | {value:.4f} |" for label, value in metrics.items()]
    config = model.config
    if isinstance(model, CtsPolicyModel):
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
        title=_as_markdown(title),
        description=description,
        pipeline_tag=pipeline_tag,
        paper=_PAPER,
        recipe=_RECIPE if has_recipe else "",
        results=_RESULTS.format(rows="\n".join(rows)) if rows else "",
        example=example.format(name=_as_python(name)),
    )


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
