# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import threading

import pytest
import torch

from cts_hf import apply_cts, remove_cts
from cts_hf.model.modeling_cts_encoder_call import _call, current_call

from ..helpers.existing_models import ENCODER_KINDS, build_existing, call_existing, random_scores, states
from ..helpers.models import random_images, tiny_policy


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ENCODER_KINDS)
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    """Also if another forward comes in between, with other tokens."""
    if use_reentrant and name == "beit_shared_bias":
        pytest.skip("upstream cannot do it: a bias that all layers share is backpropagated through by each")
    model = apply_cts(build_existing(name))
    images, scores = random_images(), random_scores(64, 64)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        outputs = call_existing(model, name, images, superpatch_scores=scores)
        call_existing(model, name, images, superpatch_scores=-scores, token_reduction=0.6)
        states(outputs).square().mean().backward()
        with_gradient = [(key, value) for key, value in model.named_parameters() if value.grad is not None]
        gradients.append({key: value.grad.clone() for key, value in with_gradient if value.numel()})
    without, with_checkpoints = gradients
    assert without.keys() == with_checkpoints.keys()
    for key, value in without.items():
        torch.testing.assert_close(with_checkpoints[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())
    remove_cts(model)
    assert not any("_CheckpointInCall" in repr(vars(module)) for module in model.modules())


def test_gradient_checkpointing_where_only_layers_are_in_training_mode():
    """The rest may be in evaluation mode, as it is frozen."""
    model, gradients = apply_cts(build_existing("beit")), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.eval().zero_grad()
        for module in model.modules():
            if type(module).__name__ == "BeitLayer":
                module.train()
        model(random_images(), superpatch_scores=random_scores(64, 64)).last_hidden_state.square().mean().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


@torch.no_grad()
def test_calls_of_several_threads_do_not_meet():
    model = apply_cts(build_existing("beit"))
    images = random_images(1)
    cases = [(random_scores(64, 64, 1, seed), reduction) for seed in range(4) for reduction in (0.0, 0.3, 0.6)]
    expected = [model(images, superpatch_scores=s, token_reduction=r).last_hidden_state for s, r in cases]
    problems = []

    def run(first):
        for index in range(first, first + 40):
            scores, reduction = cases[index % len(cases)]
            got = model(images, superpatch_scores=scores, token_reduction=reduction)
            if not torch.equal(got.last_hidden_state, expected[index % len(cases)]):
                problems.append(index)

    threads = [threading.Thread(target=run, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@torch.no_grad()
def test_an_error_in_a_call_leaves_the_next_one_alone():
    model = apply_cts(build_existing("dinov2"))
    images, scores = random_images(), random_scores(64, 64)
    expected = model(images, superpatch_scores=scores).last_hidden_state
    with pytest.raises(ValueError, match="without a policy"):
        model(images)
    handle = model.layernorm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images, superpatch_scores=scores)
    handle.remove()
    # A part of it, called by itself, is no call of the model.
    assert model.embeddings(images).shape[1] == 65
    assert torch.equal(model(images, superpatch_scores=scores).last_hidden_state, expected)


class Left(BaseException):
    """As `KeyboardInterrupt`, which hooks after a forward do not see."""


@torch.no_grad()
def test_an_interrupt_in_a_call_leaves_no_call_behind():
    model = apply_cts(build_existing("upernet_dinov2"), tiny_policy())
    inside, images, scores = model.backbone, random_images(), random_scores(64, 64)
    expected, expected_inside = model(images).logits, inside(images).feature_maps[-1]

    def interrupt(*args):
        raise Left

    handle = inside.layernorm.register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(Left) as error:
            model(images, superpatch_scores=scores, token_reduction=0.75)
        assert error.traceback
    handle.remove()
    assert current_call() is None
    assert inside.embeddings(images).shape[1] == 65
    assert torch.equal(inside(images).feature_maps[-1], expected_inside)
    assert _call.get() is None  # nor the tensors that it held
    assert torch.equal(model(images).logits, expected)


@torch.no_grad()
def test_an_export_that_fails_leaves_no_call_behind():
    model, images = apply_cts(build_existing("dinov2"), tiny_policy()), random_images()
    expected = model(images).last_hidden_state
    handle = model.layernorm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch.export.export(model, (images,), {"token_reduction": 0.6}, strict=False)
    handle.remove()
    assert torch.equal(model(images).last_hidden_state, expected)
