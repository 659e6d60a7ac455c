# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a trained Segmenter reaches: a table, a model card and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import SegmentationData
from ..evaluation.segmentation import PreparedImage, of_images, segment_batches
from ..evaluation.sharing import Sharing, is_nothing
from ..evaluation.tables import format_table
from ..evaluation.visualization import prediction_panel, superpatch_sizes
from ..evaluation.windows import resized_images
from ..hub.output_folder import OutputFolder
from ..model.image_processing_maps_cts import resize_labels
from ..model.modeling_cts_outputs import per_level
from .saving import save_card
from .tasks import SegmentationTask


def sharings_to_compare(
    token_reduction: float | tuple[float, ...], sharing_threshold: float | None = None
) -> list[Sharing]:
    """
    No sharing, and every other strategy at the budget that the model was trained with; learned sharing at the
    threshold, if it was trained with one.
    """
    if is_nothing(token_reduction):
        return [Sharing("none", 0.0)]
    shared = [Sharing(strategy, token_reduction) for strategy in ("learned", "random", "oracle")]
    if sharing_threshold is not None:
        shared[0] = Sharing("learned", sharing_threshold=sharing_threshold)
    return [Sharing("none", 0.0), *shared]


def report_segmenter(
    folder: str | Path, task: SegmentationTask, results: list[dict[str, Any]], data: SegmentationData
) -> None:
    """
    Prints the metrics of a trained Segmenter as a table, and adds them to the model card in its folder, with the
    picture of a prediction.

    Args:
        folder: of the run, which holds the model.
        task: its model, image processor and validation images.
        results: metrics for each of several sharings, from `task.evaluate_sharings`.
        data: the names and colors of the classes.
    """
    save_card(folder, task.model, {f"mean IoU, {_describe(result)}": result["mean_iou"] for result in results})
    print(_table(results))
    picture = draw_prediction(task, next(iter(task.eval_dataset)), data)
    with OutputFolder(folder, "training") as output, output.writing() as unfinished:
        picture.save(unfinished / "prediction.png")


@torch.no_grad()
def draw_prediction(task: SegmentationTask, row: dict[str, Any], data: SegmentationData) -> Image.Image:
    """
    Image, ground truth, prediction and sharing grid of one row of `data`, at the size that the model sees: of the
    first window, where its image processor cuts windows.
    """
    task.model.eval()
    segmenter = task.segmenter
    (pixel_values,) = resized_images(row["image"], task.processor)
    size = tuple(pixel_values.shape[-2:])
    (segmentation,) = segment_batches(segmenter, [[PreparedImage(None, [pixel_values], size)]])
    done = segmentation.passes[0]
    box = done.windows.boxes[0]
    part = (slice(box.top, box.bottom), slice(box.left, box.right))
    labels = resize_labels(torch.from_numpy(np.array(row["label"])), size)
    return prediction_panel(
        row["image"].resize(size[::-1]).crop((box.left, box.top, box.right, box.bottom)),
        segmentation.class_ids[part],
        labels=labels[part],
        shared_superpatches=of_images(done.shared_superpatches, 0),
        palette=data.palette,
        superpatch_size=superpatch_sizes(segmenter.config),
        patch_size=segmenter.config.patch_size,
        classes=data.classes,
    )


def _describe(result: dict[str, Any]) -> str:
    if "sharing_threshold" in result:
        return (
            f"{result['sharing']} sharing from a probability of {result['sharing_threshold']:g} on, "
            f"{_fewer_tokens(result):.0%} of the tokens"
        )
    if is_nothing(result["token_reduction"]):
        return "no sharing"
    return f"{result['sharing']} sharing of {_fewer_tokens(result):.0%} of the tokens"


def _fewer_tokens(result: dict[str, Any]) -> float:
    """The fraction of the tokens that was to be removed, or that was, on average, where a threshold decided."""
    token_reduction = result["token_reduction"]
    if token_reduction is None:
        return result["mean_token_reduction"]
    return sum(per_level(token_reduction))


def _table(results: list[dict[str, Any]]) -> str:
    # Mean IoU of each strategy, and how many of the superpatches that share a token hold one class.
    rows = []
    for result in results:
        fewer = _fewer_tokens(result)
        precision = f"{result.get('policy_precision_at_budget', float('nan')):.3f}" if fewer > 0 else "-"
        rows.append([result["sharing"], f"{fewer:.1%}", f"{result['mean_iou']:.4f}", precision])
    return "\n" + format_table(["sharing", "fewer tokens", "mean IoU", "one class"], rows) + "\n"


__all__ = ["draw_prediction", "report_segmenter", "sharings_to_compare"]
