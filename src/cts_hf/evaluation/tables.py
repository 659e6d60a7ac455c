# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables as text."""

from collections.abc import Sequence


def format_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A Markdown table whose columns align to the right, also as plain text.

    Args:
        titles: of the columns.
        rows: the cells of each row, as many as there are titles.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (titles, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


__all__ = ["format_table"]
