# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean IoU against cost: several sharing strategies, each at several budgets, as numbers, a table and a plot."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, PreTrainedModel

from ..model.token_sharing import check_token_reduction
from .cost import multiply_adds, num_tokens
from .evaluator import evaluate_sharings
from .existing_models import ExistingSegmenter, Segmenter, as_segmenter
from .sharing import Sharing, check_strategy, format_reduction, is_nothing
from .tables import format_table
from .windows import InferenceOptions, resized_images


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
    model: PreTrainedModel | Segmenter,
    dataset: Dataset | IterableDataset,
    processor: BaseImageProcessor,
    strategies: Sequence[str],
    token_reductions: Sequence[float],
    options: InferenceOptions | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """
    Evaluates every sharing strategy at every budget; "none", or the budget 0, is evaluated once, first.

    Args:
        model, dataset, processor, options: as for `evaluate_sharings`.
        strategies: of "none", "learned", "random" and "oracle".
        token_reductions: fractions of the tokens to remove, 0 to 0.75.
        settings: the other ones of `evaluate_sharings`.

    Returns:
        the results of `evaluate_sharings`, and in each the cost of one forward pass of one window (or of the first
        image, where there are no windows): `input_size` (height and width in pixels), `tokens` (of patches and
        superpatches) and `multiply_adds`.

    Raises:
        ValueError: arguments that are no lists, and what `evaluate_sharings` refuses.
    """
    for name, given in (("strategies", strategies), ("token_reductions", token_reductions)):
        if isinstance(given, str | float | int):
            raise ValueError(f"`{name}` must be a list, got {given!r}: pass [{given!r}].")
    options = options or InferenceOptions()
    model = as_segmenter(model, processor, options)
    for strategy in strategies:
        check_strategy(strategy)
    for token_reduction in token_reductions:
        check_token_reduction(token_reduction, model.config.superpatch_levels)
    sharings = [
        Sharing(strategy, token_reduction)
        for strategy in dict.fromkeys(strategies)
        for token_reduction in dict.fromkeys(token_reductions)
        if strategy != "none" and not is_nothing(token_reduction)
    ]
    if "none" in strategies or any(map(is_nothing, token_reductions)):
        sharings.insert(0, Sharing("none", 0))
    results = evaluate_sharings(model, dataset, processor, sharings, options=options, **settings)

    size = (options.window, options.window)
    if options.window is None:
        first_image = next(iter(dataset))["image"]
        size = tuple(resized_images(first_image, processor, options)[0].shape[-2:])
    if isinstance(model, ExistingSegmenter):
        size = model.boxes(size)[0][2:]
    for result in results:
        runs_policy = result["sharing"] == "learned"
        result["input_size"] = list(size)
        result["tokens"] = num_tokens(model, size, result["token_reduction"])
        result["multiply_adds"] = multiply_adds(model, size, result["token_reduction"], runs_policy)
    return results


def format_sweep(results: Sequence[dict[str, Any]]) -> str:
    """The results of a sweep as a table, a row each."""
    rows = []
    for result in results:
        cells = [_cell(result.get(key), factor, decimals) for _, key, factor, decimals in COLUMNS]
        rows.append([result["sharing"], format_reduction(result["token_reduction"]), *cells])
    return format_table(["sharing", "token reduction", *(title for title, *_ in COLUMNS)], rows)


def plot_sweep(results: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """
    Draws mean IoU against tokens and against multiply-adds, a line for every sharing strategy.

    Args:
        results: of `budget_sweep`.
        path: picture to write, in any format of matplotlib.
        title: above the picture.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    unshared = [result for result in results if result["sharing"] == "none"]
    strategies = dict.fromkeys(result["sharing"] for result in results if result["sharing"] != "none")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, factor, label in zip(
        axes,
        ("tokens", "multiply_adds"),
        (1, 1e-9),
        ("tokens", "multiply-adds (billions, with the policy's)"),
        strict=True,
    ):
        for strategy in strategies:
            points = unshared + [result for result in results if result["sharing"] == strategy]
            points.sort(key=lambda result: result["token_reduction"])
            color, marker = STYLES[strategy]
            # Where the learned policy runs it costs, so that its line does not start at the model without sharing.
            shown = points[len(unshared) :] if key == "multiply_adds" else points
            axis.plot(
                [result[key] * factor for result in shown],
                [100 * result["mean_iou"] for result in shown],
                color=color,
                marker=marker,
                label=strategy,
            )
        for result in unshared:
            axis.plot(result[key] * factor, 100 * result["mean_iou"], "k*", markersize=11, label="none")
        height, width = results[0]["input_size"]
        axis.set_xlabel(f"{label} of a {height} x {width} input")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean IoU (%)")
    axes[0].legend(title="sharing")
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


__all__ = ["budget_sweep", "format_sweep", "plot_sweep", "to_json"]
