# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import load_scenes
from cts_hf.training import SegmentationTask
from cts_hf.training.report import draw_prediction, report_segmenter, sharings_to_compare

from ..helpers.models import tiny_model


pytestmark = pytest.mark.usefixtures("drawn_panels")


@pytest.fixture
def data():
    return load_scenes(num_train=1, num_val=1, image_size=64)


@pytest.fixture
def task(data):
    model = tiny_model(num_labels=data.num_classes)
    return SegmentationTask(model, CtsImageProcessor(size={"shortest_edge": 64}), data.validation, ())


@pytest.mark.parametrize(
    ("trained_with", "expected"),
    [
        ((0.3,), [("none", 0.0, None), ("learned", 0.3, None), ("random", 0.3, None), ("oracle", 0.3, None)]),
        ((0.3, 0.9), [("none", 0.0, None), ("learned", None, 0.9), ("random", 0.3, None), ("oracle", 0.3, None)]),
        ((0.0,), [("none", 0.0, None)]),
        (((0.0, 0.0),), [("none", 0.0, None)]),
    ],
)
def test_sharings_are_compared_as_in_the_training(trained_with, expected):
    assert sharings_to_compare(*trained_with) == expected


def test_the_report_has_a_table_a_card_and_a_picture(task, data, tmp_path, capsys):
    results = [
        {"sharing": "none", "token_reduction": 0.0, "mean_iou": 0.5},
        {"sharing": "oracle", "token_reduction": 0.3, "mean_iou": 0.25, "policy_precision_at_budget": 1.0},
        {"sharing": "random", "token_reduction": (0.1, 0.4), "mean_iou": 0.2, "policy_precision_at_budget": 0.5},
        {
            "sharing": "learned",
            "token_reduction": None,
            "sharing_threshold": 0.9,
            "mean_token_reduction": 0.42,
            "mean_iou": 0.3,
            "policy_precision_at_budget": 0.9,
        },
    ]
    report_segmenter(tmp_path, task, results, data)
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[2] == ["|", "none", "|", "0.0%", "|", "0.5000", "|", "-", "|"]
    assert lines[3] == ["|", "oracle", "|", "30.0%", "|", "0.2500", "|", "1.000", "|"]
    assert lines[4][1:6] == ["random", "|", "50.0%", "|", "0.2000"]
    assert lines[5] == ["|", "learned", "|", "42.0%", "|", "0.3000", "|", "0.900", "|"]
    card = (tmp_path / "README.md").read_text()
    assert "| mean IoU, no sharing | 0.5000 |" in card
    assert "| mean IoU, oracle sharing of 30% of the tokens | 0.2500 |" in card
    assert "| mean IoU, learned sharing from a probability of 0.9 on, 42% of the tokens | 0.3000 |" in card
    with Image.open(tmp_path / "prediction.png") as picture:
        assert picture.width > picture.height


def test_a_model_in_training_is_drawn_as_it_predicts(task, data):
    row = data.validation[0]
    task.model.train()
    assert draw_prediction(task, row, data).tobytes() == draw_prediction(task, row, data).tobytes()
    assert not task.model.training
