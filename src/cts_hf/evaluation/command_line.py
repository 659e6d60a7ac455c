# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the processes that they run in, and how they print."""

import sys
from typing import Any

import torch
from accelerate import Accelerator


def new_accelerator(**options: Any) -> Accelerator:
    """
    The accelerator of a command, in one process or in several, on the devices of the machine or on its CPU.

    Args:
        options: of [`~accelerate.Accelerator`], all but `cpu`.
    """
    # Without devices, Accelerate connects processes only if asked for the CPU: else each works as the only one.
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def print_text(text: object) -> None:
    """
    Prints to the standard output. What its encoding does not have, such as letters of a class name where it is ASCII,
    is escaped: `print` would raise an error.
    """
    encoding = sys.stdout.encoding or "utf-8"  # a stream that was put in its place may have none
    print(str(text).encode(encoding, "backslashreplace").decode(encoding))


__all__ = ["new_accelerator", "print_text"]
