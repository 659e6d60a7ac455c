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
One call of a vision transformer that shares tokens: what the hooks on its modules tell each other, safe with threads,
gradient checkpointing and `torch.compile`.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import CompileableContextVar

from .modeling_cts_grid import shrink
from .token_sharing import TokenLayout, share, unshare


class EncoderCall:
    """
    What the hooks of one call of a model tell each other.

    Args:
        layout ([`TokenLayout`], *optional*):
            The tokens to encode images with; `None` to share nothing. Derived classes choose them by the images.
        unshares (`bool`, *optional*, defaults to `True`):
            Whether the encoder returns states of all patches. Otherwise they are those of the tokens.
    """

    grid: tuple[int, int] | None = None
    # What hooks leave for later ones: see there.
    bias_index: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    random_state: torch.Tensor | None = None
    unshares_early: bool = False

    def __init__(self, layout: TokenLayout | None = None, unshares: bool = True) -> None:
        self.layout, self.unshares = layout, unshares
        self.is_projecting = False

    def choose(self, images: torch.Tensor, grid: tuple[int, int]) -> TokenLayout | None:
        """The tokens of images, `(batch_size, num_channels, height, width)`, of a grid of rows and columns."""
        return self.layout

    def begin(
        self, projection: nn.Module, patch_size: tuple[int, int], images: torch.Tensor, projected: torch.Tensor
    ) -> None:
        """Chooses the tokens, once a convolution has made patches, of this height and width, of images."""
        self.grid = tuple(projected.shape[-2:])
        self.layout = self.choose(images, self.grid)
        self.bias_index, self._unsharing = None, {}
        if self.layout is not None:
            self._projection, self._patch_size = projection, patch_size
            self._images, self._projected = images, projected

    def share_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Prefix tokens and patches, `(batch_size, num_prefix + num_patches, dim)`, to the tokens of the layout."""
        num_patches = self.grid[0] * self.grid[1]
        prefix, patches = tokens[:, :-num_patches], tokens[:, -num_patches:]
        # Whatever positions a model adds, of any interpolation: what the tokens have over the projection.
        dtype = torch.promote_types(patches.dtype, torch.float32)
        # Of each image by itself, or rounding would make them depend on the first one.
        positions = patches.to(dtype) - self._projected.flatten(2).transpose(1, 2).to(dtype)
        superpatches = self._project_superpatches() + mean_of_four(positions, self.grid).to(patches.dtype)
        self._images = self._projected = None  # kept for nothing else
        return torch.cat([prefix, share(patches, superpatches, self.layout)], dim=1)

    def _project_superpatches(self) -> torch.Tensor:
        """A superpatch is projected as a patch of the image at half resolution."""
        patch_height, patch_width = self._patch_size
        height, width = (2 * (length // 2) for length in self.grid)
        halved = shrink(self._images[..., : height * patch_height, : width * patch_width], 2)
        self.is_projecting = True
        projected = self._projection(halved)
        self.is_projecting = False
        return projected.flatten(2).transpose(1, 2)

    def unshare_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_prefix + num_tokens, dim)` to `(batch_size, num_prefix + num_patches, dim)`."""
        num_prefix = tokens.shape[1] - self.layout.token_source.shape[1]
        if num_prefix not in self._unsharing:
            self._unsharing[num_prefix] = on_device(_prepend(self.layout, num_prefix), tokens.device)
        return unshare(tokens, self._unsharing[num_prefix])


_call = CompileableContextVar("cts_encoder_call")


def current_call() -> EncoderCall | None:
    """The call that runs in this thread and task, if there is one."""
    call, frame = _call.get() or (None, None)
    if frame is not None and not _is_running(frame):
        return None
    return call


def begin_call(call: EncoderCall, frame: FrameType | None = None) -> Any:
    """
    Makes hooks find `call`, until `end_call` is given what this returns.

    Args:
        call ([`EncoderCall`]): What begins.
        frame (`FrameType`, *optional*): Of the function that the call runs in: once that is left, the call is over.
            Given where `end_call` may not run, as hooks after a forward do not if a `KeyboardInterrupt` ends it.
    """
    if not torch.compiler.is_compiling():
        if _call.compiling:
            _call.reset(None)  # of an export that failed
        if current_call() is None:
            _call.set(None)  # of a call that was interrupted, whose frames hold images and states
    return _call.set((call, frame))


def end_call(token: Any) -> None:
    """Undoes `begin_call`."""
    _call.reset(token)


def sharing_call() -> EncoderCall | None:
    """The call that runs, if tokens are shared in it."""
    call = current_call()
    return call if call is not None and call.layout is not None else None


def _is_running(frame: FrameType) -> bool:
    running = sys._getframe()
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None


def on_device(layout: TokenLayout, device: torch.device) -> TokenLayout:
    """The layout with its indices on another device, for models that are spread over several."""
    if layout.token_source.device == device:
        return layout
    return TokenLayout(*(value if value is None else value.to(device) for value in layout.to_tuple()))


def mean_of_four(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Means over superpatches, `(batch_size, num_superpatches, ...)`, of values of patches, `(batch_size, num_patches,
    ...)`; rows and columns that lie in no superpatch are left out.
    """
    rows, columns = grid[0] // 2, grid[1] // 2
    cells = values.unflatten(1, grid)[:, : 2 * rows, : 2 * columns]
    return cells.unflatten(2, (columns, 2)).unflatten(1, (rows, 2)).mean(dim=(2, 4)).flatten(1, 2)


def _prepend(layout: TokenLayout, num_prefix: int) -> TokenLayout:
    """The layout of sequences that start with `num_prefix` tokens and patches more, which stand for themselves."""
    prefix = torch.arange(num_prefix, device=layout.patch_to_token.device).expand(layout.patch_to_token.shape[0], -1)
    mask = layout.token_mask
    return TokenLayout(
        layout.shared_superpatches,
        torch.cat([prefix, layout.token_source + num_prefix], dim=1),
        torch.cat([prefix, layout.patch_to_token + num_prefix], dim=1),
        None if mask is None else torch.cat([torch.ones_like(prefix, dtype=torch.bool), mask], dim=1),
    )


class _CheckpointInCall:
    """
    A function for gradient checkpointing that runs layers again, in the backward pass, in the call that they were a
    part of. An object and no closure, so that models can be copied and pickled.
    """

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None:
            return self.checkpoint(function, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            token = begin_call(call)
            try:
                return function(*args, **kwargs)
            finally:
                end_call(token)

        return self.checkpoint(run, *args, **kwargs)


def keep_call_in_checkpoints(model: nn.Module) -> None:
    """Makes layers that are checkpointed find their call in the backward pass."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointInCall):
            module._gradient_checkpointing_func = _CheckpointInCall(checkpoint)


def forget_call_in_checkpoints(model: nn.Module) -> None:
    """Undoes `keep_call_in_checkpoints`."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, _CheckpointInCall):
            module._gradient_checkpointing_func = checkpoint.checkpoint


__all__ = [
    "EncoderCall",
    "begin_call",
    "current_call",
    "end_call",
    "forget_call_in_checkpoints",
    "keep_call_in_checkpoints",
    "mean_of_four",
    "on_device",
    "sharing_call",
]
