# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the dataclasses of options are made of: fields with a help text, and bounds of their numbers."""

from dataclasses import field, fields
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of an options dataclass, with the help text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


# Upper bounds are far above any use: what exceeds them is a mistake that would overflow or never end.
LARGEST = 10**9
FROM_0, FROM_1 = (0, LARGEST), (1, LARGEST)
PIXELS = (1, 100_000)
LAYERS = (0, 1000)
EPOCHS = (0, 1_000_000)
LEARNING_RATE = (-1000, 1000)  # that it is above 0 is checked separately
THREADS = 1024


def refuse_outside(options: Any, **bounds: tuple[float, float]) -> None:
    """
    Refuses numbers, or lists with numbers, that are NaN or outside of their bounds, with a `ValueError`.

    Args:
        options: dataclass.
        bounds: of some of its fields the lowest and the highest value allowed. All others: -1e9 to 1e9.
    """
    for entry in fields(options):
        value = getattr(options, entry.name)
        low, high = bounds.get(entry.name, (-LARGEST, LARGEST))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not low <= number <= high:
                allowed = f"between {low} and {high}"
                if low == -high:
                    allowed = f"a finite number of at most {high} in magnitude"
                elif high == LARGEST:
                    allowed = f"at least {low} and at most {high}"
                raise ValueError(f"`{entry.name}` must be {allowed}, got {value}.")
