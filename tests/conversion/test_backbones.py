# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import transformers

from cts_hf.conversion.backbones import (
    backbone_normalization,
    load_backbone,
    load_backbone_config,
    load_encoder_config,
)

from ..helpers.existing_models import PATCH_SIZE, build_existing
from ..model.test_modeling_cts_backbone import build


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("dinov2", "Dinov2Config"),
        ("vit", "ViTConfig"),
        ("beit_segmentation", "BeitConfig"),  # its base has the encoder
        ("dinov3", "DINOv3ViTConfig"),
    ],
)
def test_the_weights_are_loaded(name, config, tmp_path):
    source = build_existing(name)
    source.save_pretrained(tmp_path)
    backbone_config = load_backbone_config(tmp_path)
    assert type(backbone_config).__name__ == config
    model = build(config, backbone_config=backbone_config, decoder_type="linear")
    load_backbone(model, tmp_path)
    expected = getattr(source, "beit", source).state_dict()
    loaded = model.cts.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


def test_the_normalization_is_that_of_the_processor_or_the_family(tmp_path):
    source = build_existing("dinov2")
    source.save_pretrained(tmp_path)
    assert backbone_normalization(tmp_path, source.config).image_mean == [0.485, 0.456, 0.406]
    transformers.BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert backbone_normalization(tmp_path, source.config) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_encoders_in_other_models_are_found(tmp_path):
    build_existing("upernet_dinov2").save_pretrained(tmp_path)
    assert load_encoder_config(tmp_path).patch_size == PATCH_SIZE


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be the folder of a model of transformers"):
        load_backbone_config(tmp_path)
    model = build("Dinov2Config", decoder_type="linear")
    upstream = build_existing("dinov2")
    del upstream.encoder.layer[1].mlp
    upstream.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be those of a Dinov2Model .* got \d missing \['encoder.layer.1.mlp"):
        load_backbone(model, tmp_path)
    upstream = build_existing("dinov2")
    upstream.layernorm.bias.data.fill_(torch.nan)
    upstream.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layernorm\.bias"):
        load_backbone(model, tmp_path)
    transformers.ResNetConfig(depths=[1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of a plain vision transformer"):
        load_backbone_config(tmp_path)
    with pytest.raises(ValueError, match="must hold a model with square patches"):
        load_encoder_config(tmp_path)
