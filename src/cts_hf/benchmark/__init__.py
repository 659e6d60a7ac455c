# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""How long a model takes, and where the time goes."""
