# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Folders of models: writing them, loading them completely or not at all, describing and publishing them."""
