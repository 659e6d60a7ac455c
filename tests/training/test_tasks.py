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
from cts_hf.evaluation.evaluator import evaluate_segmentation
from cts_hf.model.modeling_cts_targets import IGNORED_TARGET, pad_labels, superpatch_targets
from cts_hf.training import PolicyTask, SegmentationTask, build_accelerator
from cts_hf.training.arguments import OptimizationArguments

from ..helpers.models import random_images, tiny_model, tiny_policy
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


LEVELS = (2, 4)


@pytest.mark.parametrize("token_reduction", [0.6, (0.15, 0.3)])
@pytest.mark.parametrize("levels", [(2,), LEVELS], ids=str)
def test_a_policy_is_measured_as_in_a_model_that_has_it(accelerator, levels, token_reduction):
    token_reduction = token_reduction if len(levels) > 1 else 0.6
    policy = tiny_policy(superpatch_levels=levels)
    model = tiny_model(num_labels=10, superpatch_levels=levels)
    model.set_policy(policy)
    rows = build_scenes(3, image_size=80)
    # 72 pixels are 9 patches: superpatches reach beyond the image.
    processor = CtsImageProcessor(size={"shortest_edge": 72})
    metrics = PolicyTask(policy, processor, rows, (), token_reduction).evaluate(accelerator)
    expected = evaluate_segmentation(model, rows, processor, token_reduction=token_reduction)
    assert metrics == {
        name.removeprefix("policy_"): value for name, value in expected.items() if name.startswith("policy_")
    }
    assert ("precision_at_budget_4x4" in metrics) == (len(levels) > 1)


def test_every_level_of_a_policy_is_trained(accelerator):
    policy = tiny_policy(superpatch_levels=LEVELS)
    task = policy_task(build_scenes(1, image_size=64), policy)
    labels = torch.zeros(2, 72, 72, dtype=torch.int64)
    labels[:, :30, ::2] = 1
    batch = {"pixel_values": random_images(2, 72, 72), "labels": labels}
    outputs = task.forward(policy.train(), batch)
    targets = tuple(superpatch_targets(pad_labels(labels, 32), side) for side in (16, 32))
    assert torch.equal(outputs.loss, policy(batch["pixel_values"], labels=targets).loss)
    assert task.count(batch) == sum((of_level != IGNORED_TARGET).sum() for of_level in targets) < 2 * (36 + 9)
    outputs.loss.backward()
    for head in (policy.head, *policy.larger_heads):
        assert head.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_training_with_a_threshold_gives_each_image_what_it_gets_alone(accelerator):
    model = tiny_model(num_labels=10, superpatch_levels=LEVELS).double()
    processor, rows = CtsImageProcessor(size={"shortest_edge": 64}), build_scenes(4, image_size=64)
    batch = processor([row["image"] for row in rows], [row["label"] for row in rows], return_tensors="pt")
    batch = {"pixel_values": batch["pixel_values"].double(), "labels": batch["labels"]}
    _, logits_4x4 = model(batch["pixel_values"]).policy_logits
    model.config.sharing_threshold = logits_4x4.softmax(dim=1)[:, 1].quantile(0.8).item()
    task = SegmentationTask(model.train(), processor, rows, ())
    together = task.forward(model, batch)
    assert len(set(together.num_tokens.tolist())) > 1
    losses = []
    for index in range(4):
        alone = task.forward(model, {name: values[index : index + 1] for name, values in batch.items()})
        assert alone.num_tokens.item() == together.num_tokens[index]
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-12, rtol=0)
        losses.append(alone.loss)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), atol=1e-12, rtol=0)
    metrics = task.evaluate(accelerator)
    assert metrics["mean_num_tokens"] == together.num_tokens.double().mean().item()
