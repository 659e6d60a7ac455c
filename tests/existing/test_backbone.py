# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoBackbone, AutoConfig, Dinov2Config, Dinov2Model, DINOv3ViTConfig, SwinConfig, ViTConfig

from cts_hf import CtsBackbone, CtsBackboneConfig, CtsPolicyConfig

from ..helpers.backbones import (
    MODELS,
    POLICY,
    SIZES,
    build,
    encoder_config,
    head_class,
    head_config,
    load,
    random_scores,
    randomize,
    same,
)
from ..helpers.existing_models import (
    PATCH_SIZE,
    WITH_MLP,
    build_existing,
)
from ..helpers.models import random_images, tiny_config, tiny_policy


def expected_maps(plain, images, options):
    states = plain(images, output_hidden_states=True, **options).hidden_states
    rows, columns = (length // PATCH_SIZE for length in images.shape[-2:])
    return [
        plain.layernorm(each)[:, -rows * columns :].transpose(1, 2).reshape(2, -1, rows, columns) for each in states
    ]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_become_backbones(name, tmp_path):
    """ViT, DeiT and Data2VecVision have none upstream."""
    config, model, defaults = MODELS[name]
    plain_class = getattr(transformers, model)
    config = getattr(transformers, config)(**{**defaults, "num_hidden_layers": 4})
    randomize(plain_class(config, add_pooling_layer=False)).save_pretrained(tmp_path / "plain")
    plain = load(plain_class, tmp_path / "plain", add_pooling_layer=False)
    call = {} if name == "data2vec-vision" else {"interpolate_pos_encoding": True}
    config = CtsBackboneConfig(backbone_config=plain.config, token_reduction=0.0, out_indices=[0, 2, 4])
    backbone, info = load(CtsBackbone, tmp_path / "plain", config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert backbone.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert backbone.out_features == ["stem", "stage2", "stage4"]
    assert backbone.channels == 3 * [defaults["hidden_size"]]
    sequences = copy.deepcopy(backbone)
    sequences.config.backbone_config.reshape_hidden_states = False
    for height, width in SIZES:
        images = random_images(2, height, width)
        maps = expected_maps(plain, images, call)[::2]
        outputs = backbone(images)
        assert all(map(torch.equal, outputs.feature_maps, maps))
        assert outputs.hidden_states is None
        with_states = backbone(images, output_hidden_states=True)
        assert len(with_states.hidden_states) == 5
        shared = backbone(images, token_reduction=0.3, superpatch_scores=random_scores(height, width))
        assert shared.shared_superpatches.any()
        assert not torch.equal(shared.feature_maps[-1], maps[-1])
        # As heads that make maps themselves want it.
        for sequence, state, feature_map in zip(
            sequences(images).feature_maps, with_states.hidden_states[::2], maps, strict=True
        ):
            assert torch.equal(sequence[:, 0], plain.layernorm(state)[:, 0])
            assert torch.equal(sequence[:, 1:], feature_map.flatten(2).transpose(1, 2))
    without_norm = copy.deepcopy(backbone)
    without_norm.config.backbone_config.apply_layernorm = False
    images = random_images()
    state = without_norm(images, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(without_norm(images).feature_maps[-1].flatten(2), state[:, -64:].transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinov2", {"apply_layernorm": False, "out_features": ["stem", "stage4"]}),
        ("dinov2", {"reshape_hidden_states": False}),
        ("dinov2_with_registers", {"reshape_hidden_states": False}),
        ("dinov3_vit", {"return_class_token": True, "apply_layernorm": False}),
        ("dinov3_vit", {"reshape_hidden_states": False}),
        ("beit", {"add_fpn": True}),
        ("beit", {"reshape_hidden_states": False}),
        ("pixio", {"n_cls_tokens": 3, "apply_layernorm": False}),
    ],
)
@torch.no_grad()
def test_options_of_encoders_mean_what_they_do_upstream(name, options, tmp_path):
    plain = randomize(AutoBackbone.from_config(encoder_config(name, **options)))
    model = build(name, token_reduction=0.0, **options)
    model.backbone.load_state_dict(plain.state_dict())
    images = random_images(2, 48, 96)
    call = {"output_hidden_states": True}
    expected, outputs = plain(images, **call), model(images, **call)
    assert same(outputs, expected)
    assert outputs.get("cls_tokens") is not None or not options.get("return_class_token")
    assert model.out_features == plain.out_features
    assert model.channels == plain.channels
    # Options outlive saving.
    model.save_pretrained(tmp_path)
    assert same(load(CtsBackbone, tmp_path)(images, **call), expected)
    assert same(load(type(plain), tmp_path, config=plain.config)(images, **call), expected)


@torch.no_grad()
def test_stages_are_those_of_the_encoder_or_given():
    inner = encoder_config("dinov2", out_features=["stage2"])
    assert CtsBackboneConfig(backbone_config=inner).out_indices == [2]
    config = CtsBackboneConfig(backbone_config=inner, out_indices=(1, 3))
    assert config.out_features == config.backbone_config.out_features == ["stage1", "stage3"]
    assert inner.out_features == ["stage2"]
    model = CtsBackbone(config).eval()
    assert len(model(random_images(), token_reduction=0).feature_maps) == 2
    model.out_features = ["stage4"]
    assert config.backbone_config.out_indices == [4]
    (feature_map,) = model(random_images(), token_reduction=0).feature_maps
    assert feature_map.shape == (2, 32, 8, 8)
    assert CtsBackboneConfig(backbone_config=ViTConfig(**WITH_MLP)).out_features == ["stage3"]
    assert CtsBackboneConfig().backbone_config.to_dict() == Dinov2Config().to_dict()


@torch.no_grad()
def test_each_call_has_its_own_budget_and_scores():
    model = build("dinov3_vit")
    images, scores = random_images(2, 72, 56), random_scores(72, 56)
    model.set_attn_implementation("eager")
    outputs = model(images, superpatch_scores=scores, output_hidden_states=True, output_attentions=True)
    num_shared = round(0.3 * 63 / 3)
    chosen = outputs.shared_superpatches
    assert chosen.shape == scores.shape
    assert chosen.sum((1, 2)).tolist() == [num_shared, num_shared]
    assert outputs.num_tokens.tolist() == 2 * [63 - 3 * num_shared]
    assert scores[0][chosen[0]].min() > scores[0][~chosen[0]].max()
    assert all(feature_map.shape == (2, 32, 9, 7) for feature_map in outputs.feature_maps)
    num_all = 5 + 63 - 3 * num_shared  # attentions stay those of tokens
    assert [attention.shape[-2:] for attention in outputs.attentions] == 4 * [(num_all, num_all)]
    most = model(images, token_reduction=0.75, superpatch_scores=scores)
    assert most.shared_superpatches.all()
    filtered = model.forward_with_filtered_kwargs(images, superpatch_scores=scores, output_hidden_states=False)
    assert torch.equal(filtered.feature_maps[-1], outputs.feature_maps[-1])
    # DPT passes on what it does not know.
    config = head_config("dpt", CtsBackboneConfig(backbone_config=encoder_config("beit", reshape_hidden_states=False)))
    depth = randomize(head_class("dpt")(config))
    images, scores = random_images(), random_scores(64, 64)
    plain = depth(images, token_reduction=0).predicted_depth
    assert not torch.equal(depth(images, superpatch_scores=scores).predicted_depth, plain)


@torch.no_grad()
def test_the_policy_chooses():
    """As it does by itself on the same images, for which they are renormalized and odd borders cut off."""
    policy = tiny_policy(image_mean=0.5, image_std=0.5)
    config = CtsBackboneConfig(
        backbone_config=encoder_config("beit"), image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    )
    model = CtsBackbone(config).eval()
    model.set_policy(policy)
    for height, width in SIZES:
        images = random_images(2, height, width)
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
        pixels = (images * std + mean)[..., : height // 16 * 16, : width // 16 * 16]
        logits = policy((pixels - 0.5) / 0.5).logits
        by_policy, by_scores = model(images), model(images, superpatch_scores=logits[:, 1] - logits[:, 0])
        assert torch.equal(by_policy.shared_superpatches, by_scores.shared_superpatches)
        assert same(by_policy, by_scores)


def test_the_default_normalization_is_the_family_s_and_is_saved(tmp_path):
    model = build("dinov2")
    assert (model.config.image_mean, model.config.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert build("beit").config.image_mean == [0.5, 0.5, 0.5]
    model.save_pretrained(tmp_path)
    assert CtsBackboneConfig.from_pretrained(tmp_path).image_mean == [0.485, 0.456, 0.406]


def test_the_policy_is_frozen(tmp_path):
    build(policy_config=POLICY).save_pretrained(tmp_path)
    model = load(CtsBackbone, tmp_path)
    assert next(name for name, _ in model.named_parameters() if "policy" in name).startswith("policy.")
    for _ in range(2):
        model.train()
        assert model.backbone.training
        assert not model.policy.training
        assert not any(parameter.requires_grad for parameter in model.policy.parameters())
        before = copy.deepcopy(model.policy.state_dict())
        model(random_images()).feature_maps[-1].sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
        assert all(parameter.grad is None for parameter in model.policy.parameters())
        assert model.backbone.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0
        # Also one that comes later, and trainable.
        model.set_policy(tiny_policy(seed=1).train().requires_grad_(True))
        assert not model.policy.training


@torch.no_grad()
def test_copies_and_other_dtypes():
    model = build(policy_config=POLICY)
    images = random_images()
    expected = model(images)
    twin = copy.deepcopy(model)
    assert twin.policy is twin.backbone.token_sharing.policy is not model.policy
    assert same(twin(images), expected)
    twin.to(torch.bfloat16)
    outputs = twin(images.bfloat16())
    assert outputs.feature_maps[-1].dtype == torch.bfloat16
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    assert same(model(images), expected)


@pytest.mark.parametrize("name", ["beit", "dinov2", "vit"])
def test_gradient_checkpointing_is_exact(name):
    model = build(name, policy_config=POLICY, hidden_dropout_prob=0.0, drop_path_rate=0.0)
    images = random_images()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        sum(feature_map.square().sum() for feature_map in model(images).feature_maps).backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("name", ["dinov2", "vit"])
@torch.no_grad()
def test_layers_are_recorded_once(name):
    """Hooks that are installed twice record every layer twice, and maps are then of the wrong layers."""
    model = build(name, token_reduction=0.0)
    for _ in range(2):
        assert len(model(random_images(), output_hidden_states=True).hidden_states) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "vit"])
@torch.no_grad()
def test_compiles_without_a_break(name):
    model = build(name, policy_config=POLICY)
    images = random_images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = compiled(images)
    assert torch.equal(outputs.shared_superpatches, model(images).shared_superpatches)
    assert same(outputs, model(images))


@torch.no_grad()
def test_checkpoints_of_the_encoder_load(tmp_path):
    build_existing("dinov2").save_pretrained(tmp_path / "plain")
    plain = load(Dinov2Model, tmp_path / "plain")
    config = CtsBackboneConfig(backbone_config=plain.config, policy_config=POLICY)
    model, info = load(CtsBackbone, tmp_path / "plain", config=config, output_loading_info=True)
    assert info["missing_keys"] == {f"policy.{name}" for name in model.policy.state_dict()}
    images = random_images()
    states = plain(images).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    assert torch.equal(model(images, token_reduction=0).feature_maps[-1], states)
    # And back: what is saved is a checkpoint of the encoder, with a policy that it ignores.
    model.save_pretrained(tmp_path / "shared")
    again = load(Dinov2Model, tmp_path / "shared", config=plain.config)
    assert torch.equal(again(images).last_hidden_state, plain(images).last_hidden_state)


def test_auto_classes_know_it(tmp_path):
    model = build(policy_config=POLICY)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CtsBackboneConfig
    assert type(config.backbone_config) is Dinov2Config
    assert type(config.policy_config) is CtsPolicyConfig
    assert config.out_features == model.out_features
    assert type(AutoBackbone.from_config(config)) is CtsBackbone
    assert (config.hidden_size, config.patch_size, config.image_size) == (32, 8, 64)
    nested = transformers.UperNetConfig.from_dict(head_config("upernet", config).to_dict())
    assert nested.backbone_config.to_dict() == config.to_dict()
    assert AutoConfig.from_pretrained(tmp_path, token_reduction=0.5).token_reduction == 0.5


@pytest.mark.parametrize("part", [None, "backbone_config", "policy_config"])
def test_names_that_other_versions_leave_in_files_are_allowed(part, tmp_path):
    config = CtsBackboneConfig(backbone_config=encoder_config("dinov2"), policy_config=POLICY)
    head_config("upernet", config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "alone")
    for file, path in ((tmp_path, ["backbone_config"]), (tmp_path / "alone", [])):
        content = json.loads((file / "config.json").read_text())
        options = content
        for name in [*path, *([part] if part else [])]:
            options = options[name]
        options["an_option_of_others"] = 1
        (file / "config.json").write_text(json.dumps(content))
        loaded = AutoConfig.from_pretrained(file)
        loaded = loaded.backbone_config if path else loaded
        assert loaded.policy_config.to_dict().items() >= config.policy_config.to_dict().items()
        assert loaded.out_features == config.out_features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_config": SwinConfig()}, "`backbone_config` must be that of one of .*, got 'swin'"),
        ({"backbone_config": {"hidden_size": 32}}, "`backbone_config` must be that of one of .*, got None"),
        ({"backbone_config": tiny_config()}, "`backbone_config` must be that of one of .*, got 'cts'"),
        ({"backbone_config": "facebook/dinov2-small"}, "backbone_config"),
        ({"token_reduction": 0.8}, r"`token_reduction` must be between 0 and 0\.75, got 0\.8"),
        ({"token_reduction": "0.3"}, "token_reduction"),
        ({"image_mean": [0.5, 0.5]}, "`image_mean` must be finite numbers, one for each of 3 channels"),
        ({"image_std": 0}, "`image_std` must be numbers above 0"),
        ({"policy_config": {"output_stride": 7}}, "`output_stride` must be 8, 16 or 32, got 7"),
        ({"out_features": ["stage13"]}, "out_features must be a subset of stage_names"),
        ({"token_reductoin": 0.3}, "CtsBackboneConfig has no option 'token_reductoin'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(Exception, match=message) as error:
        CtsBackboneConfig(**options)
    assert isinstance(error.value, ValueError | TypeError) or "StrictDataclass" in type(error.value).__name__


def test_bad_calls_are_refused():
    model = build(policy_config=POLICY)
    images = random_images()
    for token_reduction in (0.8, "0.3", True, float("nan")):
        with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
            model(images, token_reduction=token_reduction)
    with pytest.raises(ValueError, match="`superpatch_scores` must"):
        model(images, superpatch_scores=random_scores(64, 32))
    with pytest.raises(ValueError, match="`return_dict` must be True"):
        model(images, return_dict=False)
    with pytest.raises(ValueError, match="`policy` must be a CtsPolicyModel"):
        model.set_policy(model)
    other = {**POLICY, "superpatch_size": 32}
    with pytest.raises(ValueError, match="`policy` must be for superpatches of two patches"):
        CtsBackbone(CtsBackboneConfig(backbone_config=DINOv3ViTConfig(**WITH_MLP), policy_config=other))
    model.config.token_reduction = 2.0
    with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
        model(images)
