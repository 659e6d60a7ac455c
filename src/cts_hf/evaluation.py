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
"""Mean IoU of a model on a data set, under any policy and budget, on one process or many."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cts_hf.data import IGNORE_INDEX
from cts_hf.image_processing_pil_cts import CtsImageProcessingMixin, resize_labels, upsampled_argmax
from cts_hf.inference import Box, InferenceOptions, View, resized_images, same_size_groups, segment, windowed_size
from cts_hf.metrics import MeanIoU, PolicyMetrics
from cts_hf.modeling_cts import CtsForSemanticSegmentation
from cts_hf.token_sharing import IGNORED_TARGET, num_shared_superpatches, pad_labels, superpatch_targets


if TYPE_CHECKING:
    from accelerate import Accelerator

POLICIES = ("learned", "random", "oracle")


class Sharing(NamedTuple):
    """
    Which superpatches share a token.

    Attributes:
        policy: "learned" (the model's own), "random" or "oracle" (ground truth: those of one class first).
        token_reduction: fraction of the tokens that is removed, 0 (no sharing, whatever the policy) to 0.75.
    """

    policy: str
    token_reduction: float


class Sample(NamedTuple):
    """
    A row of the data set, ready for the model.

    Attributes:
        index: of the row.
        images: for every scale (1, C, h, w).
        label: (H, W) uint8 class ids at the size of the original image.
    """

    index: int
    images: list[Tensor]
    label: Tensor


def evaluate_segmentation(
    model: CtsForSemanticSegmentation,
    dataset: Dataset | IterableDataset,
    processor: CtsImageProcessingMixin,
    *,
    policy: str = "learned",
    token_reduction: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """
    Evaluates one policy at one budget.

    Args:
        model: on the device to use; its training mode is restored afterwards.
        dataset: rows with `image` and `label` (class ids in [0, num_labels) or 255) as PIL images, as the readers of
            `cts_hf.data` give them.
        processor: prepares the images.
        policy: "learned", "random" or "oracle".
        token_reduction: 0 to 0.75; None is `model.config.token_reduction`.
        settings: of `evaluate_sharings`.

    Returns:
        what `evaluate_sharings` gives for it.

    Example:

    ```python
    >>> data = load_segmentation_data("scenes")
    >>> evaluate_segmentation(model, data.validation, processor, token_reduction=0.3)["mean_iou"]
    ```
    """
    if token_reduction is None:
        token_reduction = _unwrapped(model, settings.get("accelerator")).config.token_reduction
    return evaluate_sharings(model, dataset, processor, [Sharing(policy, token_reduction)], **settings)[0]


@torch.no_grad()
def evaluate_sharings(
    model: CtsForSemanticSegmentation,
    dataset: Dataset | IterableDataset,
    processor: CtsImageProcessingMixin,
    sharings: Sequence[Sharing],
    *,
    options: InferenceOptions | None = None,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: "Accelerator | None" = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """
    Evaluates several policies and budgets, reading the data set once.

    Rows are counted exactly once whatever the number of processes, in batches that do not depend on it: the counts,
    and so the results, are those of a single process.

    Args:
        model: on the device to use; its training mode is restored afterwards.
        dataset: rows with `image` and `label` (class ids in [0, num_labels) or 255) as PIL images, as the readers of
            `cts_hf.data` give them.
        processor: prepares the images; predictions are compared at the size of the labels.
        sharings: policies and budgets.
        options: how images are segmented; None is each one as a whole, at the processor's size.
        num_workers: processes that read ahead; a streamed data set is read by the main one.
        seed: of the random policy, and of the order of equally good superpatches under the oracle. Each row has a
            generator of its own.
        accelerator: of all the processes that take part, every one of which has to call this; each gets the results.
        show_progress: whether the main process shows a progress bar.

    Returns:
        for every sharing, in their order: `policy`, `token_reduction`, `num_images`, all of `MeanIoU.compute`, and
        where anything is shared all of `PolicyMetrics.compute` under `policy_...`, of the windows that the model saw.

    Raises:
        ValueError: a policy that there is not or that the model has not, a budget out of range, labels that are no
            class of the model, or an empty data set.
    """
    model = _unwrapped(model, accelerator)
    options = options or InferenceOptions()
    evaluations = [_Evaluation(model, sharing, options, seed) for sharing in sharings]
    rank, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # A window's batch never reaches into the next image, so that images can be dealt out one by one.
    batches = _Batches(dataset, processor, options, options.batch_size if options.is_single_pass else 1)
    batches = tqdm(
        batches.of_process(rank, num_processes, num_workers), "evaluating", disable=not show_progress or rank > 0
    )
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast() if accelerator else nullcontext():
            for samples in batches:
                for evaluation in evaluations:
                    evaluation.update(samples)
    finally:
        model.train(was_training)
    return [evaluation.compute(accelerator) for evaluation in evaluations]


class _Evaluation:
    """The metrics of one policy at one budget."""

    def __init__(self, model: CtsForSemanticSegmentation, sharing: Sharing, options: InferenceOptions, seed: int):
        if sharing.policy not in POLICIES:
            raise ValueError(f"policy is {sharing.policy!r}, it must be one of {', '.join(POLICIES)}.")
        num_shared_superpatches(sharing.token_reduction, num_patches=0)  # refuses a budget out of range
        if sharing.policy == "learned" and sharing.token_reduction > 0 and model.cts.policy is None:
            raise ValueError(
                "policy is 'learned', but the model has none (use_policy=False): evaluate it with 'random' or "
                "'oracle', or with token_reduction 0."
            )
        self.model, self.sharing, self.options, self.seed = model, sharing, options, seed
        self.superpatch_size = 2 * model.config.patch_size
        self.mean_iou = MeanIoU(model.config.num_labels, IGNORE_INDEX, model.device)
        self.policy_metrics = PolicyMetrics()
        # A process without images has to take part in the exchange nonetheless.
        nothing = torch.zeros(0, 1, 1, device=model.device)
        self.policy_metrics.update(nothing, nothing.long(), 0)
        self.num_images = 0

    def update(self, samples: list[Sample]) -> None:
        """Counts one batch."""
        self.num_images += len(samples)
        if not self.options.is_single_pass:
            for sample in samples:
                self._count(sample, self._segment_views(sample))
            return
        for alike in same_size_groups(samples, [sample.images[0] for sample in samples]):
            self._segment_whole(alike)

    def compute(self, accelerator: "Accelerator | None") -> dict[str, Any]:
        num_images = torch.tensor(self.num_images, device=self.model.device)
        if accelerator is not None:
            num_images = accelerator.reduce(num_images, reduction="sum")
        if not num_images:
            raise ValueError("The data set is empty: there is nothing to evaluate.")
        result = {**self.sharing._asdict(), "num_images": int(num_images), **self.mean_iou.compute(accelerator)}
        if self.sharing.token_reduction > 0:
            policy_metrics = self.policy_metrics.compute(accelerator)
            result.update({f"policy_{name}": value for name, value in policy_metrics.items()})
        return result

    def _segment_whole(self, samples: list[Sample]) -> None:
        pixel_values = torch.cat([sample.images[0] for sample in samples]).to(self.model.device)
        size = pixel_values.shape[-2:]
        scores = None
        if self.sharing.token_reduction > 0:
            targets = [self._targets(self._labels_at(sample, size), [Box(0, 0, *size)]) for sample in samples]
            noise = [
                self._noise(self._generator(sample), target.shape)
                for sample, target in zip(samples, targets, strict=True)
            ]
            scores = self._scores(pixel_values, torch.cat(targets), torch.cat(noise))
        outputs = self.model(
            pixel_values, superpatch_scores=scores, token_reduction=self.sharing.token_reduction, return_dict=True
        )
        for sample, logits in zip(samples, outputs.logits, strict=True):
            self._count(sample, upsampled_argmax(logits.float(), sample.label.shape))

    def _segment_views(self, sample: Sample) -> Tensor:
        generator, views = self._generator(sample), []
        for image in sample.images:
            pixel_values = image.to(self.model.device)
            size = pixel_values.shape[-2:]
            if self.options.window is not None:
                size = windowed_size(*size, self.options.window)
            labels = self._labels_at(sample, size)
            for flipped in (False, True) if self.options.flip else (False,):
                if flipped:
                    pixel_values, labels = pixel_values.flip(-1), labels.flip(-1)
                scores = partial(self._window_scores, labels, generator) if self.sharing.token_reduction > 0 else None
                views.append(View(pixel_values, flipped, scores))
        probabilities = segment(
            self.model,
            views,
            tuple(sample.label.shape),
            self.options.window,
            self.options.stride,
            self.options.batch_size,
            token_reduction=self.sharing.token_reduction,
        )
        return probabilities.argmax(0)

    def _window_scores(
        self, labels: Tensor, generator: np.random.Generator, windows: Tensor, boxes: list[Box]
    ) -> Tensor:
        targets = self._targets(labels, boxes)
        return self._scores(windows, targets, self._noise(generator, targets.shape))

    def _scores(self, pixel_values: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        """Scores (B, Hs, Ws) of the policy for images (B, C, H, W), counted against their targets (B, Hs, Ws)."""
        if self.sharing.policy == "learned":
            policy_logits = self.model.cts.policy(pixel_values, return_dict=True).logits
            scores = policy_logits[:, 1] - policy_logits[:, 0]
        elif self.sharing.policy == "random":
            scores = noise
        else:
            # One class first, several last, ignored ones between. Equals come in random order: the order of the grid
            # would favour the top of the image.
            scores = noise + torch.where(targets == IGNORED_TARGET, 0, 2 * targets - 1)
        num_shared = num_shared_superpatches(self.sharing.token_reduction, 4 * targets[0].numel())
        self.policy_metrics.update(scores, targets, num_shared)
        return scores

    def _targets(self, labels: Tensor, boxes: list[Box]) -> Tensor:
        """Superpatch targets (len(boxes), Hs, Ws) of parts of labels (H, W)."""
        parts = torch.stack([labels[box.top : box.bottom, box.left : box.right] for box in boxes])
        parts = pad_labels(parts, self.superpatch_size, IGNORE_INDEX)
        return superpatch_targets(parts, self.superpatch_size, IGNORE_INDEX)

    def _labels_at(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        return resize_labels(sample.label.to(self.model.device), size)

    def _generator(self, sample: Sample) -> np.random.Generator:
        # Of the row alone: neither the batch nor the process it is in changes its numbers.
        return np.random.default_rng([self.seed, sample.index])

    def _noise(self, generator: np.random.Generator, shape: torch.Size) -> Tensor:
        """Uniform in [-0.5, 0.5)."""
        return torch.from_numpy(generator.random(shape, dtype=np.float32) - 0.5).to(self.model.device)

    def _count(self, sample: Sample, segmentation: Tensor) -> None:
        self.mean_iou.update(segmentation, sample.label)


class _Batches:
    """The prepared rows of a data set in batches of consecutive ones."""

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        processor: CtsImageProcessingMixin,
        options: InferenceOptions,
        batch_size: int,
    ):
        self.dataset, self.processor, self.options, self.batch_size = dataset, processor, options, batch_size

    def __getitem__(self, index: int) -> Sample:
        return self._prepare(index, self.dataset[index])

    def of_process(self, rank: int, num_processes: int, num_workers: int):
        """Every `num_processes`-th batch, from number `rank` on: an iterable, with a length where there is one."""
        if not hasattr(self.dataset, "__len__"):
            return self._streamed(rank, num_processes)
        starts = range(rank * self.batch_size, len(self.dataset), num_processes * self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(self.dataset))) for start in starts]
        return DataLoader(self, batch_sampler=batches, collate_fn=list, num_workers=num_workers)

    def _streamed(self, rank: int, num_processes: int) -> Iterator[list[Sample]]:
        batch = []
        for index, row in enumerate(self.dataset):
            if index // self.batch_size % num_processes != rank:
                continue
            batch.append(self._prepare(index, row))
            if (index + 1) % self.batch_size == 0:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepare(self, index: int, row: dict[str, Image.Image]) -> Sample:
        label = torch.from_numpy(np.array(row["label"]))
        return Sample(index, resized_images(row["image"], self.processor, self.options), label)


def _unwrapped(model: CtsForSemanticSegmentation, accelerator: "Accelerator | None") -> CtsForSemanticSegmentation:
    return model if accelerator is None else accelerator.unwrap_model(model)


__all__ = ["POLICIES", "Sharing", "evaluate_segmentation", "evaluate_sharings"]
