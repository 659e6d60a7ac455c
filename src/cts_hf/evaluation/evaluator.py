# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Mean IoU of a model on a data set, under any sharing, budget and threshold, in one process or several."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from ..data import IGNORE_INDEX
from ..model.configuration_cts import CtsConfig
from ..model.image_processing_maps_cts import resize_labels
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_targets import superpatch_targets
from .existing_models import Segmenter, as_segmenter
from .mean_iou import MeanIoU
from .metrics import LevelMetrics, PerLevel, TokenMetrics
from .segmentation import PreparedImage, Segmentation, Windows, of_process, segment_batches
from .sharing import Sharing, checked_sharing, sharing_scores
from .windows import InferenceOptions, check_input_sizes, resized_images


if TYPE_CHECKING:
    from accelerate import Accelerator


class Row(NamedTuple):
    """
    What the segmentation of a row of the data set is compared with.

    Attributes:
        index: of the row.
        label: (H, W) uint8 class ids at the size of the original image; None where the row has none.
    """

    index: int
    label: Tensor | None


def evaluate_segmentation(
    model: PreTrainedModel | Segmenter,
    dataset: Dataset | IterableDataset,
    processor: BaseImageProcessor,
    *,
    sharing: str = "learned",
    token_reduction: float | tuple[float, ...] | None = None,
    sharing_threshold: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """
    Evaluates one sharing strategy at one budget or threshold.

    Args:
        model: a Segmenter or a model that `apply_cts` has changed, on the device to use; its training mode is restored
            afterwards.
        dataset: rows with `image` and `label` (class ids in [0, num_labels) or 255) as PIL images, as the readers of
            `cts_hf.data` give them.
        processor: prepares the images.
        sharing: "none", "learned", "random" or "oracle".
        token_reduction: fraction of the tokens to remove, or what each level removes.
        sharing_threshold: instead of it, the probability from which on superpatches share, of learned sharing. If
            neither is given, the model's own, and no budget for "none".
        settings: of `evaluate_sharings`.

    Returns:
        what `evaluate_sharings` gives for it.

    Example:

    ```python
    >>> data = load_segmentation_data("scenes")
    >>> evaluate_segmentation(model, data.validation, processor, token_reduction=0.3)["mean_iou"]
    ```
    """
    if token_reduction is None and sharing_threshold is None:
        model = _segmenter(model, processor, settings.get("options"), settings.get("accelerator"))
        _, token_reduction, sharing_threshold = Sharing.of_model(model.config)
        if sharing == "none":
            token_reduction, sharing_threshold = 0.0, None
    sharings = [Sharing(sharing, token_reduction, sharing_threshold)]
    return evaluate_sharings(model, dataset, processor, sharings, **settings)[0]


@torch.no_grad()
def evaluate_sharings(
    model: PreTrainedModel | Segmenter,
    dataset: Dataset | IterableDataset,
    processor: BaseImageProcessor,
    sharings: Sequence[Sharing],
    *,
    options: InferenceOptions | None = None,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: "Accelerator | None" = None,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """
    Evaluates several sharing strategies, budgets and thresholds, reading the data set once.

    Rows are counted exactly once whatever the number of processes, in batches that do not depend on it: the counts,
    and so the results, are those of a single process.

    Args:
        model: a Segmenter or a model that `apply_cts` has changed, on the device to use; its training mode is restored
            afterwards.
        dataset: rows with `image` and `label` (class ids in [0, num_labels) or 255) as PIL images, as the readers of
            `cts_hf.data` give them.
        processor: prepares the images; predictions are compared at the size of the labels.
        sharings: strategies, each with a budget or a threshold.
        options: how images are segmented; None is each one as a whole, at the processor's size.
        num_workers: processes that read ahead; a streamed data set is read by the main one.
        seed: of random sharing, and of the order of equally good superpatches under the oracle. Each row has a
            generator of its own.
        accelerator: of all the processes that take part, every one of which has to call this; each gets the results.
        show_progress: whether the main process shows a progress bar.

    Returns:
        for every sharing, in their order: `sharing` (the strategy), `token_reduction` (the budget, or None and
        `sharing_threshold`), `num_images`, all of `TokenMetrics.compute`, what came out of it, all of
        `MeanIoU.compute`, and where anything is shared all of `LevelMetrics.compute` under `policy_...`: of the
        windows that the model saw, by the scores and the choice in its own outputs.

    Raises:
        ValueError: an unknown strategy, learned sharing of a model without policy, a budget or threshold that the
            model cannot have, inputs smaller than a superpatch, labels that are no class of the model, or an empty
            data set.
    """
    options = options or InferenceOptions()
    model = _segmenter(model, processor, options, accelerator)
    if isinstance(sharings, Sharing):
        raise ValueError(f"`sharings` must be a list of `Sharing`, got a single one: pass [{sharings!r}].")
    check_input_sizes(options, processor, model.config.superpatch_size)
    evaluations = [_Evaluation(model, sharing, options, seed) for sharing in sharings]
    # A window's batch never reaches into the next image, so that images can be dealt out one by one.
    batch_size = options.batch_size if options.is_single_pass else 1
    batches = prepared_batches(dataset, processor, options, batch_size, accelerator, num_workers, show_progress)
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast() if accelerator else nullcontext():
            for images in batches:
                for evaluation in evaluations:
                    evaluation.update(images)
    finally:
        model.train(was_training)
    return [evaluation.compute(accelerator) for evaluation in evaluations]


def prepared_batches(
    dataset: Dataset | IterableDataset,
    processor: BaseImageProcessor,
    options: InferenceOptions,
    batch_size: int = 1,
    accelerator: "Accelerator | None" = None,
    num_workers: int = 0,
    show_progress: bool = False,
) -> Iterable[list[PreparedImage]]:
    """
    The rows of a data set in batches of consecutive ones, those of this process: every row is dealt out once, in
    batches that do not depend on the number of processes.

    Args:
        dataset, processor, options, accelerator, num_workers, show_progress: as for `evaluate_sharings`.
        batch_size: rows in a batch.

    Returns:
        an iterable; the source of each image is its `Row`.
    """
    rows = _Rows(dataset, processor, options)
    if hasattr(dataset, "__len__"):
        indices = range(len(dataset))
        parts = of_process([indices[start : start + batch_size] for start in indices[::batch_size]], accelerator)
        # A generator of its own: else an evaluation in training would change the random numbers of what follows.
        batches = DataLoader(
            rows, batch_sampler=parts, collate_fn=list, num_workers=num_workers, generator=torch.Generator()
        )
    else:
        batches = (
            [rows.prepare(*row) for row in batch] for batch in of_process(rows.streamed(batch_size), accelerator)
        )
    is_main_process = accelerator is None or accelerator.is_main_process
    return tqdm(batches, "evaluating", disable=not (show_progress and is_main_process))


def total_images(num_images: int, device: torch.device, accelerator: "Accelerator | None" = None) -> int:
    """
    How many images all processes have evaluated, every one of which has to call this.

    Raises:
        ValueError: none at all.
    """
    total = torch.tensor(num_images, device=device)
    if accelerator is not None:
        total = accelerator.reduce(total, reduction="sum")
    if not total:
        raise ValueError("The data set is empty: there is nothing to evaluate.")
    return int(total)


def input_grid(config: CtsConfig, windows: Windows) -> PatchGrid:
    """The grid of each of the inputs of a model that are cut out of an image."""
    top, left, bottom, right = windows.boxes[0]
    return PatchGrid.of_config(config, (bottom - top, right - left))


def window_targets(config: CtsConfig, label: Tensor, windows: Windows) -> PerLevel:
    """
    What a policy should say of windows of an image.

    Args:
        config: of the model, or what evaluation reads of one of transformers.
        label: (H, W) uint8 class ids at the size of the original image.
        windows: where they are.

    Returns:
        (len(boxes), Hs, Ws) int64 of `superpatch_targets`; a tuple of one per level if there are several.
    """
    labels = resize_labels(label, windows.size)
    if windows.flipped:
        labels = labels.flip(-1)
    parts = torch.stack([labels[box.top : box.bottom, box.left : box.right] for box in windows.boxes])
    grid = input_grid(config, windows)
    parts = grid.pad(parts, IGNORE_INDEX)
    targets = tuple(superpatch_targets(parts, level * grid.patch_size, IGNORE_INDEX) for level in grid.levels)
    return targets if len(targets) > 1 else targets[0]


class _Evaluation:
    """The metrics of one sharing strategy at one budget or threshold."""

    def __init__(self, model: Segmenter, sharing: Sharing, options: InferenceOptions, seed: int):
        levels, takes_thresholds = model.config.superpatch_levels, model.config.backbone_config is None
        self.sharing = checked_sharing(sharing, model.cts.policy is not None, levels, takes_thresholds)
        self.model, self.options, self.seed = model, options, seed
        self.mean_iou = MeanIoU(model.config.num_labels, IGNORE_INDEX, model.device)
        self.policy_metrics = LevelMetrics(levels, model.device)
        self.token_metrics = TokenMetrics(levels, model.device)
        self.num_images = 0

    def update(self, images: list[PreparedImage]) -> None:
        """Counts one batch."""
        scores = None
        if self.sharing.strategy in ("random", "oracle"):
            # Of the row alone: neither the batch nor the process it is in changes its numbers.
            generators = {image.source.index: self._generator(image.source) for image in images}
            scores = partial(self._scores, generators)
        for segmentation in segment_batches(
            self.model, [images], self.options, superpatch_scores=scores, **self.sharing.budget
        ):
            self._count(segmentation)

    def compute(self, accelerator: "Accelerator | None") -> dict[str, Any]:
        num_images = total_images(self.num_images, self.model.device, accelerator)
        result = {"sharing": self.sharing.strategy, "token_reduction": self.sharing.token_reduction}
        if self.sharing.sharing_threshold is not None:
            result["sharing_threshold"] = self.sharing.sharing_threshold
        result["num_images"] = num_images
        result |= self.token_metrics.compute(accelerator)
        result |= self.mean_iou.compute(accelerator=accelerator)
        if self.sharing.strategy != "none":
            policy_metrics = self.policy_metrics.compute(accelerator)
            result.update({f"policy_{name}": value for name, value in policy_metrics.items()})
        return result

    def _count(self, segmentation: Segmentation) -> None:
        self.num_images += 1
        row, passes = segmentation.source, segmentation.passes
        self.mean_iou.add(prediction=segmentation.class_ids, reference=row.label)
        self.token_metrics.update(
            [(input_grid(self.model.config, done.windows).num_patches, done.shared_superpatches) for done in passes]
        )
        if self.sharing.strategy == "none":
            return
        for done in passes:
            # Where the budget of a small image rounds to nothing, the policy does not run.
            if done.scores is not None:
                targets = window_targets(self.model.config, row.label.to(self.model.device), done.windows)
                self.policy_metrics.update(done.scores, targets, done.shared_superpatches)

    def _scores(self, generators: dict[int, np.random.Generator], row: Row, windows: Windows) -> PerLevel:
        targets = window_targets(self.model.config, row.label.to(self.model.device), windows)
        generator = generators[row.index]
        if isinstance(targets, tuple):
            return tuple(sharing_scores(self.sharing.strategy, of_level, generator) for of_level in targets)
        return sharing_scores(self.sharing.strategy, targets, generator)

    def _generator(self, row: Row) -> np.random.Generator:
        return np.random.default_rng([self.seed, row.index])


class _Rows:
    """The prepared rows of a data set."""

    def __init__(self, dataset: Dataset | IterableDataset, processor: BaseImageProcessor, options: InferenceOptions):
        self.dataset, self.processor, self.options = dataset, processor, options

    def __getitem__(self, index: int) -> PreparedImage:
        return self.prepare(index, self.dataset[index])

    def prepare(self, index: int, row: dict[str, Image.Image]) -> PreparedImage:
        image, label = row["image"], row["label"]
        label = None if label is None else torch.from_numpy(np.array(label))
        size = (image.height, image.width) if label is None else tuple(label.shape)
        return PreparedImage(Row(index, label), resized_images(image, self.processor, self.options), size)

    def streamed(self, batch_size: int) -> Iterator[list[tuple[int, dict[str, Image.Image]]]]:
        rows = enumerate(self.dataset)
        while batch := list(islice(rows, batch_size)):
            yield batch


def _segmenter(
    model: PreTrainedModel | Segmenter,
    processor: BaseImageProcessor,
    options: InferenceOptions | None,
    accelerator: "Accelerator | None",
) -> Segmenter:
    model = model if accelerator is None else accelerator.unwrap_model(model)
    return as_segmenter(model, processor, options or InferenceOptions())


__all__ = [
    "Row",
    "evaluate_segmentation",
    "evaluate_sharings",
    "input_grid",
    "prepared_batches",
    "total_images",
    "window_targets",
]
