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
"""What a model knows of its decoder, whichever it is."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .modeling_cts_grid import PatchGrid
from .token_sharing import TokenLayout, unshare


class CtsDecoder(nn.Module):
    """
    A decoder says what it takes; [`CtsForSemanticSegmentation`] hands it over, and unshares before or behind it. A new
    decoder is a subclass that is built from a [`CtsConfig`], with an entry in `DECODERS` and in `DECODER_TYPES`.

    Attributes:
        takes_maps (`bool`): Whether it takes feature maps of all patches, as convolutions need them. Otherwise it
            takes the tokens, shared or not, and its logits are unshared.
        layer_indices (`tuple[int, ...]`): Encoder layers, counted from 0, whose outputs it takes besides the
            normalized output of the encoder.
    """

    takes_maps: bool = False
    layer_indices: tuple[int, ...] = ()

    def forward(
        self,
        hidden_states: Sequence[torch.Tensor],
        mask: torch.Tensor | None = None,
        with_auxiliary: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (sequence of `torch.Tensor`): The outputs of the layers in `layer_indices`, and last the
                encoder's. Each is `(batch_size, num_tokens, hidden_size)`, or `(batch_size, hidden_size, rows,
                columns)` of patches if `takes_maps`; in the dtype of the encoder, which need not be the decoder's.
            mask (`torch.BoolTensor`, *optional*): Of a batch of images of different sizes, `False` at filling: of
                tokens, `(batch_size, num_tokens)`, or of superpatches, `(batch_size, superpatch_rows,
                superpatch_columns)`, if `takes_maps`.
            with_auxiliary (`bool`, *optional*, defaults to `False`): Whether the loss is wanted, which may need more
                than the logits.

        Returns:
            `tuple[torch.Tensor, ...]`: The logits, and behind them those that only the loss sees. Each is
            `(batch_size, num_tokens, num_labels)`, or `(batch_size, num_labels, n * rows, n * columns)` with any whole
            number n if `takes_maps`.
        """
        raise NotImplementedError

    def loss(self, logits: Sequence[torch.Tensor], criterion: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits (sequence of `torch.Tensor`): Those of `forward`, as maps `(batch_size, num_labels, height, width)`.
            criterion (`Callable`): Gives the cross-entropy of such logits, upsampled to the labels.
        """
        return criterion(logits[0])

    def init_own_weights(self, std: float) -> None:
        """Initializes parameters that lie in no other module, with `transformers.initialization`."""


def unshare_to_map(
    values: torch.Tensor, layout: TokenLayout, grid: PatchGrid, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Values of tokens, `(batch_size, num_tokens, dim)`, to a map of patches, `(batch_size, dim, rows, columns)`: that of
    the token that stands for a patch, plus a residual of patches, `(batch_size, num_patches, dim)`, if there is one.
    """
    patches = unshare(values, layout)
    if residual is not None:
        patches = patches + residual.to(patches)
    return patches.transpose(1, 2).unflatten(2, grid.shape())


def logits_per_side(logits: torch.Tensor, grid: PatchGrid) -> int:
    """How many logits a decoder gives for a patch, along each side."""
    return logits.shape[2] // grid.shape()[0]


def crop_map(logits: torch.Tensor, grid: PatchGrid) -> torch.Tensor:
    """Cuts off the logits, of whole superpatches, that lie beyond the images."""
    rows, columns = grid.begun_patches(logits_per_side(logits, grid))
    # Contiguous, as upsampling takes several times as long with the classes last, and rounds differently.
    return logits[:, :, :rows, :columns].contiguous()


__all__ = ["CtsDecoder", "crop_map", "logits_per_side", "unshare_to_map"]
