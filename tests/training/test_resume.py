# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run of `examples/train.py` that is resumed refuses, and what it takes as done."""

import pytest

from ..helpers.training_runs import contents, largest_difference, no_step, train_example, write_scenes


def test_resuming_with_other_options_is_refused_and_lists_them(scenes, tmp_path, monkeypatch):
    train_example(scenes, tmp_path, save_steps=1)
    before = contents(tmp_path)
    changed = {"learning_rate": 0.1, "seed": 4, "optimizer": "sgd", "batch_size": 2, "token_reduction": 0.5}
    other = write_scenes(tmp_path.with_name("other"), 8, 2)
    with monkeypatch.context() as patch:
        no_step(patch)
        with pytest.raises(ValueError, match="was made with other options") as refusal:
            train_example(other, tmp_path, resume_from_checkpoint="latest", **changed, save_steps=1)
    for part in (
        "learning_rate 0.001 -> 0.1",
        "seed 0 -> 4",
        "optimizer 'adamw' -> 'sgd'",
        "batch_size 4 -> 2",
        "token_reduction 0.3 -> 0.5",
        f"data_dir '{scenes}' -> '{other}'",
    ):
        assert part in str(refusal.value)
    assert contents(tmp_path) == before
    free = {"max_steps": 3, "logging_steps": 1, "eval_steps": 3, "save_steps": 3, "save_total_limit": 1}
    train_example(scenes, tmp_path, resume_from_checkpoint="latest", **free)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_policy_that_is_trained_already_is_taken_only_if_it_was_trained_so(scenes, tmp_path, monkeypatch):
    policy_first = {"policy_epochs": 0.4, "policy_loss_weight": 0}

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After the policy, before the first step of the Segmenter.
        patch.setattr("cts_hf.training.tasks.SegmentationTask.forward", killed)
        with pytest.raises(KeyboardInterrupt):
            train_example(scenes, tmp_path, **policy_first)
    with pytest.raises(ValueError, match=r"policy was made with other options: learning_rate 5e-05 -> 0.01"):
        train_example(scenes, tmp_path, resume_from_checkpoint="latest", **policy_first, policy_learning_rate=0.01)
    with pytest.raises(ValueError, match=r"policy was made with other options: num_epochs 0.4 -> 0.8"):
        train_example(scenes, tmp_path, resume_from_checkpoint="latest", **{**policy_first, "policy_epochs": 0.8})
    train_example(scenes, tmp_path, resume_from_checkpoint="latest", **policy_first)
    train_example(scenes, tmp_path.with_name("whole"), **policy_first)
    files = (folder / "model.safetensors" for folder in (tmp_path, tmp_path.with_name("whole")))
    assert largest_difference(*files) == 0
