# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import json
from pathlib import Path

import pytest
import torch

from cts_hf.training import OptimizationArguments, build_optimizer, build_scheduler, polynomial_lr

from ..helpers.models import tiny_model


GOLDEN = Path(__file__).parents[1] / "fixtures" / "polynomial_lr.json"


def learning_rates(num_steps, **options):
    args = OptimizationArguments(**options)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), args)
    scheduler = build_scheduler(optimizer, args, num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_polynomial_decay_is_the_reference_s(optimizer):
    golden = json.loads(GOLDEN.read_text())
    rates = learning_rates(
        golden["total_steps"],
        optimizer=optimizer,
        learning_rate=golden["base_lr"],
        lr_power=golden["power"],
        min_lr=golden["min_lr"],
        warmup_steps=golden["warmup_steps"],
    )
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(golden["lr_after_k_steps"]), rtol=1e-6, atol=1e-10)


def test_warmup_rises_to_the_base_rate_and_decay_starts_there():
    rates = [polynomial_lr(step, 20, base_lr=1.0, min_lr=0.0, warmup_steps=4) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[20] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_constant_rate_keeps_its_warmup():
    rates = learning_rates(6, lr_scheduler="constant", learning_rate=0.5, warmup_steps=1)
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_optimizers_leave_the_frozen_policy_alone_and_decay_matrices_only():
    model = tiny_model()
    sgd = build_optimizer(model, OptimizationArguments(weight_decay=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.9
    decayed, others = ({id(p) for p in group["params"]} for group in sgd.param_groups)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.1, 0.0]
    assert id(model.cts.layers[0].mlp.fc1.weight) in decayed
    assert id(model.cts.embeddings.position_embeddings) in others
    assert id(model.cts.layernorm.weight) in others
    assert not {id(p) for p in model.cts.policy.parameters()} & (decayed | others)
    assert isinstance(build_optimizer(model, OptimizationArguments(optimizer="adamw")), torch.optim.AdamW)


def test_a_final_rate_above_the_first_is_refused():
    with pytest.raises(ValueError, match=r"`min_lr` must be between 0 and learning_rate, which is 0.1.*, got 1"):
        OptimizationArguments(learning_rate=0.1, min_lr=1)


def test_lower_layers_learn_slower():
    model = tiny_model()
    args = OptimizationArguments(learning_rate=1.0, min_lr=0.0, layer_decay=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, args)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    cts = model.cts
    assert rates[id(cts.embeddings.cls_token)] == 0.125
    assert {rates[id(p)] for p in cts.layers[0].parameters()} == {0.25}
    assert {rates[id(p)] for p in cts.layers[1].parameters()} == {0.5}
    assert {rates[id(p)] for p in [*cts.layernorm.parameters(), *model.decode_head.parameters()]} == {1.0}
