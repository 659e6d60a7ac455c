# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from cts_hf import CtsImageProcessor

from ..helpers.models import tiny_model
from ..helpers.scripts import run_main


def test_dry_run(monkeypatch, capsys, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    CtsImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    (tmp_path / "notes.txt").write_text("mine")
    run_main(monkeypatch, "push_to_hub.py", folder=tmp_path, repo_id="me/street", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{len(list(tmp_path.iterdir())) - 1} files would be uploaded to me/street:"
    assert "  model.safetensors" in lines
    assert lines[-2:] == ["left out:", "  notes.txt"]
