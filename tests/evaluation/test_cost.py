# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

from cts_hf import num_shared_superpatches
from cts_hf.evaluation.cost import multiply_adds, num_tokens

from ..helpers.models import tiny_config, tiny_model


def test_multiply_adds_are_those_of_the_layers():
    options = {"num_labels": 7, "decoder_type": "linear", "patch_size": 8}
    model = tiny_model(**options)
    size, reduction = (72, 80), 0.3  # padded to 80 x 80
    config = tiny_config(**options)
    tokens = num_tokens(model, size, reduction)
    assert tokens == 100 - 3 * num_shared_superpatches(reduction, 100)
    width, sequence = config.hidden_size, tokens + 1
    layer = sequence * width * (4 * width + 2 * config.intermediate_size) + 2 * sequence**2 * width
    others = tokens * width * config.num_labels
    embeddings = multiply_adds(model, size, reduction, runs_policy=False) - config.num_hidden_layers * layer - others
    assert embeddings == tokens * 3 * config.patch_size**2 * width
