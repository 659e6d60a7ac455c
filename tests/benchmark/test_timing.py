# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pytest

from cts_hf.benchmark.timing import median_times

from ..helpers.clock import Clock


def test_runtimes_take_turns(monkeypatch):
    calls, clock = [], Clock()
    monkeypatch.setattr("cts_hf.benchmark.timing.time", clock)

    def run(name, seconds, pixels):
        calls.append((name, pixels.sum().item()))
        clock.wait(100 if len(calls) <= 2 else next(seconds))

    runtimes = {"a": partial(run, "a", iter([1, 2, 9])), "b": partial(run, "b", iter([3, 8, 4]))}
    # In milliseconds, without the first turns, which are not timed.
    assert median_times(runtimes, (1, 3, 16, 16), rounds=3) == {"a": 2000, "b": 4000}
    assert [name for name, _ in calls] == ["a", "b", "b", "a"] * 2
    sums = [value for _, value in calls]
    assert sums[::2] == sums[1::2]  # the same images for both
    assert len(set(sums)) == 4  # new ones every turn


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        median_times({}, (1, 3, 16, 16), rounds=0)
