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
"""What the image processors of both backends share: options, label maps, padding and post-processing."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .image_processing_inputs_cts import (
    check_images,
    check_resized_size,
    check_segmentation_maps,
    drop_alpha,
    in_native_order,
    open_wide_picture,
    white_level,
)
from .image_processing_label_maps_cts import upsampled_argmax
from .image_processing_maps_cts import IGNORE_INDEX, reduce_labels, resize_labels, upsample


# The options that say which values images have.
_VALUE_OPTIONS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean")


class CtsImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Whether to subtract 1 from all labels of the segmentation maps, for data sets that use 0 for pixels of no
        class (e.g. ADE20K). 0 becomes 255, and 255 stays.
    """

    do_reduce_labels: bool | None


class CtsImageProcessingMixin:
    """What the two backends' image processors share: defaults, label maps, padding and post-processing."""

    valid_kwargs = CtsImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - a class attribute in transformers as well

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 512}  # noqa: RUF012
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_pad = True
    do_reduce_labels = False

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[CtsImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Images, and their label maps if given, to what the model takes.

        Images of different sizes are padded on the right and at the bottom to the largest height and width of the
        batch (or to `pad_size`), unless `do_pad=False`: then a list stays a list.

        Args:
            images (`ImageInput`): an image or a list of them, as PIL images, arrays, tensors, paths or addresses (of
                which transformers opens 16-bit grey ones as white pictures where it uses Pillow). Transparency is
                dropped: what was drawn below it shows.
            segmentation_maps (`ImageInput`, *optional*): for each image a map of integer class ids of its size. Paths
                are no use here, because they are opened as RGB.
            kwargs: any of the processor's options, for this call.

        Returns:
            `BatchFeature`: With `pixel_values`, float32 `(batch_size, num_channels, height, width)`, 0 where padded;
                with `labels`, int64 `(batch_size, height, width)`, 255 where padded, if there are `segmentation_maps`;
                and with `pixel_mask`, int64 `(batch_size, height, width)`, 1 on the image and 0 on padding, if one
                image was padded at least.

        Raises:
            ValueError: For segmentation maps that do not fit the images, for options without a meaning here, for
                values that the options do not expect (from 0 to 255 to be rescaled, else from 0 to 1; 16-bit values
                are scaled from 0 to 65535, so that those of 10 or 12 bits are dark and those of 8 are refused), and
                for images over 16 times as long as wide that would have over 2**20 pixels once resized.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _validate_preprocess_kwargs(self, size: SizeDict | None = None, do_center_crop: bool | None = None, **kwargs):
        if do_center_crop:
            raise ValueError(
                "do_center_crop=True is not supported: the segmentation is that of the whole image. Crop the images "
                "and their segmentation maps before they are passed."
            )
        if size is not None and any(length < 1 for _, length in size):
            raise ValueError(f"size must hold lengths of 1 pixel or more, got size={dict(size)}. Correct it.")
        super()._validate_preprocess_kwargs(size=size, do_center_crop=do_center_crop, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool | None,
        input_data_format: str | ChannelDimension | None,
        return_tensors: str | TensorType | None,
        do_reduce_labels: bool | None,
        do_pad: bool | None,
        pad_size: SizeDict | None,
        device: "str | torch.device | None" = None,
        **kwargs,
    ) -> BatchFeature:
        white = white_level(**{name: kwargs[name] for name in _VALUE_OPTIONS})
        images = check_images(self._prepare_images_structure(images), white, do_convert_rgb)
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )  # each (num_channels, height, width)
        if kwargs["do_resize"] and kwargs["size"].shortest_edge and not kwargs["size"].longest_edge:
            for i, image in enumerate(images):
                check_resized_size(image.shape[-2:], kwargs["size"].shortest_edge, f"Image {i}")
        if segmentation_maps is not None:
            segmentation_maps = self._prepare_image_like_inputs(
                in_native_order(segmentation_maps),
                expected_ndims=2,
                input_data_format=ChannelDimension.FIRST,
                device=device,
            )  # each (1, height, width)
            check_segmentation_maps(images, segmentation_maps)

        pixel_values = self._preprocess(
            images, do_pad=False, pad_size=None, return_tensors=None, **kwargs
        ).pixel_values
        sizes = [tuple(image.shape[-2:]) for image in pixel_values]
        data = {"pixel_values": pixel_values}
        if segmentation_maps is not None:
            data["labels"] = [
                self._prepare_labels(segmentation_map, size, do_reduce_labels)
                for segmentation_map, size in zip(segmentation_maps, sizes, strict=True)
            ]

        padded_size = (pad_size.height, pad_size.width) if pad_size else tuple(map(max, zip(*sizes, strict=True)))
        if do_pad and any(size != padded_size for size in sizes):
            data["pixel_values"], data["pixel_mask"] = self.pad(pixel_values, pad_size, return_mask=True)
            if segmentation_maps is not None:
                data["labels"] = self.pad(data["labels"], pad_size, fill_value=IGNORE_INDEX)
        if segmentation_maps is not None:
            data["labels"] = [labels[0] for labels in data["labels"]]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        if isinstance(image_url_or_urls, str) and (image := open_wide_picture(image_url_or_urls)) is not None:
            return image
        return super().fetch_images(image_url_or_urls)

    def convert_to_rgb(self, image: Any, input_data_format: str | ChannelDimension | None = None) -> Any:
        if hasattr(image, "shape"):  # not PIL, see `check_images`
            image = drop_alpha(image, input_data_format)
        # The oldest transformers that are supported take the image alone.
        return super().convert_to_rgb(image, *([] if input_data_format is None else [input_data_format]))

    def _prepare_labels(self, segmentation_map: Any, size: tuple[int, int], do_reduce_labels: bool | None) -> Any:
        """Segmentation map `(1, height, width)`, array or tensor, to int64 labels `(1, *size)`."""
        labels = torch.as_tensor(segmentation_map).to(torch.int64)
        if do_reduce_labels:
            if labels.max() > IGNORE_INDEX:
                raise ValueError(
                    f"`segmentation_maps` must have ids from 0 to {IGNORE_INDEX} with do_reduce_labels=True, got "
                    f"{labels.max().item()}: one of the ids would become {IGNORE_INDEX}, which is ignored. Subtract 1 "
                    "before, and leave the option out."
                )
            labels = reduce_labels(labels)
        return resize_labels(labels, size)

    def to_dict(self) -> dict:
        output = super().to_dict()
        if "auto_map" in output:
            # `save_pretrained` has recorded the backend that saves; the one that loads may be the other. Imported
            # here, as both import this file: by these lines transformers finds the code of both wherever it saves or
            # caches that of one.
            from .image_processing_cts import CtsImageProcessor
            from .image_processing_pil_cts import CtsImageProcessorPil

            backends = {"torchvision": CtsImageProcessor, "pil": CtsImageProcessorPil}
            names = {key: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for key, cls in backends.items()}
            output["auto_map"] = {"AutoImageProcessor": names}
        return output

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: "list[tuple[int, int]] | torch.Tensor | None" = None,
        return_segmentation_scores: bool = False,
    ) -> "list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]":
        """
        The model's output to one segmentation map per image.

        Args:
            outputs ([`CtsSemanticSegmenterOutput`]):
                Anything with `logits` of shape `(batch_size, num_labels, height, width)`. Where it also has
                `logits_sizes`, int64 of shape `(batch_size, 2)`, only so many rows and columns of an image's logits
                are used: the others lie on padding.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`, *optional*):
                Height and width of each map, in pixels: those of the image before preprocessing. If unset, maps have
                the size of the logits.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`):
                Whether to return the scores of all classes as well, which takes more time and memory.

        Returns:
            `list[torch.LongTensor]` of length `batch_size`, each `(height, width)` with class ids; or, with scores, a
            list of [`SemanticSegmentationPostProcessorOutput`] with the fields `segmentation` (the same map) and
            `segmentation_scores` (logits at the size of the map, `(num_labels, height, width)`).

        Raises:
            `ValueError`: if there is not one target size of two positive integers per image, or for logits that are
                NaN, which argmax would take for a class.
        """
        batch_logits = outputs.logits
        if target_sizes is not None:
            target_sizes = _check_target_sizes(target_sizes, len(batch_logits))
        logits_sizes = getattr(outputs, "logits_sizes", None)
        logits_sizes = [None] * len(batch_logits) if logits_sizes is None else logits_sizes.tolist()

        results = []
        for i, (logits, logits_size) in enumerate(zip(batch_logits, logits_sizes, strict=True)):
            if logits_size is not None:
                logits = logits[:, : logits_size[0], : logits_size[1]]
            if logits.isnan().any():  # costs little before upsampling
                raise ValueError(
                    f"`outputs.logits` must be numbers, got NaN for image {i}: look for NaN in the image and in the "
                    "weights of the model, and if there is none, run it in a dtype of larger range, such as bfloat16."
                )
            segmentation = logits.argmax(0) if target_sizes is None else upsampled_argmax(logits, target_sizes[i])
            if not return_segmentation_scores:
                results.append(segmentation)
                continue
            scores = logits if target_sizes is None else upsample(logits, target_sizes[i])
            data = {"segmentation": segmentation, "segmentation_scores": scores}
            results.append(SemanticSegmentationPostProcessorOutput(data=data))
        return results


def _check_target_sizes(target_sizes: Any, batch_size: int) -> list[tuple[int, int]]:
    """Target sizes, a sequence, array or tensor, as a list of pairs of int; refuses what is not one per image."""
    must = "`target_sizes` must be a list of one (height, width) per image, in whole pixels of 1 or more"
    advice = "pass the sizes of the images before preprocessing; PIL's `image.size` is (width, height)."
    sizes = _as_list(target_sizes)
    if sizes is None:
        raise ValueError(f"{must}, got {target_sizes!r}: {advice}")
    if len(sizes) != batch_size:
        raise ValueError(f"{must}, got {len(sizes)} for the logits of {batch_size} images: {advice}")
    pairs = [_as_list(size) for size in sizes]
    for size, pair in zip(sizes, pairs, strict=True):
        if pair is None or len(pair) != 2 or not all(map(_is_length, pair)):
            raise ValueError(f"{must}, got {size!r} among them: {advice}")
    return [(int(height), int(width)) for height, width in pairs]


def _as_list(values: Any) -> list | None:
    """The values of a sequence, array or tensor with one dimension or more; None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else None


def _is_length(length: Any) -> bool:
    """Whether a value, possibly that of an array or tensor without dimensions, is a whole number of pixels."""
    length = length.item() if getattr(length, "ndim", None) == 0 else length
    return isinstance(length, int | float) and length >= 1 and length % 1 == 0


__all__ = ["CtsImageProcessingMixin", "CtsImageProcessorKwargs"]
