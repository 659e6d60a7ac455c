# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images to segmentations, and what the model did to make them: for evaluation and prediction alike, batch by batch, on
one process or many.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..model.image_processing_label_maps_cts import upsampled_argmax
from ..model.modeling_cts import CtsSemanticSegmenterOutput
from .existing_models import LOGITS, ExistingSegmenter, Segmenter
from .metrics import PerLevel, policy_scores
from .windows import Box, InferenceOptions, View, same_size_groups, segment, windowed_size, with_flips


if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")


class PreparedImage(NamedTuple):
    """
    An image, ready for the model.

    Attributes:
        source: what it was made of, such as the row of a data set; handed through.
        inputs: for every scale float32 (1, C, h, w), as `resized_images` gives them.
        size: height and width of its segmentation in pixels, usually those of the original image.
    """

    source: Any
    inputs: list[Tensor]
    size: tuple[int, int]


class Windows(NamedTuple):
    """
    Where the model looks in one forward pass at an image.

    Attributes:
        size: height and width, in pixels, of the resized image that the windows are cut out of.
        flipped: whether left and right of that image are exchanged.
        boxes: the places of the windows; without windows a single one, the whole.
    """

    size: tuple[int, int]
    flipped: bool
    boxes: list[Box]


# From the source of an image and windows of it to scores (len(boxes), Hs, Ws), in place of the model's policy.
SuperpatchScores = Callable[[Any, Windows], PerLevel]


class ForwardPass(NamedTuple):
    """
    What the model did with windows of one image, in its own outputs.

    Attributes:
        windows: where it looked.
        scores: (B, Hs, Ws) by which superpatches shared a token: of the policy, if it ran, else those that were given.
            None where nothing was to be shared, so that the policy did not run.
        shared_superpatches: (B, Hs, Ws) bool, those that shared a token.

    Scores and superpatches are tuples of one per level if there are several.
    """

    windows: Windows
    scores: PerLevel | None
    shared_superpatches: PerLevel


@dataclass
class Segmentation:
    """
    The class of each pixel of an image, and what the model did to find it.

    Attributes:
        source: that of the image.
        class_ids: int64 (H, W), at the size that was asked for.
        passes: all forward passes that it comes from: of its windows, scales and flips.
    """

    source: Any
    class_ids: Tensor
    passes: list[ForwardPass]


@torch.no_grad()
def segment_batches(
    model: Segmenter,
    batches: Iterable[Sequence[PreparedImage]],
    options: InferenceOptions | None = None,
    *,
    superpatch_scores: SuperpatchScores | None = None,
    **budget: Any,
) -> Iterator[Segmentation]:
    """
    Segments images, each one once. No more than the logits of one image are held at full resolution.

    Args:
        model: in evaluation mode, on the device to use.
        batches: images that may share a forward pass, where an image is a single input of the model.
        options: how images are segmented; None is each one as a whole.
        superpatch_scores: gives scores in place of the model's policy, asked in the order of the forward passes.
        budget: `token_reduction` or `sharing_threshold`, as in [`CtsModel.forward`]; by default the model's own.

    Yields:
        the segmentation of every image; those of a batch in the order of their sizes.

    Raises:
        ValueError: logits that are NaN.
    """
    options = options or InferenceOptions()
    for batch in batches:
        if options.is_single_pass:
            for alike in same_size_groups(batch, [image.inputs[0] for image in batch]):
                yield from _segment_whole(model, alike, superpatch_scores, budget)
        else:
            for image in batch:
                yield _segment_views(model, image, options, superpatch_scores, budget)


def of_images(values: PerLevel, part: int | slice) -> PerLevel:
    """What there is of the superpatches of one image of a batch, or of several; a tuple if there is one per level."""
    return tuple(of_level[part] for of_level in values) if isinstance(values, tuple) else values[part]


def of_process(items: Iterable[Item], accelerator: "Accelerator | None") -> Iterable[Item]:
    """
    The items that are this process's: every n-th of n processes, so that each item is dealt out once.

    Args:
        items: a sequence, of which a part is given, or a stream, which every process has to read.
        accelerator: of the processes; None is a single one.
    """
    if accelerator is None:
        return items
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    return items[rank::num_processes] if isinstance(items, Sequence) else islice(items, rank, None, num_processes)


def _segment_whole(
    model: Segmenter,
    images: Sequence[PreparedImage],
    superpatch_scores: SuperpatchScores | None,
    budget: dict[str, Any],
) -> Iterator[Segmentation]:
    pixel_values = torch.cat([image.inputs[0] for image in images]).to(model.device)
    size = tuple(pixel_values.shape[-2:])
    boxes = model.boxes(size) if isinstance(model, ExistingSegmenter) else [Box(0, 0, *size)]
    windows = Windows(size, flipped=False, boxes=boxes)
    if len(boxes) > 1:
        cut = [pixel_values[:, :, box.top : box.bottom, box.left : box.right] for box in boxes]
        pixel_values = torch.stack(cut, dim=1).flatten(0, 1)
    scores = None
    if superpatch_scores is not None:
        scores = _concatenated([superpatch_scores(image.source, windows) for image in images])
    outputs = model(pixel_values, superpatch_scores=scores, return_dict=True, **budget)
    _refuse_nan(outputs)
    scores = _deciding_scores(scores, outputs)
    for index, image in enumerate(images):
        part = slice(index * len(boxes), (index + 1) * len(boxes))
        done = ForwardPass(
            windows,
            scores if scores is None else of_images(scores, part),
            of_images(outputs.shared_superpatches, part),
        )
        if isinstance(model, ExistingSegmenter):
            class_ids = model.class_ids(outputs, part, boxes, image.size)
        else:
            class_ids = upsampled_argmax(outputs.logits[index].float(), image.size)
        yield Segmentation(image.source, class_ids, [done])


def _concatenated(values: list[PerLevel]) -> PerLevel:
    if isinstance(values[0], tuple):
        return tuple(torch.cat(of_level) for of_level in zip(*values, strict=True))
    return torch.cat(values)


def _segment_views(
    model: Segmenter,
    image: PreparedImage,
    options: InferenceOptions,
    superpatch_scores: SuperpatchScores | None,
    budget: dict[str, Any],
) -> Segmentation:
    passes = []

    def given_scores(size: tuple[int, int], flipped: bool, _: Tensor, boxes: list[Box]) -> PerLevel:
        return superpatch_scores(image.source, Windows(size, flipped, boxes))

    def observe(
        size: tuple[int, int],
        flipped: bool,
        boxes: list[Box],
        scores: PerLevel | None,
        outputs: CtsSemanticSegmenterOutput,
    ) -> None:
        _refuse_nan(outputs)
        windows = Windows(size, flipped, boxes)
        passes.append(ForwardPass(windows, _deciding_scores(scores, outputs), outputs.shared_superpatches))

    views = [View(pixel_values.to(model.device)) for pixel_values in image.inputs]
    views = with_flips(views) if options.flip else views
    for view in views:
        size = tuple(view.pixel_values.shape[-2:])
        if options.window is not None:
            size = windowed_size(*size, options.window)
        if superpatch_scores is not None:
            view.superpatch_scores = partial(given_scores, size, view.flipped)
        view.observer = partial(observe, size, view.flipped)
    probabilities = segment(
        model,
        views,
        image.size,
        options.window,
        options.stride,
        options.batch_size,
        return_dict=True,
        **budget,
    )
    return Segmentation(image.source, probabilities.argmax(0), passes)


def _refuse_nan(outputs: CtsSemanticSegmenterOutput) -> None:
    # Before upsampling, where it costs little: argmax would take NaN for a class.
    if any(outputs[name].isnan().any() for name in LOGITS if outputs.get(name) is not None):
        raise ValueError(
            "The model's logits must be numbers, got NaN: look for NaN in its weights, and if there is none, run it "
            "in a dtype of a larger range, such as bfloat16."
        )


def _deciding_scores(given: PerLevel | None, outputs: CtsSemanticSegmenterOutput) -> PerLevel | None:
    return given if outputs.policy_logits is None else policy_scores(outputs.policy_logits)


__all__ = [
    "ForwardPass",
    "PreparedImage",
    "Segmentation",
    "SuperpatchScores",
    "Windows",
    "of_images",
    "of_process",
    "segment_batches",
]
