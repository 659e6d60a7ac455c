# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Mean IoU against cost: several sharing strategies, each at several budgets, and several thresholds of the policy, as
numbers, a table and a plot.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from transformers import BaseImageProcessor, PreTrainedModel

from ..model.modeling_cts_grid import PatchGrid
from ..model.token_sharing import check_token_reduction
from .cost import multiply_adds, num_tokens
from .evaluator import evaluate_sharings
from .existing_models import ExistingSegmenter, Segmenter, as_segmenter
from .sharing import Sharing, check_strategy, format_budget, is_nothing
from .tables import format_table
from .windows import InferenceOptions, resized_images


# Title, key in the results, factor and decimals of the table's columns.
COLUMNS = (
    ("tokens", "tokens", 1, 0),
    ("fewer tokens %", "mean_token_reduction", 100, 2),
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
    token_reductions: Sequence[float | tuple[float, ...]],
    options: InferenceOptions | None = None,
    sharing_thresholds: Sequence[float] = (),
    **settings: Any,
) -> list[dict[str, Any]]:
    """
    Evaluates every sharing strategy at every budget, and learned sharing at every threshold; "none", or the budget 0,
    is evaluated once, first.

    Args:
        model, dataset, processor, options: as for `evaluate_sharings`.
        strategies: of "none", "learned", "random" and "oracle".
        token_reductions: fractions of the tokens to remove, or tuples of what each level removes.
        sharing_thresholds: probabilities from which on superpatches share, of learned sharing.
        settings: the other ones of `evaluate_sharings`.

    Returns:
        the results of `evaluate_sharings`, and in each the cost of one forward pass of one window (or of the first
        image, where there are no windows): `input_size` (height and width in pixels), `tokens` (of patches and
        superpatches) and `multiply_adds`. With a threshold, that is the cost of losing `mean_token_reduction`, what
        all images lost on average.

    Raises:
        ValueError: arguments that are no lists, strategies that nothing is given for, and what `evaluate_sharings`
            refuses.
    """
    lists = {"strategies": strategies, "token_reductions": token_reductions, "sharing_thresholds": sharing_thresholds}
    for name, given in lists.items():
        if isinstance(given, str | float | int):
            raise ValueError(f"`{name}` must be a list, got {given!r}: pass [{given!r}].")
    options = options or InferenceOptions()
    model = as_segmenter(model, processor, options)
    sharings = _sharings(strategies, token_reductions, sharing_thresholds)
    for token_reduction in token_reductions:
        check_token_reduction(token_reduction, model.config.superpatch_levels)
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
        cost_of = result["token_reduction"]
        if cost_of is None:
            cost_of = result["mean_token_reduction"]
            result["tokens"] = (1 - cost_of) * PatchGrid.of_config(model.config, size).num_patches
        else:
            result["tokens"] = num_tokens(model, size, cost_of)
        result["multiply_adds"] = multiply_adds(model, size, cost_of, runs_policy)
    return results


def _sharings(
    strategies: Sequence[str],
    token_reductions: Sequence[float | tuple[float, ...]],
    sharing_thresholds: Sequence[float],
) -> list[Sharing]:
    for strategy in strategies:
        check_strategy(strategy)
    has_budgets, has_thresholds = len(token_reductions) > 0, len(sharing_thresholds) > 0
    if has_thresholds and "learned" not in strategies:
        raise ValueError(
            "`sharing` must have 'learned' with a `sharing_threshold`, a probability that the policy gives, got "
            f"{', '.join(strategies)}: add it, or leave the thresholds out."
        )
    if not has_budgets and (others := [name for name in strategies if name in ("random", "oracle")]):
        raise ValueError(
            f"`token_reduction` must be given for {' and '.join(others)} sharing, which no threshold stops, got none: "
            "give budgets as well."
        )
    sharings = []
    for strategy in dict.fromkeys(strategies):
        if strategy == "none":
            continue
        budgets = [budget for budget in dict.fromkeys(token_reductions) if not is_nothing(budget)]
        sharings += [Sharing(strategy, budget) for budget in budgets]
        if strategy == "learned":
            sharings += [Sharing(strategy, sharing_threshold=each) for each in dict.fromkeys(sharing_thresholds)]
    if "none" in strategies or any(map(is_nothing, token_reductions)):
        sharings.insert(0, Sharing("none", 0))
    return sharings


def format_sweep(results: Sequence[dict[str, Any]]) -> str:
    """The results of a sweep as a table, a row each."""
    rows = []
    for result in results:
        cells = [_cell(result.get(key), factor, decimals) for _, key, factor, decimals in COLUMNS]
        budget = format_budget(result["token_reduction"], result.get("sharing_threshold"))
        rows.append([result["sharing"], budget, *cells])
    return format_table(["sharing", "token reduction", *(title for title, *_ in COLUMNS)], rows)


def plot_sweep(results: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """
    Draws mean IoU against tokens and against multiply-adds, a line for every sharing strategy, and a dashed one for
    the thresholds of learned sharing.

    Args:
        results: of `budget_sweep`.
        path: picture to write, in any format of matplotlib.
        title: above the picture.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    unshared = [result for result in results if result["sharing"] == "none"]
    lines = dict.fromkeys(map(_line, results))
    lines.pop(("none", False), None)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, factor, label in zip(
        axes,
        ("tokens", "multiply_adds"),
        (1, 1e-9),
        ("tokens", "multiply-adds (billions, with the policy's)"),
        strict=True,
    ):
        for strategy, has_threshold in lines:
            points = [result for result in results if _line(result) == (strategy, has_threshold)]
            points = unshared + sorted(points, key=lambda result: -result["tokens"])
            color, marker = STYLES[strategy]
            # Where the learned policy runs it costs, so that its line does not start at the model without sharing.
            shown = points[len(unshared) :] if key == "multiply_adds" else points
            axis.plot(
                [result[key] * factor for result in shown],
                [100 * result["mean_iou"] for result in shown],
                color=color,
                marker=marker,
                linestyle="--" if has_threshold else "-",
                label=f"{strategy}, by threshold" if has_threshold else strategy,
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


def _line(result: dict[str, Any]) -> tuple[str, bool]:
    """What the points of one line of the plot have in common: the strategy, and whether there is a threshold."""
    return result["sharing"], "sharing_threshold" in result


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
