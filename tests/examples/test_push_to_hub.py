# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from transformers import BeitImageProcessor

from cts_hf import CtsImageProcessor, apply_cts, save_cts

from ..helpers.existing_models import build_existing
from ..helpers.models import tiny_model, tiny_policy
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


def test_dry_run_of_a_model_of_transformers(monkeypatch, capsys, tmp_path):
    save_cts(apply_cts(build_existing("beit_segmentation"), tiny_policy()), tmp_path / "street")
    BeitImageProcessor().save_pretrained(tmp_path / "street")
    run_main(monkeypatch, "push_to_hub.py", folder=tmp_path / "street", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" files would be uploaded to street:")
    assert {"  model.safetensors", "  token_sharing/options.json", "  token_sharing/model.safetensors"} <= set(lines)
