# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be trained: a Segmenter or a policy alone. How each is run, measured and saved."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from ..data import IGNORE_INDEX
from ..evaluation.evaluator import evaluate_segmentation, evaluate_sharings, prepared_batches, total_images
from ..evaluation.existing_models import Segmenter, as_segmenter
from ..evaluation.metrics import LevelMetrics, PerLevel, policy_scores
from ..evaluation.sharing import Sharing
from ..evaluation.windows import InferenceOptions
from ..model.image_processing_base_cts import CtsImageProcessingMixin
from ..model.image_processing_maps_cts import resize_labels
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_policy import CtsPolicyModel
from ..model.modeling_cts_targets import pad_labels, superpatch_targets
from ..model.token_sharing import build_layout, num_shared_superpatches
from .saving import save_model_folder
from .steps import Batch


class Task(Protocol):
    """
    What `fit` needs to know of a model.

    Attributes:
        name: for progress bars and trackers.
        score: name of the metric, of those of `evaluate`, that is highest for the best model.
        model: the model.
        arguments: options dataclasses of the run.
    """

    name: str
    score: str
    model: nn.Module
    arguments: Sequence[Any]

    def count(self, batch: Batch) -> int:
        """Number of labels that the loss of a batch, still on the CPU, is a mean of."""

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutput:
        """Runs `model`, which is the possibly wrapped one: outputs with `loss` and `logits`."""

    def check(self, accelerator: Accelerator) -> None:
        """Evaluates one image, so that what would fail after the training fails before it."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics on the validation images, the same in every process."""

    def save(self, folder: Path, metrics: dict[str, float], subfolder: str = "") -> None:
        """Writes the model and what belongs to it to a subfolder of the run's folder, or to the folder itself."""


class SegmentationTask:
    """
    Training of a Segmenter, with a frozen policy or a jointly trained one, or of a model of transformers.

    Args:
        model: the Segmenter, or a model for semantic segmentation that `apply_cts` has changed.
        processor: saved with it, and used in evaluation.
        eval_dataset: rows with image and label.
        arguments: options dataclasses, saved with the model.
        inference: how images are segmented in evaluation.
    """

    name = "segmenter"
    score = "mean_iou"

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        eval_dataset: Dataset | IterableDataset,
        arguments: Sequence[Any],
        inference: InferenceOptions | None = None,
    ):
        self.model, self.processor, self.eval_dataset = model, processor, eval_dataset
        self.arguments, self.inference = arguments, inference

    @property
    def segmenter(self) -> Segmenter:
        """The model as evaluation sees it."""
        return as_segmenter(self.model, self.processor, self.inference or InferenceOptions())

    def count(self, batch: Batch) -> int:
        """Number of pixels that are not ignored."""
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutput:
        """The outputs of the model, with the loss of the policy in it if that is trained jointly."""
        return model(**batch)

    def check(self, accelerator: Accelerator) -> None:
        """Evaluates the first image."""
        self.model.to(accelerator.device)
        evaluate_segmentation(
            self.model, self.eval_dataset.take(1), self.processor, options=self.inference, accelerator=accelerator
        )

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean IoU and the other numbers of `evaluate_sharings`, at the model's budget or threshold, by its policy."""
        sharing = Sharing.of_model(self.segmenter.config)
        return _numbers(self.evaluate_sharings([sharing], accelerator, show_progress=False)[0])

    def evaluate_sharings(
        self, sharings: Sequence[Sharing], accelerator: Accelerator, show_progress: bool = True
    ) -> list[dict[str, Any]]:
        """The metrics of several sharings, as the function [`evaluate_sharings`] gives them."""
        return evaluate_sharings(
            self.model,
            self.eval_dataset,
            self.processor,
            sharings,
            options=self.inference,
            accelerator=accelerator,
            show_progress=show_progress,
        )

    def save(self, folder: Path, metrics: dict[str, float], subfolder: str = "") -> None:
        """Writes the folder of [`save_model_folder`]."""
        save_model_folder(folder, self.model, self.processor, self.arguments, metrics, subfolder=subfolder)


class MaskTask(SegmentationTask):
    """
    Training of a model of transformers that predicts masks and the class of each, such as EoMT or Mask2Former: a class
    of an image is one mask. Pixels that are ignored are in none.
    """

    def count(self, batch: Batch) -> int:
        """Number of images; the model itself takes means over masks, of which it counts those of all processes."""
        return len(batch["labels"])

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutput:
        """The outputs of the model, with the loss of classes and masks."""
        labels = batch["labels"]
        classes = [label[label != IGNORE_INDEX].unique() for label in labels]
        masks = [(label == ids[:, None, None]).float() for label, ids in zip(labels, classes, strict=True)]
        return model(batch["pixel_values"], mask_labels=masks, class_labels=classes)


class PolicyTask:
    """
    Training of a policy alone, on superpatch targets.

    Args:
        model: the policy.
        processor: saved with it, and used in evaluation.
        eval_dataset: rows with image and label.
        arguments: options dataclasses, saved with the model.
        token_reduction: budget of the precision at budget; see [`num_shared_superpatches`].
    """

    name = "policy"
    score = "precision_at_budget"

    def __init__(
        self,
        model: CtsPolicyModel,
        processor: CtsImageProcessingMixin,
        eval_dataset: Dataset | IterableDataset,
        arguments: Sequence[Any],
        token_reduction: float | tuple[float, ...],
    ):
        self.model, self.processor, self.eval_dataset = model, processor, eval_dataset
        self.arguments, self.token_reduction = arguments, token_reduction

    def count(self, batch: Batch) -> int:
        """Number of superpatches, of all levels, that are not ignored."""
        targets = per_level(self._targets(batch["labels"]))
        return sum(int((of_level != IGNORE_INDEX).sum()) for of_level in targets)

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutput:
        """The outputs of the policy, with the loss on superpatch targets."""
        return model(batch["pixel_values"], labels=self._targets(batch["labels"]))

    def check(self, accelerator: Accelerator) -> None:
        """Evaluates the first image."""
        self.model.to(accelerator.device)
        first = PolicyTask(self.model, self.processor, self.eval_dataset.take(1), self.arguments, self.token_reduction)
        first.evaluate(accelerator)

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator, show_progress: bool = False) -> dict[str, float]:
        """
        The metrics of `LevelMetrics` on whole images, each one measured once by one of the processes.

        Args:
            accelerator: of all the processes that take part, every one of which has to call this.
            show_progress: whether the main process shows a progress bar.

        Raises:
            ValueError: an empty data set.
        """
        levels, device, num_images = self.model.config.superpatch_levels, accelerator.device, 0
        metrics = LevelMetrics(levels, device)
        self.model.eval()
        batches = prepared_batches(
            self.eval_dataset,
            self.processor,
            InferenceOptions(),
            accelerator=accelerator,
            show_progress=show_progress,
        )
        for image in chain.from_iterable(batches):
            pixel_values, label = image.inputs[0].to(device), image.source.label.to(device)
            with accelerator.autocast():
                scores = policy_scores(self.model(pixel_values).logits)
            # What a model that has this policy would share.
            num_patches = self._grid(pixel_values).num_patches
            num_shared = num_shared_superpatches(self.token_reduction, num_patches, levels)
            shared = build_layout(scores, num_shared, levels=levels).shared_superpatches
            targets = self._targets(resize_labels(label, pixel_values.shape[-2:])[None])
            metrics.update(scores, targets, shared)
            num_images += 1
        total_images(num_images, device, accelerator)
        return metrics.compute(accelerator)

    def save(self, folder: Path, metrics: dict[str, float], subfolder: str = "") -> None:
        """Writes the folder of [`save_model_folder`]."""
        save_model_folder(folder, self.model, self.processor, self.arguments, metrics, subfolder=subfolder)

    def _grid(self, images: torch.Tensor) -> PatchGrid:
        """The grid of images or label maps, `(..., height, width)`."""
        config = self.model.config
        patch_size = config.superpatch_size // config.superpatch_levels[0]
        return PatchGrid(tuple(images.shape[-2:]), patch_size, config.superpatch_levels)

    def _targets(self, labels: torch.Tensor) -> PerLevel:
        grid = self._grid(labels)
        sizes = [level * grid.patch_size for level in grid.levels]
        labels = pad_labels(labels, sizes[-1], IGNORE_INDEX)
        targets = tuple(superpatch_targets(labels, size, IGNORE_INDEX) for size in sizes)
        return targets if len(targets) > 1 else targets[0]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}
