# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Token sharing in the vision transformers of transformers."""

from .apply import TokenSharing, apply_cts, remove_cts
from .backbone import CtsBackbone, CtsBackboneConfig
from .saving import load_cts, save_cts


__all__ = [
    "CtsBackbone",
    "CtsBackboneConfig",
    "TokenSharing",
    "apply_cts",
    "load_cts",
    "remove_cts",
    "save_cts",
]
