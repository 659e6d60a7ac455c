# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that cannot be written, that are damaged, and that hold code."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cts_hf.training import CheckpointFolder

from ..helpers.slow import slow_but
from ..helpers.training_runs import largest_difference, train


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(scenes, folder, max_steps=2, save_steps=1)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A run of two steps, whose checkpoints a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(scenes, run, **options):
    return train(scenes, run, resume_from_checkpoint="latest", **{"max_steps": 3, "save_steps": 1, **options})


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_the_bomb_goes_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def plant(file, trace, kind):
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save({"state": Bomb(trace)}, file)


@pytest.mark.parametrize("kind", slow_but(["pickle"], ["pickle", "torch"]))
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.bin",
        "random_states_0.pkl",
        "model.safetensors",
        "pytorch_model.bin",
        "scheduler.bin",
        "scaler.pt",
        "sampler.bin",
        "dl_state_dict.bin",
        "custom_checkpoint_0.pkl",
        "progress.json",
    ],
)
def test_no_code_of_a_checkpoint_is_run(scenes, run, tmp_path, name, kind):
    checkpoint = run / "checkpoints" / "step_00000002"
    plant(checkpoint / name, tmp_path / "trace", kind)
    refusals = dict.fromkeys(
        ["optimizer.bin", "random_states_0.pkl", "model.safetensors", "progress.json"], "cannot be"
    )
    refusals |= {"custom_checkpoint_0.pkl": "pickles of an earlier", "scaler.pt": "no earlier training is recorded"}
    if name in refusals:
        with pytest.raises(ValueError, match=refusals[name]):
            resume(scenes, run)
    else:
        resume(scenes, run)
    assert not (tmp_path / "trace").exists()


def test_checkpoints_of_earlier_versions_are_refused_by_name(scenes, run):
    checkpoint = run / "checkpoints" / "step_00000002"
    (checkpoint / "progress.json").unlink()
    for index in (0, 1):
        torch.save({"step": 2}, checkpoint / f"custom_checkpoint_{index}.pkl")
    for which in ("latest", str(checkpoint)):
        with pytest.raises(
            ValueError, match=r"custom_checkpoint_0.pkl, custom_checkpoint_1.pkl, pickles of an earlier"
        ):
            train(scenes, run, resume_from_checkpoint=which, max_steps=3)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_damaged_checkpoints_are_named(scenes, run, name, damage):
    file = run / "checkpoints" / "step_00000002" / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-40])
    if (name, damage) == ("progress.json", "gone"):
        # Not whole: the one before is the latest.
        resume(scenes, run)
        return
    with pytest.raises(ValueError, match=rf"step_00000002.*{name}|step_00000002 cannot be read"):
        resume(scenes, run)


def test_weights_of_another_model_are_refused(scenes, run):
    file = run / "checkpoints" / "step_00000002" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "cts.layernorm.weight": torch.ones(7)}, file)
    with pytest.raises(ValueError, match=r"step_00000002 cannot be read as part of a checkpoint"):
        resume(scenes, run)


def test_a_folder_that_is_no_checkpoint_is_refused(scenes, run):
    for which in (run, run / "checkpoints"):
        with pytest.raises(ValueError, match=r"is no checkpoint, it has no progress.json. Pass 'latest' or one of"):
            train(scenes, run, resume_from_checkpoint=str(which), max_steps=3)


@pytest.mark.parametrize("number", range(1, 4))
def test_a_full_disk_leaves_the_checkpoints_before(scenes, tmp_path, monkeypatch, number):
    writes = 0

    def on_a_full_disk(original):
        def write(*args, **kwargs):
            nonlocal writes
            if "step_00000002" in str(args):
                writes += 1
                if writes == number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", on_a_full_disk(torch.save))
        patch.setattr(Path, "write_text", on_a_full_disk(Path.write_text))
        with pytest.raises(ValueError, match=r"of step 2 could not be written.*No space left.*step_00000001"):
            train(scenes, tmp_path, max_steps=2, save_steps=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    train(scenes, tmp_path, max_steps=2, save_steps=1, resume_from_checkpoint="latest")
    assert CheckpointFolder(tmp_path).list()[-1].name == "step_00000002"


def test_what_others_put_into_a_checkpoint_stays_when_it_is_old(scenes, run):
    note = run / "checkpoints" / "step_00000001" / "note.txt"
    note.write_text("the best one")
    resume(scenes, run, save_total_limit=1)
    assert [path.name for path in CheckpointFolder(run).list()] == ["step_00000003"]
    assert note.read_text() == "the best one"
    assert list(note.parent.iterdir()) == [note]
    resume(scenes, run, save_total_limit=1, max_steps=4)
    assert note.exists()


def test_a_checkpoint_that_is_made_again_leaves_what_others_put_there(scenes, run):
    note = run / "checkpoints" / "step_00000002" / "note.txt"
    note.write_text("the best one")
    first = str(run / "checkpoints" / "step_00000001")
    train(scenes, run, resume_from_checkpoint=first, max_steps=2, save_steps=1)
    assert note.read_text() == "the best one"
    assert CheckpointFolder(run).list()[-1] == note.parent


def test_a_run_goes_on_from_the_checkpoint_of_another_folder(scenes, run, tmp_path):
    checkpoint = run / "checkpoints" / "step_00000001"
    options = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": str(checkpoint)}
    train(scenes, tmp_path / "other", **options)
    assert [path.name for path in CheckpointFolder(tmp_path / "other").list()] == ["step_00000002"]
    with pytest.raises(ValueError, match=r"holds checkpoints/step_00000002/.* of an earlier run"):
        train(scenes, tmp_path / "other", **options)
    progress = json.loads((tmp_path / "other/checkpoints/step_00000002/progress.json").read_text())
    assert progress["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -5}, "must hold the progress of a run"),
        ({"step": 1.5}, "must hold the progress of a run"),
        ({"step": "2"}, "must hold the progress of a run"),
        ({"step_of_epoch": 10**30}, "must hold the progress of a run"),
        ({"best_score": float("nan")}, "must hold the progress of a run"),
        ({"num_processes": "1"}, "must hold the progress of a run"),
        ({"more": 1}, "must hold the progress of a run"),
        (None, "progress, options and data must be mappings"),
    ],
    ids=str,
)
def test_progress_of_another_kind_is_refused(scenes, run, change, message):
    file = run / "checkpoints" / "step_00000002" / "progress.json"
    state = json.loads(file.read_text())
    state["progress"] = None if change is None else {**state["progress"], **change}
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        resume(scenes, run)


def test_optimizer_states_of_other_shapes_are_refused(scenes, run):
    file = run / "checkpoints" / "step_00000002" / "optimizer.bin"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"step_00000002 cannot be read .* the optimizer has states of the shapes"):
        resume(scenes, run)


def test_weights_of_a_checkpoint_that_are_not_finite_are_not_saved(scenes, run):
    file = run / "checkpoints" / "step_00000002" / "model.safetensors"
    weights = load_file(file)
    weights["cts.layernorm.weight"].fill_(float("nan"))
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"Weights must be finite, got NaN or infinity in weights of the model: cts"):
        resume(scenes, run, max_steps=2)  # no step is left to make


def test_fewer_steps_than_were_made_are_refused(scenes, run):
    with pytest.raises(ValueError, match=r"step_00000002 was written after 2 steps, and these options ask for 1"):
        resume(scenes, run, max_steps=1)


def test_latest_is_what_was_written_last(scenes, run):
    """A run that was resumed from an earlier checkpoint has left the former one."""
    resume(scenes, run, max_steps=6, save_total_limit=9)
    first = str(run / "checkpoints" / "step_00000001")
    train(scenes, run, resume_from_checkpoint=first, max_steps=3, save_steps=1, save_total_limit=9)
    assert [path.name[-1] for path in CheckpointFolder(run).list()] == ["1", "4", "5", "6", "2", "3"]


@pytest.mark.parametrize("change", ["fewer", "renamed", "classes"])
def test_other_data_are_noticed(scenes, run, tmp_path, change):
    other = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    if change == "classes":
        names = (other / "classes.txt").read_text().split("\n")
        (other / "classes.txt").write_text("\n".join(reversed(names)))
    else:
        for kind in ("images", "labels"):
            file = other / kind / "train" / "000.png"
            file.unlink() if change == "fewer" else file.rename(file.with_name("other.png"))
    state = json.loads((run / "checkpoints/step_00000002/progress.json").read_text())
    state["options"]["data_dir"] = str(other)  # the folder is the same, its content is not
    (run / "checkpoints/step_00000002/progress.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step_00000002 was made with other data: (classes|digest|training images)?"):
        train(other, run, resume_from_checkpoint="latest", max_steps=3)


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """Weights of the model and of the best one of a run that nothing interrupts."""
    return run_to_the_end(scenes, tmp_path_factory.mktemp("whole"))


OPTIONS = {"model_options": {"drop_path_rate": 0.3, "decoder_dropout_prob": 0.3}, "max_steps": 4, "eval_steps": 2}


def run_to_the_end(scenes, folder, **options):
    model, *_ = train(scenes, folder, **OPTIONS, **options)
    return model.state_dict(), load_file(folder / "best" / "model.safetensors")


@pytest.mark.parametrize("save_steps", [2, 3])
@pytest.mark.parametrize("call", slow_but((1, 21, 41), range(1, 60, 4)))
def test_killed_at_any_file_operation_a_run_goes_on(scenes, whole, tmp_path, monkeypatch, call, save_steps):
    calls = 0

    def counting(original):
        def count(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                monkeypatch.undo()
                # A process that is killed cleans nothing up.
                monkeypatch.setattr("cts_hf.hub.output_folder.OutputFolder.delete", lambda *_: None)
                raise Killed
            return original(*args, **kwargs)

        return count

    for target, name in ((os, "replace"), (Path, "mkdir"), (Path, "write_text"), (torch, "save")):
        monkeypatch.setattr(target, name, counting(getattr(target, name)))
    try:
        run_to_the_end(scenes, tmp_path, save_steps=save_steps)
    except Killed:
        monkeypatch.undo()
    monkeypatch.undo()
    ended = run_to_the_end(scenes, tmp_path, save_steps=save_steps, resume_from_checkpoint="latest")
    for state, expected in zip(ended, whole, strict=True):
        assert largest_difference(state, expected) == 0
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".unfinished")]


def test_a_failing_evaluation_does_not_lose_the_steps_before_it(scenes, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("cts_hf.training.tasks.SegmentationTask.evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_to_the_end(scenes, tmp_path, save_steps=2)
    checkpoint = CheckpointFolder(tmp_path).list()[-1]
    assert checkpoint.name == "step_00000002"
    # The evaluation that is due is made up for, here and in another folder, which does not get half a checkpoint.
    other = tmp_path.with_name("other")
    for folder, which in ((other, str(checkpoint)), (tmp_path, "latest")):
        ended = run_to_the_end(scenes, folder, save_steps=3, resume_from_checkpoint=which)
        for state, expected in zip(ended, whole, strict=True):
            assert largest_difference(state, expected) == 0
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step_00000003"]
