# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    jaccard_score,
    precision_score,
    recall_score,
)
from transformers import EvalPrediction

from cts_hf.metrics import MeanIoU, PolicyMetrics, TrainerMeanIoU, average_precision, preprocess_logits_for_metrics


NUM_CLASSES = 6


@pytest.fixture
def segmentations():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, (5, 12, 10), generator=generator)
    noise = torch.randint(0, NUM_CLASSES, labels.shape, generator=generator)
    predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, noise)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return predictions, labels


def test_agrees_with_scikit_learn(segmentations):
    predictions, labels = segmentations
    metric = MeanIoU(NUM_CLASSES)
    for prediction, label in zip(predictions, labels, strict=True):
        metric.update(prediction[None], label[None])
    counted = labels != 255
    expected, given = labels[counted].numpy(), predictions[counted].numpy()
    result = metric.compute()
    matrix = confusion_matrix(expected, given, labels=range(NUM_CLASSES))
    assert metric.confusion_matrix().dtype == torch.int64
    assert np.array_equal(metric.confusion_matrix().numpy(), matrix)
    assert result["per_category_iou"] == pytest.approx(jaccard_score(expected, given, average=None))
    assert result["mean_iou"] == pytest.approx(jaccard_score(expected, given, average="macro"))
    assert result["per_category_accuracy"] == pytest.approx(recall_score(expected, given, average=None))
    assert result["mean_accuracy"] == pytest.approx(recall_score(expected, given, average="macro"))
    assert result["overall_accuracy"] == pytest.approx(accuracy_score(expected, given))


def test_small_integer_types_count_alike(segmentations):
    predictions, labels = segmentations
    one, other = MeanIoU(NUM_CLASSES), MeanIoU(NUM_CLASSES)
    one.update(predictions, labels)
    other.update(predictions.to(torch.uint8), labels.to(torch.uint8))
    assert one.compute() == other.compute()


def test_absent_classes_are_nan_and_left_out():
    metric = MeanIoU(4)
    metric.update(torch.tensor([[0, 0, 2, 0]]), torch.tensor([[0, 0, 0, 1]]))
    result = metric.compute()
    assert result["per_category_iou"] == pytest.approx([0.5, 0, 0, float("nan")], nan_ok=True)
    assert result["per_category_accuracy"] == pytest.approx([2 / 3, 0, float("nan"), float("nan")], nan_ok=True)
    assert result["mean_iou"] == pytest.approx(0.5 / 3)
    assert result["mean_accuracy"] == pytest.approx(1 / 3)


def test_nothing_counted_is_nan():
    metric = MeanIoU(2)
    metric.update(torch.zeros(1, 3, 3, dtype=torch.long), torch.full((1, 3, 3), 255))
    assert np.isnan(metric.compute()["mean_iou"])
    assert np.isnan(metric.compute()["overall_accuracy"])


def test_reset_forgets(segmentations):
    metric = MeanIoU(NUM_CLASSES)
    metric.update(*segmentations)
    metric.reset()
    assert metric.confusion_matrix().sum() == 0


class _Processes:
    """The part of an Accelerator that metrics use, for processes that are rows of a list."""

    def __init__(self, others):
        self.others = others

    def reduce(self, counts, reduction):
        assert reduction == "sum"
        return counts + sum(metric._counts for metric in self.others)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_any_sharding_gives_the_same_numbers(segmentations, cut):
    predictions, labels = segmentations
    whole, first, second = (MeanIoU(NUM_CLASSES) for _ in range(3))
    whole.update(predictions, labels)
    first.update(predictions[:cut], labels[:cut])
    second.update(predictions[cut:], labels[cut:])
    processes = _Processes([second])
    assert first.compute(processes) == whole.compute()
    assert first.compute(processes) == whole.compute()


def test_impossible_ids_are_reported(segmentations):
    predictions, labels = segmentations
    metric = MeanIoU(NUM_CLASSES - 1)
    metric.update(predictions, labels)
    with pytest.raises(ValueError, match="outside 0 to 4"):
        metric.compute()


def test_shapes_must_match():
    with pytest.raises(ValueError, match="resize the logits"):
        MeanIoU(2).update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long))


def test_trainer_metrics_agree_batched_or_not(segmentations):
    _, labels = segmentations
    logits = torch.randn(5, NUM_CLASSES, 3, 5, generator=torch.Generator().manual_seed(1))
    metric = MeanIoU(NUM_CLASSES)
    resized = torch.nn.functional.interpolate(logits, size=(12, 10), mode="bilinear").argmax(1)
    metric.update(resized, labels)
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
    metrics = PolicyMetrics()
    metrics.update(scores[:1], targets[:1], num_shared=10)
    metrics.update(scores[1:], targets[1:], num_shared=10)
    result = metrics.compute()
    counted = targets != 255
    expected, given = targets[counted].numpy(), scores[counted].numpy()
    assert result["accuracy"] == pytest.approx(accuracy_score(expected, given > 0))
    assert result["precision"] == pytest.approx(precision_score(expected, given > 0))
    assert result["recall"] == pytest.approx(recall_score(expected, given > 0))
    assert result["average_precision"] == pytest.approx(average_precision_score(expected, given))
    right = chosen = 0
    for score, target in zip(scores.flatten(1).tolist(), targets.flatten(1).tolist(), strict=True):
        best = sorted(range(30), key=lambda index: -score[index])[:10]
        chosen += sum(target[index] != 255 for index in best)
        right += sum(target[index] == 1 for index in best)
    assert result["precision_at_budget"] == pytest.approx(right / chosen)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_with_equal_scores(levels):
    rng = np.random.default_rng(levels)
    positive, scores = rng.random(300) < 0.3, rng.integers(0, levels, 300).astype(float)
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))


def test_policy_metrics_without_anything_to_divide_by():
    metrics = PolicyMetrics()
    metrics.update(torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 255), num_shared=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(np.isnan(value) for value in metrics.compute().values())


def test_policy_metrics_refuse_what_does_not_fit(policy):
    scores, targets = policy
    with pytest.raises(ValueError, match="both must be"):
        PolicyMetrics().update(scores, targets[:, :2], 3)
    with pytest.raises(ValueError, match="num_shared is 31"):
        PolicyMetrics().update(scores, targets, 31)
    with pytest.raises(ValueError, match="call update"):
        PolicyMetrics().compute()
