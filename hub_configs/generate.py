# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Writes the folders beside this file: for each checkpoint of the paper, for its policies and for CamVid, the
configuration, the image processor, the recipe and the model card. All of it follows from `examples/recipes`, the names
of the classes in `cts_hf.data` and the table below.

    python hub_configs/generate.py            # after a change of any of these
    python hub_configs/generate.py --check    # lists what is out of date, and fails if something is
"""

import argparse
import json
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from cts_hf.data import SegmentationData
from cts_hf.data.benchmarks.ade20k import ADE20K_CLASSES
from cts_hf.data.benchmarks.cityscapes import CITYSCAPES_CLASSES
from cts_hf.data.benchmarks.pascal_context import PASCAL_CONTEXT_CLASSES
from cts_hf.model.token_sharing import num_shared_superpatches
from cts_hf.training import (
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicyOptimizationArguments,
    PolicySourceArguments,
    SuperpatchArguments,
    build_processor,
    parse_recipe,
)
from cts_hf.training.models import policy_config, segmenter_config


HERE = Path(__file__).parent
RECIPES = HERE.parent / "examples" / "recipes"
CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)


@dataclass(frozen=True)
class Dataset:
    """A data set: its name in prose and on the Hub, and its classes."""

    title: str
    hub_name: str
    classes: tuple[str, ...]


DATASETS = {
    "ade20k": Dataset("ADE20K", "scene_parse_150", ADE20K_CLASSES),
    "cityscapes": Dataset("Cityscapes", "cityscapes", CITYSCAPES_CLASSES),
    "pascal-context": Dataset("Pascal Context", "pascal-context", PASCAL_CONTEXT_CLASSES),
    "camvid": Dataset("CamVid", "camvid", CAMVID_CLASSES),
}


@dataclass(frozen=True)
class Reported:
    """
    What the authors report in https://github.com/tue-mps/cts-segmenter: mean IoU in percent, at one scale, the median
    of five runs; and images per second at a batch size of 32.
    """

    mean_iou: float
    images_per_second: float


@dataclass(frozen=True)
class Measured:
    """What was measured here: of what, and the metrics in percent."""

    setting: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Checkpoint:
    """A folder: a recipe, changed where the paper has another budget, what the paper says of it, and what we do."""

    name: str
    recipe: str
    dataset: str
    policy: str | None = None
    plain: bool = False
    reported: Reported | None = None
    measured: Measured | None = None


def _sizes(size: str, resolution: str, dataset: str, recipe: str, reported: dict[int, Reported]) -> list[Checkpoint]:
    """The checkpoints of one row of the paper's tables, without sharing and with it."""
    name = f"cts-segmenter-vit-{size}-patch16-{resolution}-{dataset}"
    policy = f"cts-policy-efficientnet-lite0-{resolution}-{dataset}"
    return [
        Checkpoint(f"{name}-r{percent}", recipe, dataset, None if percent == 0 else policy, percent == 0, numbers)
        for percent, numbers in reported.items()
    ]


CHECKPOINTS = [
    *_sizes("tiny", "512", "ade20k", "ade20k_512_tiny", {0: Reported(38.1, 262), 30: Reported(38.2, 284)}),
    *_sizes("small", "512", "ade20k", "ade20k_512_small", {0: Reported(45.0, 122), 30: Reported(45.1, 162)}),
    *_sizes("base", "512", "ade20k", "ade20k_512_base", {0: Reported(48.5, 47), 30: Reported(48.7, 69)}),
    *_sizes("large", "640", "ade20k", "ade20k_640_large", {0: Reported(51.8, 9.7), 30: Reported(51.6, 15)}),
    *_sizes(
        "small", "480", "pascal-context", "pascal_context_480_small", {0: Reported(53.0, 157), 30: Reported(52.9, 203)}
    ),
    *_sizes("small", "768", "cityscapes", "cityscapes_768_small", {0: Reported(76.5, 38), 44: Reported(76.5, 78)}),
    Checkpoint("cts-segmenter-vit-tiny-patch16-352-camvid", "camvid_tiny", "camvid"),
    Checkpoint("cts-policy-efficientnet-lite0-512-ade20k", "policy_ade20k_512", "ade20k"),
    Checkpoint("cts-policy-efficientnet-lite0-640-ade20k", "policy_ade20k_640", "ade20k"),
    Checkpoint("cts-policy-efficientnet-lite0-480-pascal-context", "policy_pascal_context_480", "pascal-context"),
    Checkpoint("cts-policy-efficientnet-lite0-768-cityscapes", "policy_cityscapes_768", "cityscapes"),
    Checkpoint(
        "cts-policy-efficientnet-lite0-256-camvid",
        "policy_camvid",
        "camvid",
        measured=Measured(
            "on the 233 test images at 480 x 360, one seed",
            {
                "accuracy": 85.40,
                "average precision": 91.54,
                "precision at a budget of 30 %": 86.70,
                "precision at a budget of 43.75 %": 73.90,
            },
        ),
    ),
]

CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: {pipeline_tag}
tags: [semantic-segmentation, vision-transformer, token-sharing, cts, "arxiv:2306.02095"]
datasets: [{hub_name}]
metrics: [{metric}]
---

# {name}

{description}

This folder is a configuration without weights; `train.yaml` holds the options of the training that differ from the
defaults.

{numbers}

## Train

```bash
{train}
```
{use}
## Method

[Content-aware Token Sharing for Efficient Semantic Segmentation with Vision
Transformers](https://arxiv.org/abs/2306.02095), Chenyang Lu, Daan de Geus and Gijs Dubbelman, CVPR 2023. This is
cts_hf, an independent implementation for Hugging Face Transformers; the authors' own is
[tue-mps/cts-segmenter](https://github.com/tue-mps/cts-segmenter).
"""
USE = """
## Use, once it is trained

```python
from transformers import pipeline

folder = "outputs/{name}"
segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
for region in segment("image.jpg"):
    print(region["label"], region["mask"].size)
```
"""
REPORTED = """| reported by the authors, not measured here | |
|---|---|
| mean IoU, one scale, median of 5 runs | {mean_iou:.1f} % |
| images per second at batch size 32, on their hardware | {images_per_second:g} |"""
MEASURED = """| measured by cts_hf {setting} | |
|---|---|
{rows}"""
UNMEASURED = "No metric of it has been measured here."


def render(checkpoint: Checkpoint) -> dict[str, str]:
    """The text of every file of a checkpoint's folder."""
    is_policy = checkpoint.name.startswith("cts-policy")
    overrides = ["--output_dir", f"outputs/{checkpoint.name}"]
    overrides += ["--token_reduction", "0"] if checkpoint.plain else []
    overrides += ["--policy", f"outputs/{checkpoint.policy}"] if checkpoint.policy else []
    sources = (SuperpatchArguments, PolicyArguments, PolicyOptimizationArguments)
    if not is_policy:
        sources = (ModelArguments, PolicyArguments, PolicySourceArguments, OptimizationArguments)
    recipe = RECIPES / f"{checkpoint.recipe}.yaml"
    arguments = parse_recipe((DataArguments, *sources), ["--recipe", str(recipe), *overrides])
    config = policy_model_config(arguments) if is_policy else segmenter_model_config(arguments, checkpoint)
    options = {
        name: value
        for group in arguments
        for name, value in asdict(group).items()
        if value != getattr(type(group)(), name)
    }
    return {
        "config.json": config_text(config),
        "preprocessor_config.json": build_processor(arguments[0], config).to_json_string(),
        "train.yaml": yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=119),
        "README.md": card(checkpoint, config, is_policy),
    }


def policy_model_config(arguments: tuple[Any, ...]) -> PreTrainedConfig:
    _, superpatch_args, policy_args, _ = arguments
    config = policy_config(policy_args, superpatch_args.patch_size)
    config.architectures = ["CtsPolicyModel"]
    return config


def segmenter_model_config(arguments: tuple[Any, ...], checkpoint: Checkpoint) -> PreTrainedConfig:
    data_args, model_args, policy_args, policy_source, _ = arguments
    data = SegmentationData(splits={}, classes=DATASETS[checkpoint.dataset].classes)
    policy = policy_config(policy_args, model_args.patch_size)
    config = segmenter_config(model_args, policy, policy_source, data, data_args.crop_size)
    config.use_policy = not checkpoint.plain
    config.architectures = ["CtsForSemanticSegmentation"]
    return config


def config_text(config: PreTrainedConfig) -> str:
    """`config.json` without the version of transformers, which is no property of the checkpoint."""
    values = json.loads(config.to_json_string())
    for level in (values, values.get("policy_config", {})):
        level.pop("transformers_version", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def card(checkpoint: Checkpoint, config: PreTrainedConfig, is_policy: bool) -> str:
    dataset = DATASETS[checkpoint.dataset]
    name = checkpoint.name
    script = "train_policy.py" if is_policy else "train.py"
    train = f"accelerate launch examples/{script} --recipe hub_configs/{name}/train.yaml --data_dir DATA"
    if checkpoint.policy:
        policy = f"hub_configs/{checkpoint.policy}/train.yaml"
        train = f"accelerate launch examples/train_policy.py --recipe {policy} --data_dir DATA\n{train}"
    description = describe_policy(config, dataset) if is_policy else describe_segmenter(config, dataset)
    numbers = UNMEASURED
    if checkpoint.reported:
        numbers = REPORTED.format(**asdict(checkpoint.reported))
    elif checkpoint.measured:
        rows = "\n".join(f"| {metric} | {value:.2f} % |" for metric, value in checkpoint.measured.metrics.items())
        numbers = MEASURED.format(setting=checkpoint.measured.setting, rows=rows)
    return CARD.format(
        name=name,
        pipeline_tag="image-feature-extraction" if is_policy else "image-segmentation",
        hub_name=dataset.hub_name,
        metric="accuracy" if is_policy else "mean_iou",
        description=textwrap.fill(description, width=119),
        numbers=numbers,
        train=train,
        use="" if is_policy else USE.format(name=name),
    )


def describe_policy(config: PreTrainedConfig, dataset: Dataset) -> str:
    size = config.superpatch_size
    return (
        f"The policy of content-aware token sharing for {dataset.title}: an EfficientNet-Lite0 that predicts which "
        f"superpatches of {size} x {size} pixels show one class."
    )


def describe_segmenter(config: PreTrainedConfig, dataset: Dataset) -> str:
    num_patches = (config.image_size // config.patch_size) ** 2
    num_shared = num_shared_superpatches(config.token_reduction, num_patches)
    tokens = f"all {num_patches} tokens of an image of {config.image_size} x {config.image_size} pixels: no sharing."
    if num_shared:
        num_unshared = num_patches - 4 * num_shared
        tokens = (
            f"{num_unshared} + {num_shared} instead of {num_patches} tokens of an image of {config.image_size} x "
            f"{config.image_size} pixels, {config.token_reduction:.1%} fewer."
        )
    return (
        f"Semantic segmentation of the {len(dataset.classes)} classes of {dataset.title} by a Segmenter with a ViT of "
        f"width {config.hidden_size}, and {tokens}"
    )


def index() -> str:
    """README.md of this folder: the checkpoints and what the authors report of each."""
    rows = []
    for checkpoint in CHECKPOINTS:
        reported = checkpoint.reported
        numbers = f"{reported.mean_iou:.1f} | {reported.images_per_second:g}" if reported else "- | -"
        rows.append(f"| [{checkpoint.name}]({checkpoint.name}) | {DATASETS[checkpoint.dataset].title} | {numbers} |")
    return "\n".join(
        [
            "# Configurations of the checkpoints",
            "",
            "One folder per checkpoint, named after its budget (`-r30`: 30 % fewer tokens) where there are several:",
            "`config.json`, `preprocessor_config.json`, `train.yaml` and the model card. They are written by",
            "`python hub_configs/generate.py`. The numbers are the authors', on their hardware, from",
            "[tue-mps/cts-segmenter](https://github.com/tue-mps/cts-segmenter); they have not been measured here.",
            "",
            "| checkpoint | data set | mean IoU (%), the authors' | images/s at batch 32, the authors' |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def render_all() -> dict[Path, str]:
    """The text of every file, by its path."""
    files = {HERE / "README.md": index()}
    for checkpoint in CHECKPOINTS:
        for name, text in render(checkpoint).items():
            files[HERE / checkpoint.name / name] = text
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a file is out of date.")
    check = parser.parse_args().check
    files = render_all()
    outdated = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    outdated += [path for path in HERE.glob("*/*") if path not in files and path.suffix != ".pyc"]
    if check:
        sys.exit("\n".join(["Out of date: run hub_configs/generate.py.", *map(str, outdated)]) if outdated else 0)
    for path in outdated:
        if path in files:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        else:
            path.unlink()
    print(f"{len(CHECKPOINTS)} checkpoints, {len(outdated)} files changed.")


if __name__ == "__main__":
    main()
