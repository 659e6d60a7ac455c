# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every way to load a checkpoint: with and without this package, trust in its code, torchvision, from a folder and from
the Hub's cache, with each auto class and the pipeline. `pytest -s -m slow tests/test_loading.py` prints the matrix.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor, CtsImageProcessorPil

from ..helpers.loading_cells import load
from ..helpers.models import random_images, tiny_model


LOADERS = ["AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation", "AutoImageProcessor", "pipeline"]
SOURCES = ["folder", "cache"]
REPOSITORY, COMMIT = "someone/street", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60), Image.Resampling.NEAREST).save(file)
    return file


def hub_cache(checkpoint, home):
    """The checkpoint as a download from the Hub leaves it."""
    repository = home / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def run_job(folder, installed, torchvision, cells, image):
    folder.mkdir()
    hidden = [*([] if installed else ["cts_hf"]), *([] if torchvision else ["torchvision"])]
    (folder / "job.json").write_text(json.dumps({"hidden": hidden, "import_package": installed, "cells": cells}))
    # Without the caches that the user may have named.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"CELL_IMAGE": str(image), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*(str(Path(p).resolve()) for p in sys.path if p)])
    script = Path(__file__).parents[1] / "helpers" / "loading_cells.py"
    command = [sys.executable, str(script), str(folder)]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {cell["name"]: json.loads((folder / f"{cell['name']}.json").read_text()) for cell in cells}


@pytest.fixture(scope="module")
def matrix(checkpoint, image, tmp_path_factory):
    """The result of each cell, by (installed, torchvision, trust_remote_code, source, loader)."""
    root = tmp_path_factory.mktemp("matrix")
    hub_cache(checkpoint, root / "home")
    sources = {"folder": str(checkpoint), "cache": REPOSITORY}

    def run_environment(environment):
        installed, torchvision = environment
        keys = list(product((True, False), SOURCES, LOADERS))
        cells = [
            {
                "name": f"cell{index}",
                "trust_remote_code": trust,
                "source": sources[source],
                "loader": loader,
            }
            for index, (trust, source, loader) in enumerate(keys)
        ]
        results = run_job(root / f"{installed}-{torchvision}", installed, torchvision, cells, image)
        return {(*environment, *key): results[cell["name"]] for key, cell in zip(keys, cells, strict=True)}

    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(run_environment, product((True, False), (True, False)))
    return {key: result for part in parts for key, result in part.items()}


@pytest.mark.slow
def test_every_cell_works_or_says_what_to_do(matrix, checkpoint, image, monkeypatch, capsys):
    monkeypatch.setenv("CELL_IMAGE", str(image))
    with capsys.disabled():
        print(format_matrix(matrix))
    expected = {loader: load(loader, str(checkpoint), {}) for loader in LOADERS}
    pil_processor = CtsImageProcessorPil.from_pretrained(checkpoint)
    pil_pixels = pil_processor(Image.open(image), return_tensors="pt")["pixel_values"].double().sum().item()

    for (installed, torchvision, trust, _, loader), result in matrix.items():
        if not installed and not trust:
            assert result["error"] == "ValueError", result
            assert "trust_remote_code=True" in result["message"]
            continue
        assert "error" not in result, result["trace"]
        loaded, value = expected[loader]
        if loader == "AutoImageProcessor" and not torchvision:
            assert result["class"] == "CtsImageProcessorPil"
            value = pil_pixels
        else:
            assert result["class"] == type(loaded).__name__
        assert result["module"].startswith("cts_hf." if installed else "transformers_modules.")
        if loader == "pipeline":
            # The two backends resize with slightly different rounding; and another number of threads may exchange
            # classes that are equally likely but for rounding.
            pixels = sum(value.values())
            different = sum(abs(value.get(n, 0) - result["value"].get(n, 0)) for n in {*value, *result["value"]})
            assert different <= (0.002 if torchvision else 0.02) * pixels
        else:
            assert result["value"] == pytest.approx(value, rel=1e-4)


def format_matrix(matrix):
    """A line for each environment and source, a column for each loader."""
    short = {"AutoModelForSemanticSegmentation": "AutoModelForSem.Seg."}
    names = [short.get(loader, loader) for loader in LOADERS]
    rows = ["", "cts_hf     torchvision  trust_remote_code  source  " + "  ".join(f"{name:<20}" for name in names)]
    for installed, torchvision, trust, source in sorted({key[:4] for key in matrix}, reverse=True):
        row = f"{'imported' if installed else 'absent':<11}{'present' if torchvision else 'absent':<13}"
        row += f"{'True' if trust else 'not given':<19}{source:<8}"
        for loader in LOADERS:
            result = matrix[installed, torchvision, trust, source, loader]
            where = "this package" if result.get("module", "").startswith("cts_hf.") else "its own code"
            row += f"{'refuses' if 'error' in result else 'works, ' + where:<22}"
        rows.append(row.rstrip())
    return "\n".join(rows)


@pytest.fixture
def logits(checkpoint):
    with torch.no_grad():
        return CtsForSemanticSegmentation.from_pretrained(checkpoint)(random_images()).logits


def assert_logits(model, logits):
    with torch.no_grad():
        given = model(random_images().to(model.device)).logits
    torch.testing.assert_close(given.float().cpu(), logits)


def test_device_map(checkpoint, logits):
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, device_map="auto")
    assert_logits(model, logits)


def test_device_map_with_layers_on_disk(checkpoint, logits, tmp_path):
    """More than fits: what is left stays in files, and every layer is read when its turn comes."""
    model = AutoModelForSemanticSegmentation.from_pretrained(
        checkpoint,
        device_map={"cts.policy": "cpu", "cts.embeddings": "cpu", "cts.layers": "disk", "cts.layernorm": "cpu"}
        | {"decode_head": "disk"},
        offload_folder=tmp_path,
    )
    assert {parameter.device.type for parameter in model.cts.layers.parameters()} == {"meta"}
    assert_logits(model, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(checkpoint, logits, dtype):
    model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # With the scores of the model in float32: rounding may rank superpatches of nearly equal scores differently.
    reference = CtsForSemanticSegmentation.from_pretrained(checkpoint)
    scores = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(random_images(), superpatch_scores=scores).logits
        given = model(random_images(), superpatch_scores=scores).logits
    assert given.dtype == dtype
    # Some ten layers round to the precision of the type.
    assert (given.float() - expected).abs().max() < 30 * torch.finfo(dtype).eps * expected.abs().max()
    segmenter = pipeline("image-segmentation", model=str(checkpoint), dtype=dtype)
    assert segmenter(Image.new("RGB", (90, 60), "teal"))


def test_shards_and_saving_again(checkpoint, logits, tmp_path):
    AutoModelForSemanticSegmentation.from_pretrained(checkpoint).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert_logits(again, logits)
    again.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert_logits(AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "whole"), logits)
