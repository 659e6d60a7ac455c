# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import transformers
from transformers import AutoModelForSemanticSegmentation

from cts_hf import CtsPolicyModel, apply_cts

from ..helpers.existing_models import build_existing
from ..helpers.models import random_images
from ..helpers.training_runs import TINY_DATA, TINY_POLICY, run_example, train_example


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A folder with an encoder of transformers and its image processor."""
    folder = tmp_path_factory.mktemp("dinov2")
    build_existing("dinov2").save_pretrained(folder)
    transformers.BitImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_an_encoder_of_transformers_is_trained_on_or_kept(scenes, dinov2, tmp_path, freeze_encoder):
    train_example(
        scenes,
        tmp_path,
        backbone=dinov2,
        decoder_type="linear",
        freeze_encoder=freeze_encoder,
        layer_decay=0.75,
        learning_rate=1e-2,
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert model.config.backbone_config.model_type == "dinov2"
    assert model.config.image_mean == [0.4, 0.5, 0.6]
    before = transformers.AutoModel.from_pretrained(dinov2).state_dict()
    changed = {
        name
        for name, value in model.cts.backbone.state_dict().items()
        if not torch.equal(value, before[name]) and "mask_token" not in name
    }
    assert (changed == set()) == freeze_encoder
    # Higher layers learn faster.
    if not freeze_encoder:
        moved = [
            (model.cts.backbone.state_dict()[name] - before[name]).abs().max()
            for name in ("encoder.layer.0.norm1.weight", "encoder.layer.2.norm1.weight")
        ]
        assert moved[0] < moved[1]
    # It is trained on as any model.
    train_example(scenes, tmp_path / "again", model=tmp_path, policy_loss_weight=0.0)


def test_a_policy_for_a_model_of_transformers(scenes, dinov2, tmp_path):
    options = {**TINY_POLICY, **TINY_DATA, "cpu_threads": 1, "batch_size": 4, "max_steps": 2}
    del options["crop_size"]
    run_example("train_policy.py", **options, data_dir=scenes, output_dir=tmp_path, for_model=dinov2)
    policy = CtsPolicyModel.from_pretrained(tmp_path)
    assert policy.config.superpatch_size == 16
    assert policy.config.image_mean == [0.4, 0.5, 0.6]
    assert "crop_size: 64" in (tmp_path / "train.yaml").read_text()
    model = apply_cts(transformers.AutoModel.from_pretrained(dinov2), tmp_path)
    assert model(random_images()).shared_superpatches.any()


def test_options_that_exclude_each_other(scenes, dinov2, tmp_path):
    with pytest.raises(ValueError, match="One of `model`, `backbone` and `backbone_weights` must be given at most"):
        train_example(scenes, tmp_path, backbone=dinov2, backbone_weights=dinov2)
    with pytest.raises(ValueError, match="`freeze_encoder` must be False for an encoder with random weights"):
        train_example(scenes, tmp_path, freeze_encoder=True)
    for options in ({"superpatch_levels": [2, 4]}, {"sharing_threshold": 0.9}):
        with pytest.raises(ValueError, match="`superpatch_levels` must be 2 and `sharing_threshold` unset"):
            train_example(scenes, tmp_path, backbone=dinov2, **options)
    assert list(tmp_path.iterdir()) == []
