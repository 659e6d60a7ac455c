# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models (under 100k parameters) and inputs for the tests."""

import torch

from cts_hf import CtsConfig, CtsForSemanticSegmentation, CtsPolicyConfig, CtsPolicyModel


TINY_BACKBONE = {"width_coefficient": 0.1, "depth_coefficient": 0.3}


def tiny_config(**overrides):
    options = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 5,
        "policy_config": dict(TINY_BACKBONE),
    }
    return CtsConfig(**{**options, **overrides})


def tiny_model(seed=0, **overrides):
    torch.manual_seed(seed)
    model = CtsForSemanticSegmentation(tiny_config(**overrides)).eval()
    # At initialization every position has almost the same value: tests would not see a position mixed up.
    torch.nn.init.normal_(model.cts.embeddings.position_embeddings)
    return model


def tiny_policy(seed=0, **overrides):
    torch.manual_seed(seed)
    return CtsPolicyModel(CtsPolicyConfig(**{"superpatch_size": 16, **TINY_BACKBONE, **overrides})).eval()


def random_images(batch_size=2, height=64, width=64, seed=0):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))
