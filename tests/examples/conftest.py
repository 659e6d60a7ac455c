# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from PIL import ExifTags, Image

from cts_hf import CtsImageProcessor
from cts_hf.data import build_scenes

from ..helpers.models import tiny_model


@pytest.fixture
def one_thread():
    """As `accelerate launch` gives each process: other numbers of threads may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prediction_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_labels=10).save_pretrained(folder)
    CtsImageProcessor(size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def options(prediction_model, tmp_path):
    """Of predict.py: five good images, two of another size and one of those in a folder below."""
    images = tmp_path / "images"
    (images / "below").mkdir(parents=True)
    scenes = [row["image"] for row in build_scenes(5, image_size=64)]
    scenes[1] = scenes[1].crop((0, 0, 64, 48)).convert("L")
    sideways = Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    for name, scene in zip(("a.png", "b.png", "c.png", "below/d.png"), scenes[:4], strict=True):
        scene.save(images / name)
    scenes[4].crop((0, 0, 64, 40)).save(images / "e.jpg", exif=sideways)
    return {"model": prediction_model, "images": images, "output_dir": tmp_path / "out", "num_workers": 0}


@pytest.fixture
def uploads(monkeypatch):
    """What is uploaded: repository and names of files, by no call of the real Hub."""
    uploads = []

    class Hub:
        def __init__(self, **options):
            pass

        def create_repo(self, repo_id, **options):
            return type("Url", (str,), {"repo_id": f"me/{repo_id}"})("https://hub/me")

        def create_commit(self, repo_id, operations, **options):
            uploads.append((repo_id, {operation.path_in_repo for operation in operations}))

    monkeypatch.setattr("cts_hf.hub.publishing.HfApi", Hub)
    return uploads
