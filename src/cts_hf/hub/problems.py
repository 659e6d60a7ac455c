# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with files and weights, in words."""

from collections.abc import Iterable, Mapping
from typing import Any


_NEVER_USED = "neck.fusion_stage.layers.0.residual_layer1."  # of DPT: published checkpoints lack these weights


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def list_problems(missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]) -> str:
    """The weights that do not fit, counted and named; empty if there are none."""
    found = {"missing": list(missing), "unexpected": list(unexpected), "misshaped": list(misshaped)}
    return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items() if names)


def loading_problems(info: Mapping[str, Any], ignore: tuple[str, ...] = (), new: tuple[str, ...] = ()) -> str:
    """
    What `from_pretrained(..., output_loading_info=True)` found wrong, in words; empty if nothing.

    Args:
        info: the loading info.
        ignore: prefixes of weights that may be misshaped.
        new: prefixes of weights that may be missing.
    """
    # Misshaped weights come with both of their shapes.
    misshaped = (str(name if isinstance(name, str) else name[0]) for name in info["mismatched_keys"])
    misshaped = sorted(name for name in misshaped if not name.startswith(ignore))
    missing = sorted(name for name in info["missing_keys"] if not name.startswith((_NEVER_USED, *new)))
    return list_problems(missing, sorted(info["unexpected_keys"]), misshaped)


__all__ = ["first_line", "list_problems", "loading_problems"]
