# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Readers of the benchmarks in their official layout."""
