# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import load_scenes
from cts_hf.training import SegmentationTask
from cts_hf.training.report import draw_prediction, report_segmenter, sharings_to_compare

from ..helpers.models import tiny_model


@pytest.fixture
def data():
    return load_scenes(num_train=1, num_val=1, image_size=64)


@pytest.fixture
def task(data):
    model = tiny_model(num_labels=data.num_classes)
    return SegmentationTask(model, CtsImageProcessor(size={"shortest_edge": 64}), data.validation, ())


@pytest.mark.parametrize(
    ("token_reduction", "expected"),
    [
        (0.3, [("none", 0.0), ("learned", 0.3), ("random", 0.3), ("oracle", 0.3)]),
        (0.0, [("none", 0.0)]),
    ],
)
def test_sharings_are_compared_at_the_budget_of_the_training(token_reduction, expected):
    sharings = sharings_to_compare(token_reduction)
    assert [(sharing.strategy, sharing.token_reduction) for sharing in sharings] == expected


def test_the_report_has_a_table_a_card_and_a_picture(task, data, tmp_path, capsys):
    results = [
        {"sharing": "none", "token_reduction": 0.0, "mean_iou": 0.5},
        {"sharing": "oracle", "token_reduction": 0.3, "mean_iou": 0.25, "policy_precision_at_budget": 1.0},
    ]
    report_segmenter(tmp_path, task, results, data)
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[2] == ["|", "none", "|", "0.0%", "|", "0.5000", "|", "-", "|"]
    assert lines[3] == ["|", "oracle", "|", "30.0%", "|", "0.2500", "|", "1.000", "|"]
    card = (tmp_path / "README.md").read_text()
    assert "| mean IoU, no sharing | 0.5000 |" in card
    assert "| mean IoU, oracle sharing of 30% of the tokens | 0.2500 |" in card
    with Image.open(tmp_path / "prediction.png") as picture:
        assert picture.width > picture.height


def test_a_model_in_training_is_drawn_as_it_predicts(task, data):
    row = data.validation[0]
    task.model.train()
    assert draw_prediction(task, row, data).tobytes() == draw_prediction(task, row, data).tobytes()
    assert not task.model.training
