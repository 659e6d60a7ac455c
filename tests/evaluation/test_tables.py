# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from cts_hf.evaluation.tables import format_table


def test_columns_are_as_wide_as_their_widest_cell_and_align_to_the_right():
    assert format_table(("a", "long title"), [("wide", "1.5"), ("", "12")]).splitlines() == [
        "|    a | long title |",
        "|-----:|-----------:|",
        "| wide |        1.5 |",
        "|      |         12 |",
    ]
    assert format_table(("a",), []) == "| a |\n|--:|"


def test_rows_need_a_cell_for_each_title():
    with pytest.raises(ValueError, match="shorter"):
        format_table(("a", "b"), [("1",)])
