# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os
import sys

import pytest


# The tests are about the CPU, also where there is a GPU: what is computed there is not the same twice, and the exact
# ones would fail. Processes that they start inherit it.
os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with ten training and three validation images, for tests that write nothing there."""
    from .helpers.training_runs import write_scenes  # imports torch, which reads the environment

    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=10)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_of_data_sets(tmp_path_factory):
    """Neither leftovers of other runs nor a home that can be written to decide what tests find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        # For threads that end with the process, which a test does not.
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield


@pytest.fixture
def drawn_panels():
    """Draws the panels of trainings as they are, for tests that look at them."""


@pytest.fixture(autouse=True)
def _plain_panels(request, monkeypatch):
    """Leaves the image alone as the panels of trainings, which take longer to draw than tiny models to train."""
    report = sys.modules.get("cts_hf.training.report")
    if report is not None and "drawn_panels" not in request.fixturenames:
        monkeypatch.setattr(report, "prediction_panel", lambda image, *args, **options: image)
