# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from cts_hf import CtsForSemanticSegmentation
from cts_hf.data import SquashTransform, collate, load_folder
from cts_hf.training import CheckpointFolder, OptimizationArguments, build_accelerator

from ..helpers.slow import slow_but
from ..helpers.training_runs import largest_difference, train


# Dropout and drop path, so that random states matter.
RANDOM = {"drop_path_rate": 0.3, "decoder_dropout_prob": 0.3}
# Everything shares a token, so that rounding cannot exchange superpatches of almost equal scores.
DETERMINISTIC = {"drop_path_rate": 0.0, "decoder_dropout_prob": 0.0, "token_reduction": 0.75}


def untrained(scenes, folder, *transform):
    """The model that training starts from."""
    options = {"optimizer": "sgd", "learning_rate": 1e-20, "min_lr": 0, "max_steps": 1}
    return train(scenes, folder, *transform, model_options=DETERMINISTIC, **options)[0]


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    """Weights after 6 steps of 2 an epoch, which any interrupted run has to reach."""
    model, _, _ = train(scenes, tmp_path_factory.mktemp("run"), model_options=RANDOM, max_steps=6)
    return model.state_dict()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the run may catch it."""


def kill_at(monkeypatch, target, name, call):
    """Makes the given call of a function, and none before, end the run."""
    original, calls = getattr(target, name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, killing)


@pytest.mark.parametrize("at", slow_but([1, 5], [1, 2, 3, 5]))
def test_resumed_runs_end_with_the_same_weights(scenes, uninterrupted, tmp_path, monkeypatch, at):
    options = {"model_options": RANDOM, "max_steps": 6, "save_steps": 1}
    with monkeypatch.context() as patch:
        kill_at(patch, torch.optim.AdamW, "zero_grad", at + 1)
        with pytest.raises(Killed):
            train(scenes, tmp_path, **options)
    assert CheckpointFolder(tmp_path).list()[-1].name == f"step_{at:08d}"
    torch.manual_seed(123)
    model, _, _ = train(scenes, tmp_path, resume_from_checkpoint="latest", **options)
    assert largest_difference(model.state_dict(), uninterrupted) == 0


# What is called for the second checkpoint, of step 4, by a part of its arguments.
@pytest.mark.parametrize(
    ("target", "name", "argument"),
    [
        (torch, "save", "step_00000004/optimizer.bin"),
        (torch, "save", "step_00000004/random_states_0.pkl"),
        (Path, "write_text", "step_00000004/progress.json"),
        (os, "replace", "checkpoints/step_00000004"),
    ],
    ids=["early", "late", "last file", "moving"],
)
def test_killed_while_writing_a_checkpoint_resumes_from_the_one_before(
    scenes, uninterrupted, tmp_path, monkeypatch, target, name, argument
):
    options = {"model_options": RANDOM, "max_steps": 6, "save_steps": 2}
    original = getattr(target, name)

    def killing(*args, **kwargs):
        if any(str(arg).endswith(argument) for arg in args):
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, killing)
        with pytest.raises(Killed):
            train(scenes, tmp_path, **options)
    assert any(path.name.startswith(".unfinished") for path in (tmp_path / "checkpoints").iterdir())
    assert [path.name for path in CheckpointFolder(tmp_path).list()] == ["step_00000002"]
    model, _, _ = train(scenes, tmp_path, resume_from_checkpoint="latest", **options)
    assert largest_difference(model.state_dict(), uninterrupted) == 0


def test_only_the_newest_checkpoints_are_kept_and_a_path_resumes(scenes, uninterrupted, tmp_path):
    train(scenes, tmp_path, model_options=RANDOM, max_steps=6, save_steps=1, save_total_limit=3)
    checkpoints = CheckpointFolder(tmp_path).list()
    assert [path.name for path in checkpoints] == ["step_00000004", "step_00000005", "step_00000006"]
    assert sorted(checkpoints) == sorted((tmp_path / "checkpoints").iterdir())
    options = {"model_options": RANDOM, "max_steps": 6, "save_steps": 1}
    model, _, _ = train(scenes, tmp_path, resume_from_checkpoint=str(checkpoints[0]), **options)
    assert largest_difference(model.state_dict(), uninterrupted) == 0


def test_checkpoints_of_an_earlier_run_are_not_overwritten_unasked(scenes, tmp_path):
    train(scenes, tmp_path, max_steps=2, save_steps=1)
    with pytest.raises(ValueError, match=r"up to step_00000002. Go on with --resume_from_checkpoint latest"):
        train(scenes, tmp_path, max_steps=2)
    train(scenes, tmp_path, max_steps=1, save_steps=1, overwrite_output_dir=True)
    assert [path.name for path in CheckpointFolder(tmp_path).list()] == ["step_00000001"]


def test_resuming_from_nothing(scenes, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"There is no checkpoint .*gone. Pass 'latest' or one of these: none"):
        train(scenes, tmp_path, max_steps=1, resume_from_checkpoint=str(tmp_path / "gone"))
    train(scenes, tmp_path, max_steps=1, resume_from_checkpoint="latest")
    assert "There is no checkpoint yet: starting a new run" in capsys.readouterr().out


def test_accumulation_steps_make_the_same_step(scenes, tmp_path):
    # The labels of the scenes ignore different numbers of pixels: a mean of means would not be the same. One batch
    # norm statistic would differ too, so the policy is frozen.
    options = {"model_options": DETERMINISTIC, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}
    start = untrained(scenes, tmp_path).state_dict()
    whole, halves, quarters = (
        train(scenes, tmp_path / str(parts), gradient_accumulation_steps=parts, max_steps=3, **options)[0].state_dict()
        for parts in (1, 2, 4)
    )
    # SGD goes as far as the gradients are large, and these differ by rounding, about a millionth. (AdamW takes steps
    # of the size of the learning rate also where a gradient is zero but for rounding, as those of key biases are.)
    moved = largest_difference(start, whole)
    assert largest_difference(whole, halves) < 1e-3 * moved
    assert largest_difference(whole, quarters) < 1e-3 * moved


def test_batches_without_any_label_change_nothing(scenes, tmp_path):
    def without_labels(image, label, rng):
        sample = SquashTransform(64)(image, label, rng)
        return {**sample, "labels": torch.full_like(sample["labels"], 255)}

    before, _, _ = train(scenes, tmp_path, without_labels, max_steps=1, optimizer="sgd", learning_rate=1e-5)
    after, _, _ = train(scenes, tmp_path, without_labels, max_steps=3, optimizer="sgd")
    assert largest_difference(before.state_dict(), after.state_dict()) == 0


def test_frozen_policies_stay_and_joint_ones_learn(scenes, tmp_path):
    frozen, joint = (
        [
            train(scenes, tmp_path / f"{weight}_{steps}", policy_loss_weight=weight, max_steps=steps)[0].cts.policy
            for steps in (1, 3)
        ]
        for weight in (0.0, 1.0)
    )
    assert largest_difference(frozen[0].state_dict(), frozen[1].state_dict()) == 0
    # Parameters alone: the statistics of batch normalization change whatever is learned.
    parameters = [dict(policy.named_parameters()) for policy in joint]
    for name in parameters[0]:
        assert not torch.equal(parameters[0][name], parameters[1][name]), name


def test_gradients_are_clipped(scenes, tmp_path):
    one_step = {"max_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "model_options": DETERMINISTIC}
    start = untrained(scenes, tmp_path)
    end = train(scenes, tmp_path, **one_step, max_grad_norm=1e-3)[0]
    moved = [(p - q).norm() for p, q in zip(start.parameters(), end.parameters(), strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_cheaper_training_reaches_almost_the_same(scenes, tmp_path):
    common = {"max_steps": 2, "optimizer": "sgd", "model_options": DETERMINISTIC}
    plain, checkpointed, half = (
        train(scenes, tmp_path, **common, **options)[0]
        for options in ({}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"})
    )
    assert largest_difference(plain.state_dict(), checkpointed.state_dict()) == 0  # the same operations, twice
    assert half.dtype == torch.float32
    # A bfloat16 has 8 bits, and each of some ten layers rounds: a few percent of the way.
    moved = largest_difference(untrained(scenes, tmp_path).state_dict(), plain.state_dict())
    assert 0 < largest_difference(plain.state_dict(), half.state_dict()) < 0.2 * moved


def test_the_best_model_is_kept(scenes, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(
        "cts_hf.training.tasks.evaluate_sharings", lambda *_, **__: [{"policy": "learned", "mean_iou": next(scores)}]
    )
    model, _, _ = train(scenes, tmp_path, max_steps=3, eval_steps=1)
    best = CtsForSemanticSegmentation.from_pretrained(tmp_path / "best")
    assert largest_difference(best.state_dict(), model.state_dict()) > 0
    assert "| mean_iou | 0.3000 |" in (tmp_path / "best" / "README.md").read_text()
    assert {"train.yaml", "preprocessor_config.json"} <= {path.name for path in (tmp_path / "best").iterdir()}
    assert not (tmp_path / "best" / ".unfinished").exists()


class Diary(GeneralTracker):
    name = "diary"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.values = []

    @property
    def tracker(self):
        return self.values

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.values.append((step, values))


def test_trackers_get_loss_learning_rate_and_metrics(scenes, tmp_path):
    def transform(image, label, rng):
        return SquashTransform(64)(image, label, np.random.default_rng(0))  # all flipped alike

    diary = Diary()
    options = {"batch_size": 10, "max_steps": 2, "logging_steps": 1, "eval_steps": 2, "learning_rate": 1e-3}
    _, task, accelerator = train(
        scenes, tmp_path / "run", transform, trackers=[diary], model_options=DETERMINISTIC, **options
    )
    assert [step for step, _ in diary.values] == [1, 2, 2]
    first, _, evaluated = (values for _, values in diary.values)
    assert first["segmenter/learning_rate"] == pytest.approx(1e-3)
    # A batch of all the images: the loss is known, but for the order of the sum.
    rows = load_folder(scenes).train
    batch = collate([transform(row["image"], row["label"], None) for row in rows])
    expected = untrained(scenes, tmp_path / "start", transform)(**batch).loss.item()
    assert first["segmenter/loss"] == pytest.approx(expected, rel=1e-4)
    assert evaluated["segmenter/mean_iou"] == task.evaluate(accelerator)["mean_iou"]


def test_trackers_that_are_not_installed_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"report_to has \['abacus'\], installed are"):
        build_accelerator(OptimizationArguments(output_dir=str(tmp_path), report_to=["abacus"]))
