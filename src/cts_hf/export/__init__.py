# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Models in other formats."""
