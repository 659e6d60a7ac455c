# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsPolicyConfig, CtsPolicyModel
from cts_hf.data.benchmarks.ade20k import ADE20K_CLASSES
from cts_hf.hub.normalization import IMAGENET, check_normalization

from ..conversion.test_checkpoints import write_original
from ..helpers.golden import load_golden
from ..helpers.mmsegmentation import build_segmenter
from ..helpers.models import random_images, tiny_policy
from ..helpers.scripts import ROOT, command_line, run_main


@pytest.mark.slow
@torch.no_grad()
def test_a_segmenter_from_the_command_line_and_back(tmp_path):
    """The checkpoint in the original's file layout, converted by the script, gives the logits of the original."""
    golden, meta = load_golden("tiny_mask_cts")
    source = write_original(tmp_path / "run", golden["weights"], meta)

    def run(**options):
        command = [sys.executable, str(ROOT / "examples" / "convert_checkpoint.py"), *command_line(options)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "CtsForSemanticSegmentation of" in run(source=source, output_dir=tmp_path / "out", token_reduction=0.375)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    scores = golden["policy_logits"][:, 1] - golden["policy_logits"][:, 0]
    logits = model(golden["pixel_values"], superpatch_scores=scores).logits
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size.shortest_edge == 96
    assert not list((tmp_path / "out").glob("*.bin"))

    run(source=tmp_path / "out", output_dir=tmp_path / "back", kind="original")
    weights = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)["model"]
    for name, value in golden["weights"].items():
        assert torch.equal(weights[name], value), name


def test_the_normalization_from_the_command_line_and_back(monkeypatch, tmp_path):
    golden, meta = load_golden("tiny_linear_cts_distilled")
    source = write_original(tmp_path / "run", golden["weights"], meta)
    run_main(monkeypatch, "convert_checkpoint.py", source=source, output_dir=tmp_path / "deit")
    config = CtsConfig.from_pretrained(tmp_path / "deit")
    assert (config.image_mean, config.image_std) == IMAGENET
    # As it was saved when configurations did not record it.
    values = json.loads((tmp_path / "deit" / "config.json").read_text())
    for part in (values, values["policy_config"]):
        del part["image_mean"], part["image_std"]
    (tmp_path / "deit" / "config.json").write_text(json.dumps(values))
    options = {"source": tmp_path / "deit", "kind": "original"}
    run_main(monkeypatch, "convert_checkpoint.py", **options, output_dir=tmp_path / "back")
    assert "normalization: deit" in (tmp_path / "back" / "variant.yml").read_text()

    given = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    run_main(monkeypatch, "convert_checkpoint.py", source=source, output_dir=tmp_path / "given", **given)
    policy = tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0)
    torch.save(policy.state_dict(), tmp_path / "model.pth")
    options = {"source": tmp_path / "model.pth", "kind": "policy"}
    run_main(monkeypatch, "convert_checkpoint.py", **options, output_dir=tmp_path / "policy", **given)
    for folder, config_class in (("given", CtsConfig), ("policy", CtsPolicyConfig)):
        config = config_class.from_pretrained(tmp_path / folder)
        assert (config.image_mean, config.image_std) == ([0.0] * 3, [1.0] * 3)
        check_normalization(config, AutoImageProcessor.from_pretrained(tmp_path / folder))


@torch.no_grad()
def test_mmsegmentation_with_a_policy(monkeypatch, tmp_path):
    policy = tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0)
    torch.save(policy.state_dict(), tmp_path / "model.pth")
    run_main(
        monkeypatch, "convert_checkpoint.py", source=tmp_path / "model.pth", output_dir=tmp_path / "p", kind="policy"
    )
    assert torch.equal(
        CtsPolicyModel.from_pretrained(tmp_path / "p")(random_images()).logits, policy(random_images()).logits
    )

    reference = build_segmenter(num_classes=150)
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "segmenter.pth")
    options = {"source": tmp_path / "segmenter.pth", "output_dir": tmp_path / "out", "policy": tmp_path / "p"}
    run_main(monkeypatch, "convert_checkpoint.py", **options, dataset="ade20k", num_attention_heads=2)
    model = CtsForSemanticSegmentation.from_pretrained(tmp_path / "out")
    expected = reference.decode_head(reference.backbone(random_images()))
    torch.testing.assert_close(model(random_images()).logits, expected, rtol=0, atol=1e-4)
    assert model.config.id2label == dict(enumerate(ADE20K_CLASSES))
    assert model(random_images(), token_reduction=0.3).policy_logits is not None


@pytest.fixture
def policy_file(tmp_path):
    policy = tiny_policy(superpatch_size=32, width_coefficient=1.0, depth_coefficient=1.0)
    torch.save(policy.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


def test_files_of_others_are_kept_and_earlier_results_replaced_only_when_asked(monkeypatch, policy_file, tmp_path):
    target = tmp_path / "out"
    options = {"source": policy_file, "output_dir": target, "kind": "policy"}
    target.mkdir()
    for name in ("README.md", "config.json", "token_sharing.py"):
        (target / name).write_text("mine")
        for overwrite in ({}, {"overwrite_output_dir": True}):
            with pytest.raises(ValueError, match=f"holds {name}, which this run would replace"):
                run_main(monkeypatch, "convert_checkpoint.py", **{**options, "source": "absent.pth"}, **overwrite)
        assert (target / name).read_text() == "mine"
        (target / name).unlink()
    (target / "notes.txt").write_text("mine")
    run_main(monkeypatch, "convert_checkpoint.py", **options)
    with pytest.raises(ValueError, match=r"of an earlier run: .* with --overwrite_output_dir"):
        run_main(monkeypatch, "convert_checkpoint.py", **options)
    run_main(monkeypatch, "convert_checkpoint.py", **options, output_stride=32, overwrite_output_dir=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert "# out" in (target / "README.md").read_text()


def test_a_conversion_that_fails_changes_nothing(monkeypatch, policy_file, tmp_path):
    target = tmp_path / "out"
    options = {"output_dir": target, "kind": "policy"}
    run_main(monkeypatch, "convert_checkpoint.py", source=policy_file, **options)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    policy_file.write_bytes(b"")
    with pytest.raises(ValueError, match="got an empty one"):
        run_main(monkeypatch, "convert_checkpoint.py", source=policy_file, **options, overwrite_output_dir=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    shutil.rmtree(target)
    target.write_text("mine")
    with pytest.raises(ValueError, match="must be a folder that can be written to"):
        run_main(monkeypatch, "convert_checkpoint.py", source="absent", **options)


def test_originals_replace_nothing_of_others(monkeypatch, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "variant.yml").write_text("mine")
    with pytest.raises(ValueError, match=r"holds variant\.yml, which this run would replace"):
        run_main(monkeypatch, "convert_checkpoint.py", source="absent", output_dir=target, kind="original")
    assert (target / "variant.yml").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_size", [-48, 80]), ("num_attention_heads", 0), ("output_stride", 7), ("token_reduction", "nan")],
)
def test_numbers_are_checked_before_the_source_is_opened(monkeypatch, tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        run_main(monkeypatch, "convert_checkpoint.py", source="absent", output_dir=tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()
