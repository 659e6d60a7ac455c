# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Token sharing in the vision transformers of transformers."""

from .apply import apply_cts, remove_cts
from .backbone import CtsBackbone, CtsBackboneConfig
from .saving import load_cts, save_cts
from .sharing import TokenSharing


__all__ = [
    "CtsBackbone",
    "CtsBackboneConfig",
    "TokenSharing",
    "apply_cts",
    "load_cts",
    "remove_cts",
    "save_cts",
]
