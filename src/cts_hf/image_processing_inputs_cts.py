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
"""What the pixel values of pictures mean: 16-bit values are scaled to 8 bits, values of an unknown range refused."""

from typing import TYPE_CHECKING

import numpy as np
from transformers.utils import is_vision_available


if is_vision_available():
    from PIL import Image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# Formats whose integer pictures (mode "I") always hold 16-bit values: so older versions of Pillow open these.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# Grey levels from 0 to 255 that stay below are black; values from 0 to 1, even if sharpened or interpolated, do so too.
_BLACK = 2


def to_eight_bit(image: "PILImage") -> "PILImage":
    """
    A PIL image whose channels have 8 bits. Only grey pictures can have more, of these modes:

    - "I;16" and its variants have 16 bits: the upper 8 are taken, so that 65535 becomes 255, as Pillow does with
      colour pictures of 16 bits. What uses fewer bits of the 16 (12 bits of some cameras) becomes dark: scale it first.
    - "I" has 16 bits as well where it was read from PNG or PGM. Else its values must lie in 0 to 255 and are taken as
      they are.
    - "F" must hold grey levels from 0 to 255 and not those from 0 to 1; fractions are dropped.

    Args:
        image (`PIL.Image.Image`): of any mode.

    Returns:
        `PIL.Image.Image`: of mode "L" for the modes above, else `image` itself.

    Raises:
        `ValueError`: values that do not lie in the range of their mode, or may have been meant for another.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in _SIXTEEN_BIT_FORMATS:
        return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
    check_values(values, 255, f"the picture has mode {image.mode!r} and values", "Save it as an 8-bit picture.")
    return Image.fromarray(values.astype(np.uint8))


def check_values(values: np.ndarray, highest: float, what: str, advice: str) -> None:
    """
    Refuses values outside of 0 to `highest`, and fractions that may have been meant for 0 to 1 instead.

    Args:
        values (`np.ndarray`): integers or floats.
        highest (`float`): the value of white.
        what (`str`): what the message says of the values, before their range.
        advice (`str`): what the message ends with.

    Raises:
        `ValueError`: see above.
    """
    low, high = float(values.min()), float(values.max())
    # Values that round to a level inside the range are inside.
    half = highest / 510
    if not (low >= -half and high <= highest + half):  # NaN compares as false
        raise ValueError(f"{what} from {low:g} to {high:g}, which must lie in 0 to {highest:g}. {advice}")
    if values.dtype.kind == "f" and highest > _BLACK > high > 0:
        raise ValueError(
            f"{what} from {low:g} to {high:g}, which is black where white is {highest:g}, and looks like 0 to 1. "
            f"{advice}"
        )
