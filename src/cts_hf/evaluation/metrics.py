# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean IoU in `transformers.Trainer`, and the quality of a policy's choice, exact whatever the number of processes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..model.image_processing_label_maps_cts import upsampled_argmax
from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_targets import IGNORED_TARGET
from .mean_iou import MeanIoU


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import EvalPrediction


# What there is of superpatches: of a single level, or of each of several.
PerLevel = Tensor | tuple[Tensor, ...]

# What transformers.Trainer fills label maps of different sizes up with.
TRAINER_PADDING = -100


class TrainerMeanIoU:
    """
    `MeanIoU` as `compute_metrics` of `transformers.Trainer`, with `preprocess_logits_for_metrics` beside it.

    With `batch_eval_metrics=True` in the training arguments only one batch of predictions is held at a time. An
    evaluation that was interrupted then leaves its counts behind, to which the next one would add: call
    `metric.reset()` of this object before it.

    Args:
        num_labels: number of classes.
        ignore_index: label of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        self.metric = MeanIoU(num_labels, ignore_index)

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
            self.metric.add(prediction=output, reference=label)
        return self.metric.compute() if compute_result else {}


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
    return torch.stack([upsampled_argmax(image.float(), labels.shape[-2:]) for image in logits])


class PolicyMetrics:
    """
    How well scores tell superpatches of one class (target 1) from those of several (0), without the ignored (255).

    Accuracy, precision and recall are those of the decision score > 0. Precision at budget is that of what was shared.

    Args:
        device: of the scores, so that processes that have none can take part in the exchange.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self._scores = [torch.zeros(0, device=device)]
        self._targets = [torch.zeros(0, dtype=torch.int64, device=device)]
        self._shared = [torch.zeros(0, dtype=torch.int64, device=device)]

    def update(self, scores: Tensor, targets: Tensor, shared_superpatches: Tensor) -> None:
        """
        Adds a batch.

        Args:
            scores: (B, Hs, Ws) float; the higher, the rather a superpatch shares a token.
            targets: (B, Hs, Ws) int64, 1, 0 or 255, of `superpatch_targets`.
            shared_superpatches: (B, Hs, Ws) bool, those that shared a token, as the model's outputs tell.

        Raises:
            ValueError: shapes that differ, or `shared_superpatches` that are not bool.
        """
        shapes = [tuple(grid.shape) for grid in (scores, targets, shared_superpatches)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3:
            raise ValueError(
                f"`scores`, `targets` and `shared_superpatches` must have one shape (B, Hs, Ws), got {shapes[0]}, "
                f"{shapes[1]} and {shapes[2]}: give all three of the same superpatches."
            )
        if shared_superpatches.dtype != torch.bool:
            raise ValueError(
                f"`shared_superpatches` must be bool, got {shared_superpatches.dtype}: give those of the model's "
                "outputs or of `build_layout`."
            )
        self._scores.append(scores.detach().float().flatten())
        self._targets.append(targets.flatten())
        self._shared.append(shared_superpatches.flatten().to(torch.int64))

    def compute(self, accelerator: "Accelerator | None" = None) -> dict[str, float]:
        """
        The metrics of all batches.

        Args:
            accelerator: gathers the superpatches of all its processes, every one of which has to call this.

        Returns:
            fractions of 1: accuracy, precision, recall, average_precision (area under the precision-recall steps, as
            scikit-learn's) and precision_at_budget; NaN where there is nothing to divide by.
        """
        collected = [torch.cat(parts) for parts in (self._scores, self._targets, self._shared)]
        if accelerator is not None:
            # Whatever fills short processes up is marked as ignored.
            collected = [_gather(part, accelerator) for part in collected]
        scores, targets, shared = (part.cpu().numpy() for part in collected)
        counted = targets != IGNORED_TARGET
        scores, positive, shared = scores[counted], targets[counted] == 1, shared[counted] == 1
        decided = scores > 0
        return {
            "accuracy": _ratio((decided == positive).sum(), len(positive)),
            "precision": _ratio((decided & positive).sum(), decided.sum()),
            "recall": _ratio((decided & positive).sum(), positive.sum()),
            "average_precision": average_precision(scores, positive),
            "precision_at_budget": _ratio((shared & positive).sum(), shared.sum()),
        }


class LevelMetrics:
    """
    [`PolicyMetrics`] of superpatches of several sizes: of all of them together and, where there are several, of each.

    Args:
        levels: sides of the superpatches in patches.
        device: of the scores.
    """

    def __init__(self, levels: Sequence[int], device: torch.device | str = "cpu"):
        self._all = PolicyMetrics(device)
        self._of_level = {level: PolicyMetrics(device) for level in levels if len(levels) > 1}

    def update(self, scores: PerLevel, targets: PerLevel, shared_superpatches: PerLevel) -> None:
        """Adds a batch: as [`PolicyMetrics.update`], tuples of one per level if there are several."""
        if not self._of_level:
            self._all.update(scores, targets, shared_superpatches)
            return
        of_level = zip(scores, targets, shared_superpatches, strict=True)
        for metrics, values in zip(self._of_level.values(), of_level, strict=True):
            self._all.update(*values)
            metrics.update(*values)

    def compute(self, accelerator: "Accelerator | None" = None) -> dict[str, float]:
        """The metrics of all superpatches, and those of each of several levels as `..._2x2` and so on."""
        result = self._all.compute(accelerator)
        for level, metrics in self._of_level.items():
            of_level = metrics.compute(accelerator)
            result.update({f"{name}_{level}x{level}": value for name, value in of_level.items()})
        return result


class TokenMetrics:
    """
    How many tokens images had, by what shared one in the model's outputs.

    Args:
        levels: sides of the superpatches in patches.
        device: of the outputs, so that processes that have none can take part in the exchange.
    """

    def __init__(self, levels: Sequence[int], device: torch.device | str = "cpu"):
        self._levels = levels
        # Of each image: inputs of the model, their patches, and how many tokens fewer there were.
        self._counts = [torch.zeros(0, 3, dtype=torch.int64, device=device)]

    def update(self, inputs: Sequence[tuple[int, PerLevel]]) -> None:
        """
        Adds an image.

        Args:
            inputs: of each forward pass of it, the number of patches of one of the inputs, which are of one size, and
                `shared_superpatches` of all of them; see `LevelMetrics.update`.
        """
        num_inputs = num_patches = removed = 0
        for num_patches_of_one, shared in inputs:
            shared = per_level(shared)
            num_inputs += len(shared[0])
            num_patches += num_patches_of_one * len(shared[0])
            removed += sum((level**2 - 1) * of.sum() for level, of in zip(self._levels, shared, strict=True))
        count = [torch.as_tensor(value, device=self._counts[0].device) for value in (num_inputs, num_patches, removed)]
        self._counts.append(torch.stack(count)[None])

    def compute(self, accelerator: "Accelerator | None" = None) -> dict[str, float]:
        """
        The means over all images.

        Args:
            accelerator: gathers the images of all its processes, every one of which has to call this.

        Returns:
            mean_num_tokens, of an input of the model, and mean_token_reduction, the fraction of the tokens that an
            image lost; NaN without images.
        """
        counts = torch.cat(self._counts)
        if accelerator is not None:
            counts = accelerator.gather(accelerator.pad_across_processes(counts, pad_index=0))
        counts = counts[counts[:, 0] > 0].cpu().numpy()  # without what fills short processes up
        num_inputs, num_patches, removed = counts.T
        return {
            "mean_num_tokens": _ratio((num_patches - removed).sum(), num_inputs.sum()),
            # Rounded once, so that the order of the images, and so the number of processes, changes nothing.
            "mean_token_reduction": _ratio(math.fsum(removed / num_patches), len(counts)),
        }


def policy_scores(policy_logits: PerLevel) -> PerLevel:
    """
    The scores by which a model shares superpatches, in its own arithmetic.

    Args:
        policy_logits: (B, 2, Hs, Ws) float, of the model's or the policy's outputs; a tuple of one per level if there
            are several.

    Returns:
        (B, Hs, Ws) of their dtype; likewise.
    """
    if isinstance(policy_logits, tuple):
        return tuple(map(policy_scores, policy_logits))
    return policy_logits[:, 1] - policy_logits[:, 0]


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
