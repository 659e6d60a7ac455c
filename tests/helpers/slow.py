# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which of many parameters the default run has."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters that are marked `slow`, but for those in `fast`: one for each way that the code can go."""
    fast, values = list(fast), list(values)
    assert all(value in values for value in fast), f"{fast} must be among {values}"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
