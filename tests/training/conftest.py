# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from ..helpers.training_runs import reset_accelerate, write_scenes


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with ten training and three validation images, for tests that write nothing there."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=10)
