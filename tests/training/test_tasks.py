# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from cts_hf import CtsImageProcessor
from cts_hf.data import build_scenes
from cts_hf.training import PolicyTask, build_accelerator
from cts_hf.training.arguments import OptimizationArguments

from ..helpers.models import tiny_policy
from ..helpers.training_runs import TINY_RUN


@pytest.fixture
def accelerator(tmp_path):
    return build_accelerator(OptimizationArguments(output_dir=str(tmp_path), **TINY_RUN))


def policy_task(rows, policy=None, token_reduction=0.375):
    processor = CtsImageProcessor(size={"shortest_edge": 64})
    return PolicyTask(policy or tiny_policy(), processor, rows, (), token_reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_those_count_that_a_model_shares(accelerator, dtype):
    labels = np.zeros((64, 64), np.uint8)
    labels[32:, ::2] = 1  # the upper half of the superpatches has one class, every one of the lower half two
    row = {"image": Image.new("RGB", (64, 64)), "label": Image.fromarray(labels)}
    policy = tiny_policy()
    policy.head.weight.data.zero_()
    rows = Dataset.from_list([row], features=Features({"image": ImageFeature(), "label": ImageFeature()}))
    metrics = policy_task(rows, policy.to(dtype)).evaluate(accelerator)
    # A model shares the first half of superpatches of equal scores.
    assert metrics["precision_at_budget"] == 1


def test_streamed_rows_change_nothing(accelerator):
    rows = build_scenes(3, image_size=80)
    metrics = policy_task(rows).evaluate(accelerator)
    assert metrics == policy_task(rows.to_iterable_dataset()).evaluate(accelerator)


def test_nothing_to_evaluate_is_refused(accelerator):
    with pytest.raises(ValueError, match="The data set is empty: there is nothing to evaluate"):
        policy_task(build_scenes(1, image_size=80).take(0)).evaluate(accelerator)
