# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModel, AutoModelForSemanticSegmentation

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsModel, apply_cts

from ..helpers.existing_models import ENCODER, IMAGE_SIZE, PATCH_SIZE, RELATIVE, WITH_MLP
from ..helpers.models import TINY_BACKBONE, random_images, tiny_policy


ENCODERS = {
    "ViTConfig": WITH_MLP,
    "DeiTConfig": WITH_MLP,
    "BeitConfig": RELATIVE,
    "Data2VecVisionConfig": RELATIVE,
    "Dinov2Config": ENCODER,
    "Dinov2WithRegistersConfig": {**ENCODER, "num_register_tokens": 4},
    "DINOv3ViTConfig": {**WITH_MLP, "num_register_tokens": 4},
    "DPTConfig": WITH_MLP,
    "PixioConfig": {**ENCODER, "n_cls_tokens": 3},
}
DECODERS = ["linear", "mask_transformer", "setr_naive", "setr_pup", "setr_mla"]


def backbone_config(name, **options):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**{**ENCODERS[name], **options})


def build(name="Dinov2Config", seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"num_labels": 5, "policy_config": dict(TINY_BACKBONE), "decoder_hidden_size": 16}
    config = CtsConfig(**{**defaults, "backbone_config": backbone_config(name), **options})
    model = CtsForSemanticSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def remove_hooks(backbone):
    """A copy of an encoder as it is in transformers."""
    upstream = copy.deepcopy(backbone)
    for module in upstream.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return upstream


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (72, 56)])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_encoder_is_upstreams(name, size):
    """Without sharing it gives what the model of transformers gives, and with it what `apply_cts` makes of that."""
    model = build(name)
    images = random_images(2, *size)
    upstream = remove_hooks(model.cts.backbone)
    options = {"interpolate_pos_encoding": True} if name in ("ViTConfig", "DeiTConfig") else {}
    expected = upstream(images, output_hidden_states=True, **options)
    outputs = model.cts(images, token_reduction=0.0, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert len(outputs.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, outputs.hidden_states, expected.hidden_states))

    rows, columns = size[0] // PATCH_SIZE, size[1] // PATCH_SIZE
    scores = torch.rand(2, rows // 2, columns // 2)
    outputs = model.cts(images, scores, 0.4)
    layout = outputs.token_layout
    assert outputs.num_tokens.tolist() == 2 * [rows * columns - 3 * round(0.4 * rows * columns / 3)]
    assert layout.patch_to_token.shape == (2, rows * columns)
    tokens = outputs.last_hidden_state[:, -layout.token_source.shape[1] :]
    patches = tokens.gather(1, layout.patch_to_token[:, :, None].expand(-1, -1, tokens.shape[2]))
    shared = apply_cts(upstream)(images, superpatch_scores=scores, token_reduction=0.4, **options)
    assert torch.equal(shared.shared_superpatches, layout.shared_superpatches)
    torch.testing.assert_close(patches, shared.last_hidden_state[:, -rows * columns :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("name", ["Dinov2Config", "DINOv3ViTConfig", "BeitConfig"])
def test_decoders_train_on_it(name, decoder_type):
    model = build(name, decoder_type=decoder_type, policy_loss_weight=1.0)
    images, labels = random_images(2, 72, 56), torch.randint(0, 5, (2, 72, 56))
    with torch.no_grad():
        outputs = model(images, labels=labels)
        batch = model(images).logits
        alone = torch.cat([model(images[:1]).logits, model(images[1:]).logits])
    assert outputs.logits.shape[-2] % 9 == 0
    assert outputs.logits.shape[-1] % 7 == 0
    assert outputs.shared_superpatches.shape == (2, 4, 3)
    torch.testing.assert_close(batch, alone, rtol=1e-3, atol=1e-4)
    model.train()
    model(images, labels=labels).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []
    assert not any(value.requires_grad for key, value in model.named_parameters() if "mask_token" in key)


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_and_loaded(name, tmp_path):
    model = build(name, decoder_type="linear")
    images = random_images()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert isinstance(loaded, CtsForSemanticSegmentation)
    with torch.no_grad():
        assert torch.equal(model(images).logits, loaded(images).logits)
        assert torch.equal(model.cts(images).last_hidden_state, CtsModel.from_pretrained(tmp_path)(images)[0])
    loaded.train()
    assert not any(value.requires_grad for key, value in loaded.named_parameters() if "mask_token" in key)


@pytest.mark.parametrize("name", ["Dinov2Config", "DINOv3ViTConfig", "BeitConfig"])
def test_the_weights_are_named_as_upstreams(name, tmp_path):
    upstream = AutoModel.from_config(backbone_config(name))
    model = build(name, decoder_type="linear")
    info = model.cts.backbone.load_state_dict(upstream.state_dict(), strict=False)
    assert info.missing_keys == []
    assert all(key.startswith("pooler.") for key in info.unexpected_keys)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["Dinov2Config", "DINOv3ViTConfig", "BeitConfig"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    model = build(name, decoder_type="linear")
    images, labels = random_images(), torch.randint(0, 5, (2, 64, 64))
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(images, labels=labels, token_reduction=0.4).loss.backward()
        gradients.append(
            {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTConfig", "Dinov2Config", "DINOv3ViTConfig", "BeitConfig"])
@torch.no_grad()
def test_compiled_and_exported(name):
    model = build(name, decoder_type="linear")
    images = random_images()
    expected = model(images).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    exported = torch.export.export(model, (images,)).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_configuration_follows_its_backbone():
    config = CtsConfig(backbone_config=backbone_config("Dinov2Config"))
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"):
        assert getattr(config, name) == getattr(config.backbone_config, name)
    assert config.image_mean == [0.485, 0.456, 0.406]
    assert config.policy_config.superpatch_size == 2 * PATCH_SIZE
    assert config.policy_config.image_std == [0.229, 0.224, 0.225]
    again = CtsConfig(**{**config.to_dict(), "transformers_version": None})
    assert again.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert "backbone_config" not in CtsConfig().to_dict()
    nested = CtsConfig(backbone_config={"model_type": "dinov2", **ENCODER})
    assert nested.backbone_config.hidden_size == ENCODER["hidden_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 100}, r"`hidden_size` must be that of the `backbone_config`, 32, got 100"),
        ({"patch_size": 32}, r"`patch_size` must be that of the `backbone_config`, 8, got 32"),
        ({"superpatch_levels": (2, 4)}, r"`superpatch_levels` must be \(2,\)"),
        ({"sharing_threshold": 0.9}, r"`sharing_threshold` None with a `backbone_config`, got \(2,\) and 0.9"),
        ({"backbone_config": {"model_type": "swin"}}, r"one of 'vit', .* got 'swin'"),
        ({"backbone_config": {"model_type": "resnet"}}, r"one of 'vit', .* got 'resnet'"),
        ({"backbone_config": {"model_type": "dpt", "is_hybrid": True}}, r"got a hybrid or nested one"),
        ({"backbone_config": {"hidden_size": 32}}, r"`backbone_config` must be"),
        ({"backbone_config": {"model_type": "nothing"}}, r"`backbone_config` must be"),
    ],
)
def test_refused_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        CtsConfig(**{"backbone_config": backbone_config("Dinov2Config"), **options})


def test_refused_calls():
    model = build(decoder_type="linear")
    images = random_images()
    mask = torch.ones(2, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
    assert model(images, pixel_mask=mask).logits.shape == (2, 5, 8, 8)
    mask[0, 32:] = 0
    with pytest.raises(ValueError, match="`pixel_mask` must be 1 everywhere for a model with a `backbone_config`"):
        model(images, pixel_mask=mask)
    for options in ({"token_reduction": torch.tensor([0.1, 0.2])}, {"sharing_threshold": 0.5}):
        with pytest.raises(ValueError, match="must be a number for a model with a `backbone_config`"):
            model(images, **options)
    with pytest.raises(ValueError, match=r"must have shape .* = \(2, 4, 3\)"):
        model(random_images(2, 72, 56), superpatch_scores=torch.zeros(2, 5, 4))


def test_a_policy_is_set():
    model = build(decoder_type="linear", use_policy=False)
    with pytest.raises(ValueError, match="no policy"):
        model(random_images())
    model.set_policy(tiny_policy())
    assert model(random_images()).policy_logits is not None


@pytest.mark.parametrize("wanted", [True, 1, [0, -1], (2,), [-9], -1, 0, []])
@torch.no_grad()
def test_hidden_states_are_selected_as_upstream_does(wanted):
    """Also where the decoder wants those of other layers."""
    images = random_images()
    tokens, maps = build(), build(decoder_type="setr_mla")
    expected = remove_hooks(tokens.cts.backbone)(images, output_hidden_states=wanted).hidden_states
    for model in (tokens, maps):
        got = model(images, token_reduction=0.0, output_hidden_states=wanted).hidden_states
        if expected is None:
            assert got is None
            continue
        if model is maps and version.parse(transformers.__version__) < version.parse("5.20"):
            continue  # which does not select by number, and returns no place for what is not selected
        assert [states is not None for states in got] == [states is not None for states in expected]
        assert model is maps or all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if a is not None)
