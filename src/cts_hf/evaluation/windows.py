# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The windows, scales and flips that a segmentation is averaged over, and the options that say which. The rules are those
of Segmenter (Strudel et al., ICCV 2021; https://github.com/rstrudel/segmenter), so that published numbers can be
compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BaseImageProcessor

from ..model.image_processing_maps_cts import upsample
from ..model.modeling_cts import CtsForSemanticSegmentation, CtsSemanticSegmenterOutput


class Box(NamedTuple):
    """The place of a window in its image, in pixels."""

    top: int
    left: int
    bottom: int
    right: int


Item = TypeVar("Item")
# From windows (B, C, h, w) and their places to scores (B, Hs, Ws), in place of the model's policy.
WindowScores = Callable[[Tensor, list[Box]], Tensor]
# Called after each forward pass, with the places of its windows, the scores that were given, and the model's outputs.
Observer = Callable[[list[Box], Tensor | None, CtsSemanticSegmenterOutput], None]


@dataclass
class View:
    """
    One of the images that a segmentation is averaged over.

    Attributes:
        pixel_values: (1, C, H, W), as the image processor gives them.
        flipped: whether left and right are exchanged.
        superpatch_scores: what shares tokens in its windows; None leaves that to the model's policy.
        observer: called after each forward pass of its windows.
    """

    pixel_values: Tensor
    flipped: bool = False
    superpatch_scores: WindowScores | None = None
    observer: Observer | None = None


@dataclass
class InferenceOptions:
    """How images are segmented. Without a window each image is one input of the model, resized but never cut."""

    shortest_edge: int | None = field(
        default=None,
        metadata={"help": "Shorter side, in pixels, that images are resized to. Default: the image processor's size."},
    )
    window: int | None = field(
        default=None, metadata={"help": "Side of square sliding windows, in pixels. Default: whole images."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Pixels between the starts of windows. Default: the window, without overlap."}
    )
    scales: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Factors on the size of the images, to average over."}
    )
    flip: bool = field(default=False, metadata={"help": "Average over the mirrored images as well."})
    batch_size: int = field(default=8, metadata={"help": "Images, or windows of one image, in a forward pass."})

    def __post_init__(self):
        for name in ("shortest_edge", "window", "stride"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        _check_positive("batch_size", self.batch_size)
        if not isinstance(self.scales, list | tuple) or not self.scales or not all(map(_is_factor, self.scales)):
            raise ValueError(
                f"`scales` must be one or more finite numbers above 0, got {self.scales!r}: give factors such as 1.0."
            )
        if self.window is None and self.stride is not None:
            raise ValueError(f"`stride` must be unset without `window`, got {self.stride}: give `window`, too.")
        if self.window is not None:
            _check_stride(self.stride or self.window, self.window)

    @property
    def is_single_pass(self) -> bool:
        """Whether an image is a single input of the model, so that images can be batched."""
        return self.window is None and len(self.scales) == 1 and not self.flip


def check_input_sizes(options: InferenceOptions, processor: BaseImageProcessor, superpatch_size: int) -> None:
    """
    Refuses options whose inputs are smaller than a superpatch, before any image is read.

    Args:
        options: how images are segmented.
        processor: its size is that of scale 1, unless `options` have a `shortest_edge`.
        superpatch_size: side of the model's superpatches in pixels, the least that it takes.

    Raises:
        ValueError: a window, or the shorter side of a resized image, that is smaller than a superpatch.
    """
    if options.window is not None:
        if options.window < superpatch_size:
            raise ValueError(
                f"`window` must be at least {superpatch_size} pixels, a superpatch of this model, got "
                f"{options.window}: choose larger windows."
            )
        return
    size = _size_at_scale_1(processor, options)
    if size is None:
        return  # that of each image
    smallest = {name: _scaled(length, min(options.scales)) for name, length in size.items()}
    if min(smallest.values()) < superpatch_size:
        raise ValueError(
            f"Images must be resized to at least {superpatch_size} pixels, a superpatch of this model, got {smallest} "
            f"at scale {min(options.scales):g}: choose a larger `shortest_edge` or larger `scales`."
        )


def resized_images(
    image: Image.Image, processor: BaseImageProcessor, options: InferenceOptions | None = None
) -> list[Tensor]:
    """
    An image as the image processor prepares it, at every scale of the options.

    Args:
        image: PIL image of any mode and size.
        processor: its options apply, its size is that of scale 1.
        options: `shortest_edge` replaces the processor's size; None is all defaults.

    Returns:
        for every scale float32 (1, C, H, W).
    """
    options = options or InferenceOptions()
    size = _size_at_scale_1(processor, options) or {"height": image.height, "width": image.width}
    # EoMT's would cut windows; they are cut later, when the size of the whole is known.
    whole = {"do_split_image": False} if hasattr(processor, "do_split_image") else {}
    return [
        processor(
            image,
            do_resize=True,
            size={name: _scaled(length, scale) for name, length in size.items()},
            return_tensors="pt",
            **whole,
        ).pixel_values
        for scale in options.scales
    ]


def same_size_groups(items: Sequence[Item], images: Sequence[Tensor]) -> list[list[Item]]:
    """
    The items in groups whose images (1, C, H, W) have one size and can be stacked. Padding them to one size instead
    would change what the policy's convolutions see.
    """
    groups: dict[torch.Size, list[Item]] = {}
    for item, image in zip(items, images, strict=True):
        groups.setdefault(image.shape, []).append(item)
    return list(groups.values())


def windowed_size(height: int, width: int, window: int) -> tuple[int, int]:
    """
    Height and width, in pixels, at which windows are cut out of an image: its own size, or where its shorter side is
    under the window, enlarged so that this side equals the window.
    """
    shorter = min(height, width)
    if shorter >= window:
        return height, width
    # Rounded down, as in Segmenter.
    return max(window, window * height // shorter), max(window, window * width // shorter)


def window_boxes(height: int, width: int, window: int, stride: int) -> list[Box]:
    """
    Where the windows of an image lie: they start at 0, stride, 2 * stride, ... and the last ones end at the border.

    Args:
        height, width: of the image in pixels, the window at least.
        window: side of the windows in pixels.
        stride: pixels between the starts of neighbors, at most the window.
    """
    tops, lefts = ([*range(0, side - window, stride), side - window] for side in (height, width))
    return [Box(top, left, top + window, left + window) for top in tops for left in lefts]


@torch.no_grad()
def sliding_window_logits(
    model: CtsForSemanticSegmentation,
    pixel_values: Tensor,
    window: int,
    stride: int,
    batch_size: int = 8,
    superpatch_scores: WindowScores | None = None,
    observer: Observer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """
    Logits of an image from square windows; where windows overlap, the mean of their logits.

    No more than the logits of one image and one window are held at full resolution.

    Args:
        model: in evaluation mode.
        pixel_values: (1, C, H, W), of any size: where the shorter side is under the window, the image is enlarged
            first, to `windowed_size`.
        window: side of the windows in pixels.
        stride: pixels between the starts of neighboring windows, 1 to the window.
        batch_size: windows in a forward pass.
        superpatch_scores: called with windows (B, C, window, window) and their places in the (enlarged) image, it
            gives scores (B, Hs, Ws) in place of the model's policy.
        observer: called after each forward pass.
        model_kwargs: for the model's forward, such as `token_reduction`.

    Returns:
        float32 (num_labels, H', W') with `(H', W') = windowed_size(H, W, window)`.

    Raises:
        ValueError: more than one image, or a window, stride or batch size out of range.
    """
    _check_positive("window", window)
    _check_positive("stride", stride)
    _check_stride(stride, window)
    _check_positive("batch_size", batch_size)
    _check_single(pixel_values)
    height, width = windowed_size(*pixel_values.shape[-2:], window)
    if (height, width) != pixel_values.shape[-2:]:
        pixel_values = interpolate(pixel_values, (height, width), mode="bilinear", align_corners=False)

    total = count = None
    boxes = window_boxes(height, width, window, stride)
    for start in range(0, len(boxes), batch_size):
        batch = boxes[start : start + batch_size]
        logits = _forward(model, pixel_values, batch, superpatch_scores, observer, model_kwargs)
        for box, window_logits in zip(batch, logits, strict=True):
            if total is None:
                total = window_logits.new_zeros(len(window_logits), height, width)
                count = window_logits.new_zeros(height, width)
            total[:, box.top : box.bottom, box.left : box.right] += upsample(window_logits, (window, window))
            count[box.top : box.bottom, box.left : box.right] += 1
    return total.div_(count)


@torch.no_grad()
def segment(
    model: CtsForSemanticSegmentation,
    views: Sequence[View],
    size: tuple[int, int],
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    **model_kwargs: Any,
) -> Tensor:
    """
    Class probabilities of an image: the mean over its views of the softmax of their resized logits.

    Args:
        model: in evaluation mode.
        views: the image at one or several scales, flipped or not, on the model's device.
        size: height and width of the result in pixels, usually those of the original image.
        window: side of sliding windows in pixels; None gives each view to the model as a whole.
        stride: pixels between the starts of neighboring windows; None is the window.
        batch_size: windows in a forward pass.
        model_kwargs: for the model's forward, such as `token_reduction`.

    Returns:
        float32 (num_labels, *size), flipped back where views were flipped.

    Raises:
        ValueError: no views, views of more than one image, or window options out of range.
    """
    if not views:
        raise ValueError("`views` must be one or more, got none: give at least one.")
    probabilities = None
    for view in views:
        if window is None:
            _check_single(view.pixel_values)
            whole = Box(0, 0, *view.pixel_values.shape[-2:])
            scores, observer = view.superpatch_scores, view.observer
            (logits,) = _forward(model, view.pixel_values, [whole], scores, observer, model_kwargs)
        else:
            logits = sliding_window_logits(
                model,
                view.pixel_values,
                window,
                stride or window,
                batch_size,
                view.superpatch_scores,
                view.observer,
                **model_kwargs,
            )
        logits = upsample(logits, size)
        if view.flipped:
            logits = logits.flip(-1)
        view_probabilities = logits.softmax(dim=0)
        del logits
        probabilities = view_probabilities if probabilities is None else probabilities.add_(view_probabilities)
    return probabilities.div_(len(views))


def with_flips(views: Sequence[View]) -> list[View]:
    """The views, and each one mirrored. Only for views without scores and observers of their own."""
    return [
        version for view in views for version in (view, View(view.pixel_values.flip(-1), flipped=not view.flipped))
    ]


def _forward(
    model: CtsForSemanticSegmentation,
    pixel_values: Tensor,
    boxes: list[Box],
    superpatch_scores: WindowScores | None,
    observer: Observer | None,
    model_kwargs: dict[str, Any],
) -> Tensor:
    windows = torch.cat([pixel_values[:, :, box.top : box.bottom, box.left : box.right] for box in boxes])
    scores = None
    if superpatch_scores is not None:
        scores = superpatch_scores(windows, boxes)
        model_kwargs = {**model_kwargs, "superpatch_scores": scores}
    outputs = model(windows, **model_kwargs)
    if observer is not None:
        observer(boxes, scores, outputs)
    return outputs.logits.float()


def _size_at_scale_1(processor: BaseImageProcessor, options: InferenceOptions) -> dict[str, int] | None:
    """What images are resized to, as an image processor takes it; None keeps the size of each."""
    if options.shortest_edge is not None:
        return {"shortest_edge": options.shortest_edge}
    if processor.do_resize:
        return {name: length for name, length in dict(processor.size).items() if length is not None}
    return None


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number, 1 or more, got {value!r}: correct it.")


def _check_stride(stride: int, window: int) -> None:
    if stride > window:
        raise ValueError(
            f"`stride` must be 1 to {window}, the window, got {stride}: choose a smaller one, as some pixels would "
            "lie in no window."
        )


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_single(pixel_values: Tensor) -> None:
    if pixel_values.ndim != 4 or pixel_values.shape[0] != 1:
        raise ValueError(
            f"`pixel_values` must be a single image (1, channels, height, width), got {tuple(pixel_values.shape)}: "
            "give one at a time, as the logits of several at full resolution can exceed the memory."
        )


__all__ = [
    "Box",
    "InferenceOptions",
    "Observer",
    "View",
    "WindowScores",
    "check_input_sizes",
    "resized_images",
    "same_size_groups",
    "segment",
    "sliding_window_logits",
    "window_boxes",
    "windowed_size",
    "with_flips",
]
