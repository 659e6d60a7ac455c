# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from cts_hf.model.modeling_cts_grid import PatchGrid

from ..helpers.models import TINY_BACKBONE, random_images, tiny_model
from ..helpers.slow import slow_but


@pytest.mark.slow
@torch.no_grad()
def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = tiny_model()
    images = random_images()
    expected = model(images).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, expected, rtol=0, atol=1e-4)


SIZES_IN_A_ROW = [(64, 64), (64, 96), (41, 70), (33, 129), (96, 96)]


@pytest.mark.parametrize("dynamic", slow_but([None], [None, True]))
@torch.no_grad()
def test_images_of_sizes_that_vary_can_be_compiled(dynamic):
    """What the model resamples to sizes that it computes, alone: all of it takes long to compile."""
    torch._dynamo.reset()
    positions = random_images(1, 8, 8)

    def resample(images):
        grid = PatchGrid.of_images(images, None, 8)
        images, size = grid.pad(images), grid.shape()
        return images, nn.functional.interpolate(positions, size=size, mode="bilinear", align_corners=False)

    compiled = torch.compile(resample, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in SIZES_IN_A_ROW:
        images = random_images(1, *size)
        torch.testing.assert_close(compiled(images), resample(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tf_padding", "pads_batch", "levels"), [(False, False, (2,)), (True, True, (2,)), (False, False, (2, 4))]
)
@torch.no_grad()
def test_a_model_compiled_by_default_takes_any_sizes(tf_padding, pads_batch, levels):
    torch._dynamo.reset()
    policy = {**TINY_BACKBONE, "output_stride": 8, "tf_padding": tf_padding}  # fewer stages, as compiling takes long
    options = {"num_hidden_layers": 1, "decoder_type": "linear", "superpatch_levels": levels}
    model = tiny_model(**options, policy_config=policy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Of several levels fewer sizes, as torch.compile takes minutes to reason about the number of tokens.
    for height, width in SIZES_IN_A_ROW[: 5 if len(levels) == 1 else 2]:
        images, pixel_mask = random_images(2, height, width), None
        if pads_batch:
            pixel_mask = torch.ones(2, height, width)
            pixel_mask[1, 20:] = pixel_mask[1, :, 50:] = 0
        expected, outputs = (module(images, pixel_mask=pixel_mask) for module in (model, compiled))
        assert torch.equal(outputs.num_tokens, expected.num_tokens)
        torch.testing.assert_close(outputs.shared_superpatches, expected.shared_superpatches, rtol=0, atol=0)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_to_one_graph_per_size_and_budget():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tiny_model(), fullgraph=True, dynamic=False, backend=counter)
    for num_graphs, (size, token_reduction) in enumerate([(64, 0.3), (64, 0.6), (96, 0.6), (96, 0)], start=1):
        for seed in range(3):
            compiled(random_images(2, size, size, seed=seed), token_reduction=token_reduction)
        assert counter.frame_count == num_graphs


@pytest.mark.slow
@torch.no_grad()
def test_exports_at_a_fixed_size():
    model = tiny_model()
    program = torch.export.export(model, (random_images(),))
    images = random_images(seed=1)
    torch.testing.assert_close(program.module()(images).logits, model(images).logits, rtol=0, atol=1e-4)
