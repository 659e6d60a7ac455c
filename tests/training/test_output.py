# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What `examples/train.py` may do in its output folder, and what it refuses before the first step."""

import json
import re

import pytest

from cts_hf import CtsForSemanticSegmentation
from cts_hf.hub.output_folder import LOCK, OutputFolder
from cts_hf.training import loop

from ..helpers.locks import another_process_tries
from ..helpers.slow import slow_but
from ..helpers.training_runs import contents, largest_difference, no_step, train_example


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")


@pytest.mark.parametrize(
    "name",
    ["README.md", "config.json", "model.safetensors", "best/config.json", "checkpoints/step_00000007/optimizer.bin"],
)
@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]], ids=["plain", "overwrite"])
def test_files_of_others_that_a_run_would_replace_are_refused(scenes, tmp_path, monkeypatch, name, flags):
    write(tmp_path, name)
    before = contents(tmp_path)
    no_step(monkeypatch)
    with pytest.raises(
        ValueError, match=rf"holds {re.escape(name)}, which this run would replace and which no earlier"
    ):
        train_example(scenes, tmp_path, *flags)
    assert contents(tmp_path) == before


def test_other_files_of_others_stay(scenes, tmp_path):
    write(
        tmp_path, "notes.txt", "checkpoints/mine", "best/mine", "policy/mine", ".unfinished/mine", "best/.unfinished"
    )
    before = contents(tmp_path)
    for flags in ([], ["--overwrite_output_dir"]):
        train_example(scenes, tmp_path, *flags, eval_steps=1, save_steps=1, policy_epochs=0.4)
        after = contents(tmp_path)
        assert {path: after[path] for path in before} == before
    assert {"model.safetensors", "best", "checkpoints", "policy"} <= {path.name for path in tmp_path.iterdir()}


def test_a_file_that_appears_while_it_trains_is_not_replaced_and_the_model_is_not_lost(scenes, tmp_path, monkeypatch):
    backward = loop._backward

    def writing(*args):
        write(tmp_path, "README.md")
        return backward(*args)

    monkeypatch.setattr(loop, "_backward", writing)
    with pytest.raises(
        ValueError, match=r"holds README.md, which no training wrote and which the new files in .*unfinished"
    ):
        train_example(scenes, tmp_path)
    assert (tmp_path / "README.md").read_text() == "the user's README.md"
    assert (tmp_path / ".unfinished" / "model.safetensors").exists()


def test_a_finished_model_is_replaced_only_when_asked(scenes, tmp_path, monkeypatch, capsys):
    train_example(scenes, tmp_path, eval_steps=1)  # too short for a checkpoint
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        no_step(patch)
        with pytest.raises(ValueError, match=r"holds README.md.* of an earlier run: .*--overwrite_output_dir"):
            train_example(scenes, tmp_path, seed=5)
        with pytest.raises(ValueError, match=r"was made with other options: seed 0 -> 5"):
            train_example(scenes, tmp_path, seed=5, resume_from_checkpoint="latest")
        # A queue passes `latest` whenever it starts a run again.
        assert train_example(scenes, tmp_path, eval_steps=1, resume_from_checkpoint="latest") == []
        assert contents(tmp_path) == before
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    record = json.loads((tmp_path / ".cts_hf.json").read_text())
    record["written"]["model-00001-of-00002.safetensors"] = "training"  # as a larger model leaves
    (tmp_path / ".cts_hf.json").write_text(json.dumps(record))
    capsys.readouterr()
    train_example(scenes, tmp_path, "--overwrite_output_dir", seed=5)
    assert re.search(rf"Deleted \d+ files of an earlier run in {tmp_path}", capsys.readouterr().out)
    assert not list(tmp_path.glob("model-*"))
    assert not (tmp_path / "best").exists()
    assert contents(tmp_path)[tmp_path / "model.safetensors"] != before[tmp_path / "model.safetensors"]


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("source", slow_but(["best"], ["", "best"]))
def test_a_run_does_not_replace_the_model_that_it_starts_from(scenes, tmp_path, monkeypatch, flags, source):
    train_example(scenes, tmp_path, eval_steps=1)
    before = contents(tmp_path)
    no_step(monkeypatch)
    with pytest.raises(ValueError, match=r"`output_dir` must not be where `model` lies"):
        train_example(scenes, tmp_path, *flags, model=tmp_path / source)
    with pytest.raises(ValueError, match=r"`output_dir` must not be where `backbone_weights` lies"):
        train_example(scenes, tmp_path, *flags, backbone_weights=tmp_path / source / "model.safetensors")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_window": 7}, "`window` must be at least 16 pixels, a superpatch of this model, got 7"),
        ({"max_eval_samples": 0}, r"`max_eval_samples` must be at least 1.*, got 0"),
        ({"eval_window": 32, "eval_stride": 48}, "`stride` must be 1 to 32, the window, got 48"),
        ({"eval_stride": 16}, "`stride` must be unset without `window`, got 16"),
        ({"policy_loss_weight": "nan"}, r"`policy_loss_weight` must be at least 0.*, got nan"),
        ({"learning_rate": "nan"}, r"`learning_rate` must be a finite number.*, got nan"),
        ({"max_grad_norm": "inf"}, r"`max_grad_norm` must be at least 0.*, got inf"),
        ({"warmup_steps": -1}, r"`warmup_steps` must be at least 0.*, got -1"),
        ({"seed": -1}, r"`seed` must be between 0 and 4294967295.*, got -1"),
        ({"drop_path_rate": "nan"}, r"`drop_path_rate` must be a finite number.*, got nan"),
        ({"scale_range": [0.5, "nan"]}, r"`scale_range` must be a finite number.*, got \[0.5, nan\]"),
        ({"hidden_size": 33}, r"`hidden_size` \(33\) must be a multiple of"),
        ({"hub_model_id": "no good/name!"}, "Repo id must"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["joint", "policy first"])
def test_what_would_fail_at_the_end_is_refused_before_the_first_step(
    scenes, tmp_path, monkeypatch, options, message, stage
):
    no_step(monkeypatch)
    first = {"policy_epochs": 1, "policy_loss_weight": 0} if stage == "policy first" else {}
    with pytest.raises(ValueError, match=message):
        train_example(scenes, tmp_path / "run", **{**first, **options})


def test_a_path_that_is_a_file_is_refused_before_the_data_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file must be a folder that can be written to, or the path of a new one"):
        train_example(tmp_path / "nowhere", tmp_path / "file")


@pytest.mark.parametrize("fails", ["evaluate_sharings", "prediction_panel"])
def test_a_training_whose_evaluation_fails_is_not_lost(scenes, tmp_path, monkeypatch, fails):
    def failing(*args, **kwargs):
        raise RuntimeError("out of memory")

    if fails == "evaluate_sharings":
        monkeypatch.setattr("cts_hf.training.tasks.evaluate_sharings", failing)
    else:
        monkeypatch.setattr("cts_hf.training.report.prediction_panel", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_example(scenes, tmp_path)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_two_runs_in_one_folder_are_refused(scenes, tmp_path, monkeypatch):
    no_step(monkeypatch)
    with another_process_tries(tmp_path / LOCK) as has_it:
        assert has_it
        with pytest.raises(ValueError, match=f"Another run is writing to {tmp_path}"):
            train_example(scenes, tmp_path)


def test_what_other_scripts_wrote_is_deleted_only_with_the_rest(scenes, tmp_path):
    with OutputFolder(tmp_path, "evaluation") as folder, folder.writing() as unfinished:
        (unfinished / "evaluation.json").write_text("{}")
    train_example(scenes, tmp_path)
    assert (tmp_path / "evaluation.json").exists()
    train_example(scenes, tmp_path, "--overwrite_output_dir")
    assert not (tmp_path / "evaluation.json").exists()  # which was of the former model


def test_a_record_of_others_deletes_nothing(scenes, tmp_path):
    write(tmp_path, "notes/precious", "thesis.tex")
    names = dict.fromkeys(["thesis.tex", "notes/", "notes/precious"], "training")
    (tmp_path / ".cts_hf.json").write_text(json.dumps({"written": names}))
    train_example(scenes, tmp_path)
    assert (tmp_path / "notes" / "precious").exists()
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["README.md/", "best", "checkpoints", "model.safetensors/", "train.yaml/"])
def test_things_in_the_way_are_found_before_the_first_step(scenes, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir() if name.endswith("/") else write(tmp_path, name)
    no_step(monkeypatch)
    with pytest.raises(ValueError, match=r"which this run would replace|must be a folder of its own"):
        train_example(scenes, tmp_path)


@pytest.mark.parametrize("name", slow_but(["best"], ["best", "checkpoints"]))
def test_another_disk_is_for_the_whole_folder(scenes, tmp_path, name):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match=rf"{name} must be a folder of its own or not be there, got a link"):
        train_example(scenes, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    train_example(scenes, tmp_path / "link", save_steps=1, save_total_limit=1)
    train_example(scenes, tmp_path / "link", "--overwrite_output_dir", save_steps=1, save_total_limit=1)
    assert [path.name for path in (tmp_path / "disk" / "checkpoints").iterdir()] == ["step_00000002"]


def test_the_policy_that_is_trained_first_does_not_replace_its_source(scenes, tmp_path, monkeypatch):
    train_example(scenes, tmp_path, policy_epochs=0.4, policy_loss_weight=0)
    before = contents(tmp_path)
    no_step(monkeypatch)
    source = tmp_path / "policy" / "model.safetensors"
    with pytest.raises(ValueError, match=r"`output_dir` must not be where `policy_weights` lies"):
        train_example(scenes, tmp_path, "--overwrite_output_dir", policy_epochs=1, policy_weights=source)
    assert contents(tmp_path) == before


def test_a_policy_for_other_patches_is_not_taken(scenes, tmp_path, monkeypatch):
    policy_first = {"policy_epochs": 0.4, "policy_loss_weight": 0}
    with monkeypatch.context() as patch:
        patch.setattr("cts_hf.training.tasks.SegmentationTask.forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_example(scenes, tmp_path, **policy_first)
    with pytest.raises(ValueError, match=r"policy was made with other options: patch_size 8 -> 16"):
        train_example(scenes, tmp_path, resume_from_checkpoint="latest", **policy_first, patch_size=16)


def test_a_checkpoint_of_the_segmenter_has_its_policy(scenes, tmp_path, monkeypatch):
    policy_first = {"policy_epochs": 0.4, "policy_loss_weight": 0}
    train_example(scenes, tmp_path, **policy_first, save_steps=1)
    monkeypatch.setattr("cts_hf.training.tasks.PolicyTask.forward", lambda *_: pytest.fail("it was trained again"))
    other = tmp_path / "other"
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    train_example(scenes, other, **policy_first, resume_from_checkpoint=checkpoint)
    files = (folder / "model.safetensors" for folder in (tmp_path, other))
    assert largest_difference(*files) == 0
    with pytest.raises(ValueError, match="was made with other options: learning_rate"):
        train_example(scenes, tmp_path / "third", **policy_first, resume_from_checkpoint=checkpoint, learning_rate=0.1)


def test_the_precision_that_the_environment_sets_is_an_option_too(scenes, tmp_path, monkeypatch):
    train_example(scenes, tmp_path, save_steps=1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="was made with other options: mixed_precision 'no' -> 'bf16'"):
        train_example(scenes, tmp_path, resume_from_checkpoint="latest", max_steps=3)


def test_a_full_disk_at_the_end_is_named(scenes, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CtsForSemanticSegmentation, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"could not be written to .*No space left.* --resume_from_checkpoint latest"):
        train_example(scenes, tmp_path, save_steps=1)


def test_a_failed_upload_names_the_folder(scenes, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("cts_hf.training.saving.upload_folder", offline)
    with pytest.raises(ValueError, match=rf"The model is in {tmp_path}, but .*no network.*push_to_hub.py --folder"):
        train_example(scenes, tmp_path, "--push_to_hub", hub_model_id="street")


@pytest.mark.parametrize("place", ["images", "images/train", "labels/val/new"])
def test_no_model_is_written_among_the_data(scenes, monkeypatch, place):
    before = contents(scenes)
    no_step(monkeypatch)
    with pytest.raises(ValueError, match=r"`output_dir` must not be in .*, where pictures are data"):
        train_example(scenes, scenes / place)
    assert contents(scenes) == before
