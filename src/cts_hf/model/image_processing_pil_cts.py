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
"""Image processing for CTS with Pillow and NumPy, where torchvision is absent."""

from typing import Any

from transformers.image_processing_backends import PilBackend

from .image_processing_base_cts import CtsImageProcessingMixin


class CtsImageProcessorPil(CtsImageProcessingMixin, PilBackend):
    """
    Constructs a CTS image processor that works with Pillow and NumPy.

    Resizes images (by default to a shortest edge of 512 pixels, keeping the aspect ratio), scales them to [-1, 1],
    pads those of a batch to one size, and does the same with label maps. The options are those of
    [`CtsImageProcessorKwargs`] and of all image processors; each can also be given per call.
    """

    def _prepare_labels(self, segmentation_map: Any, size: tuple[int, int], do_reduce_labels: bool | None) -> Any:
        # A copy, because PyTorch does not take read-only or mirrored arrays.
        return super()._prepare_labels(segmentation_map.copy(), size, do_reduce_labels).numpy()


__all__ = ["CtsImageProcessorPil"]
