# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Clocks and meters of the benchmarks."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ..model.modeling_cts import CtsForSemanticSegmentation


class Stopwatch:
    """
    Adds up the time between marks, in milliseconds: by CUDA events on a GPU, by the clock of the host elsewhere.

    Args:
        device (`torch.device`): What runs between the marks.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forgets all marks; time counts from here."""
        if self._is_cuda:
            torch.cuda.synchronize()
        self._marks.clear()
        self.mark("start")

    def mark(self, part: str) -> None:
        """Counts the time since the last mark as that of `part`."""
        if self._is_cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part since the start, in the order of their first marks."""
        if self._is_cuda:
            torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            spent = before.elapsed_time(after) if self._is_cuda else 1000 * (after - before)
            parts[part] = parts.get(part, 0.0) + spent
        return parts


@contextmanager
def marked_parts(model: CtsForSemanticSegmentation, stopwatch: Stopwatch) -> Iterator[None]:
    """
    Within this context, the modules of a model mark their parts of each forward.

    Args:
        model ([`CtsForSemanticSegmentation`]): Gets hooks, which the end of the context removes.
        stopwatch ([`Stopwatch`]): What they mark, started before the forward. What follows the decoder is left to the
            caller to mark.
    """

    def marks(part: str) -> Callable[..., None]:
        return lambda *_: stopwatch.mark(part)

    base = model.cts
    handles = [
        base.layers[0].register_forward_pre_hook(marks("embedding_and_sharing")),
        base.layernorm.register_forward_hook(marks("encoder")),
        model.decode_head.register_forward_hook(marks("decoder")),
    ]
    if base.policy is not None:
        handles.append(base.policy.register_forward_pre_hook(marks("embedding_and_sharing")))
        handles.append(base.policy.register_forward_hook(marks("policy")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """
    Most memory that tensors took during a run beyond what there was before, in MiB.

    Args:
        run: What to run, once.
        device (`torch.device`): Where its tensors are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    if not changes:
        return 0.0
    # The total counts on from earlier profiles, with what was freed after their end: the growth alone is the run's.
    first = min(changes, key=lambda event: event["ts"])["args"]
    highest = max(event["args"]["Total Allocated"] for event in changes)
    return (highest - first["Total Allocated"] + first["Bytes"]) / 2**20


@torch.inference_mode()
def median_times(
    runtimes: dict[str, Callable[[torch.Tensor], Any]], shape: tuple[int, ...], rounds: int
) -> dict[str, float]:
    """
    Median milliseconds of each of several ways to run a model on a CPU, which take turns on the same random images.

    Args:
        runtimes (`dict`): By name, what takes `pixel_values`.
        shape (`tuple[int, ...]`): Shape of `pixel_values`.
        rounds (`int`): Turns of each, another one first every time; one more comes before, untimed.

    Raises:
        ValueError: If there are no rounds.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}: choose more.")
    generator, stopwatch = torch.Generator().manual_seed(0), Stopwatch(torch.device("cpu"))
    names, turns = list(runtimes), []
    for index in range(rounds + 1):
        pixel_values = torch.randn(shape, generator=generator)
        first = index % len(names)
        stopwatch.start()
        for name in names[first:] + names[:first]:
            runtimes[name](pixel_values)
            stopwatch.mark(name)
        turns.append(stopwatch.parts())
    return {name: float(np.median([turn[name] for turn in turns[1:]])) for name in names}


__all__ = ["Stopwatch", "marked_parts", "median_times", "peak_memory"]
