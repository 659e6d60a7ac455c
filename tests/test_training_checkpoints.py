# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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

from .training_runs import reset_accelerate, train, write_scenes


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=10)


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(scenes, folder, max_steps=2, save_steps=1)
    reset_accelerate()
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


@pytest.mark.parametrize("kind", ["pickle", "torch"])
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
    refusals |= {"custom_checkpoint_0.pkl": "pickles of an earlier", "scaler.pt": "no earlier run is recorded"}
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
