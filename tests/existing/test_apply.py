# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pytest
import torch
import transformers

from cts_hf import CtsPolicyConfig, CtsPolicyModel, apply_cts, remove_cts

from ..helpers.existing_models import (
    KINDS,
    PATCH_SIZE,
    build_existing,
    call_existing,
    differences,
    random_scores,
    sizes,
    states,
    tensors,
)
from ..helpers.models import random_images, tiny_config, tiny_model, tiny_policy


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_nothing_changes_without_sharing(name, attn_implementation):
    if attn_implementation == "sdpa" and not getattr(transformers, KINDS[name].model)._supports_sdpa:
        pytest.skip("upstream has no such attention")
    model = build_existing(name, attn_implementation)
    for height, width in sizes(name):
        images = random_images(2, height, width)
        options = {"output_hidden_states": True}
        expected = call_existing(model, name, images, **options)
        apply_cts(model)
        same = call_existing(model, name, images, token_reduction=0.0, **options)
        assert set(differences(expected, same).values()) == {0.0}
        assert isinstance(same, type(expected))
        assert not same.shared_superpatches.any()
        assert same.num_tokens.tolist() == 2 * [height // PATCH_SIZE * (width // PATCH_SIZE)]
        remove_cts(model)
        after = call_existing(model, name, images, **options)
        assert type(after) is type(expected)
        assert set(differences(expected, after).values()) == {0.0}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_shared_tokens_come_back_as_patches(name):
    model = build_existing(name)
    for height, width in sizes(name):
        images, scores = random_images(2, height, width), random_scores(height, width)
        options = {"output_hidden_states": True}
        plain = call_existing(model, name, images, **options)
        apply_cts(model)
        for token_reduction in (0.02, 0.3, 0.75):
            outputs = call_existing(
                model, name, images, superpatch_scores=scores, token_reduction=token_reduction, **options
            )
            shapes = {key: value.shape for key, value in tensors(outputs).items()}
            assert shapes == {key: value.shape for key, value in tensors(plain).items()}
            assert all(value.isfinite().all() for value in tensors(outputs).values())
            assert outputs.shared_superpatches.shape == scores.shape
            num_patches = height // PATCH_SIZE * (width // PATCH_SIZE)
            num_shared = outputs.shared_superpatches.sum((1, 2))
            assert (num_shared == min(round(token_reduction * num_patches / 3), scores[0].numel())).all()
            assert torch.equal(outputs.num_tokens, num_patches - 3 * num_shared)
            chosen = outputs.shared_superpatches
            if 0 < num_shared[0] < scores[0].numel():
                assert scores[0][chosen[0]].min() > scores[0][~chosen[0]].max()
                assert not torch.equal(states(outputs), states(plain))
        # Each image gets what it gets alone.
        alone = call_existing(model, name, images[1:], superpatch_scores=scores[1:], token_reduction=0.75, **options)
        largest = states(alone).abs().max().item()
        torch.testing.assert_close(states(outputs)[1:], states(alone), rtol=1e-3, atol=1e-3 * largest)
        remove_cts(model)


def test_the_state_dict_is_upstreams(tmp_path):
    model = build_existing("dinov2")
    expected = model.state_dict()
    apply_cts(model, tiny_policy())
    assert model.state_dict().keys() == expected.keys()
    model.load_state_dict(expected)
    torch.nn.ModuleDict({"inner": model}).load_state_dict({f"inner.{name}": value for name, value in expected.items()})
    model.save_pretrained(tmp_path)
    reloaded, info = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in expected.items())


@torch.no_grad()
def test_copies_and_pickles():
    model = apply_cts(build_existing("beit"), tiny_policy(), 0.4)
    images = random_images()
    outputs = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).last_hidden_state, outputs.last_hidden_state)
        remove_cts(other)
        assert "num_tokens" not in other(images)
        assert torch.equal(model(images).last_hidden_state, outputs.last_hidden_state)
    for other in (copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert type(other) is type(outputs)
        assert torch.equal(other.num_tokens, outputs.num_tokens)
        assert torch.equal(other.last_hidden_state, outputs.last_hidden_state)


@torch.no_grad()
def test_in_bfloat16():
    model = apply_cts(build_existing("dinov3"), tiny_policy())
    images, scores = random_images(), random_scores(64, 64)
    expected = model(images, superpatch_scores=scores).last_hidden_state
    model.to(torch.bfloat16)
    got = model(images.bfloat16(), superpatch_scores=scores).last_hidden_state
    assert (got.float() - expected).norm() < 0.05 * expected.norm()
    assert model(images).num_tokens.tolist() == [64 - 3 * 6] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "beit"])
@torch.no_grad()
def test_compiled_and_exported(name):
    model = apply_cts(build_existing(name, "sdpa"), tiny_policy())
    images = random_images()
    expected = call_existing(model, name, images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    exported = torch.export.export(model, (images,), dict(KINDS[name].call)).module()
    for run in (compiled, exported):
        outputs = run(images, **KINDS[name].call)
        assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
        assert torch.equal(outputs.num_tokens, expected.num_tokens)
        torch.testing.assert_close(states(outputs), states(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_head_is_compiled_whose_output_no_annotation_names():
    model, images = apply_cts(build_existing("zoedepth"), tiny_policy()), random_images()
    torch._dynamo.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(images)
    assert torch.equal(outputs.predicted_depth, model(images).predicted_depth)


REFUSED_MODELS = {
    "swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    ),
    "segformer": lambda: transformers.SegformerModel(
        transformers.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1])
    ),
    "vitdet": lambda: transformers.VitDetModel(
        transformers.VitDetConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_without_plain_patches_are_refused(name):
    with pytest.raises(ValueError, match=r"`model` must have one vision transformer of plain patches.*got none"):
        apply_cts(REFUSED_MODELS[name]())


def test_refusals():
    model = build_existing("dinov2")
    state = {name: dict(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"for superpatches of two patches, which are 8 x 8 pixels here, got .* 32"):
        apply_cts(model, CtsPolicyModel(CtsPolicyConfig(width_coefficient=0.1, depth_coefficient=0.1)))
    with pytest.raises(ValueError, match="images of 3 channels, got one for 1"):
        apply_cts(model, tiny_policy(num_channels=1))
    with pytest.raises(ValueError, match=r"`policy` must be a CtsPolicyModel.*got <class 'int'>"):
        apply_cts(model, 3)
    for value in (-0.1, 0.76, "0.3", True, [0.3], torch.tensor(0.3), float("nan")):
        with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
            apply_cts(model, tiny_policy(), value)
    with pytest.raises(ValueError, match=r"`image_mean` must be finite numbers, one for each of 3 channels"):
        apply_cts(model, image_mean=[0.5, 0.5])
    for not_a_model in (torch.nn.Linear(2, 2), "dinov2", None):
        with pytest.raises(ValueError, match="`model` must be a model of transformers, got"):
            apply_cts(not_a_model)
    for own in (tiny_model(), tiny_model().cts):
        with pytest.raises(ValueError, match="must be one that does not share tokens by itself"):
            apply_cts(own)
    with pytest.raises(ValueError, match="must be one that `apply_cts` has changed"):
        remove_cts(model)
    # Nothing of it was left behind.
    assert not hasattr(model, "token_sharing")
    assert state == {name: dict(module._forward_hooks) for name, module in model.named_modules()}

    several = build_existing("dinov2")
    several.other = build_existing("vit")
    with pytest.raises(ValueError, match=r"got 2 of them in a Dinov2Model: give those .* by themselves"):
        apply_cts(several)
    assert apply_cts(several.other).token_sharing is not None

    without_plain_layers = build_existing("eomt", num_blocks=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"`config.num_blocks` must be below the number of layers"):
            apply_cts(without_plain_layers)

    apply_cts(model, tiny_policy())
    images = random_images()
    with pytest.raises(ValueError, match="must not share tokens yet"):
        apply_cts(model)
    with pytest.raises(ValueError, match="`return_dict` must be True"):
        model(images, return_dict=False)
    with pytest.raises(ValueError, match="`attention_mask` must be None where tokens are shared"):
        model(images, attention_mask=torch.ones(2, 65))
    with pytest.raises(ValueError, match="`bool_masked_pos` must be None where tokens are shared"):
        model(images, torch.ones(2, 64).bool())
    with pytest.raises(ValueError, match="`token_reduction` must be a number between 0"):
        model(images, token_reduction=0.8)
    with pytest.raises(ValueError, match=r"must have shape .* = \(2, 4, 4\) for these images, got \(2, 4, 5\)"):
        model(images, superpatch_scores=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="NaN"):
        model(images, superpatch_scores=torch.full((2, 4, 4), torch.nan))
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`pixel_values` must be finite"):
        model(images)


def test_a_config_of_another_model_is_no_config_of_ours():
    assert tiny_config().model_type == "cts"  # by which own models are recognized
