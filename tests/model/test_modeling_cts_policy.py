# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cts_hf
from cts_hf import CtsForSemanticSegmentation, CtsPolicyConfig, CtsPolicyModel, superpatch_targets
from cts_hf.conversion import convert_policy
from cts_hf.model.modeling_cts_grid import shrink

from ..helpers.models import TINY_BACKBONE, random_images, tiny_model, tiny_policy


@pytest.mark.parametrize(("output_stride", "num_stages"), [(8, None), (8, 4), (8, 7), (16, None), (16, 6), (32, None)])
@pytest.mark.parametrize("superpatch_size", [8, 16, 28, 32, 64])
def test_output_is_on_the_superpatch_grid(superpatch_size, output_stride, num_stages):
    model = tiny_policy(superpatch_size=superpatch_size, output_stride=output_stride, num_stages=num_stages)
    assert num_stages is None or len(model.backbone.blocks) == num_stages
    logits = model(random_images(2, 2 * superpatch_size + 5, 3 * superpatch_size - 1)).logits
    assert logits.shape == (2, 2, 3, 3)


def test_images_are_padded_with_zeros():
    model = tiny_policy()
    images = random_images(1, 40, 50)
    padded = torch.zeros(1, 3, 48, 64)
    padded[:, :, :40, :50] = images
    assert torch.equal(model(images).logits, model(padded).logits)


def test_loss_ignores_and_trains():
    model = tiny_policy().train()
    images = random_images(4, 64, 64)
    labels = torch.randint(0, 2, (4, 64, 64)) * (torch.arange(64) < 32)
    targets = superpatch_targets(labels, 16)
    targets[0] = 255
    expected = torch.nn.functional.cross_entropy(model(images).logits, targets, ignore_index=255)
    torch.testing.assert_close(model(images, labels=targets).loss, expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(images, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert model(images, labels=torch.full_like(targets, 255)).loss == 0


def test_save_and_load(tmp_path):
    model = tiny_policy(output_stride=16)
    model.save_pretrained(tmp_path)
    loaded = CtsPolicyModel.from_pretrained(tmp_path)
    images = random_images()
    assert torch.equal(model(images).logits, loaded(images).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tf_padding", "eps"), [("efficientnet_lite0", False, 1e-5), ("tf_efficientnet_lite0", True, 1e-3)]
)
@torch.no_grad()
def test_backbone_agrees_with_timm(name, tf_padding, eps):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = timm.create_model(name, pretrained=False, features_only=True).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    full = timm.create_model(name, pretrained=False)
    full.load_state_dict(reference.state_dict(), strict=False)
    images = random_images(2, 96, 128)
    features = dict(zip((2, 4, 8, 16, 32), reference(images), strict=True))
    for output_stride in (8, 16, 32):
        model = convert_policy(
            full.state_dict(), output_stride=output_stride, batch_norm_eps=eps, tf_padding=tf_padding
        )
        model.unfuse_batch_norm()  # the same operations, as folding rounds otherwise
        difference = (model.backbone(images) - features[output_stride]).abs().max().item()
        print(f"{name} at output stride {output_stride}: {difference:.1e}")
        assert difference <= 1e-4


def test_published_size():
    """EfficientNet-Lite0 without its classifier, and the classifier of superpatches."""
    with torch.device("meta"):
        model = CtsPolicyModel(CtsPolicyConfig())
        half = CtsPolicyModel(CtsPolicyConfig(output_stride=16))
    # 4 652 008 parameters are published; the last convolution and the classifier of ImageNet are not there.
    published = 4_652_008 - (320 * 1280 + 2 * 1280) - (1280 * 1000 + 1000)
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == published
    assert half.num_parameters() < model.num_parameters() / 3


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(1, 4, 32, 32), None, r"num_channels.*\(1, 4, 32, 32\)"),
        (torch.zeros(1, 3, 8, 32), None, "16 x 16 pixels, got 8 x 32"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64), r"\(1, 2, 2\).*\(1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32), torch.full((1, 2, 2), 2), r"0 to 1.*\[2\]"),
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 2), r"integer dtype, got torch\.float32: make them"),
        (torch.zeros(1, 3, 32, 32), [[[0, 1], [1, 0]]], r"integer dtype, got <class 'list'>: make them"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None, r"floating-point dtype, got torch\.uint8"),
        (np.zeros((1, 3, 32, 32)), None, r"pixel_values.*got <class 'numpy\.ndarray'>"),
    ],
)
def test_refusals_name_the_value(images, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy()(images, labels=labels)


@pytest.mark.parametrize(
    ("superpatch_mask", "message"),
    [
        (torch.ones(1, 2, 2), r"bool dtype, got torch\.float32"),
        ([[[True, True], [True, True]]], r"bool dtype, got <class 'list'>"),
        (torch.ones(1, 32, 32, dtype=torch.bool), r"\(1, 2, 2\).*\(1, 32, 32\)"),
        (torch.ones(2, 2, 2, dtype=torch.bool), r"\(1, 2, 2\).*\(2, 2, 2\)"),
    ],
)
def test_a_superpatch_mask_is_bool_on_the_grid(superpatch_mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy()(torch.zeros(1, 3, 32, 32), superpatch_mask=superpatch_mask)


def policy_with_statistics(**overrides):
    """As after training: the batch normalizations do something."""
    model = tiny_policy(**overrides)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def is_fused(model):
    return model.backbone.conv_stem.folded_weight is not None


@pytest.mark.parametrize("tf_padding", [False, True])
@pytest.mark.parametrize(
    ("superpatch_size", "output_stride"), [(16, 32), (8, 32), (28, 32), (16, 16), (48, 32), (64, 32), (16, 8)]
)
@torch.no_grad()
def test_images_of_different_sizes_get_the_logits_they_get_alone(superpatch_size, output_stride, tf_padding):
    model = policy_with_statistics(superpatch_size=superpatch_size, output_stride=output_stride, tf_padding=tf_padding)
    grids = [(4, 4), (3, 3), (1, 4), (2, 1)]
    images = random_images(4, 4 * superpatch_size, 4 * superpatch_size) + 2  # a border is not like the padding
    superpatch_mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    for index, (rows, columns) in enumerate(grids):
        superpatch_mask[index, :rows, :columns] = True
    pixel_mask = superpatch_mask.repeat_interleave(superpatch_size, 1).repeat_interleave(superpatch_size, 2)
    images = images * pixel_mask[:, None]
    logits = model(images, superpatch_mask=superpatch_mask).logits
    for index, (rows, columns) in enumerate(grids):
        alone = images[index : index + 1, :, : rows * superpatch_size, : columns * superpatch_size]
        part, expected = logits[index, :, :rows, :columns], model(alone).logits[0]
        assert (part - expected).abs().max() <= 1e-4 * expected.abs().max()  # the tolerance of test_golden.py


@pytest.mark.parametrize("overrides", [{}, {"output_stride": 16}, {"tf_padding": True, "batch_norm_eps": 1e-3}])
@torch.no_grad()
def test_evaluation_folds_normalizations_and_that_changes_nothing(overrides, tmp_path):
    model, images = policy_with_statistics(**overrides), random_images(2, 64, 96)
    model.unfuse_batch_norm()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(images).logits
    for _ in range(2):
        model.eval()
        assert is_fused(model)
        fused = model(images).logits
        torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
        assert not torch.equal(fused, expected)
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    for same in (CtsPolicyModel.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_fused(same)
        assert torch.equal(same(images).logits, fused)
        assert torch.equal(same.unfuse_batch_norm()(images).logits, expected)
    trained = copy.deepcopy(model).train()
    assert not is_fused(trained)
    assert torch.equal(trained(images).logits, policy_with_statistics(**overrides).train()(images).logits)


@torch.no_grad()
def test_fused_weights_are_never_stale():
    images, other = random_images(), policy_with_statistics(seed=1).unfuse_batch_norm()
    expected = other(images).logits
    with pytest.raises(ValueError, match=r"eval\(\)"):
        policy_with_statistics().train().fuse_batch_norm()

    def copy_in_place(model):
        for mine, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            mine.copy_(theirs)

    def replace(model):
        for module, theirs in zip(model.modules(), other.modules(), strict=True):
            for name, parameter in theirs.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.clone()))
            for name, buffer in theirs.named_buffers(recurse=False):
                module.register_buffer(name, buffer.clone())

    for change in (
        lambda model: model.load_state_dict(other.state_dict()),
        lambda model: model.load_state_dict(other.state_dict(), assign=True),
        copy_in_place,
        replace,
    ):
        model = policy_with_statistics()
        change(model)
        assert torch.equal(model(images).logits, expected)
        assert torch.equal(model.eval()(images).logits, other.eval()(images).logits)
        other.unfuse_batch_norm()


def test_a_fused_policy_still_passes_gradients_to_its_weights():
    model = policy_with_statistics()
    assert is_fused(model)
    targets = torch.zeros(2, 4, 4, dtype=torch.int64)
    model(random_images(), labels=targets).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_normalization_in_training_mode_is_not_folded():
    model, images = policy_with_statistics(), random_images()
    mean = model.backbone.bn1.running_mean.clone()
    model.backbone.bn1.train()
    model(images)
    assert not torch.equal(model.backbone.bn1.running_mean, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fused_half_precision_is_close(dtype):
    model = policy_with_statistics(output_stride=16)
    expected = model.unfuse_batch_norm()(random_images()).logits
    fused = model.eval().to(dtype)
    again = copy.deepcopy(fused).fuse_batch_norm()
    logits = fused(random_images()).logits
    assert logits.dtype == dtype
    assert torch.equal(again(random_images()).logits, logits)  # of the weights as they are now
    assert (logits.float() - expected).abs().max() / expected.abs().max() < 30 * torch.finfo(dtype).eps


def test_policies_without_values_are_not_folded():
    with torch.device("meta"):
        model = CtsPolicyModel(CtsPolicyConfig(superpatch_size=16, output_stride=8, **TINY_BACKBONE)).eval()
    assert not is_fused(model)
    model.to_empty(device="cpu").load_state_dict(policy_with_statistics(output_stride=8).state_dict())
    with torch.no_grad():
        expected = policy_with_statistics(output_stride=8).unfuse_batch_norm()(random_images()).logits
        assert torch.equal(model(random_images()).logits, expected)


def test_a_frozen_policy_stays_fused_while_its_model_trains():
    assert is_fused(tiny_model().train().cts.policy)
    assert not is_fused(tiny_model(policy_loss_weight=0.1).train().cts.policy)


@torch.no_grad()
def test_stages_beyond_the_stride_have_the_weights_of_the_whole_backbone():
    """As ImageNet's are loaded into them; with the stride of all stages it is the whole backbone again."""
    whole, images = policy_with_statistics(tf_padding=True), random_images(2, 64, 96)
    for output_stride, num_stages in ((8, 4), (16, 7)):
        backbone = tiny_policy(seed=1, tf_padding=True, output_stride=output_stride, num_stages=num_stages).backbone
        backbone.load_state_dict({name: whole.backbone.state_dict()[name] for name in backbone.state_dict()})
        first = CtsPolicyConfig(output_stride=output_stride).built_stages
        features = whole.backbone.act(whole.backbone.bn1(whole.backbone.conv_stem(images)))
        for stage in whole.backbone.blocks[:first]:
            features = stage(features)
        size = features.shape[-2:]
        for stage in backbone.blocks[first:]:
            features = stage(features)
        assert torch.equal(backbone(images), features)
        assert features.shape[-2:] == size
    same = tiny_policy(seed=1, tf_padding=True, num_stages=7)
    same.load_state_dict(whole.state_dict())
    assert torch.equal(same(images).logits, whole(images).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 8, "num_stages": 2}, "from 3, which `output_stride=8` takes, to 7, got 2"),
        ({"output_stride": 16, "num_stages": 4}, "from 5"),
        ({"num_stages": 8}, "from 7, .* got 8"),
    ],
)
def test_stages_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CtsPolicyConfig(**options)
    assert "num_stages" not in CtsPolicyConfig().to_dict()


@torch.no_grad()
def test_half_resolution_is_the_mean_of_2_x_2_pixels():
    images = random_images(2, 32, 48)
    torch.testing.assert_close(shrink(images, 2), torch.nn.functional.avg_pool2d(images, 2))


@torch.no_grad()
def test_a_policy_of_another_copy_of_the_code_can_be_set(tmp_path, monkeypatch):
    """As where model and policy are loaded from two folders with `trust_remote_code=True`."""
    (tmp_path / "another_copy").mkdir()
    for file in (Path(cts_hf.__file__).parent / "model").glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, tmp_path / "another_copy")
    monkeypatch.syspath_prepend(tmp_path)
    another = importlib.import_module("another_copy.modeling_cts_policy")
    policy = another.CtsPolicyModel(
        another.CtsPolicyConfig(superpatch_size=16, output_stride=16, **TINY_BACKBONE)
    ).eval()
    assert not isinstance(policy.config, CtsPolicyConfig)
    model = tiny_model()
    model.set_policy(policy)
    assert model.config.policy_config is policy.config
    assert type(policy.config) is CtsPolicyConfig
    assert policy.config.output_stride == 16
    model.save_pretrained(tmp_path / "model")
    loaded = CtsForSemanticSegmentation.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(random_images()).policy_logits, model(random_images()).policy_logits)


def policy_with_options_that_do_not_fit():
    policy = tiny_policy()
    policy.config.image_std = [0.5, 0.5, 0.0]
    return policy


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: None, "`policy` must be a CtsPolicyModel, got <class 'NoneType'>: load one by"),
        (lambda: "folder", "`policy` must be a CtsPolicyModel, got <class 'str'>"),
        (lambda: tiny_policy().config, "`policy` must be .* got <class '.*CtsPolicyConfig'>"),
        (lambda: torch.nn.Linear(1, 1), "`policy` must be .* got <class '.*Linear'>"),
        (tiny_model, "`policy` must be .* got <class '.*CtsForSemanticSegmentation'>"),
        (lambda: tiny_policy(superpatch_size=32), r"`policy_config\.superpatch_size` must be 16 .* got 32"),
        (policy_with_options_that_do_not_fit, r"`image_std` must be numbers above 0, .* got \[0\.5, 0\.5, 0\.0\]"),
    ],
)
@torch.no_grad()
def test_a_policy_that_is_refused_leaves_the_model_as_it_is(build, message):
    model = tiny_model(use_policy=False)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_policy(build())
    assert model.cts.policy is None
    assert model.config.to_dict() == before
