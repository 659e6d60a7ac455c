# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf import apply_cts

from ..helpers.existing_models import build_existing, random_scores
from ..helpers.models import random_images


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("name", ["eomt", "eomt_dinov3"])
@torch.no_grad()
def test_hidden_states_of_queries(name, is_masked):
    """Those before the queries come in, with them, and the last: all of patches, whether queries are masked or not."""
    model = build_existing(name, num_hidden_layers=4, num_blocks=2)
    model.attn_mask_probs.fill_(1.0 if is_masked else 0.0)
    images, scores = random_images(), random_scores(64, 64)
    plain = model(images, output_hidden_states=True)
    apply_cts(model)
    outputs = model(images, superpatch_scores=scores, output_hidden_states=True)
    assert [state.shape for state in outputs.hidden_states] == [state.shape for state in plain.hidden_states]
    assert outputs.last_hidden_state.shape == plain.last_hidden_state.shape
