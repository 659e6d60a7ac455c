# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""From pictures to label maps, and how good they are: windows, metrics, sharing strategies, budgets, predictions."""
