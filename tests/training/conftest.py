# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from ..helpers.training_runs import reset_accelerate


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    reset_accelerate()
    yield
    reset_accelerate()
