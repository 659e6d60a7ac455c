# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is wrong with files and weights, in words."""

from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def list_problems(missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]) -> str:
    """The weights that do not fit, counted and named; empty if there are none."""
    found = {"missing": list(missing), "unexpected": list(unexpected), "misshaped": list(misshaped)}
    return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items() if names)


__all__ = ["first_line", "list_problems"]
