# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from cts_hf import CtsImageProcessor, load_cts
from cts_hf.export.onnx import OnnxSegmenter, export_onnx

from ..helpers.existing_models import build_processor, save_existing
from ..helpers.models import tiny_model, tiny_policy
from ..helpers.scripts import run_main


@pytest.fixture
def model_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    CtsImageProcessor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class HalfWritten:
    """An exported program that writes to a full disk."""

    def save(self, file):
        Path(file).write_bytes(b"half")
        Path(f"{file}.data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Written:
    """An exported program whose weights are in a second file."""

    def save(self, file):
        Path(file).write_bytes(b"model")
        Path(f"{file}.data").write_bytes(b"weights")


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "token_reduction"), [((2,), 0.4), ((2, 4), (0.15, 0.3))], ids=str)
def test_export_and_use(monkeypatch, capsys, tmp_path, levels, token_reduction):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    pytest.importorskip("onnxruntime")
    unsharing = "residual" if len(levels) > 1 else "copy"
    model = tiny_model(superpatch_levels=levels, sharing_threshold=0.9, unsharing=unsharing)
    target = tmp_path / "exported"
    model.save_pretrained(tmp_path / "model")
    CtsImageProcessor(do_resize=False).save_pretrained(tmp_path / "model")
    options = {"image_size": [48, 80], "benchmark": True, "rounds": 2}
    options["token_reduction"] = ",".join(map(str, token_reduction)) if len(levels) > 1 else token_reduction
    run_main(monkeypatch, "export_onnx.py", model=tmp_path / "model", output_dir=target, **options)

    lines = capsys.readouterr().out.splitlines()
    difference = re.search(
        r"logits differ by (\S+) at most, 100.00% of the superpatches share alike", "\n".join(lines)
    )
    assert float(difference[1]) < 1e-4
    assert [line.split("|")[1].strip() for line in lines[-4:]] == [
        "PyTorch, no sharing",
        "PyTorch",
        "ONNX Runtime, no sharing",
        "ONNX Runtime",
    ]
    names = {path.name for path in target.iterdir()}
    assert {"model.onnx", "config.json", "preprocessor_config.json"} <= names
    config = AutoConfig.from_pretrained(target)
    assert (config.token_reduction, config.sharing_threshold) == (token_reduction, None)

    image = Image.new("RGB", (123, 77), "teal")
    processor = AutoImageProcessor.from_pretrained(target)
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 80)
    outputs = OnnxSegmenter(target / "model.onnx")(**inputs)
    with torch.no_grad():
        expected = model(**inputs, token_reduction=token_reduction)
    if len(levels) > 1:
        shared = zip(outputs.shared_superpatches, expected.shared_superpatches, strict=True)
        assert all(torch.equal(*of_level) for of_level in shared)
    segmentations = [
        processor.post_process_semantic_segmentation(each, [(77, 123)])[0] for each in (outputs, expected)
    ]
    assert segmentations[0].shape == (77, 123)
    assert (segmentations[0] == segmentations[1]).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpt_segmentation", "upernet_dinov2"])
def test_models_of_transformers_are_exported_with_their_image_processor(monkeypatch, capsys, tmp_path, name):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    pytest.importorskip("onnxruntime")
    source, target = (
        save_existing(tmp_path / "model", name, policy=tiny_policy(), token_reduction=0.4),
        tmp_path / "exported",
    )
    if name == "dpt_segmentation":
        build_processor(name, keep_aspect_ratio=True, ensure_multiple_of=32).save_pretrained(source)
    run_main(monkeypatch, "export_onnx.py", model=source, output_dir=target, benchmark=True, rounds=1)
    printed = capsys.readouterr().out
    difference = re.search(r"logits differ by (\S+) at most, 100.00% of the superpatches share alike", printed)
    assert float(difference[1]) < 0.01  # of more than a thousand
    assert "40.0% fewer tokens, images (1, 3, 64, 64)" in printed

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (77, 123, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(target)
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    outputs = OnnxSegmenter(target / "model.onnx")(**inputs)
    with torch.no_grad():
        expected = load_cts(source)(**inputs)
    segmentations = [
        processor.post_process_semantic_segmentation(each, [(77, 123)])[0] for each in (outputs, expected)
    ]
    assert segmentations[0].shape == (77, 123)
    assert (segmentations[0] == segmentations[1]).float().mean() > 0.99


def test_models_that_cannot_be_exported_leave_no_folder(monkeypatch, tmp_path):
    source = save_existing(tmp_path / "model", "eomt")
    with pytest.raises(ValueError, match=r"got a EomtForUniversalSegmentation: .* are not exported"):
        run_main(monkeypatch, "export_onnx.py", model=source, output_dir=tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_plain_model_of_transformers_is_exported_without_sharing_only(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    source = save_existing(tmp_path / "model", "upernet_dinov2")
    with pytest.raises(ValueError, match="shares tokens without a policy"):
        run_main(monkeypatch, "export_onnx.py", model=source, output_dir=tmp_path / "out", token_reduction=0.3)


def test_the_model_itself_is_not_overwritten(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match="`output_dir` must be another folder than the model's"):
        run_main(monkeypatch, "export_onnx.py", model=tmp_path, output_dir=f"{tmp_path}/.")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failed_export_leaves_nothing(monkeypatch, model_folder, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: HalfWritten())
    target = tmp_path / "exported"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="No space left"):
        run_main(monkeypatch, "export_onnx.py", model=model_folder, output_dir=target)
    left = {path.name for path in target.iterdir()} - {".cts_hf.json", ".cts_hf.lock"}
    assert left == {"notes.txt"}
    with pytest.raises(OSError, match="No space left"):
        export_onnx(tiny_model(), tmp_path / "alone" / "model.onnx")
    assert list((tmp_path / "alone").iterdir()) == []


def test_weights_in_a_second_file_keep_the_name_that_the_first_has_for_them(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Written())
    for _ in range(2):  # the second replaces the first
        export_onnx(tiny_model(), tmp_path / "large.onnx")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            "large.onnx": b"model",
            "large.onnx.data": b"weights",
        }


def test_files_of_others_are_kept_and_earlier_exports_replaced_only_when_asked(monkeypatch, model_folder, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs `pip install onnx onnxscript onnxruntime`")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Written())
    monkeypatch.setattr("cts_hf.export.onnx.OnnxSegmenter.__init__", lambda *_: None)
    monkeypatch.setattr("cts_hf.export.onnx.OnnxSegmenter.__call__", lambda _, images: tiny_model()(images))
    target = tmp_path / "exported"
    target.mkdir()
    (target / "config.json").write_text("mine")
    options = {"model": model_folder, "output_dir": target, "batch_size": 1}
    for overwrite in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(ValueError, match=r"holds config\.json, .* no earlier export is recorded to have"):
            run_main(monkeypatch, "export_onnx.py", **options, **overwrite)
    assert (target / "config.json").read_text() == "mine"
    (target / "config.json").unlink()
    run_main(monkeypatch, "export_onnx.py", **options)
    with pytest.raises(ValueError, match=r"holds config\.json, .* of an earlier run: .* with --overwrite_output_dir"):
        run_main(monkeypatch, "export_onnx.py", **options)
    run_main(monkeypatch, "export_onnx.py", **options, token_reduction=0.5, overwrite_output_dir=True)
    assert AutoConfig.from_pretrained(target).token_reduction == 0.5


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image_size", [-48, 80], "`image_size` must be a height and a width"),
        ("batch_size", -1, "`batch_size` must be at least 0"),
        ("rounds", 0, "`rounds` must be at least 1"),
        ("token_reduction", "nan", "`token_reduction` must be .*between 0"),
    ],
)
def test_numbers_are_checked_before_the_model_is_opened(monkeypatch, tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        run_main(monkeypatch, "export_onnx.py", model="absent", output_dir=tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()
