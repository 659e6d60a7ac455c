# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from cts_hf import build_layout, share, superpatch_targets, unshare

from ..helpers.golden import LARGE, TINY, build_golden_model, load_golden


# Of values up to 5 in float32, here and wherever two ways to compute outputs are compared: some ten layers round by
# 2**-24 of their values each, and the last normalization of mask logits divides by deviations below 1. Another order
# of sums makes 1e-5; a weight or a position that is mixed up makes 0.1 and more.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", TINY + LARGE)
@torch.no_grad()
def test_agrees_with_the_original(name):
    golden, meta = load_golden(name)
    model, inputs = build_golden_model(golden, meta)
    outputs = model(**inputs)
    base = model.cts(**inputs)

    pairs = {"last_hidden_state": base.last_hidden_state, "logits": outputs.logits}
    if "logits_full_size" in golden:
        size = golden["logits_full_size"].shape[-2:]
        pairs["logits_full_size"] = torch.nn.functional.interpolate(outputs.logits, size=size, mode="bilinear")
    if outputs.policy_logits is not None:
        pairs["policy_logits"] = outputs.policy_logits
    for key, value in pairs.items():
        difference = (value - golden[key]).abs().max().item()
        print(f"{name} {key}: {difference:.1e}")
        assert difference <= TOLERANCE, key
    if "shared_superpatch_mask" in golden:
        assert torch.equal(outputs.shared_superpatches, golden["shared_superpatch_mask"].bool())


@pytest.mark.parametrize("name", [name for name in TINY + LARGE if name != "segmenter_mask_plain"])
def test_token_order_is_that_of_the_original(name):
    golden, meta = load_golden(name)
    patch_rows, patch_columns = golden["unshared_patch_mask"].shape[1:]
    scores = golden["policy_logits"][:, 1] - golden["policy_logits"][:, 0]
    layout = build_layout(scores, meta["num_shared"])

    batch_size = scores.shape[0]
    codes = []
    for scale, rows, columns in ((1, patch_rows, patch_columns), (2, patch_rows // 2, patch_columns // 2)):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        # The reference names a token by its size and its first patch.
        code = torch.stack([torch.full_like(row, scale), scale * row, scale * column], dim=-1).flatten(0, 1).float()
        codes.append(code.expand(batch_size, -1, -1))
    tokens = share(*codes, layout)
    assert torch.equal(tokens, golden["token_code"])
    is_unshared = unshare(tokens, layout)[:, :, 0].view(batch_size, patch_rows, patch_columns) == 1
    assert torch.equal(is_unshared, golden["unshared_patch_mask"].bool())


@pytest.mark.parametrize(("key", "patch_size"), [("0_patch16", 16), ("1_patch16", 16), ("2_patch8", 8)])
def test_superpatch_targets(key, patch_size):
    golden, _ = load_golden("policy_targets")
    targets = superpatch_targets(golden[f"labels_{key}"], 2 * patch_size)
    assert torch.equal(targets, golden[f"targets_{key}"].long())
