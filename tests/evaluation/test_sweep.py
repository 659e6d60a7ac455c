# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json
from functools import cache

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config

from cts_hf import CtsConfig, CtsForSemanticSegmentation, num_shared_superpatches
from cts_hf.evaluation.sharing import STRATEGIES
from cts_hf.evaluation.sweep import budget_sweep, format_sweep, plot_sweep, to_json
from cts_hf.evaluation.windows import InferenceOptions

from ..helpers.figures import saved_figures
from ..helpers.models import TINY_BACKBONE
from ..helpers.scenes import processor, scene_model, scenes


@cache
def sweep():
    return budget_sweep(scene_model(), scenes(), processor(), [*STRATEGIES[1:], "random"], [0, 0.3, 0.3, 0.75])


def test_sweep_evaluates_every_strategy_at_every_budget_once():
    pairs = [(result["sharing"], result["token_reduction"]) for result in sweep()]
    assert pairs == [("none", 0)] + [(strategy, budget) for strategy in STRATEGIES[1:] for budget in (0.3, 0.75)]
    # 64 x 64 pixels are 64 patches of 8.
    assert [result["tokens"] for result in sweep()] == [64, 46, 16, 46, 16, 46, 16]
    at_most = [result["mean_iou"] for result in sweep() if result["token_reduction"] == 0.75]
    assert at_most == pytest.approx([at_most[0]] * 3)  # everything is shared, whatever the strategy
    cost = {pair: result["multiply_adds"] for pair, result in zip(pairs, sweep(), strict=True)}
    assert cost["random", 0.75] < cost["random", 0.3] < cost["none", 0]
    assert cost["learned", 0.75] - cost["random", 0.75] == cost["learned", 0.3] - cost["oracle", 0.3] > 0


def test_window_is_the_input_that_is_counted():
    options = InferenceOptions(window=48)
    result = budget_sweep(scene_model(), scenes().take(1), processor(), ["random"], [0.3], options=options)[0]
    assert result["input_size"] == [48, 48]
    assert result["tokens"] == 36 - 3 * num_shared_superpatches(0.3, 36)


def test_table_plot_and_json(tmp_path, monkeypatch):
    lines = format_sweep(sweep()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(sweep())
    assert lines[2].split("|")[1:4] == ["    none ", "               0 ", "     64 "]
    assert lines[2].rstrip("| ").endswith("-")
    figures = saved_figures(monkeypatch)
    plot_sweep(sweep(), tmp_path / "sweep.png", "scenes")
    (figure,) = figures
    tokens, cost = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    for strategy in STRATEGIES[1:]:
        results = [result for result in sweep() if result["sharing"] in ("none", strategy)]
        assert tokens[strategy].get_xdata().tolist() == [64, 46, 16]
        assert tokens[strategy].get_ydata().tolist() == [100 * result["mean_iou"] for result in results]
        shared = [result for result in results if result["sharing"] == strategy]
        assert cost[strategy].get_xdata().tolist() == [result["multiply_adds"] * 1e-9 for result in shared]
    assert tokens["none"].get_xdata().tolist() == [64]
    with Image.open(tmp_path / "sweep.png") as picture:
        picture.load()
    text = to_json({"results": sweep(), "nothing": float("nan")})
    assert json.loads(text, parse_constant=pytest.fail)["nothing"] is None


class Unreadable:
    """A data set of which no row may be read."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise AssertionError(f"row {index} was read")


@pytest.mark.parametrize("strategies", [["learned"], ["none"]])
@pytest.mark.parametrize(
    ("options", "token_reductions", "message"),
    [
        ({"window": 15}, [0.3], "`window` must be at least 16 pixels"),
        ({"shortest_edge": 15}, [0.3], "must be resized to at least 16 pixels"),
        ({}, [0.3, float("nan")], "`token_reduction` must be a number between 0 .* got nan"),
        ({}, [float("inf")], "`token_reduction` must be a number between 0 .* got inf"),
        ({}, [-0.1], "`token_reduction` must be a number between 0 .* got -0.1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_data_are_read(strategies, options, token_reductions, message):
    with pytest.raises(ValueError, match=message):
        budget_sweep(
            scene_model(), Unreadable(), processor(), strategies, token_reductions, InferenceOptions(**options)
        )


def test_single_values_where_lists_belong_are_refused():
    with pytest.raises(ValueError, match=r"`strategies` must be a list, got 'learned': pass \['learned'\]"):
        budget_sweep(scene_model(), scenes(), processor(), "learned", [0.3])
    with pytest.raises(ValueError, match=r"`token_reductions` must be a list, got 0.3: pass \[0.3\]"):
        budget_sweep(scene_model(), scenes(), processor(), ["learned"], 0.3)


@torch.no_grad()
def test_a_segmenter_on_an_encoder_of_transformers_has_odd_grids():
    """Of 9 x 9 patches, superpatches cover 8 x 8: 12 of 16 share at 0.45, all at 0.75."""
    encoder = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8)
    config = CtsConfig(backbone_config=encoder, num_labels=10, policy_config=dict(TINY_BACKBONE))
    model = CtsForSemanticSegmentation(config).eval()
    results = budget_sweep(model, scenes().take(2), processor(72), ["oracle"], [0, 0.45, 0.75])
    assert [result["policy_accuracy"] for result in results[1:]] == [1, 1]
    pixel_values = torch.zeros(1, 3, 72, 72)
    for result in results:
        outputs = model(pixel_values, token_reduction=result["token_reduction"])
        assert outputs.num_tokens.tolist() == [result["tokens"]]
    assert [result["tokens"] for result in results] == [81, 81 - 3 * 12, 81 - 3 * 16]


def test_thresholds_are_swept_beside_budgets(tmp_path, monkeypatch):
    settings = {"sharing_thresholds": [0.4, 0.5, 0.4]}
    results = budget_sweep(scene_model(), scenes(), processor(), ["learned", "random"], [0, 0.3], **settings)
    found = [(result["sharing"], result["token_reduction"], result.get("sharing_threshold")) for result in results]
    assert found == [
        ("none", 0, None),
        ("learned", 0.3, None),
        ("learned", None, 0.4),
        ("learned", None, 0.5),
        ("random", 0.3, None),
    ]
    for result in results:
        # All images are of one size: 64 patches.
        assert result["tokens"] == pytest.approx(result["mean_num_tokens"], abs=1e-9)
        assert result["mean_token_reduction"] == pytest.approx(1 - result["mean_num_tokens"] / 64, abs=1e-12)
    low, high = results[2:4]
    assert low["tokens"] < high["tokens"]
    assert low["multiply_adds"] < high["multiply_adds"]
    assert "| learned |        p >= 0.4 |" in format_sweep(results)
    figures = saved_figures(monkeypatch)
    plot_sweep(results, tmp_path / "sweep.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert lines["learned"].get_xdata().tolist() == [64, 46]
    assert lines["learned, by threshold"].get_xdata().tolist() == [64, high["tokens"], low["tokens"]]
    for strategies, budgets, message in (
        (["random"], [0.3], "`sharing` must have 'learned' with a `sharing_threshold`.* got random"),
        (["learned", "oracle"], [], "`token_reduction` must be given for oracle sharing"),
    ):
        with pytest.raises(ValueError, match=message):
            budget_sweep(scene_model(), Unreadable(), processor(), strategies, budgets, **settings)


def test_several_levels_are_swept_and_measured_each():
    model = scene_model(superpatch_levels=(2, 4))
    results = budget_sweep(model, scenes().take(2), processor(), STRATEGIES[1:], [0.6, (0.15, 0.3), 0.9375])
    assert [result["tokens"] for result in results[:3]] == [64 - 3 * 8 - 15, 64 - 3 * 3 - 15, 4]
    assert "0.15,0.3" in format_sweep(results)
    for result in results:
        precisions = [result[f"policy_precision_at_budget_{level}x{level}"] for level in (2, 4)]
        if result["token_reduction"] == (0.15, 0.3):  # 3 of each of 2 images, and 1
            pooled = (6 * precisions[0] + 2 * precisions[1]) / 8
            assert result["policy_precision_at_budget"] == pytest.approx(pooled)
        assert result["multiply_adds"] > 0
    oracle, random = (
        next(result for result in results if result["sharing"] == strategy) for strategy in ("oracle", "random")
    )
    assert oracle["policy_precision_at_budget_4x4"] >= random["policy_precision_at_budget_4x4"]
    windowed = budget_sweep(
        model, scenes().take(1), processor(), ["oracle"], [0.6], options=InferenceOptions(window=48, flip=True)
    )[0]
    assert windowed["input_size"] == [48, 48]
    assert windowed["tokens"] < 64  # 48 pixels are padded to 64
