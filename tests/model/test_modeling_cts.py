# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
from torch import nn

from cts_hf import (
    CtsForSemanticSegmentation,
    CtsModel,
    num_shared_superpatches,
    superpatch_targets,
    unshare,
)

from ..helpers.models import TINY_BACKBONE, random_images, tiny_config, tiny_model


SIZES = [(64, 64), (64, 96), (16, 16), (41, 70), (33, 129)]
REDUCTIONS = [0, 0.1, 0.3, 0.4375, 0.75]


def random_labels(batch_size=2, height=64, width=64, num_labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, num_labels, (batch_size, -(-height // 16), -(-width // 16)), generator=generator)
    return coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].contiguous()


@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear"])
@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_any_size_and_budget(height, width, decoder_type):
    model = tiny_model(decoder_type=decoder_type)
    rows, columns = -(-height // 16), -(-width // 16)
    for token_reduction in REDUCTIONS:
        outputs = model(random_images(2, height, width), token_reduction=token_reduction, output_hidden_states=True)
        num_shared = num_shared_superpatches(token_reduction, 4 * rows * columns)
        assert outputs.logits.shape == (2, 5, -(-height // 8), -(-width // 8))
        assert outputs.logits.isfinite().all()
        assert outputs.logits.is_contiguous()
        assert outputs.shared_superpatches.shape == (2, rows, columns)
        assert (outputs.shared_superpatches.sum((1, 2)) == num_shared).all()
        assert outputs.hidden_states[0].shape[1] == 1 + 4 * rows * columns - 3 * num_shared
        assert (outputs.policy_logits is None) == (num_shared == 0)


@torch.no_grad()
def test_budget_zero_is_a_plain_segmenter():
    """Against a Segmenter written down with torch alone."""
    model = tiny_model()
    images = random_images()
    embeddings = model.cts.embeddings
    weight = embeddings.patch_embeddings.projection.weight.unflatten(1, (3, 8, 8))
    patches = nn.functional.conv2d(images, weight, embeddings.patch_embeddings.projection.bias, stride=8)
    tokens = torch.cat([embeddings.cls_token.expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + embeddings.position_embeddings
    for layer in model.cts.layers:
        tokens = layer(tokens)
    (logits,) = model.decode_head([model.cts.layernorm(tokens)[:, 1:]])
    expected = logits.transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(model(images, token_reduction=0).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_patches_of_a_shared_superpatch_get_the_same_logits():
    outputs = tiny_model()(random_images(), token_reduction=0.4375)
    cells = outputs.logits.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, C, rows, columns, 4)
    is_constant = (cells == cells[..., :1]).all(dim=-1).all(dim=1)
    assert torch.equal(is_constant, outputs.shared_superpatches)


@torch.no_grad()
def test_a_uniform_superpatch_loses_nothing_but_positions():
    """Where pixels and positions are constant, a superpatch's token is that of each of its patches."""
    model = tiny_model().cts
    model.embeddings.position_embeddings.zero_()
    images = random_images(2, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :64, :64]
    shared, plain = model(images, token_reduction=0.75), model(images, token_reduction=0)
    embedded = unshare(model.embeddings.patch_embeddings(images, shared.token_layout), shared.token_layout)
    torch.testing.assert_close(embedded, model.embeddings.patch_embeddings(images, plain.token_layout))


@torch.no_grad()
def test_images_of_a_batch_are_independent():
    model = tiny_model()
    images = random_images(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(images).logits[order], model(images[order]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scores", [None, torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder_type": "linear", "use_distillation_token": True},
        {"policy_config": {**TINY_BACKBONE, "output_stride": 8}},
        {"policy_config": {**TINY_BACKBONE, "tf_padding": True, "output_stride": 16}},
    ],
)
@torch.no_grad()
def test_images_of_different_sizes_are_segmented_as_alone(options, scores):
    model = tiny_model(**options)
    sizes = [(64, 80), (40, 50), (16, 80), (64, 64)]
    images = [random_images(1, *size, seed=index) for index, size in enumerate(sizes)]
    pixel_values, pixel_mask = torch.zeros(len(sizes), 3, 64, 80), torch.zeros(len(sizes), 64, 80)
    for index, (height, width) in enumerate(sizes):
        pixel_values[index, :, :height, :width] = images[index][0]
        pixel_mask[index, :height, :width] = 1
    for token_reduction in REDUCTIONS:
        batch = model(pixel_values, superpatch_scores=scores, pixel_mask=pixel_mask, token_reduction=token_reduction)
        for index, (height, width) in enumerate(sizes):
            own_scores = None
            if scores is not None:
                own_scores = scores[index : index + 1, : -(-height // 16), : -(-width // 16)]
            alone = model(images[index], superpatch_scores=own_scores, token_reduction=token_reduction)
            rows, columns = batch.logits_sizes[index]
            torch.testing.assert_close(batch.logits[index, :, :rows, :columns], alone.logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_full_pixel_mask_changes_nothing():
    model = tiny_model()
    images = random_images(2, 64, 96)
    masked = model(images, pixel_mask=torch.ones(2, 64, 96))
    torch.testing.assert_close(masked.logits, model(images).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_injected_scores_replace_the_policy():
    model = tiny_model()
    images = random_images()
    own = model(images)
    scores = own.policy_logits[:, 1] - own.policy_logits[:, 0]
    injected = model(images, superpatch_scores=scores)
    assert torch.equal(injected.logits, own.logits)
    assert injected.policy_logits is None
    without_policy = tiny_model(use_policy=False)
    without_policy.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(without_policy(images, superpatch_scores=scores).logits, own.logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
@torch.no_grad()
def test_scores_of_any_dtype(dtype):
    model, images = tiny_model(), random_images()
    targets = torch.zeros(2, 4, 4)
    targets[:, 1:3] = 1
    for pixel_mask in (None, torch.ones(2, 64, 64)):
        outputs = model(images, superpatch_scores=targets.to(dtype), pixel_mask=pixel_mask)
        assert outputs.shared_superpatches.sum() == outputs.shared_superpatches[:, 1:3].sum() == 12


def test_loss_is_that_of_upsampled_logits():
    model = tiny_model()
    images, labels = random_images(2, 41, 70), random_labels(2, 41, 70)
    labels[:, :10] = 255
    outputs = model(images, labels=labels)
    upsampled = nn.functional.interpolate(outputs.logits, size=(41, 70), mode="bilinear", align_corners=False)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(upsampled, labels, ignore_index=255))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    model, labels = tiny_model(policy_loss_weight=1.0), random_labels()
    labels[:, :20] = 200
    model.config.semantic_loss_ignore_index = 200
    expected = model(random_images(), labels=labels).loss
    assert torch.equal(model(random_images(), labels=labels.to(dtype)).loss, expected)


def test_a_batch_without_annotation_has_the_loss_zero():
    model = tiny_model()
    loss = model(random_images(), labels=torch.full((2, 64, 64), 255)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_it_does_not_matter_what_padding_holds():
    model, images, pixel_mask = tiny_model(), random_images(), torch.ones(2, 64, 64)
    pixel_mask[1, 40:] = pixel_mask[1, :, 50:] = 0
    blank = model(images * pixel_mask[:, None], pixel_mask=pixel_mask).logits
    images[1, :, 40:] = float("nan")
    assert torch.equal(model(images, pixel_mask=pixel_mask).logits, blank)


def test_a_joint_policy_learns_from_each_image_as_alone():
    model = tiny_model(policy_loss_weight=1.0, decoder_type="linear")
    labels = torch.full((2, 64, 64), 255)
    labels[0], labels[1, :40, :50] = 0, random_labels(1, 40, 50)[0]
    pixel_mask = (labels != 255).float()
    pixel_values = random_images() * pixel_mask[:, None]
    together = model(pixel_values, labels=labels, pixel_mask=pixel_mask)
    policy_losses = []
    for index, (height, width) in enumerate([(64, 64), (40, 50)]):
        part = slice(index, index + 1)
        logits = model.cts.policy(pixel_values[part, :, :height, :width]).logits
        padded = nn.functional.pad(labels[part, :height, :width], (0, -width % 16, 0, -height % 16), value=255)
        targets = superpatch_targets(padded, 16)
        policy_losses.append(nn.functional.cross_entropy(logits, targets, ignore_index=255, reduction="none"))
    policy_losses = torch.cat([losses[losses != 0] for losses in policy_losses])
    upsampled = nn.functional.interpolate(together.logits, size=(64, 64), mode="bilinear", align_corners=False)
    expected = nn.functional.cross_entropy(upsampled, labels, ignore_index=255) + policy_losses.mean()
    torch.testing.assert_close(together.loss, expected)


def test_a_frozen_policy_stays_as_it_is():
    model = tiny_model().train()
    before = copy.deepcopy(model.cts.policy.state_dict())
    outputs = model(random_images(), labels=random_labels())
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert model.training
    assert not any(module.training for module in model.cts.policy.modules())
    assert all(parameter.grad is None for parameter in model.cts.policy.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.cts.policy.state_dict().items())
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == sum(not name.startswith("cts.policy.") for name, _ in model.named_parameters())


def test_a_joint_policy_learns_from_its_own_loss():
    model = tiny_model(policy_loss_weight=0.5).train()
    images, labels = random_images(), random_labels(2, 64, 64)
    outputs = model(images, labels=labels)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.cts.policy.backbone.bn1.num_batches_tracked == 1
    upsampled = nn.functional.interpolate(outputs.logits, size=(64, 64), mode="bilinear", align_corners=False)
    policy_loss = nn.functional.cross_entropy(outputs.policy_logits, superpatch_targets(labels, 16), ignore_index=255)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(upsampled, labels) + 0.5 * policy_loss)


@pytest.mark.parametrize("policy_loss_weight", [0.0, 1.0])
def test_gradient_checkpointing_gives_the_same_gradients(policy_loss_weight):
    model = tiny_model(policy_loss_weight=policy_loss_weight).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(random_images(), labels=random_labels()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.gradient_checkpointing_enable()
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_drop_path_drops_residuals_in_training_only():
    model = tiny_model(drop_path_rate=1.0)
    images = random_images()
    assert torch.equal(model(images).logits, model(images).logits)
    last_layer = model.cts.layers[-1].train()
    hidden_states = torch.randn(2, 7, 32)
    assert torch.equal(last_layer(hidden_states), hidden_states)
    assert model.cts.layers[0].drop_path.drop_prob == 0


def test_save_and_load(tmp_path):
    model = tiny_model(decoder_type="linear", use_distillation_token=True, image_size=(64, 96))
    model.save_pretrained(tmp_path)
    images = random_images(2, 64, 96)
    loaded = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert not any(parameter.requires_grad for parameter in loaded.cts.policy.parameters())
    base = CtsModel.from_pretrained(tmp_path)
    assert torch.equal(base(images).last_hidden_state, model.cts(images).last_hidden_state)


@pytest.mark.parametrize("part", ["cts.policy", "cts.embeddings", "cts.layers", "cts.layernorm", "decode_head"])
@torch.no_grad()
def test_weights_can_stay_on_disk(part, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    parts = ("cts.policy", "cts.embeddings", "cts.layers", "cts.layernorm", "decode_head")
    device_map = {**dict.fromkeys(parts, "cpu"), part: "disk"}
    loaded = CtsForSemanticSegmentation.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "o")
    assert any(weight.is_meta for weight in loaded.parameters())
    assert torch.equal(loaded(random_images()).logits, model(random_images()).logits)


@torch.no_grad()
def test_positions_are_untouched_at_their_own_size_and_interpolated_at_others():
    embeddings = tiny_model(image_size=(64, 96)).cts.embeddings
    model = tiny_model(image_size=(64, 96)).cts
    layout = model(random_images(1, 64, 96), token_reduction=0).token_layout
    positions = embeddings._token_positions(layout, (8, 12), None)
    assert torch.equal(positions, embeddings.position_embeddings[:, 1:])
    layout = model(random_images(1, 32, 32), token_reduction=0).token_layout
    grid = embeddings.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, (8, 12))
    expected = nn.functional.interpolate(grid, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(embeddings._token_positions(layout, (4, 4), None), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_type": "fcn"}, "mask_transformer"),
        ({"policy_loss_weight": -1.0}, r"policy_loss_weight.*-1\.0"),
        ({"patch_size": 4}, "superpatch_size. must be 8"),
        ({"token_reduction": 0.9}, r"token_reduction.*0\.9"),
    ],
)
def test_options_given_when_loading_are_checked_too(options, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CtsForSemanticSegmentation.from_pretrained(tmp_path, **options)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match=r"at least 2.*got 1"):
        CtsForSemanticSegmentation(tiny_config(num_labels=1))


def test_sharing_without_a_policy_is_refused():
    model = CtsForSemanticSegmentation(tiny_config(use_policy=False))
    with pytest.raises(ValueError, match="superpatch_scores"):
        model(random_images())
    assert model(random_images(), token_reduction=0).logits.shape == (2, 5, 8, 8)
