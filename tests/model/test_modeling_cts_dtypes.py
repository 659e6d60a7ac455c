# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a model in different dtypes, quantized, or without parameters of their own."""

import copy

import pytest
import torch
from torch import nn

from ..helpers.models import random_images, tiny_model, tiny_policy
from ..helpers.slow import slow_but
from .test_modeling_cts import random_labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_close(dtype):
    model = tiny_model()
    scores = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = model(random_images(), superpatch_scores=scores).logits
    logits = model.to(dtype)(random_images(), superpatch_scores=scores).logits
    assert logits.dtype == dtype
    difference = (logits.float() - expected).abs().max() / expected.abs().max()
    assert difference < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_the_default_dtype_decides_nothing(dtype):
    model, images, pixel_mask = tiny_model(), random_images(), torch.ones(2, 64, 64)
    pixel_mask[1, 40:] = 0
    expected = model(images, pixel_mask=pixel_mask).logits
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(model(images, pixel_mask=pixel_mask).logits, expected)
    finally:
        torch.set_default_dtype(default)


PARTS = {
    "policy": lambda model: model.cts.policy,
    "embeddings": lambda model: model.cts.embeddings,
    "layers": lambda model: model.cts.layers,
    "a layer": lambda model: model.cts.layers[1],
    "norm": lambda model: model.cts.layernorm,
    "decoder": lambda model: model.decode_head,
}


@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("decoder_type", slow_but(["mask_transformer"], ["mask_transformer", "linear"]))
@pytest.mark.parametrize(("dtype", "dtype_of_part"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_computes_in_the_dtype_of_its_weights(part, dtype, dtype_of_part, decoder_type, autocasts):
    model = tiny_model(decoder_type=decoder_type, policy_loss_weight=1.0).to(getattr(torch, dtype))
    PARTS[part](model).to(getattr(torch, dtype_of_part))
    for pixel_mask in (None, torch.ones(2, 64, 64)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocasts):
            outputs = model(random_images(), labels=random_labels(), pixel_mask=pixel_mask)
        outputs.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        if not autocasts:
            assert outputs.policy_logits.dtype == model.cts.policy.dtype
            assert outputs.logits.dtype == next(model.decode_head.parameters()).dtype


@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear"])
@torch.no_grad()
def test_linear_layers_can_be_quantized(decoder_type):
    model = tiny_model(decoder_type=decoder_type)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected, outputs = model(random_images()), quantized(random_images().double())
    assert torch.equal(outputs.shared_superpatches, expected.shared_superpatches)  # the policy has no linear layer
    similarity = nn.functional.cosine_similarity(outputs.logits, expected.logits, dim=1)
    assert similarity.mean() > 0.99  # some ten layers round by 2**-8 of the largest weight each: 4 % in all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder_type", ["mask_transformer", "linear"])
@torch.no_grad()
def test_a_replica_without_parameters_computes_the_same(decoder_type, dtype):
    model = tiny_model(decoder_type=decoder_type).to(dtype)
    expected = model(random_images())
    for module in model.modules():  # as in `nn.DataParallel`, which needs several GPUs
        parameters, module._parameters = module._parameters, {}
        module.__dict__.update(parameters)
    outputs = model(random_images())
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.policy_logits, expected.policy_logits)


@torch.no_grad()
def test_a_policy_in_full_precision_sees_the_images_in_full_precision():
    model = tiny_model()
    expected = model.cts.policy(random_images()).logits
    policy = copy.deepcopy(model.cts.policy)
    model.bfloat16().cts.policy = policy
    assert torch.equal(model(random_images()).policy_logits, expected)


def test_a_new_policy_has_the_dtype_of_the_encoder_and_not_of_the_policy_before():
    model = tiny_model().bfloat16()
    model.cts.policy.float()
    model.set_policy(tiny_policy())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
