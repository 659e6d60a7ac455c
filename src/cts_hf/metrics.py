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
"""Mean IoU of segmentations and quality of a policy's choice, exact whatever the number of batches and processes."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cts_hf.token_sharing import IGNORED_TARGET


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import EvalPrediction


# What transformers.Trainer fills label maps of different sizes up with.
TRAINER_PADDING = -100


class MeanIoU:
    """
    Mean intersection over union from one confusion matrix of int64 counts.

    Args:
        num_classes: number of classes.
        ignore_index: label of pixels that do not count.
        device: where the counts are kept; give the model's device, so that no batch waits for a transfer.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, it must be at least 1.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # One place after the matrix counts ignored pixels, one impossible ids: finding them now would wait for the
        # device, so compute() complains about them.
        self._counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """
        Counts a batch, without waiting for the device.

        Args:
            predictions: class ids, any integer type and shape, such as (B, H, W).
            labels: class ids or the ignore index, of the same shape.

        Raises:
            ValueError: shapes that differ.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions are {tuple(predictions.shape)} and labels {tuple(labels.shape)}: resize the logits to "
                "the labels' size before taking the argmax."
            )
        device, size = self._counts.device, self.num_classes
        predictions, labels = (ids.to(device, torch.int64).flatten() for ids in (predictions, labels))
        possible = (predictions >= 0) & (predictions < size) & (labels >= 0) & (labels < size)
        place = torch.where(possible, labels * size + predictions, size**2 + 1)
        place = torch.where(labels == self.ignore_index, size**2, place)
        self._counts.scatter_add_(0, place, torch.ones_like(place))

    def confusion_matrix(self, accelerator: "Accelerator | None" = None) -> Tensor:
        """
        Counts so far, (num_classes, num_classes) int64: labels in rows, predictions in columns.

        Args:
            accelerator: sums the counts of all its processes, every one of which has to call this.

        Raises:
            ValueError: a prediction or label was outside [0, num_classes) and not ignored.
        """
        counts = self._counts.clone()
        if accelerator is not None:
            counts = accelerator.reduce(counts, reduction="sum")
        if impossible := int(counts[-1]):
            raise ValueError(
                f"{impossible} pixels had a prediction or label outside 0 to {self.num_classes - 1} and not the "
                f"ignore index {self.ignore_index}: check num_classes and the label ids."
            )
        return counts[:-2].view(self.num_classes, self.num_classes)

    def compute(self, accelerator: "Accelerator | None" = None) -> dict[str, float | list[float]]:
        """
        The metrics of everything counted so far, named as `evaluate`'s `mean_iou` names them.

        Args:
            accelerator: sums the counts of all its processes, every one of which has to call this.

        Returns:
            fractions of 1: mean_iou, mean_accuracy, overall_accuracy, and per_category_iou and per_category_accuracy,
            lists of num_classes. A class without pixels in labels and predictions has IoU NaN, one without pixels in
            the labels has accuracy NaN; means leave NaN out.
        """
        matrix = self.confusion_matrix(accelerator).cpu().double()
        right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = right / (labelled + predicted - right)
        accuracy = right / labelled
        return {
            "mean_iou": iou.nanmean().item(),
            "mean_accuracy": accuracy.nanmean().item(),
            "overall_accuracy": (right.sum() / labelled.sum()).item(),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": accuracy.tolist(),
        }

    def reset(self) -> None:
        """Forgets all counts."""
        self._counts.zero_()


class TrainerMeanIoU:
    """
    Mean IoU as `compute_metrics` of `transformers.Trainer`, with `preprocess_logits_for_metrics` beside it.

    With `batch_eval_metrics=True` in the training arguments only one batch of predictions is held at a time.

    Args:
        num_classes: number of classes.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.metric = MeanIoU(num_classes, ignore_index)

    def __call__(self, prediction: "EvalPrediction", compute_result: bool = True) -> dict[str, Any]:
        """
        Counts predictions (N, H, W) of class ids, or logits (N, C, h, w), against labels (N, H, W).

        Returns:
            the metrics of `MeanIoU.compute` when `compute_result`, else nothing.
        """
        labels = torch.as_tensor(prediction.label_ids)
        labels = torch.where(labels == TRAINER_PADDING, self.metric.ignore_index, labels)
        outputs = prediction.predictions
        outputs = torch.as_tensor(outputs[0] if isinstance(outputs, tuple) else outputs)
        for output, label in zip(outputs, labels, strict=True):
            if output.ndim == 3:
                output = preprocess_logits_for_metrics(output[None], label[None])[0]
            self.metric.update(output, label)
        if not compute_result:
            return {}
        result = self.metric.compute()
        self.metric.reset()
        return result


def preprocess_logits_for_metrics(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """
    For the `Trainer` argument of the same name: keeps one class id of a pixel instead of its logits.

    Args:
        logits: (B, C, h, w) float, or a tuple that starts with them.
        labels: (B, H, W).

    Returns:
        (B, H, W) int64, of logits resized bilinearly to the labels' size.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    # One image at a time: full-resolution logits of a batch can be larger than the model's own activations.
    return torch.cat(
        [
            interpolate(image[None].float(), size=labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
            for image in logits
        ]
    )


class PolicyMetrics:
    """
    How well scores tell superpatches of one class (target 1) from those of several (0), without the ignored (255).

    Accuracy, precision and recall are those of the decision score > 0. Precision at budget is that of what is shared.
    """

    def __init__(self):
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def update(self, scores: Tensor, targets: Tensor, num_shared: int) -> None:
        """
        Adds a batch.

        Args:
            scores: (B, Hs, Ws) float; the higher, the rather a superpatch shares a token.
            targets: (B, Hs, Ws) int64, 1, 0 or 255, of `superpatch_targets`.
            num_shared: number of superpatches that share a token in each image, the S highest scores.

        Raises:
            ValueError: shapes that differ, or `num_shared` that an image does not have.
        """
        if scores.shape != targets.shape or scores.ndim != 3:
            raise ValueError(
                f"scores are {tuple(scores.shape)} and targets {tuple(targets.shape)}: both must be (B, Hs, Ws)."
            )
        scores, targets = scores.detach().float().flatten(1), targets.flatten(1)
        if not 0 <= num_shared <= scores.shape[1]:
            raise ValueError(f"num_shared is {num_shared}, an image has 0 to {scores.shape[1]} superpatches to share.")
        chosen = torch.zeros_like(targets).scatter_(1, scores.topk(num_shared, dim=1).indices, 1)
        self._scores.append(scores.flatten())
        self._targets.append(targets.flatten())
        self._chosen.append(chosen.flatten())

    def compute(self, accelerator: "Accelerator | None" = None) -> dict[str, float]:
        """
        The metrics of all batches.

        Args:
            accelerator: gathers the superpatches of all its processes, every one of which has to call this and must
                have had at least one batch.

        Returns:
            fractions of 1: accuracy, precision, recall, average_precision (area under the precision-recall steps, as
            scikit-learn's) and precision_at_budget; NaN where there is nothing to divide by.

        Raises:
            ValueError: no batch was added.
        """
        if not self._scores:
            raise ValueError("There is nothing to compute: call update with at least one batch first.")
        collected = [torch.cat(parts) for parts in (self._scores, self._targets, self._chosen)]
        if accelerator is not None:
            # Whatever fills short processes up is marked as ignored.
            collected = [_gather(part, accelerator) for part in collected]
        scores, targets, chosen = (part.cpu().numpy() for part in collected)
        counted = targets != IGNORED_TARGET
        scores, positive, chosen = scores[counted], targets[counted] == 1, chosen[counted] == 1
        decided = scores > 0
        return {
            "accuracy": _ratio((decided == positive).sum(), len(positive)),
            "precision": _ratio((decided & positive).sum(), decided.sum()),
            "recall": _ratio((decided & positive).sum(), positive.sum()),
            "average_precision": average_precision(scores, positive),
            "precision_at_budget": _ratio((chosen & positive).sum(), chosen.sum()),
        }


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """
    Area under the precision-recall curve, in steps: the sum of precision times the gain in recall at each threshold.

    Args:
        scores: (N,) float.
        positive: (N,) bool.

    Returns:
        a fraction of 1; NaN without positives.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    # Equal scores fall on the same side of every threshold.
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(positive[order])[last_of_equals]
    precision = found / (last_of_equals + 1)
    return float(np.sum(precision * np.diff(found, prepend=0)) / found[-1])


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def _gather(values: Tensor, accelerator: "Accelerator") -> Tensor:
    return accelerator.gather(accelerator.pad_across_processes(values, pad_index=IGNORED_TARGET))
