# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean IoU against cost: several policies, each at several budgets, as numbers, a table and a plot."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from ..model.image_processing_base_cts import CtsImageProcessingMixin
from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_grid import PatchGrid
from ..model.token_sharing import num_shared_superpatches
from .evaluator import Sharing, evaluate_sharings
from .inference import InferenceOptions, resized_images


# Title, key in the results, factor and decimals of the table's columns.
COLUMNS = (
    ("tokens", "tokens", 1, 0),
    ("GMACs", "multiply_adds", 1e-9, 2),
    ("mIoU %", "mean_iou", 100, 2),
    ("mean acc. %", "mean_accuracy", 100, 2),
    ("pixel acc. %", "overall_accuracy", 100, 2),
    ("policy acc. %", "policy_accuracy", 100, 2),
    ("policy AP %", "policy_average_precision", 100, 2),
    ("prec. at budget %", "policy_precision_at_budget", 100, 2),
)
STYLES = {"learned": ("tab:blue", "o"), "random": ("tab:gray", "s"), "oracle": ("tab:green", "^")}


def budget_sweep(
    model: CtsForSemanticSegmentation,
    dataset: Dataset | IterableDataset,
    processor: CtsImageProcessingMixin,
    policies: Sequence[str],
    token_reductions: Sequence[float],
    options: InferenceOptions | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """
    Evaluates every policy at every budget, and no sharing once, as it is the same under every policy.

    Args:
        model, dataset, processor, options: as for `evaluate_sharings`.
        policies: of "learned", "random" and "oracle".
        token_reductions: budgets, 0 to 0.75.
        settings: the other ones of `evaluate_sharings`.

    Returns:
        the results of `evaluate_sharings`, and in each the cost of one forward pass of one window (or of the first
        image, where there are no windows): `input_size` (height and width in pixels), `tokens` (of patches and
        superpatches) and `multiply_adds`. The policy of a result without sharing is "none".
    """
    for name, given in (("policies", policies), ("token_reductions", token_reductions)):
        if isinstance(given, str | float | int):
            raise ValueError(f"`{name}` must be a list, got {given!r}: pass [{given!r}].")
    # Budgets out of range stay in: `evaluate_sharings` refuses them.
    sharings = [
        Sharing(policy, budget)
        for policy in dict.fromkeys(policies)
        for budget in dict.fromkeys(token_reductions)
        if budget != 0
    ]
    if 0 in token_reductions:
        sharings.insert(0, Sharing(policies[0], 0))
    results = evaluate_sharings(model, dataset, processor, sharings, options=options, **settings)

    options = options or InferenceOptions()
    size = (options.window, options.window)
    if options.window is None:
        first_image = next(iter(dataset))["image"]
        size = tuple(resized_images(first_image, processor, options)[0].shape[-2:])
    for result in results:
        if result["token_reduction"] == 0:
            result["policy"] = "none"
        runs_policy = result["policy"] == "learned"
        result["input_size"] = list(size)
        result["tokens"] = num_tokens(model, size, result["token_reduction"])
        result["multiply_adds"] = multiply_adds(model, size, result["token_reduction"], runs_policy)
    return results


def num_tokens(model: CtsForSemanticSegmentation, size: tuple[int, int], token_reduction: float) -> int:
    """Tokens of patches and superpatches that the encoder sees of an image of `size` (height, width), in pixels."""
    num_patches = PatchGrid(size, model.config.patch_size).num_patches
    return num_patches - 3 * num_shared_superpatches(token_reduction, num_patches)


def multiply_adds(
    model: CtsForSemanticSegmentation, size: tuple[int, int], token_reduction: float, runs_policy: bool = True
) -> int:
    """
    Multiply-adds of a forward pass of one image: those of matrix products, attention and convolutions.

    Args:
        model: of any device and type; a copy without values is counted.
        size: height and width of the image in pixels.
        token_reduction: 0 to 0.75.
        runs_policy: whether the model's policy is part of it, or else its scores are given.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # whatever kernel there is, it computes these products
    with torch.device("meta"), torch.no_grad():
        empty = CtsForSemanticSegmentation(config).eval()
        scores = None if runs_policy else torch.zeros(1, *PatchGrid(size, config.patch_size).shape(2))
        with FlopCounterMode(display=False) as counter:
            pixel_values = torch.zeros(1, config.num_channels, *size)
            empty(pixel_values, superpatch_scores=scores, token_reduction=token_reduction)
    return counter.get_total_flops() // 2


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """The results of a sweep as a Markdown table, one line each."""
    rows = [["policy", "token reduction", *(title for title, *_ in COLUMNS)]]
    for result in results:
        cells = [_cell(result.get(key), factor, decimals) for _, key, factor, decimals in COLUMNS]
        rows.append([result["policy"], f"{result['token_reduction']:g}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def plot_sweep(results: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """
    Draws mean IoU against tokens and against multiply-adds, a line for every policy.

    Args:
        results: of `budget_sweep`.
        path: picture to write, in any format of matplotlib.
        title: above the picture.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    unshared = [result for result in results if result["policy"] == "none"]
    policies = dict.fromkeys(result["policy"] for result in results if result["policy"] != "none")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, factor, label in zip(
        axes,
        ("tokens", "multiply_adds"),
        (1, 1e-9),
        ("tokens", "multiply-adds (billions, with the policy's)"),
        strict=True,
    ):
        for policy in policies:
            points = unshared + [result for result in results if result["policy"] == policy]
            points.sort(key=lambda result: result["token_reduction"])
            color, marker = STYLES[policy]
            # Where the learned policy runs it costs, so that its line does not start at the model without sharing.
            shown = points[len(unshared) :] if key == "multiply_adds" else points
            axis.plot(
                [result[key] * factor for result in shown],
                [100 * result["mean_iou"] for result in shown],
                color=color,
                marker=marker,
                label=policy,
            )
        for result in unshared:
            axis.plot(result[key] * factor, 100 * result["mean_iou"], "k*", markersize=11, label="no sharing")
        height, width = results[0]["input_size"]
        axis.set_xlabel(f"{label} of a {height} x {width} input")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean IoU (%)")
    axes[0].legend()
    figure.suptitle(title, parse_math=False)  # a name may hold dollars
    figure.savefig(path, dpi=150)


def to_json(value: Any) -> str:
    """`value` as JSON text; what is not a number becomes null, which JSON can hold."""
    return json.dumps(_without_nan(value), indent=2) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: float | None, factor: float, decimals: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{factor * value:.{decimals}f}"


__all__ = ["budget_sweep", "format_table", "multiply_adds", "num_tokens", "plot_sweep", "to_json"]
