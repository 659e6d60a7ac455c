# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from cts_hf import CtsConfig
from cts_hf.evaluation.sharing import (
    STRATEGIES,
    Sharing,
    TokenReduction,
    check_budget,
    checked_sharing,
    format_budget,
    format_reduction,
    sharing_scores,
)
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
        (Sharing("learned", (0.2, 0.3)), "`token_reduction` must be .*between 0"),
        (Sharing("learned"), "Either `token_reduction` or `sharing_threshold` must be given, got None and None"),
        (Sharing("learned", 0.3, 0.9), "Either `token_reduction` or `sharing_threshold` .* got 0.3 and 0.9"),
        (Sharing("learned", None, 1.5), "`sharing_threshold` must be a probability .* got 1.5"),
        (Sharing("random", None, 0.9), "`sharing` must be 'learned' with a `sharing_threshold`.* got 'random'"),
    ],
)
def test_sharings_that_there_cannot_be_are_refused(sharing, message):
    with pytest.raises(ValueError, match=message):
        checked_sharing(sharing, has_policy=True)


def test_thresholds_are_for_policies_and_encoders_that_take_them():
    sharing = Sharing("learned", sharing_threshold=0.9)
    assert checked_sharing(sharing, has_policy=True) == sharing
    with pytest.raises(ValueError, match=r"`sharing` must be .* without policy .*, got 'learned'"):
        checked_sharing(sharing, has_policy=False)
    with pytest.raises(ValueError, match=r"`sharing_threshold` must be None for an encoder of transformers.*got 0.9"):
        checked_sharing(sharing, has_policy=True, takes_thresholds=False)


def test_what_a_model_shares_by_itself_is_an_argument_of_its_calls():
    assert Sharing.of_model(CtsConfig()).budget == {"token_reduction": 0.3}
    config = CtsConfig(superpatch_levels=(2, 4), token_reduction=(0.2, 0.3))
    assert Sharing.of_model(config).budget == {"token_reduction": (0.2, 0.3)}
    assert Sharing.of_model(CtsConfig(sharing_threshold=0.9)).budget == {"sharing_threshold": 0.9}


@pytest.mark.parametrize(("word", "value"), [("0.3", 0.3), ("0", 0.0), ("0.2,0.3", (0.2, 0.3)), ("0,0.9", (0.0, 0.9))])
def test_budgets_are_words_of_the_command_line(word, value):
    assert TokenReduction(word) == value
    assert type(TokenReduction(word)) is type(value)
    assert format_reduction(value) == format_budget(value) == word
    check_budget(value)
    for wrong in ("", "0.2,", "0.2;0.3", "a"):
        with pytest.raises(ValueError, match="could not convert"):
            TokenReduction(wrong)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"token_reduction": -0.1}, "`token_reduction` must be a number between 0 .* got -0.1: give a fraction"),
        ({"token_reduction": float("nan")}, "`token_reduction` must be a number between 0 .* got nan"),
        ({"token_reduction": 1.0}, "`token_reduction` must be a number between 0 .* got 1"),
        ({"token_reduction": (0.5, 0.5)}, "`token_reduction` must be .* or one for each level, got 0.5,0.5"),
        ({"sharing_threshold": -0.1}, "`sharing_threshold` must be a probability between 0 and 1, .* got -0.1"),
        (
            {"token_reduction": 0.3, "sharing_threshold": 0.9},
            "`sharing_threshold` must be None where `token_reduction` is given, got 0.9 and 0.3: give one of them",
        ),
    ],
)
def test_options_that_no_model_can_have_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        check_budget(**budget)


def test_the_oracle_adds_to_random_scores_what_the_targets_say():
    targets = torch.tensor([[[1, 0], [IGNORED_TARGET, 1]]])
    random = sharing_scores("random", targets, np.random.default_rng(0))
    oracle = sharing_scores("oracle", targets, np.random.default_rng(0))
    assert random.dtype == oracle.dtype == torch.float32
    assert random.abs().max() <= 0.5
    assert torch.equal(oracle, random + torch.tensor([[[1, -1], [0, 1]]]))
