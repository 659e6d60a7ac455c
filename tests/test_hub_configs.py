# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The folders of hub_configs: up to date, complete, and of the sizes that others have published."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoImageProcessor

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsPolicyModel, num_shared_superpatches
from cts_hf.hub.normalization import HALF, check_normalization
from cts_hf.training import DataArguments, ModelArguments

from .helpers.scripts import load_script
from .helpers.slow import slow_but


ROOT = Path(__file__).parents[1] / "hub_configs"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))
SEGMENTERS = [path for path in FOLDERS if path.name.startswith("cts-segmenter")]
OF_EACH_SIZE = {path.name.split("-")[3]: path for path in SEGMENTERS}.values()

# Tokens that are not shared and that are (TRAINING.md of https://github.com/tue-mps/cts-segmenter; 640 is 30 % too).
TOKENS = {"512": (612, 103), "480": (540, 90), "768": (960, 336), "640": (960, 160), "352": None}
# timm's names, and millions of parameters of the whole Segmenter as https://github.com/rstrudel/segmenter rounds them,
# with an ImageNet classifier that is not used.
PUBLISHED = {
    "tiny": ("vit_tiny_patch16_384", 7),
    "small": ("vit_small_patch16_384", 27),
    "base": ("vit_base_patch16_384", 106),
    "large": ("vit_large_patch16_384", 334),
}


def test_everything_is_up_to_date(monkeypatch, tmp_path, capsys):
    generate = load_script(monkeypatch, ROOT / "generate.py")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    assert stopped.value.code == 0, stopped.value.code

    monkeypatch.setattr(generate, "HERE", tmp_path)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    assert "Out of date" in stopped.value.code
    assert "stray" in stopped.value.code
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    generate.main()
    assert capsys.readouterr().out == f"{len(FOLDERS)} checkpoints, {4 * len(FOLDERS) + 2} files changed.\n"
    assert not (tmp_path / "stray" / "config.json").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "train.yaml",
    ]
    metadata = ModelCard.load(folder / "README.md").data
    assert (metadata.license, metadata.library_name) == ("apache-2.0", "transformers")
    assert "arxiv:2306.02095" in metadata.tags
    assert metadata.datasets
    assert metadata.metrics
    config, recipe = AutoConfig.from_pretrained(folder), yaml.safe_load((folder / "train.yaml").read_text())
    if isinstance(config, CtsConfig):
        assert recipe.get("token_reduction", ModelArguments.token_reduction) == config.token_reduction
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size["shortest_edge"] == min(recipe["base_size"])
    check_normalization(config, processor)
    # The paper's ViTs and policies all see 0.5.
    assert config.image_mean == config.image_std == [0.5, 0.5, 0.5]
    if isinstance(config, CtsConfig):
        assert (config.policy_config.image_mean, config.policy_config.image_std) == HALF
        assert metadata.pipeline_tag == "image-segmentation"
        assert config.image_size == recipe.get("crop_size", DataArguments.crop_size)
        assert not any(name.startswith("LABEL_") for name in config.label2id)
        with torch.device("meta"):
            model = CtsForSemanticSegmentation(config)
        assert (model.cts.policy is not None) is (config.token_reduction > 0)
    else:
        with torch.device("meta"):
            CtsPolicyModel(config)


@pytest.mark.parametrize("folder", SEGMENTERS, ids=lambda folder: folder.name)
def test_tokens_are_those_of_the_paper(folder):
    config = AutoConfig.from_pretrained(folder)
    num_patches = (config.image_size // config.patch_size) ** 2
    num_shared = num_shared_superpatches(config.token_reduction, num_patches)
    expected = TOKENS[str(config.image_size)]
    if config.token_reduction == 0:
        assert num_shared == 0
    elif expected:
        assert (num_patches - 4 * num_shared, num_shared) == expected
        card = " ".join((folder / "README.md").read_text().split())
        assert f"{expected[0]} + {expected[1]} instead of {num_patches} tokens" in card


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("folder", slow_but(OF_EACH_SIZE, SEGMENTERS), ids=lambda folder: folder.name)
def test_parameters_are_those_of_others(folder):
    timm = pytest.importorskip("timm")
    config = AutoConfig.from_pretrained(folder)
    name, millions = PUBLISHED[folder.name.split("-")[3]]
    with torch.device("meta"):
        model = CtsForSemanticSegmentation(config)
        encoder = timm.create_model(name, img_size=config.image_size, num_classes=0)
        backbone = timm.create_model("efficientnet_lite0", features_only=True, pretrained=False)
    size_of_policy = 0
    if model.cts.policy is not None:
        size_of_policy = count(model.cts.policy)
        stages = len(model.cts.policy.backbone.blocks)  # later ones are not built
        parts = (backbone.conv_stem, backbone.bn1, backbone.blocks[:stages])
        assert count(model.cts.policy.backbone) == sum(count(part) for part in parts)
    assert count(model.cts) - size_of_policy == count(encoder)
    # Within 4 %: the published numbers of S and B are larger than their layers account for, as T's and L's are not.
    classifier = 1000 * (config.hidden_size + 1)
    assert (count(model) - size_of_policy + classifier) / 1e6 == pytest.approx(millions, rel=0.04, abs=0.5)


def test_no_number_without_its_source():
    for folder in FOLDERS:
        text = (folder / "README.md").read_text()
        reported = (
            json.loads((folder / "config.json").read_text())["model_type"] == "cts" and "camvid" not in folder.name
        )
        assert ("reported by the authors, not measured here" in text) is reported
        measured = folder.name == "cts-policy-efficientnet-lite0-256-camvid"
        assert ("measured by cts_hf on the 233 test images at 480 x 360, one seed" in text) is measured
        assert ("No metric of it has been measured here." in text) is not (reported or measured)
