# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A folder written by `save_pretrained` is all that is needed: it is a model of the auto classes and the pipeline, and
can be saved again, also by those who do not have this package. test_loading.py has all the ways to load one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor, CtsImageProcessorPil, CtsModel, CtsPolicyModel
from cts_hf import model as model_room

from ..helpers.models import random_images, tiny_model, tiny_policy


CHECK = Path(__file__).parents[1] / "helpers" / "save_again.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its processor and an image."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model()
    model.save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.NEAREST).save(folder / "image.png")
    return folder


def run_without(hidden, folder, second):
    environment = {**os.environ, "HF_MODULES_CACHE": str(second / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(CHECK), str(folder), str(second), *hidden]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=second, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"superpatch_levels": (2, 4), "unsharing": "residual", "superpatch_embedding": "multiscale"}]
)
def test_saves_again_without_the_package(options, folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "first")
    model = tiny_model(**options)
    for parameter in model.parameters():
        if not parameter.any():  # as after training: weights that start at zero have a part
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    report = run_without(("cts_hf", "torchvision"), folder, tmp_path)
    assert report["classes"] == ["CtsConfig", "CtsModel", "CtsForSemanticSegmentation", "CtsImageProcessorPil"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])

    own = CtsImageProcessorPil.from_pretrained(folder)
    inputs = own(Image.open(folder / "image.png"), return_tensors="pt")
    model = CtsForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**inputs)
        hidden_states = model.cts(**inputs).last_hidden_state
    assert report["logits"] == pytest.approx(outputs.logits.sum().item(), abs=1e-2)
    assert report["hidden"] == pytest.approx(hidden_states.abs().sum().item(), rel=1e-4)
    expected = own.post_process_semantic_segmentation(outputs, [(60, 90)])[0].numpy()
    assert (np.load(tmp_path / "masks.npy") == expected).mean() > 0.99

    # What the second process saved serves a third one, which has torchvision again.
    (tmp_path / "image.png").write_bytes((folder / "image.png").read_bytes())
    third = tmp_path / "third"
    third.mkdir()
    assert run_without(("cts_hf",), tmp_path, third)["classes"][-1] == "CtsImageProcessor"


def test_loads_with_the_package(folder):
    assert type(AutoConfig.from_pretrained(folder)).__module__ == "cts_hf.model.configuration_cts"
    assert type(AutoModel.from_pretrained(folder)) is CtsModel
    assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)) is CtsForSemanticSegmentation
    assert type(AutoImageProcessor.from_pretrained(folder)) is CtsImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is CtsImageProcessorPil


def test_pipeline(folder):
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        segmenter = pipeline("image-segmentation", model=str(folder))
    assert "not supported" not in log.out
    image = Image.open(folder / "image.png")
    for inputs in (image, str(folder / "image.png"), [image, image.resize((70, 80))]):
        results = segmenter(inputs)
        for segments in results if isinstance(inputs, list) else [results]:
            covered = np.sum([np.array(segment["mask"]) > 0 for segment in segments], axis=0)
            assert (covered == 1).all()
            assert {segment["label"] for segment in segments} <= set(segmenter.model.config.id2label.values())


def test_saved_files(folder):
    names = {path.name for path in folder.iterdir()}
    code = {path.name for path in Path(model_room.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {name for name in names if name.endswith(".py")} == code
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation"}
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert set(processor["auto_map"]["AutoImageProcessor"]) == {"torchvision", "pil"}


def test_a_processor_saved_by_either_backend_loads_as_both(tmp_path):
    for index, processor_class in enumerate((CtsImageProcessor, CtsImageProcessorPil)):
        folder = tmp_path / str(index)
        tiny_model().save_pretrained(folder)
        processor_class(do_reduce_labels=True).save_pretrained(folder)
        assert (folder / "image_processing_cts.py").exists()
        for backend, expected in (("torchvision", CtsImageProcessor), ("pil", CtsImageProcessorPil)):
            loaded = AutoImageProcessor.from_pretrained(folder, backend=backend)
            assert type(loaded) is expected
            assert loaded.do_reduce_labels is True


def test_policy_alone(tmp_path):
    policy = tiny_policy()
    policy.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CtsPolicyModel
    assert torch.equal(loaded(random_images()).logits, policy(random_images()).logits)
    auto_map = json.loads((Path(tmp_path) / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_cts.CtsPolicyConfig",
        "AutoModel": "modeling_cts_policy.CtsPolicyModel",
    }
