# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The weights of mmsegmentation's SETR (Zheng et al., CVPR 2021): `VisionTransformer` with `SETRUPHead`, or with
`MLANeck` and `SETRMLAHead`, and their auxiliary heads.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .weight_names import count_blocks, original_name, rename, rename_mmsegmentation, require_weight


# Our names in a decoder to mmsegmentation's, by whether it is the multi-level aggregation.
_UPSAMPLING_NAMES = (
    (r"^decode_head\.auxiliary_layernorms\.(\d+)\.", r"auxiliary_head.\1.norm."),
    (r"^decode_head\.auxiliary_heads\.(\d+)\.layers\.(\d+)\.", r"auxiliary_head.\1.up_convs.\2.0."),
    (r"^decode_head\.auxiliary_heads\.(\d+)\.classifier\.", r"auxiliary_head.\1.conv_seg."),
    (r"^decode_head\.head\.layers\.(\d+)\.", r"decode_head.up_convs.\1.0."),
    (r"^decode_head\.head\.classifier\.", "decode_head.conv_seg."),
    (r"\.batch_norm\.", ".bn."),
)
_AGGREGATION_NAMES = (
    (r"^decode_head\.layernorms\.", "neck.norm."),
    (r"^decode_head\.projections\.", "neck.mla.channel_proj."),
    (r"^decode_head\.aggregations\.", "neck.mla.feat_extract."),
    (r"^decode_head\.layers\.", "decode_head.up_convs."),
    (r"^decode_head\.classifier\.", "decode_head.conv_seg."),
    (r"^decode_head\.auxiliary_heads\.(\d+)\.", r"auxiliary_head.\1.conv_seg."),
    (r"\.batch_norm\.", ".bn."),
)


def is_setr(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights under mmsegmentation's names are those of a SETR."""
    return any(name.startswith("decode_head.up_convs.") for name in state_dict)


def rename_setr(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The weights of mmsegmentation's SETR, those of the encoder under the original names. What the head or the neck
    normalizes last is the output of the encoder, so it is the last normalization of the encoder here.
    """
    num_levels = count_blocks(state_dict, "neck.norm.")
    final_norm = f"neck.norm.{num_levels - 1}." if num_levels else "decode_head.norm."
    encoder = {name: value for name, value in state_dict.items() if name.startswith("backbone.")}
    decoder = {
        re.sub(f"^{re.escape(final_norm)}", "encoder.norm.", name): value
        for name, value in state_dict.items()
        if name not in encoder
    }
    return {**rename_mmsegmentation(encoder), **decoder}


def setr_names(decoder_type: str) -> Callable[[str], str]:
    """A function that gives the name, after [`rename_setr`], of a weight of [`CtsForSemanticSegmentation`]."""
    rules = _AGGREGATION_NAMES if decoder_type == "setr_mla" else _UPSAMPLING_NAMES

    def source_name(name: str) -> str:
        return rename(name, rules) if name.startswith("decode_head.") else original_name(name)

    return source_name


def setr_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    The options of [`CtsConfig`] for the decoder that the shapes of a SETR's weights tell. How much a head
    upsamples is in no shape: by 4 after convolutions of side 1, by 2 after those of side 3, as in mmsegmentation's
    configurations.

    Raises:
        ValueError: If a weight that tells is missing or misshaped.
    """
    num_auxiliary = count_blocks(state_dict, "auxiliary_head.")
    options: dict[str, Any] = {
        "num_labels": len(require_weight(state_dict, "decode_head.conv_seg.weight", num_dims=4)),
    }
    if not num_auxiliary:
        options["auxiliary_loss_weight"] = 0
    if any(name.startswith("neck.") for name in state_dict):
        weight = require_weight(state_dict, "neck.mla.channel_proj.0.conv.weight", num_dims=4)
        return {**options, "decoder_type": "setr_mla", "decoder_hidden_size": len(weight)}
    channels, _, side, _ = require_weight(state_dict, "decode_head.up_convs.0.0.conv.weight", num_dims=4).shape
    if num_auxiliary:
        options["auxiliary_num_upsampling_layers"] = count_blocks(state_dict, "auxiliary_head.0.up_convs.")
    return {
        **options,
        "decoder_type": "setr_naive" if side == 1 else "setr_pup",
        "decoder_hidden_size": channels,
        "decoder_num_upsampling_layers": count_blocks(state_dict, "decode_head.up_convs."),
    }


__all__ = ["is_setr", "rename_setr", "setr_names", "setr_shapes"]
