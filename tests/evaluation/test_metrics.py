# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    precision_score,
    recall_score,
)
from transformers import EvalPrediction

from cts_hf.evaluation.mean_iou import MeanIoU
from cts_hf.evaluation.metrics import (
    LevelMetrics,
    PolicyMetrics,
    TokenMetrics,
    TrainerMeanIoU,
    average_precision,
    policy_scores,
    preprocess_logits_for_metrics,
)


NUM_CLASSES = 6


@pytest.fixture
def segmentations():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (5, 12, 10), generator=generator)
    noise = torch.randint(0, NUM_CLASSES, labels.shape, generator=generator)
    predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, noise)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return predictions, labels


def test_trainer_metrics_agree_batched_or_not(segmentations):
    _, labels = segmentations
    logits = torch.randn(5, NUM_CLASSES, 3, 5, generator=torch.Generator().manual_seed(1))
    metric = MeanIoU(NUM_CLASSES)
    resized = torch.nn.functional.interpolate(logits, size=(12, 10), mode="bilinear").argmax(1)
    metric.add_batch(predictions=resized, references=labels)
    expected = metric.compute()
    compute_metrics = TrainerMeanIoU(NUM_CLASSES)
    assert compute_metrics(EvalPrediction((logits.numpy(), None), labels.numpy())) == expected
    ids = preprocess_logits_for_metrics((logits, None), labels)
    assert torch.equal(ids, resized)
    assert compute_metrics(EvalPrediction(ids[:2], labels[:2]), compute_result=False) == {}
    assert compute_metrics(EvalPrediction(ids[2:], labels[2:]), compute_result=True) == expected


def test_trainer_padding_is_ignored(segmentations):
    predictions, labels = segmentations
    compute_metrics = TrainerMeanIoU(NUM_CLASSES)
    expected = compute_metrics(EvalPrediction(predictions, labels))
    padded = torch.where(labels == 255, -100, labels)
    assert compute_metrics(EvalPrediction(predictions, padded)) == expected


@pytest.fixture
def policy():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (4, 5, 6), generator=generator)
    scores = torch.randn(targets.shape, generator=generator) + targets
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = 255
    return scores, targets


def test_policy_metrics_agree_with_scikit_learn(policy):
    scores, targets = policy
    shared = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    metrics = PolicyMetrics()
    metrics.update(scores[:1], targets[:1], shared[:1])
    metrics.update(scores[1:], targets[1:], shared[1:])
    result = metrics.compute()
    counted = targets != 255
    expected, given = targets[counted].numpy(), scores[counted].numpy()
    assert result["accuracy"] == pytest.approx(accuracy_score(expected, given > 0))
    assert result["precision"] == pytest.approx(precision_score(expected, given > 0))
    assert result["recall"] == pytest.approx(recall_score(expected, given > 0))
    assert result["average_precision"] == pytest.approx(average_precision_score(expected, given))
    # Of what was shared, whatever the scores.
    right = precision_score(expected, shared[counted].numpy())
    assert result["precision_at_budget"] == pytest.approx(right)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_with_equal_scores(levels):
    rng = np.random.default_rng(levels)
    positive, scores = rng.random(300) < 0.3, rng.integers(0, levels, 300).astype(float)
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))


@pytest.mark.parametrize("num_images", [0, 1])
def test_policy_metrics_without_anything_to_divide_by(num_images):
    metrics, shape = PolicyMetrics(), (num_images, 2, 2)
    metrics.update(torch.full(shape, -1.0), torch.full(shape, 255), torch.zeros(shape, dtype=torch.bool))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(np.isnan(value) for value in metrics.compute().values())


def test_policy_metrics_refuse_what_does_not_fit(policy):
    scores, targets = policy
    shared = scores > 0
    for grids in ((scores, targets[:, :2], shared), (scores, targets, shared[:1]), (scores[0], targets[0], shared[0])):
        with pytest.raises(ValueError, match=r"must have one shape \(B, Hs, Ws\), got"):
            PolicyMetrics().update(*grids)
    with pytest.raises(ValueError, match=r"must be bool, got torch.int64"):
        PolicyMetrics().update(scores, targets, shared.long())


def test_the_models_scores_are_in_its_own_arithmetic():
    logits = torch.tensor([3.0, 1025.0, 1.0, 1024.0], dtype=torch.bfloat16).view(2, 2, 1, 1)
    assert policy_scores(logits).dtype == torch.bfloat16
    assert torch.equal(policy_scores(logits), logits[:, 1] - logits[:, 0])


def test_tokens_are_counted_by_image_and_by_input():
    metrics = TokenMetrics((2, 4))
    fine, coarse = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 2, 2, dtype=torch.bool)
    fine[0, 0, 0] = coarse[0, 1, 1] = coarse[1, 0, 0] = True
    metrics.update([(64, (fine, coarse)), (64, (fine[1:], coarse[1:]))])  # three windows
    metrics.update([(16, (fine[:1, :2, :2], coarse[:1, :1, :1]))])
    removed = (3 + 15 + 15 + 15, 3)
    assert metrics.compute() == {
        "mean_num_tokens": (3 * 64 + 16 - sum(removed)) / 4,
        "mean_token_reduction": (removed[0] / 192 + removed[1] / 16) / 2,
    }


def test_levels_are_measured_together_and_each():
    grids = [torch.randn(2, side, side) for side in (4, 2)]
    targets = [(grid > 0.3).long() for grid in grids]
    shared = [grid > 0.1 for grid in grids]
    metrics, together = LevelMetrics((2, 4)), PolicyMetrics()
    metrics.update(tuple(grids), tuple(targets), tuple(shared))
    result = metrics.compute()
    for level, *of_level in zip((2, 4), grids, targets, shared, strict=True):
        alone = LevelMetrics((level,))
        alone.update(*of_level)
        together.update(*of_level)
        for name, value in alone.compute().items():
            assert result[f"{name}_{level}x{level}"] == pytest.approx(value, abs=0, nan_ok=True)
    assert {name: result[name] for name in together.compute()} == together.compute()
