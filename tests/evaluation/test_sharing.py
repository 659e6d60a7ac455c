# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from cts_hf.evaluation.sharing import STRATEGIES, Sharing, checked_sharing, sharing_scores
from cts_hf.model.modeling_cts_targets import IGNORED_TARGET


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_budget_is_no_sharing(strategy):
    assert checked_sharing(Sharing(strategy, 0), has_policy=False) == Sharing("none", 0)


@pytest.mark.parametrize("strategy", ["learned", "random", "oracle"])
def test_only_learned_sharing_needs_a_policy(strategy):
    sharing = Sharing(strategy, 0.3)
    assert checked_sharing(sharing, has_policy=True) == sharing
    if strategy == "learned":
        with pytest.raises(ValueError, match=r"`sharing` must be .* without policy .*, got 'learned'"):
            checked_sharing(sharing, has_policy=False)
    else:
        assert checked_sharing(sharing, has_policy=False) == sharing


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (Sharing("best", 0.3), "`sharing` must be one of none, learned, random, oracle, got 'best'"),
        (Sharing("none", 0.3), "`token_reduction` must be 0 where `sharing` is 'none', got 0.3"),
        (Sharing("oracle", 0.8), "`token_reduction` must be .*between 0"),
    ],
)
def test_sharings_that_there_cannot_be_are_refused(sharing, message):
    with pytest.raises(ValueError, match=message):
        checked_sharing(sharing, has_policy=True)


def test_the_oracle_adds_to_random_scores_what_the_targets_say():
    targets = torch.tensor([[[1, 0], [IGNORED_TARGET, 1]]])
    random = sharing_scores("random", targets, np.random.default_rng(0))
    oracle = sharing_scores("oracle", targets, np.random.default_rng(0))
    assert random.dtype == oracle.dtype == torch.float32
    assert random.abs().max() <= 0.5
    assert torch.equal(oracle, random + torch.tensor([[[1, -1], [0, 1]]]))
