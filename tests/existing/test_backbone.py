# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
import transformers
from transformers import AutoBackbone, AutoConfig

from cts_hf import CtsBackbone, CtsBackboneConfig, CtsPolicyModel, apply_cts, backbone_key_mapping

from ..helpers.existing_models import ENCODER, KINDS, PATCH_SIZE, RELATIVE, WITH_MLP, sizes
from ..helpers.models import TINY_BACKBONE, random_images, tiny_policy
from .test_apply import random_scores, states


STAGES = {"num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
ENCODERS = {
    "Dinov2Config": ENCODER,
    "Dinov2WithRegistersConfig": {**ENCODER, "num_register_tokens": 4},
    "BeitConfig": RELATIVE,
    "DINOv3ViTConfig": WITH_MLP,
    "PixioConfig": {**ENCODER, "n_cls_tokens": 3},
}
HEADS = ["upernet_dinov2", "mask2former", "dpt_depth", "depth_anything", "zoedepth"]
SEQUENCES = ("dpt_depth", "depth_anything", "zoedepth")


def inner_config(name, **options):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**{**ENCODERS.get(name, WITH_MLP), **STAGES, **options})


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def without_hooks(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return plain


def build_head(head, backbone_config, **options):
    kind = KINDS[head]
    config = getattr(transformers, kind.config)(**{**kind.options, "backbone_config": backbone_config, **options})
    return getattr(transformers, kind.model), config


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_checkpoints_of_upstream_load_and_give_what_they_gave(head, encoder, tmp_path):
    options = {"reshape_hidden_states": False} if head in SEQUENCES else {}
    if head in SEQUENCES and encoder in ("Dinov2WithRegistersConfig", "DINOv3ViTConfig", "PixioConfig"):
        pytest.skip("upstream's heads take sequences with a single prefix token")
    model_class, config = build_head(head, inner_config(encoder, **options))
    randomize(model_class(config)).save_pretrained(tmp_path)
    # Both loaded, as where weights lie in memory decides how convolutions round.
    upstream = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    _, config = build_head(
        head, CtsBackboneConfig(backbone_config=inner_config(encoder, **options), policy_config=dict(TINY_BACKBONE))
    )
    mapping = backbone_key_mapping(config)
    model, info = model_class.from_pretrained(
        tmp_path, config=config, key_mapping=mapping, output_loading_info=True, attn_implementation="eager"
    )
    assert all(".token_sharing.policy." in name for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    backbone = next(module for module in model.modules() if isinstance(module, CtsBackbone))
    for height, width in sizes(head):
        images = random_images(2, height, width)
        backbone.config.token_reduction = 0.0
        expected = states(upstream(images))
        got = states(model(images))
        assert torch.equal(got, expected)
        backbone.config.token_reduction = 0.4
        assert not torch.allclose(states(model(images)), expected, rtol=1e-3)
    # What is saved needs no mapping.
    model.save_pretrained(tmp_path / "again")
    again, info = model_class.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*ENCODERS, "ViTConfig", "DeiTConfig", "Data2VecVisionConfig"])
@torch.no_grad()
def test_features_are_upstreams(name):
    """Without sharing those of upstream's backbone, or of its hidden states where it has no backbone."""
    options = {"use_relative_position_bias": True} if name == "Data2VecVisionConfig" else {}
    config = CtsBackboneConfig(backbone_config=inner_config(name, **options), out_features=["stage2", "stage4"])
    model = randomize(CtsBackbone(config))
    assert model.channels == [32, 32]
    for height, width in [(64, 64), (48, 96), (72, 56)]:
        images = random_images(2, height, width)
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        plain = without_hooks(model.backbone)
        outputs = model(images, token_reduction=0.0, output_hidden_states=True)
        if name in ENCODERS:
            expected = plain(images).feature_maps
        else:
            call = {} if name.startswith("Data2Vec") else {"interpolate_pos_encoding": True}
            hidden_states = plain(images, output_hidden_states=True, **call).hidden_states
            assert all(map(torch.equal, outputs.hidden_states, hidden_states))
            expected = [
                hidden_states[index][:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
                for index in (2, 4)
            ]
        assert len(outputs.feature_maps) == 2
        assert all(map(torch.equal, outputs.feature_maps, expected))
        scores = random_scores(height, width)
        shared = model(images, 0.4, scores)
        by_hooks = apply_cts(plain)(
            images,
            superpatch_scores=scores,
            token_reduction=0.4,
            output_hidden_states=True,
            **({"interpolate_pos_encoding": True} if name in ("ViTConfig", "DeiTConfig") else {}),
        )
        assert torch.equal(shared.shared_superpatches, by_hooks.shared_superpatches)
        assert torch.equal(shared.num_tokens, by_hooks.num_tokens)
        if name in ENCODERS:
            assert all(map(torch.equal, shared.feature_maps, by_hooks.feature_maps))


def test_sequences_and_tuples():
    config = CtsBackboneConfig(
        backbone_config=inner_config("ViTConfig", out_features=None), reshape_hidden_states=False
    )
    model = CtsBackbone(config).eval()
    (features,) = model(random_images(), token_reduction=0.0).feature_maps
    assert features.shape == (2, 65, 32)
    assert isinstance(model(random_images(), token_reduction=0.0, return_dict=False), tuple)


def test_saved_and_loaded_with_its_policy(tmp_path):
    config = CtsBackboneConfig(
        backbone_config=inner_config("Dinov2Config"), policy_config=dict(TINY_BACKBONE), image_mean=0.4, image_std=0.3
    )
    assert config.policy_config.superpatch_size == 16
    _, config = build_head("upernet_dinov2", config)
    model = randomize(transformers.UperNetForSemanticSegmentation(config))
    model.backbone.set_policy(tiny_policy())
    assert all(not parameter.requires_grad for parameter in model.backbone.token_sharing.parameters())
    images = random_images()
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded.backbone.config.image_mean == [0.4, 0.4, 0.4]
    torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-4)
    policy = loaded.backbone.token_sharing.policy
    assert torch.equal(policy(images).logits, tiny_policy()(images).logits)
    loaded.train()
    assert not policy.training
    assert all(not parameter.requires_grad for parameter in policy.parameters())
    loaded(images, labels=torch.randint(0, 5, (2, 64, 64))).loss.backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    with pytest.raises(ValueError, match="must not share tokens yet"):
        apply_cts(loaded)


@pytest.mark.parametrize("name", [*ENCODERS, "ViTConfig"])
def test_configurations_are_saved_whole(name, tmp_path):
    config = CtsBackboneConfig(backbone_config=inner_config(name), token_reduction=0.2, out_features=["stage2"])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CtsBackboneConfig)
    assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert loaded.out_features == ["stage2"]
    assert loaded.token_reduction == 0.2


@pytest.mark.parametrize("name", ["Dinov2Config", "ViTConfig"])
@torch.no_grad()
def test_features_are_those_of_the_stages_whenever_they_are_chosen(name, tmp_path):
    inner = inner_config(name)
    before = inner.to_dict()
    config = CtsBackboneConfig(backbone_config=inner, token_reduction=0.0, out_features=["stage1", "stage3"])
    CtsBackboneConfig(backbone_config=inner, out_features=["stage2"], reshape_hidden_states=False)
    assert inner.to_dict() == before
    model, images = CtsBackbone(config).eval(), random_images()
    first, third = model(images).feature_maps
    assert not torch.equal(first, third)
    model.save_pretrained(tmp_path)
    loaded = CtsBackbone.from_pretrained(tmp_path, out_features=["stage3"])
    changed = copy.deepcopy(config)
    changed.out_features = ["stage3"]
    built = CtsBackbone(changed).eval()
    built.load_state_dict(model.state_dict())
    model.out_indices = [3]
    for chosen in (loaded, built, model):
        assert chosen.out_features == ["stage3"]
        (feature,) = chosen(images).feature_maps
        assert torch.equal(feature, third)


def test_the_auto_classes_know_it(tmp_path):
    config = CtsBackboneConfig(backbone_config=inner_config("Dinov2Config"), out_indices=[2, 4])
    assert config.out_features == ["stage2", "stage4"]
    model = AutoBackbone.from_config(config).eval()
    assert isinstance(model, CtsBackbone)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).out_features == ["stage2", "stage4"]
    loaded = CtsBackbone.from_pretrained(tmp_path)
    images = random_images()
    expected = model(images, token_reduction=0.0).feature_maps
    assert all(map(torch.equal, loaded(images, token_reduction=0.0).feature_maps, expected))
    # A checkpoint of the transformer alone.
    model.backbone.save_pretrained(tmp_path / "upstream")
    again, info = CtsBackbone.from_pretrained(
        tmp_path / "upstream", config=config, key_mapping=backbone_key_mapping(config), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(map(torch.equal, again(images, token_reduction=0.0).feature_maps, expected))
    again.save_pretrained(tmp_path / "again")
    loaded, info = CtsBackbone.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(map(torch.equal, loaded(images, token_reduction=0.0).feature_maps, expected))


def test_refusals(tmp_path):
    inner = inner_config("Dinov2Config")
    with pytest.raises(ValueError, match="must be of a plain vision transformer"):
        CtsBackboneConfig(backbone_config={"model_type": "swin"})
    with pytest.raises(ValueError, match="must not be of a DPT"):
        CtsBackboneConfig(backbone_config={"model_type": "dpt"})
    with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
        CtsBackboneConfig(backbone_config=inner, token_reduction=0.9)
    with pytest.raises(ValueError, match=r"`policy_config.superpatch_size` must be 16"):
        CtsBackboneConfig(backbone_config=inner, policy_config={"superpatch_size": 32})
    with pytest.raises(ValueError, match="must have a `CtsBackboneConfig` as its `backbone_config`"):
        backbone_key_mapping(inner)
    model = CtsBackbone(CtsBackboneConfig(backbone_config=inner))
    with pytest.raises(ValueError, match="must not share tokens yet, got a Dinov2Backbone whose encoder does"):
        apply_cts(model.backbone)
    with pytest.raises(ValueError, match="without a policy"):
        model(random_images())
    with pytest.raises(ValueError, match="for superpatches of two patches"):
        model.set_policy(CtsPolicyModel.from_pretrained(_saved(tiny_policy(superpatch_size=32), tmp_path)))


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder
