# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
import transformers

from cts_hf import apply_cts, remove_cts

from ..helpers.existing_models import build_existing, call_existing, sizes, states
from ..helpers.models import random_images, tiny_policy


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "beit", "eomt"])
@torch.no_grad()
def test_the_policy_chooses(name):
    """As it does by itself on the same images, for which they are renormalized and odd borders cut off."""
    model, policy = build_existing(name), tiny_policy(image_mean=0.5, image_std=0.5)
    for height, width in sizes(name):
        images = random_images(2, height, width)
        mean, std = (torch.tensor(values)[:, None, None] for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))
        pixels = (images * std + mean)[..., : height // 16 * 16, : width // 16 * 16]
        logits = policy((pixels - 0.5) / 0.5).logits
        apply_cts(model, policy, 0.3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
        by_policy = call_existing(model, name, images)
        by_scores = call_existing(model, name, images, superpatch_scores=logits[:, 1] - logits[:, 0])
        assert torch.equal(by_policy.shared_superpatches, by_scores.shared_superpatches)
        assert by_policy.shared_superpatches.any()
        assert torch.equal(states(by_policy), states(by_scores))
        remove_cts(model)


@torch.no_grad()
def test_a_policy_of_several_levels_serves_with_its_first():
    policy, images = tiny_policy(superpatch_levels=(2, 4), image_mean=0.5, image_std=0.5), random_images(2, 48, 80)
    model = apply_cts(build_existing("dinov2"), policy, image_mean=0.5, image_std=0.5)
    logits = policy(images).logits[0][:, :, :3, :5]
    outputs = model(images)
    scores = logits[:, 1] - logits[:, 0]
    for given in (scores, (scores,)):
        expected = model(images, superpatch_scores=given)
        assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
        assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)


def test_the_normalization_is_that_of_the_image_processor(tmp_path):
    build_existing("dinov2").save_pretrained(tmp_path)
    options = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert apply_cts(model).token_sharing.image_mean == (0.485, 0.456, 0.406)
    transformers.BitImageProcessor(**options).save_pretrained(tmp_path)
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path)).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path), image_mean=0.5).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    transformers.BitImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    sharing = apply_cts(transformers.AutoModel.from_pretrained(tmp_path)).token_sharing
    assert (sharing.image_mean, sharing.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert apply_cts(build_existing("beit")).token_sharing.image_mean == (0.5, 0.5, 0.5)


def test_the_policy_stays_frozen_and_in_evaluation_mode():
    model = apply_cts(build_existing("dinov2"), tiny_policy())
    before = copy.deepcopy(model.token_sharing.policy.state_dict())
    model.train()
    call_existing(model, "dinov2", random_images()).last_hidden_state.sum().backward()
    after = model.token_sharing.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.token_sharing.policy.parameters())
    assert not model.token_sharing.policy.training


@torch.no_grad()
def test_a_policy_may_be_given_to_several_models():
    """Each has its own copy: what is done to one model does nothing to the others, nor to the policy."""
    policy, images = tiny_policy().train(), random_images()
    state = copy.deepcopy(policy.state_dict())
    model = apply_cts(build_existing("dinov2"), policy)
    expected = model(images)
    other = apply_cts(build_existing("dinov2").to(torch.bfloat16), policy)
    assert other.token_sharing.policy.dtype == torch.bfloat16
    assert other(images.bfloat16()).num_tokens.tolist() == [46, 46]
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    outputs = model(images)
    assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
