# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A loss or a weight that is not finite stops a run of `examples/train.py`, before anything is saved."""

import pytest
import torch
from safetensors.torch import load_file

from cts_hf.training import loop

from ..helpers.training_runs import train_example


@pytest.mark.parametrize("lasting", [False, True], ids=["one step", "last step"])
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(scenes, tmp_path, monkeypatch, lasting):
    backward, steps = loop._backward, iter(range(1, 100))
    bad_step = 4 if lasting else 3

    def exploding(*args):
        loss = backward(*args)
        return loss * float("nan") if next(steps) == bad_step else loss

    monkeypatch.setattr(loop, "_backward", exploding)
    with pytest.raises(ValueError, match=rf"got nan at step {bad_step}\. Nothing of it was saved.* --learning_rate"):
        train_example(scenes, tmp_path, max_steps=4, save_steps=2, eval_steps=2, logging_steps=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "model.safetensors").exists()
    for file in (tmp_path / "best" / "model.safetensors", tmp_path / "checkpoints/step_00000002/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point())


# The weights of a policy end the forward of the next step, where there is one.
@pytest.mark.parametrize(("policy", "max_steps"), [(False, 1), (True, 1), (True, 3)])
def test_weights_that_are_not_finite_stop_the_run_although_the_loss_is(
    scenes, tmp_path, monkeypatch, policy, max_steps
):
    step = torch.optim.AdamW.step

    def exploding(self, *args, **kwargs):
        step(self, *args, **kwargs)
        model.cts.policy.head.bias.data.fill_(float("nan")) if policy else model.cts.layernorm.weight.data.fill_(
            float("inf")
        )

    build = loop.build_optimizer

    def remembering(trained, args):
        nonlocal model
        model = trained
        return build(trained, args)

    model = None
    monkeypatch.setattr(loop, "build_optimizer", remembering)
    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    name = r"policy: cts\.policy\.head\.bias" if policy else r"model: cts\.layernorm\.weight"
    with pytest.raises(
        ValueError, match=rf"got NaN or infinity in weights of the {name}, after step 1\. Nothing of it"
    ):
        train_example(scenes, tmp_path, max_steps=max_steps)
    assert not (tmp_path / "model.safetensors").exists()
