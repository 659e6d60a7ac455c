# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone

from cts_hf import CtsBackboneConfig

from ..helpers.backbones import (
    ENCODERS,
    HEADS,
    MODELS,
    POLICY,
    SIZES,
    encoder_config,
    head_class,
    head_config,
    load,
    randomize,
    same,
    same_weights,
)
from ..helpers.existing_models import tensors
from ..helpers.models import random_images, tiny_policy
from ..helpers.slow import slow_but


PAIRS = [
    (head, encoder)
    for head, (_, _, wants_maps) in HEADS.items()
    for encoder, (_, _, has_sequences) in ENCODERS.items()
    if wants_maps or has_sequences
]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "encoder"), PAIRS)
@torch.no_grad()
def test_heads_load_upstream_checkpoints_and_are_exact_without_sharing(head, encoder, tmp_path):
    options = {} if HEADS[head][2] else {"reshape_hidden_states": False}
    randomize(head_class(head)(head_config(head, encoder_config(encoder, **options)))).save_pretrained(
        tmp_path / "plain"
    )
    plain = load(head_class(head), tmp_path / "plain")
    # The stages are the encoder's.
    backbone_config = CtsBackboneConfig(backbone_config=encoder_config(encoder, **options), policy_config=POLICY)
    config = head_config(head, backbone_config)
    model, info = load(head_class(head), tmp_path / "plain", config=config, output_loading_info=True)
    backbone = model.get_submodule(HEADS[head][1])
    policy_names = {f"{HEADS[head][1]}.policy.{name}" for name in backbone.policy.state_dict()}
    assert info["missing_keys"] == policy_names
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]

    for height, width in SIZES:
        images = random_images(2, height, width)
        expected = plain(images, output_hidden_states=True)
        backbone.config.token_reduction = 0.3
        shared = model(images, output_hidden_states=True)
        backbone.config.token_reduction = 0.0
        assert same(model(images, output_hidden_states=True), expected)
        assert not same(shared, expected)
        shapes = {name: value.shape for name, value in tensors(expected).items()}
        assert {name: value.shape for name, value in tensors(shared).items()} == shapes

    # What is saved has the policy, and goes by the names of the encoder alone.
    model.save_pretrained(tmp_path / "shared")
    names = load_file(tmp_path / "shared/model.safetensors").keys()
    assert names - load_file(tmp_path / "plain/model.safetensors").keys() == policy_names
    again, info = load(head_class(head), tmp_path / "shared", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_weights(again, model)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == names


@pytest.mark.parametrize("name", slow_but(["vit"], MODELS))
@torch.no_grad()
def test_heads_take_what_has_no_backbone_upstream(name, tmp_path):
    config = CtsBackboneConfig(
        backbone_config=encoder_config(name, out_features=None), policy_config=POLICY, **{"out_indices": [1, 2, 3, 4]}
    )
    model = randomize(head_class("upernet")(head_config("upernet", config)))
    images = random_images(2, 48, 96)
    outputs = model(images)
    logits = model.decode_head(model.backbone(images).feature_maps)
    assert torch.equal(outputs.logits, torch.nn.functional.interpolate(logits, size=(48, 96), mode="bilinear"))
    model.save_pretrained(tmp_path)
    again, info = load(head_class("upernet"), tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_weights(again, model)
    # Depth heads want sequences.
    config.backbone_config.reshape_hidden_states = False
    for head in ("dpt", "depth_anything", "zoedepth"):
        depth = head_class(head)(head_config(head, config)).eval()
        assert depth(images).predicted_depth.isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_new_heads_start_from_an_encoder(name, tmp_path):
    config = encoder_config(name)
    plain = AutoBackbone.from_config(config)
    randomize(plain).base_model.save_pretrained(tmp_path)  # as published, without what makes it a backbone
    plain = load(type(plain), tmp_path, config=config)
    head = head_class("upernet")(head_config("upernet", CtsBackboneConfig(backbone_config=config)))
    head.backbone.backbone.load_state_dict(plain.state_dict())
    head.eval().backbone.config.token_reduction = 0.0
    for parameter in plain.parameters():
        parameter.data = parameter.data.clone()
    images = random_images()
    assert same(head.backbone(images), plain(images))


@torch.no_grad()
def test_a_policy_that_is_set_is_saved(tmp_path):
    policy = tiny_policy(seed=3, output_stride=16)
    policy.save_pretrained(tmp_path / "policy")
    head = head_class("upernet")(head_config("upernet", CtsBackboneConfig(backbone_config=encoder_config("dinov2"))))
    randomize(head)
    images = random_images()
    with pytest.raises(ValueError, match=r"`token_reduction` must be 0 without a policy, got 0\.3"):
        head(images)
    head.backbone.set_policy(str(tmp_path / "policy"))
    assert same_weights(head.backbone.policy, policy)
    assert head.config.backbone_config.policy_config.output_stride == 16
    shared = head.backbone(images).shared_superpatches
    head.save_pretrained(tmp_path / "head")
    again = load(head_class("upernet"), tmp_path / "head")
    assert same_weights(again, head)
    assert torch.equal(again.backbone(images).shared_superpatches, shared)
    # One for other superpatches is refused, and the model as before.
    with pytest.raises(ValueError, match="`policy` must be for superpatches of two patches"):
        again.backbone.set_policy(tiny_policy(superpatch_size=32))
    assert same_weights(again, head)
    assert torch.equal(again.backbone(images).shared_superpatches, shared)
    again.backbone.set_policy(None)
    assert again.backbone.policy is None
    assert again.config.backbone_config.policy_config is None
    assert not any("policy" in name for name in again.state_dict())


def test_weights_load_in_the_dtype_that_is_asked_for(tmp_path):
    head_class("upernet")(head_config("upernet", encoder_config("dinov2"))).save_pretrained(tmp_path)
    backbone_config = CtsBackboneConfig(backbone_config=encoder_config("dinov2"), policy_config=POLICY)
    config = head_config("upernet", backbone_config)
    model = load(head_class("upernet"), tmp_path, config=config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(random_images().bfloat16()).logits.dtype == torch.bfloat16


def test_parts_are_not_split():
    head = head_class("upernet")(
        head_config("upernet", CtsBackboneConfig(backbone_config=encoder_config("dinov2"), policy_config=POLICY))
    )
    assert {"Dinov2Layer", "CtsPolicyInvertedResidual"} <= set(head._no_split_modules)
    backbone = head.backbone
    assert backbone.get_input_embeddings() is backbone.backbone.get_input_embeddings()
