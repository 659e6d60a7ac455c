# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Times of many runs as medians, ratios and shares."""

from typing import Any

import numpy as np

from .running import AROUND, KINDS


# Of each kind, for each run, milliseconds by part.
Times = dict[str, list[dict[str, float]]]


def summarize_forward(times: Times, part_times: Times, upsampling: float, bound: float) -> dict[str, Any]:
    """
    What [`measure`] returns of the times of the forward.

    Args:
        times: of the runs, what is around the forward included.
        part_times: of runs that the parts are taken from; the same if they have them.
        upsampling: milliseconds that follow the forward of either kind.
        bound: the ratio of the multiply-adds.
    """
    forwards = {kind: np.array([_stages(parts)["forward"] for parts in times[kind]]) for kind in KINDS}
    parts = {
        kind: {part: time for part, time in _medians(part_times[kind]).items() if part not in AROUND} for kind in KINDS
    }
    result = _compare(forwards)
    with_upsampling = (forwards["plain"] + upsampling) / (forwards["cts"] + upsampling)
    return {
        **result,
        "ratio_with_upsampling": float(np.median(with_upsampling)),
        "bound": bound,
        "reached": result["ratio"] / bound,
        "parts": {**parts["cts"], "upsampling": upsampling},
        "plain_parts": {**parts["plain"], "upsampling": upsampling},
    }


def summarize_end_to_end(times: Times, batch_size: int) -> dict[str, Any]:
    """What [`measure`] returns of the times from picture to label map, but for memory."""
    result = _compare({kind: np.array([sum(parts.values()) for parts in times[kind]]) for kind in KINDS})
    for kind in KINDS:
        medians = _medians([_stages(parts) for parts in times[kind]])
        result[kind] |= {
            "images_per_second": 1000 * batch_size / result[kind]["latency_ms_p50"],
            "parts": medians,
            "shares": {part: time / sum(medians.values()) for part, time in medians.items()},
        }
    return result


def memory_ratio(memory: dict[str, float], weights: float) -> float:
    """By how much the peak is lower with sharing: that of tensors of a forward and the weights, all in MiB."""
    return (weights + memory["plain"]) / (weights + memory["cts"])


def _stages(parts: dict[str, float]) -> dict[str, float]:
    """The time of the forward as a whole, and of what is around it."""
    stages: dict[str, float] = {}
    for part, time in parts.items():
        stage = part if part in AROUND else "forward"
        stages[stage] = stages.get(stage, 0.0) + time
    return stages


def _compare(totals: dict[str, np.ndarray]) -> dict[str, Any]:
    """The ratio of the times of two kinds of runs, and the latency of each."""
    ratios = totals["plain"] / totals["cts"]
    latencies = {
        kind: {f"latency_ms_p{level}": float(np.percentile(totals[kind], level)) for level in (50, 95)}
        for kind in KINDS
    }
    quartiles = [float(np.percentile(ratios, level)) for level in (25, 75)]
    return {"ratio": float(np.median(ratios)), "ratio_quartiles": quartiles, **latencies}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {part: float(np.median([parts[part] for parts in runs])) for part in runs[0]}


__all__ = ["memory_ratio", "summarize_end_to_end", "summarize_forward"]
