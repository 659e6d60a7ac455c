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
Positions of shared tokens that an encoder uses in every layer: rotary ones, as DINOv3's, and biases of pairs of
tokens, as BEiT's. A superpatch is where its center is.
"""

import math
import sys

import torch
from torch import nn

from .modeling_cts_encoder_call import EncoderCall, current_call, sharing_call
from .token_sharing import share


def before_rotary(module: nn.Module, args: tuple) -> None:
    """In training, positions are shifted and scaled at random: what is drawn is drawn again for the superpatches."""
    call = current_call()
    if call is not None:
        call.random_state = _random_state(args[0].device) if module.training else None


def after_rotary(
    module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines, `(num_patches, head_dim)`, to `(batch_size, 1, num_tokens, head_dim)`."""
    call = sharing_call()
    if call is None:
        return None
    call.rotary = output
    batch_size = call.layout.token_source.shape[0]
    angles = _superpatch_angles(module, call, output[0].device)
    cos, sin = (
        share(
            of_patches[None].expand(batch_size, -1, -1),
            of_superpatches.to(of_patches.dtype)[None].expand(batch_size, -1, -1),
            call.layout,
        )[:, None]
        for of_patches, of_superpatches in zip(output, (angles.cos(), angles.sin()), strict=True)
    )
    return cos, sin


def _superpatch_angles(module: nn.Module, call: EncoderCall, device: torch.device) -> torch.Tensor:
    """Angles at the centers of superpatches, `(num_superpatches, head_dim)`, computed as those of patches."""
    # Borders of an image are at -1 and 1; the center of superpatch i is between patches 2 i and 2 i + 1.
    rows, columns = (
        torch.arange(1, side // 2 * 2, 2, dtype=torch.float32, device=device) / side * 2 - 1 for side in call.grid
    )
    centers = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    if module.training:
        augment = sys.modules[type(module).__module__].augment_patches_center_coordinates
        config = module.config
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            _set_random_state(call.random_state, device)
            centers = augment(
                centers,
                shift=config.pos_embed_shift,
                jitter=config.pos_embed_jitter,
                rescale=config.pos_embed_rescale,
            )
    angles = 2 * math.pi * centers[:, :, None] * module.inv_freq.to(device)
    return angles.flatten(1, 2).tile(2)


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def before_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The bias of all pairs of patches is not wanted: that of one or two patches costs nothing."""
    if sharing_call() is None:
        return None
    # Upstream keeps the indices of a size, and those of inference mode would fail in training.
    is_inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return ((1, 1) if is_inference else (1, 2),), {}


def after_bias(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """
    The bias of pairs of tokens, `(batch_size, num_heads, 1 + num_tokens, 1 + num_tokens)`, at the displacement of
    their centers: the table, with a linear step in between, has a value for every multiple of half a patch.
    """
    call = sharing_call()
    if call is None:
        return None
    if call.bias_index is None:
        call.bias_index = _bias_index(call)
    (rows, columns), table = call.grid, _bias_table(module)
    # In this order, as upstream.
    height, width = (2 * side - 1 for side in module.window_size)
    values = table[:-3].reshape(1, width, height, -1).permute(0, 3, 1, 2)
    values = nn.functional.interpolate(values, size=(2 * rows - 1, 2 * columns - 1), mode="bilinear")
    values = nn.functional.interpolate(
        values, size=(4 * rows - 3, 4 * columns - 3), mode="bilinear", align_corners=True
    )
    values = torch.cat([values.flatten(2)[0], table[-3:].t()], dim=1)  # (heads, displacements)
    index = call.bias_index.to(values.device)
    # `gather` takes half the time of `index_select` here.
    bias = values.gather(1, index.flatten().expand(len(values), -1)).unflatten(1, index.shape)
    return bias.transpose(0, 1)


def _bias_table(module: nn.Module) -> torch.Tensor:
    """`(num_displacements, num_heads)`; accelerate loads weights that it offloads for the module's forward only."""
    offload = getattr(module, "_hf_hook", None)
    if offload is None:
        return module.relative_position_bias_table
    offload.pre_forward(module)
    table = module.relative_position_bias_table
    offload.post_forward(module, None)
    return table


def _bias_index(call: EncoderCall) -> torch.Tensor:
    """Which displacement pairs of tokens have, `(batch_size, 1 + num_tokens, 1 + num_tokens)`."""
    (rows, columns), source = call.grid, call.layout.token_source

    def positions(first: int, step: int, shape: tuple[int, int]) -> torch.Tensor:
        axes = (first + step * torch.arange(side, device=source.device) for side in shape)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)

    # In half patches, from the center of the first patch.
    centers = torch.cat([positions(0, 2, (rows, columns)), positions(1, 4, (rows // 2, columns // 2))])
    width = 4 * columns - 3
    flat = (centers[:, 0] * width + centers[:, 1])[source]  # (B, T)
    index = flat[:, :, None] - flat[:, None, :] + (2 * rows - 2) * width + 2 * columns - 2
    # Behind them: the class token to a token, a token to the class token, and the class token to itself.
    entries = (4 * rows - 3) * width
    index = nn.functional.pad(index, (1, 0, 1, 0))
    index[:, 0, :], index[:, :, 0], index[:, 0, 0] = entries, entries + 1, entries + 2
    return index


__all__ = ["after_bias", "after_rotary", "before_bias", "before_rotary"]
