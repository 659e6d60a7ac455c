# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from cts_hf.hub.output_folder import LOCK, RECORD, OutputFolder

from ..helpers.locks import another_process_tries


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {
        ".cts_hf.json",
        ".cts_hf.lock",
    }


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the user's {name}")


def test_what_is_written_is_recorded_and_can_be_deleted(tmp_path):
    with OutputFolder(tmp_path / "new" / "out", "training") as folder:
        with folder.writing("best") as unfinished:
            write(unfinished, "config.json", "deep/weights")
        write(folder.path, "best/notes.txt")
        assert folder.written == dict.fromkeys(["best/config.json", "best/deep/weights"], "training")
        assert files_in(folder.path) == {"best/config.json", "best/deep/weights", "best/notes.txt"}
        folder.delete(folder.written)
        assert files_in(folder.path) == {"best/notes.txt"}
        assert not (folder.path / "best" / "deep").exists()
        assert folder.written == {}


def test_what_others_wrote_is_never_deleted(tmp_path):
    write(tmp_path, "mine.txt", "folder/mine.txt")
    with OutputFolder(tmp_path, "training") as folder:
        for name in ("mine.txt", "folder/"):
            with pytest.raises(ValueError, match="is not deleted, as no run is recorded to have written it"):
                folder.delete([name])
        assert folder.scratch("folder") == tmp_path / "folder_2"
        assert folder.scratch("folder") == tmp_path / "folder_2"
    assert files_in(tmp_path) == {"mine.txt", "folder/mine.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_refused_and_earlier_results_only_unless_overwritten(tmp_path, overwrite):
    with OutputFolder(tmp_path, "training") as folder:
        folder.refuse_existing(["*.json", "best/*"], overwrite)  # nothing is there yet
        with folder.writing() as unfinished:
            write(unfinished, "config.json", "other.txt")
        if overwrite:
            folder.refuse_existing(["*.json"], overwrite)
        else:
            with pytest.raises(ValueError, match=r"holds config.json of an earlier run: .*--overwrite_output_dir"):
                folder.refuse_existing(["*.json"], overwrite)
        write(tmp_path, "best/README.md")
        with pytest.raises(ValueError, match=r"holds best/README.md, which .* no earlier training is recorded"):
            folder.refuse_existing(["*.json", "best/*"], overwrite)
        folder.refuse_existing(["*.png"], overwrite)


def test_new_files_that_would_replace_those_of_others_stay_aside(tmp_path):
    def save(folder):
        with folder.writing() as unfinished:
            write(unfinished, "README.md", "model")
            (tmp_path / "README.md").write_text("mine")

    with (
        OutputFolder(tmp_path, "training") as folder,
        pytest.raises(ValueError, match=r"README.md, which no training wrote .*\.unfin"),
    ):
        save(folder)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert files_in(tmp_path) == {"README.md", ".unfinished/README.md", ".unfinished/model"}


def test_a_failure_while_writing_changes_nothing(tmp_path):
    def save_on_a_full_disk(folder):
        with folder.writing() as unfinished:
            write(unfinished, "model")
            raise OSError("No space left on device")

    with OutputFolder(tmp_path, "training") as folder:
        with folder.writing() as unfinished:
            write(unfinished, "model")
        before = (tmp_path / "model").stat().st_mtime_ns
        with pytest.raises(OSError, match="No space"):
            save_on_a_full_disk(folder)
        assert files_in(tmp_path) == {"model"}
        assert (tmp_path / "model").stat().st_mtime_ns == before


def test_what_a_killed_run_left_is_emptied(tmp_path):
    with OutputFolder(tmp_path, "training") as folder:
        write(folder.scratch("best/.unfinished"), "half")
        with folder.writing("best") as unfinished:
            assert files_in(unfinished) == set()
            write(unfinished, "whole")
        assert files_in(tmp_path) == {"best/whole"}


def test_one_run_at_a_time(tmp_path):
    with OutputFolder(tmp_path, "training"):
        with another_process_tries(tmp_path / LOCK) as has_it:
            assert not has_it
        with OutputFolder(tmp_path, "training"):  # the process that has it may enter again
            pass
        with another_process_tries(tmp_path / LOCK) as has_it:
            assert not has_it
    with another_process_tries(tmp_path / LOCK) as has_it:
        assert has_it


def test_a_second_run_is_refused_at_once(tmp_path):
    with another_process_tries(tmp_path / LOCK) as has_it:
        assert has_it
        with pytest.raises(ValueError, match=f"Another run is writing to {tmp_path}"):
            OutputFolder(tmp_path, "training").__enter__()
    with OutputFolder(tmp_path, "training"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    folder = OutputFolder(tmp_path, "training")
    folder.__enter__()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # until the parent is done
        os._exit(0)
    folder.__exit__()
    try:
        with another_process_tries(tmp_path / LOCK) as has_it:
            assert has_it
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_paths_that_are_no_folder_are_refused(tmp_path):
    write(tmp_path, "file")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(ValueError, match=rf"{path} must be a folder that can be written to"),
            OutputFolder(path, "training"),
        ):
            pass


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b/", ""])
def test_a_record_that_names_files_elsewhere_is_refused(tmp_path, name):
    (tmp_path / RECORD).write_text(json.dumps({"written": {name: "training"}}))
    with OutputFolder(tmp_path, "training") as folder, pytest.raises(ValueError, match=r"Delete it to keep all files"):
        folder.delete(["x"])


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 200_000])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with (
        OutputFolder(tmp_path, "training") as folder,
        pytest.raises(ValueError, match=r"\.cts_hf\.json cannot be read"),
    ):
        folder.refuse_existing(["*"])


@pytest.mark.parametrize(
    "names",
    [*({name: "training"} for name in ("./", ".", "/", "a\0b", "\ud800")), "README.md", ["README.md"], {"a": 1}, None],
    ids=repr,
)
def test_a_record_of_anything_but_files_in_the_folder_is_refused(tmp_path, names):
    write(tmp_path, "mine.txt")
    (tmp_path / RECORD).write_text(json.dumps({"written": names}))
    with (
        OutputFolder(tmp_path, "training") as folder,
        pytest.raises(ValueError, match="Delete it to keep all files there"),
    ):
        folder.delete(["./"])
    assert (tmp_path / "mine.txt").exists()


def test_nothing_is_deleted_through_links_that_lead_elsewhere(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "precious", "deep/precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(elsewhere)
    names = dict.fromkeys(["link/precious", "link/deep/", "link/", "link"], "training")
    (folder / RECORD).write_text(json.dumps({"written": names}))
    with OutputFolder(folder, "training") as output:
        for name in names:
            with pytest.raises(
                ValueError, match="is not deleted, as it is another thing than a run wrote, or lies beh"
            ):
                output.delete([name])
        assert output.scratch("link") == folder / "link_2"
    assert files_in(elsewhere) == {"precious", "deep/precious"}


def test_what_this_run_wrote_behind_a_link_it_may_delete(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best").symlink_to(tmp_path / "disk")
    with OutputFolder(tmp_path / "out", "training") as output:
        with output.writing("best") as unfinished:
            write(unfinished, "model")
        assert files_in(tmp_path / "disk") == {"model"}
        output.delete(["best/model"])
    assert (tmp_path / "out" / "best").is_symlink()
    assert files_in(tmp_path / "disk") == set()


def test_a_record_is_not_written_through_a_link(tmp_path):
    write(tmp_path, "precious")
    for name in (RECORD, f"{RECORD}.unfinished"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious" if name != RECORD else tmp_path / "gone")
    with OutputFolder(tmp_path / "out", "training") as output, output.writing() as unfinished:
        write(unfinished, "model")
    assert (tmp_path / "precious").read_text() == "the user's precious"
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link"])
def test_whatever_has_the_name_of_a_result_is_in_the_way(tmp_path, kind):
    write(tmp_path, "precious")
    way = tmp_path / "out" / "model"
    way.parent.mkdir()
    way.mkdir() if kind == "folder" else way.symlink_to(tmp_path / ("precious" if kind == "link" else "gone"))
    with OutputFolder(tmp_path / "out", "training") as output:
        with pytest.raises(ValueError, match="holds model, which this run would replace"):
            output.refuse_existing(["model"], overwrite=True)

        def save():
            with output.writing() as unfinished:
                write(unfinished, "model")

        with pytest.raises(ValueError, match="holds model, which no training wrote"):
            save()
        # The new files are nowhere else, and a later run leaves them alone.
        way.unlink() if way.is_symlink() else way.rmdir()
        save()
        assert (tmp_path / "out" / ".unfinished" / "model").read_text() == way.read_text()
    assert (tmp_path / "precious").read_text() == "the user's precious"


def test_results_of_another_kind_of_run_are_not_replaced(tmp_path):
    with OutputFolder(tmp_path, "training") as folder, folder.writing() as unfinished:
        write(unfinished, "config.json", "model")
    with OutputFolder(tmp_path, "export") as folder:
        with pytest.raises(ValueError, match=r"holds config.json, which .* no earlier export is recorded"):
            folder.refuse_existing(["config.json", "model.onnx"], overwrite=True)
        folder.refuse_existing(["model.onnx"], overwrite=True)


def test_the_file_that_tells_of_the_others_comes_last(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (moved.append(os.path.basename(paths[1])), replace(*paths)))
    with OutputFolder(tmp_path, "training") as folder, folder.writing(last="b") as unfinished:
        write(unfinished, "a", "b", "c")
    assert [name for name in moved if name != RECORD] == ["a", "c", "b"]
