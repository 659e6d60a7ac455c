# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The weights of mmsegmentation's SETR (Zheng et al., CVPR 2021): `VisionTransformer` with `SETRUPHead`, and auxiliary
heads of the same kind.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .weight_names import count_blocks, original_name, rename, rename_mmsegmentation, require_weight


# Our names in a decoder to mmsegmentation's.
_DECODER_NAMES = (
    (r"^decode_head\.auxiliary_layernorms\.(\d+)\.", r"auxiliary_head.\1.norm."),
    (r"^decode_head\.auxiliary_heads\.(\d+)\.layers\.(\d+)\.", r"auxiliary_head.\1.up_convs.\2.0."),
    (r"^decode_head\.auxiliary_heads\.(\d+)\.classifier\.", r"auxiliary_head.\1.conv_seg."),
    (r"^decode_head\.head\.layers\.(\d+)\.", r"decode_head.up_convs.\1.0."),
    (r"^decode_head\.head\.classifier\.", "decode_head.conv_seg."),
    (r"\.batch_norm\.", ".bn."),
)


def is_setr(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights under mmsegmentation's names are those of a SETR."""
    return any(name.startswith("decode_head.up_convs.") for name in state_dict)


def rename_setr(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The weights of mmsegmentation's SETR, those of the encoder under the original names. What its head normalizes first
    is the output of the encoder, so it is the last normalization of the encoder here.
    """
    encoder = {name: value for name, value in state_dict.items() if name.startswith("backbone.")}
    decoder = {
        name.replace("decode_head.norm.", "encoder.norm."): value
        for name, value in state_dict.items()
        if name not in encoder
    }
    return {**rename_mmsegmentation(encoder), **decoder}


def setr_name(name: str) -> str:
    """The name, after [`rename_setr`], of a weight of [`CtsForSemanticSegmentation`]."""
    return rename(name, _DECODER_NAMES) if name.startswith("decode_head.") else original_name(name)


def setr_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    The options of [`CtsConfig`] for the decoder that follow from the shapes of a SETR's weights. How much a head
    upsamples is in no shape: by 4 after convolutions of side 1, by 2 after those of side 3, as in mmsegmentation's
    configurations.

    Raises:
        ValueError: If a weight that decides one of them is missing or misshaped, or if they are those of SETR-MLA.
    """
    if any(name.startswith("neck.") for name in state_dict):
        raise ValueError(
            "The weights must be of SETR-Naive or SETR-PUP, got those of SETR-MLA: mmsegmentation runs its encoder "
            "without class token, which this one always has. Train `decoder_type='setr_mla'` here instead."
        )
    num_auxiliary = count_blocks(state_dict, "auxiliary_head.")
    options: dict[str, Any] = {
        "num_labels": len(require_weight(state_dict, "decode_head.conv_seg.weight", num_dims=4)),
    }
    if not num_auxiliary:
        options["auxiliary_loss_weight"] = 0
    channels, _, side, _ = require_weight(state_dict, "decode_head.up_convs.0.0.conv.weight", num_dims=4).shape
    if num_auxiliary:
        options["auxiliary_num_upsampling_layers"] = count_blocks(state_dict, "auxiliary_head.0.up_convs.")
    return {
        **options,
        "decoder_type": "setr_naive" if side == 1 else "setr_pup",
        "decoder_hidden_size": channels,
        "decoder_num_upsampling_layers": count_blocks(state_dict, "decode_head.up_convs."),
    }


__all__ = ["is_setr", "rename_setr", "setr_name", "setr_shapes"]
