# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The model, its configuration and its image processors: what travels with every checkpoint. All of it lies in this one
folder, imports its neighbours only as `from .module import name`, and needs torch and transformers only.
"""
