# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import torch

from cts_hf import apply_cts

from ..helpers.existing_models import build_existing, call_existing, random_scores
from ..helpers.models import random_images


@torch.no_grad()
def test_rotary_positions_in_training_are_those_that_were_drawn():
    """DINOv3 shifts and scales positions at random in training: tokens of one size must follow."""
    model = build_existing("dinov3", pos_embed_shift=0.3, pos_embed_jitter=1.5, pos_embed_rescale=2.0).train()
    rotary = model.rope_embeddings
    seen = []
    rotary.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.manual_seed(3)
    call_existing(model, "dinov3", random_images())
    apply_cts(model)
    torch.manual_seed(3)
    scores = torch.zeros(2, 4, 4)
    call_existing(model, "dinov3", random_images(), superpatch_scores=scores, token_reduction=0.75)
    rotary.register_forward_hook(lambda module, args, output: seen.append(output))
    plain, *_ = seen
    torch.manual_seed(3)
    call_existing(model, "dinov3", random_images(), superpatch_scores=scores, token_reduction=0.75)
    cos, sin = seen[-1]
    # The slowest rotations turn little from patch to patch: their mean, renormalized, is the center's.
    grid = [values.unflatten(0, (4, 2, 4, 2)).mean((1, 3)).flatten(0, 1) for values in plain]
    length = (grid[0].square() + grid[1].square()).sqrt()
    for got, mean in zip((cos, sin), grid, strict=True):
        expected = mean / length
        is_slow = length > 0.9
        assert is_slow.any()
        torch.testing.assert_close(got[0, 0][is_slow], expected[is_slow], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_relative_bias_is_upstreams_for_patches_and_the_mean_for_superpatches():
    model = build_existing("beit")
    bias = model.layers[0].relative_position_bias if hasattr(model, "layers") else None
    bias = bias or next(m for m in model.modules() if type(m).__name__ == "BeitRelativePositionBias")
    seen = []
    handle = bias.register_forward_hook(lambda module, args, output: seen.append(output))
    images = random_images(1, 48, 96)
    model(images)
    handle.remove()
    apply_cts(model)
    bias.register_forward_hook(lambda module, args, output: seen.append(output))
    scores = torch.zeros(1, 3, 6)
    scores[0, 1, 2] = 1
    model(images, superpatch_scores=scores, token_reduction=3 / 72)
    full, shared = seen[0][0], seen[-1][0]
    of_superpatch = [12 * row + column for row in (2, 3) for column in (4, 5)]
    others = [index for index in range(72) if index not in of_superpatch]
    kept = torch.tensor([0, *(1 + index for index in others)])
    four = torch.tensor([1 + index for index in of_superpatch])
    assert shared.shape == (2, 70, 70)
    torch.testing.assert_close(shared[:, :-1, :-1], full[:, kept][:, :, kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[:, -1, :-1], full[:, four][:, :, kept].mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[:, :-1, -1], full[:, kept][:, :, four].mean(2), rtol=1e-5, atol=1e-5)


def test_training_after_inference_mode():
    """Upstream keeps indices of relative positions, which inference mode makes unfit for training."""
    model, images, scores = apply_cts(build_existing("beit")), random_images(), random_scores(64, 64)
    with torch.inference_mode():
        model(images, superpatch_scores=scores)
    model(images, superpatch_scores=scores).last_hidden_state.sum().backward()
