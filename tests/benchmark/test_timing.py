# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pytest
import torch

from cts_hf.benchmark.timing import median_times, peak_memory

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


def test_peak_memory_is_that_of_the_tensors_of_a_run():
    kept, cpu = [torch.empty(2**20)], torch.device("cpu")

    def run():
        first = torch.empty(3 * 2**18)  # 3 MiB
        del first
        second, third = torch.empty(2**18), torch.empty(2**19)
        kept.append(third)
        del second

    # Not what there was before, nor, in the second run, what the first one left and was freed between them.
    assert peak_memory(run, cpu) == pytest.approx(3, abs=0.01)
    kept.clear()
    assert peak_memory(run, cpu) == pytest.approx(3, abs=0.01)
    assert peak_memory(lambda: None, cpu) == 0
