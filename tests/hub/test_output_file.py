# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os
import tempfile

import pytest

from cts_hf.hub.output_file import prepare_file, written_whole


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "report.png"
    path.write_text("old")

    def fail_midway():
        with written_whole(path) as unfinished:
            unfinished.write_text("ne")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail_midway()
    assert path.read_text() == "old"
    with written_whole(path) as unfinished:
        assert unfinished.suffix == ".png"
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_what_a_link_leads_to_is_replaced(tmp_path, exists):
    file, link = tmp_path / "results.json", tmp_path / "link.json"
    if exists:
        file.write_text("old")
    link.symlink_to(file)
    with written_whole(link) as unfinished:
        unfinished.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_devices_are_written_to_themselves(tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    with written_whole(link) as unfinished:
        assert unfinished == link


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_takes_no_new_files_is_refused_at_the_start(tmp_path, monkeypatch, exists):
    path = tmp_path / "report.json"
    if exists:
        path.write_text("mine")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(ValueError, match=r"`json` must be .* that can be written, got .* \(Permission denied\)"):
        prepare_file("json", path, overwrite=True)
    assert path.exists() == exists
