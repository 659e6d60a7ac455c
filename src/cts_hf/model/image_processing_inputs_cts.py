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
"""
What an image processor takes: 16-bit values are scaled to 8 bits, values whose range is wrong or unknown are refused,
and so are images that resizing would blow up.
"""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import is_vision_available


if is_vision_available():
    from PIL import Image, ImageOps

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    Pixels = np.ndarray | torch.Tensor

# What the modes of pictures with more than 8 bits start with, see `to_eight_bit`.
_WIDE_MODES = ("I", "F")
# Formats whose pictures of mode "I" hold 16-bit values: so older versions of Pillow open them.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# An image with no value of this size is black, by the value of white. What was meant for a lower white stays below it,
# too: values from 0 to 1, even those that sharpening or interpolation has moved above 1, and those from 0 to 255.
_BLACK = {255: 2, 65535: 256}

# What to do about values out of range, by the value of white.
_ADVICE = {
    65535: "convert what holds 0 to 255 to 8 bits, as by `.astype('uint8')`; scale others to 0 to 65535.",
    255: "pass do_rescale=False for values from 0 to 1; clip or scale others first.",
    1: "leave do_rescale=True for values from 0 to 255; clip or scale others first.",
}

# `size={"shortest_edge": n}` leaves the other edge to the aspect ratio. So many pixels, 16384 patches of 8 x 8, take
# seconds and some hundred megabytes in a small model, both of which grow with the square; a long and narrow image may
# only have more where one of this aspect ratio has.
MAX_PIXELS = 2**20
MAX_ASPECT_RATIO = 16


def open_wide_picture(path: str) -> "PILImage | None":
    """
    The upright picture in a local file if its values may have more than 8 bits, for [`to_eight_bit`]; else None. What
    transformers opens itself is clipped to white.
    """
    if not os.path.isfile(path):
        return None
    with Image.open(path) as image:
        if not image.mode.startswith(_WIDE_MODES):
            return None
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # says what the values of mode "I" are
        return upright


def to_eight_bit(image: "PILImage") -> "PILImage":
    """
    A PIL image whose channels have 8 bits. Those of mode "1" have fewer, and their white becomes 255. Only grey
    pictures can have more, of these modes:

    - "I;16" and its variants have 16 bits: the upper 8 are taken, so that 65535 becomes 255, as Pillow does with
      color pictures of 16 bits. What uses fewer of the 16 (10 or 12 bits of some cameras) becomes dark: scale it
      first. Where that leaves nothing but black of a picture that is not, it is refused.
    - "I" has 16 bits as well where it was read from PNG or PGM. Else its values must lie in 0 to 255, and are taken
      as they are.
    - "F" must hold grey levels from 0 to 255 and not values from 0 to 1; fractions are dropped.

    Args:
        image (`PIL.Image.Image`): of any mode.

    Returns:
        `PIL.Image.Image`: of mode "L" for the modes above, else `image` itself.

    Raises:
        `ValueError`: values that do not lie in the range of their mode, or may have been meant for another.
    """
    if image.mode == "1":
        return image.convert("L")
    if not image.mode.startswith(_WIDE_MODES):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in _SIXTEEN_BIT_FORMATS:
        values = _upper_bits(values.astype(np.uint16), f"A picture of mode {image.mode!r}")
    else:
        advice = "save it as an 8-bit picture, with 0 as black and 255 as white."
        check_values(values, 255, f"A picture of mode {image.mode!r}", advice)
    return Image.fromarray(values.astype(np.uint8))


def to_opaque_rgb(image: "PILImage") -> "PILImage":
    """
    A PIL image of any mode in RGB, see [`to_eight_bit`]. Transparency is dropped: what was drawn below it shows.
    transformers would lay it on white, unless it opens a file itself.
    """
    image = to_eight_bit(image)
    image.load()  # may find transparency
    if "transparency" in image.info:  # of a color, which conversion would keep
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def drop_alpha(image: "Pixels", input_data_format: str | None) -> "Pixels":
    """
    An array or tensor of three dimensions without its fourth channel, if it has one: transparency is dropped, as by
    [`to_opaque_rgb`].
    """
    input_data_format = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    return image[..., :3] if input_data_format == ChannelDimension.LAST else image[:3]


def white_level(do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Any) -> int | None:
    """
    The value of white that the options of an image processor expect: 255 to be rescaled to 0 to 1, 1 where
    normalization alone expects 0 to 1, and None where the options do not tell.
    """
    if do_rescale:
        return 255 if abs(rescale_factor * 255 - 1) < 0.01 else None
    means = np.atleast_1d(image_mean) if do_normalize and image_mean is not None else np.zeros(1)
    return 1 if (means > 0).all() and (means < 1).all() else None


def check_images(images: list, white: int | None, do_convert_rgb: bool | None) -> list:
    """
    Images whose black is 0 and whose white is `white`, as the image processor's options expect.

    Args:
        images (`list` of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): of any size.
        white (`int`, *optional*): what [`white_level`] gives; with None, values are not looked at.
        do_convert_rgb (`bool`, *optional*): whether PIL images are to be converted, see [`to_opaque_rgb`].

    Returns:
        `list`: the images, 16-bit and boolean values scaled to 8 bits where white is 255.

    Raises:
        `ValueError`: images without pixels, values outside of 0 to `white`, fractions from 0 to 1 where white is 255,
            and 16-bit values that were meant as 8-bit ones. On an accelerator values are checked there, so that the
            host need not wait.
    """
    checked = []
    for i, image in enumerate(images):
        is_array = isinstance(image, np.ndarray | torch.Tensor)
        if is_array and "complex" in str(image.dtype):
            raise ValueError(f"Image {i} must have real values, got {image.dtype}: take the part that is the image.")
        if isinstance(image, np.ndarray):
            image = np.ascontiguousarray(image)  # PyTorch takes no mirrored arrays
        shape = tuple(image.shape) if is_array else (image.height, image.width)
        if 0 in shape:
            raise ValueError(f"Image {i} must have pixels, got the shape {shape}. Leave it out.")
        if not is_array:  # PIL
            if do_convert_rgb:
                image = to_opaque_rgb(image)
            elif white == 255 and image.mode != "F":
                image = to_eight_bit(image)
            values = np.asarray(image)
        else:
            image = values = _scaled_integers(image, f"Image {i}") if white == 255 else image
        if white is not None and not (white == 255 and str(values.dtype).endswith("uint8")):
            check_values(values, white, f"Image {i}", _ADVICE[white])
        checked.append(image)
    return checked


def in_native_order(maps: Any) -> Any:
    """Segmentation maps, one or a list of them, with arrays in the byte order of this machine, which PyTorch wants."""
    if isinstance(maps, list | tuple):
        return [in_native_order(entry) for entry in maps]
    return maps.astype(maps.dtype.newbyteorder("=")) if isinstance(maps, np.ndarray) else maps


def _scaled_integers(values: "Pixels", name: str) -> "Pixels":
    """Values of 16 bits without sign, and boolean ones, scaled to uint8; others as they are."""
    if isinstance(values, torch.Tensor):
        if values.dtype == torch.bool:
            return values.to(torch.uint8) * 255
        return _upper_bits(values, name) if values.dtype == torch.uint16 else values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    return _upper_bits(values, name) if values.dtype.kind == "u" and values.dtype.itemsize == 2 else values


def _upper_bits(values: "Pixels", name: str) -> "Pixels":
    """The upper 8 bits of uint16 values, as uint8; refuses values from 0 to 255, which have none."""
    check_values(values, 65535, name, _ADVICE[65535])
    if isinstance(values, torch.Tensor):
        return (values.to(torch.int32) >> 8).to(torch.uint8)  # uint16 itself cannot be shifted
    return (values >> 8).astype(np.uint8)


def check_values(values: "Pixels", white: int, name: str, advice: str) -> None:
    """
    Refuses values that do not lie in 0 to `white` (to half a grey level), NaN included, and those that are black
    there and look like values for a lower white: fractions from 0 to 1 where white is 255, integers from 0 to 255
    where it is 65535. Zeros are black in all ranges and pass.

    Args:
        values (`np.ndarray` or `torch.Tensor`): integers or floats.
        white (`int`): the value of white, 1, 255 or 65535.
        name (`str`): what the message calls the picture.
        advice (`str`): what the message says to do.

    Raises:
        `ValueError`: see above. On an accelerator the check runs there, asynchronously.
    """
    if torch.compiler.is_compiling():
        return
    must = f"{name} must have values from 0 to {white}"
    is_tensor = isinstance(values, torch.Tensor)
    if is_tensor:
        is_float = values.is_floating_point()
        # Not all operations exist for every type: these do.
        values = values.float() if is_float else values.long()
    else:
        is_float = values.dtype.kind == "f"
    low, high = values.min(), values.max()
    half = white / 510
    inside = (low >= -half) & (high <= white + half)
    # Integers are black at 0 and 1 of 255 as well, but then they are of a type for levels.
    is_ambiguous = white == 65535 or (white == 255 and is_float)
    in_range_only_as_black = (high > 0) & (high < _BLACK[white]) if is_ambiguous else high != high
    if is_tensor and values.device.type in ("cuda", "meta"):
        torch._assert_async(inside & ~in_range_only_as_black, f"{must}: {advice}")
        return
    got = f"{must}, got {float(low):g} to {float(high):g}"
    if not inside:
        raise ValueError(f"{got}: {advice}")
    if in_range_only_as_black:
        raise ValueError(f"{got}, which is black there and looks like 0 to {_BLACK[white] - 1}: {advice}")


def check_segmentation_maps(images: list, segmentation_maps: list) -> None:
    """Refuses maps (arrays or tensors) that are not one of integers for each image, of its size."""
    if len(images) != len(segmentation_maps):
        raise ValueError(
            f"Got {len(images)} images and {len(segmentation_maps)} segmentation maps. Pass one map for each image."
        )
    for i, (image, segmentation_map) in enumerate(zip(images, segmentation_maps, strict=True)):
        if segmentation_map.shape[0] != 1:
            raise ValueError(
                f"Segmentation map {i} has the shape {tuple(segmentation_map.shape)}, but a map has one class id per "
                "pixel, shape (height, width). Open it without converting it to RGB, or turn its colors into class "
                "ids."
            )
        if "float" in str(segmentation_map.dtype):
            raise ValueError(
                f"Segmentation map {i} has the type {segmentation_map.dtype}, but class ids are integers. Convert it, "
                "for example with `.astype('int64')`."
            )
        if image.shape[-2:] != segmentation_map.shape[-2:]:
            raise ValueError(
                f"Image {i} has (height, width) = {tuple(image.shape[-2:])}, its segmentation map "
                f"{tuple(segmentation_map.shape[-2:])}. They must be equal: check that the two belong together."
            )


def check_resized_size(size: tuple[int, int], shortest_edge: int, name: str) -> None:
    """
    Refuses an image whose shape, rather than `shortest_edge`, makes it cost gigabytes once resized: 1 x 900 pixels
    become 64 x 57600 at a shortest edge of 64.

    Args:
        size (`tuple[int, int]`): height and width of the image, in pixels.
        shortest_edge (`int`): to which it is to be resized, in pixels, its aspect ratio kept.
        name (`str`): what the message calls the image.

    Raises:
        `ValueError`: an image that would have over 2**20 pixels, and be over 16 times as long as wide.
    """
    short, long = sorted(size)
    limit = max(MAX_PIXELS, MAX_ASPECT_RATIO * shortest_edge**2)
    if shortest_edge**2 * long > limit * short:
        raise ValueError(
            f"{name} must have at most {limit} pixels once resized to a shortest edge of {shortest_edge}, got "
            f"{size[0]} x {size[1]} pixels, of which it makes {shortest_edge} x {shortest_edge * long // short}: cut "
            "this long and narrow image into pieces, or choose a smaller size."
        )
