# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch

from cts_hf import apply_cts, remove_cts
from cts_hf.model.modeling_cts_encoders import find_encoder, patch_projection

from ..helpers.existing_models import (
    ENCODER_KINDS,
    PATCH_SIZE,
    build_existing,
    call_existing,
    random_scores,
    sizes,
    states,
    tensors,
)
from ..helpers.models import random_images, tiny_policy


@pytest.mark.parametrize("name", [*ENCODER_KINDS, "eomt", "eomt_dinov3"])
@torch.no_grad()
def test_a_shared_token_of_equal_patches_is_the_mean_of_theirs(name):
    """The first hidden states: a patch's own, or the mean of four that look alike and differ in their positions."""
    model = build_existing(name)
    for height, width in sizes(name):
        patch = random_images(2, PATCH_SIZE, PATCH_SIZE)[:, :, :1, :1]
        images = patch.expand(-1, -1, height, width)
        plain = tensors(call_existing(model, name, images, output_hidden_states=True))["hidden_states.0"]
        apply_cts(model)
        outputs = call_existing(
            model,
            name,
            images,
            token_reduction=0.4,
            superpatch_scores=random_scores(height, width),
            output_hidden_states=True,
        )
        remove_cts(model)
        shared = outputs.shared_superpatches
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        patches, got = (
            value[:, -rows * columns :].unflatten(1, (rows, columns)).movedim(3, 1)
            for value in (plain, tensors(outputs)["hidden_states.0"])
        )
        whole = (..., slice(2 * shared.shape[1]), slice(2 * shared.shape[2]))
        means = torch.nn.functional.avg_pool2d(patches[whole], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected = patches.clone()
        is_shared = shared[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected[whole] = torch.where(is_shared, means, patches[whole])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "data2vec", "eomt", "eomt_dinov3"])
def test_training_with_dropout_and_drop_path(name):
    model = apply_cts(build_existing(name, hidden_dropout_prob=0.5, drop_path_rate=0.3))
    images, scores = random_images(), random_scores(64, 64)
    model.train()
    for seed in range(2):
        torch.manual_seed(seed)
        outputs = call_existing(model, name, images, superpatch_scores=scores)
        assert states(outputs).isfinite().all()
        states(outputs).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    # A dropped position of a token is 0 and no difference to the projection.
    embeddings = next(module for module in model.modules() if type(module).__name__.endswith("Embeddings"))
    seen = []
    if getattr(embeddings, "dropout", None) is not None:
        embeddings.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        call_existing(model, name, images, superpatch_scores=scores)
        ((before, after),) = seen
        assert before.shape[1] < 64
        assert ((after == 0) | torch.isclose(after, 2 * before)).all()


@torch.no_grad()
def test_positions_keep_double_precision():
    model = build_existing("dinov2").double()
    images = random_images(1, 1, 1).double().expand(-1, -1, 64, 64)
    patches = model(images, output_hidden_states=True).hidden_states[0][:, 1:].unflatten(1, (4, 2, 4, 2))
    scores = torch.zeros(1, 4, 4)
    outputs = apply_cts(model)(images, superpatch_scores=scores, token_reduction=0.75, output_hidden_states=True)
    shared = outputs.hidden_states[0][:, 1:].unflatten(1, (4, 2, 4, 2))
    torch.testing.assert_close(shared, patches.mean((2, 4), keepdim=True).expand_as(shared), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_mean_pooling_averages_patches():
    model = build_existing("beit", use_mean_pooling=True)
    images = random_images()
    outputs = apply_cts(model)(images, superpatch_scores=random_scores(64, 64))
    pooled = model.pooler.layernorm(outputs.last_hidden_state[:, 1:].mean(1))
    torch.testing.assert_close(outputs.pooler_output, pooled, rtol=1e-5, atol=1e-5)


class Adapted(torch.nn.Module):
    """A projection with a second one beside it, as adapters wrap it: nothing but `weight` is that of a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.added = torch.nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size, base.stride)

    def forward(self, pixel_values):
        return self.base(pixel_values) + self.added(pixel_values)


def set_projection(model, projection):
    _, embeddings = find_encoder(model)
    holder = embeddings.patch_embeddings
    if hasattr(holder, "projection"):
        holder.projection = projection
    else:
        embeddings.patch_embeddings = projection


@pytest.mark.parametrize("name", ["vit", "dinov3"])
@torch.no_grad()
def test_a_projection_may_be_replaced_or_wrapped_at_any_time(name):
    images, scores = random_images(), random_scores(64, 64)
    model, never = build_existing(name), build_existing(name)
    before = patch_projection(find_encoder(model)[1])
    adapted, plain = Adapted(before), copy.deepcopy(before)
    plain.weight.data.mul_(0.5)
    apply_cts(model)
    for projection in (adapted, plain, adapted, before):
        set_projection(model, projection)
        set_projection(never, copy.deepcopy(projection))
        for _ in range(2):
            outputs = call_existing(model, name, images, superpatch_scores=scores)
            assert outputs.num_tokens.tolist() == [46, 46]
        expected = call_existing(apply_cts(never), name, images, superpatch_scores=scores)
        assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
        remove_cts(never)
    set_projection(model, adapted)
    call_existing(model, name, images, superpatch_scores=scores)
    remove_cts(model)
    for module in (model, adapted, before, plain):
        assert not any(part._forward_hooks for part in module.modules() if isinstance(part, Adapted | torch.nn.Conv2d))
    apply_cts(model, tiny_policy())  # which needs the sizes of patches and images
    assert call_existing(model, name, images).num_tokens.tolist() == [46, 46]


def test_a_projection_that_is_replaced_before_a_model_is_exported_is_refused():
    model = apply_cts(build_existing("dinov2"), tiny_policy())
    set_projection(model, copy.deepcopy(patch_projection(find_encoder(model)[1])))
    with pytest.raises(ValueError, match="must be that of the last call where a model is compiled or exported"):
        torch.export.export(model, (random_images(),), strict=False)
    assert model(random_images()).num_tokens.tolist() == [46, 46]


def test_a_projection_that_returns_no_map_is_refused():
    model = apply_cts(build_existing("dinov3"), tiny_policy())
    _, embeddings = find_encoder(model)
    embeddings.patch_embeddings = torch.nn.Sequential(embeddings.patch_embeddings, torch.nn.Flatten(2))
    embeddings.patch_embeddings.weight = embeddings.patch_embeddings[0].weight
    with pytest.raises(ValueError, match=r"must return a map, .* got shape \(2, 32, 64\) from a Sequential"):
        model(random_images())
