# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights of other implementations in, weights in the original layout out."""

import warnings
from typing import Any

from .converters import (
    convert_mmsegmentation,
    convert_policy,
    convert_segmenter,
    load_policy_backbone,
    load_vit_weights,
    to_original,
)


__all__ = [
    "convert_mmsegmentation",
    "convert_policy",
    "convert_segmenter",
    "load_policy_backbone",
    "load_vit_weights",
    "to_original",
]


def __getattr__(name: str) -> Any:
    if name == "load_policy_trunk":
        warnings.warn("`load_policy_trunk` is now `load_policy_backbone`: use that name.", FutureWarning, stacklevel=2)
        return load_policy_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
