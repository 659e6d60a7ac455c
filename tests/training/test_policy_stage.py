# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from cts_hf.training import ModelArguments, PolicyArguments, PolicySourceArguments, initial_policy

from ..helpers.models import tiny_policy
from ..helpers.training_runs import TINY_MODEL, TINY_POLICY, largest_difference


def start(model_options=None, **source):
    model_args = ModelArguments(**TINY_MODEL, **(model_options or {}))
    return initial_policy(model_args, PolicyArguments(**TINY_POLICY), PolicySourceArguments(**source))


def test_a_segmenter_starts_from_the_policy_that_is_named(tmp_path):
    trained = tiny_policy(seed=5)
    trained.save_pretrained(tmp_path)
    assert largest_difference(start(policy=str(tmp_path)).state_dict(), trained.state_dict()) == 0


@pytest.mark.parametrize("source", [{"policy_epochs": 1}, {"policy_loss_weight": 1}], ids=str)
def test_a_policy_that_will_be_trained_starts_new(source):
    assert start(**source).config.superpatch_size == 2 * TINY_MODEL["patch_size"]


def test_a_new_policy_decides_about_the_superpatches_of_its_segmenter():
    config = start({"superpatch_levels": [2, 4]}, policy_epochs=1).config
    assert (config.superpatch_size, config.superpatch_levels) == (2 * TINY_MODEL["patch_size"], (2, 4))


def test_a_trained_segmenter_keeps_its_policy_unless_another_is_trained(tmp_path):
    assert start({"model": str(tmp_path)}) is None


def test_a_policy_that_nothing_trains_is_refused_where_tokens_are_shared():
    with pytest.raises(ValueError, match="The policy would stay as random as it starts"):
        start()
    with pytest.raises(ValueError, match="The policy would stay as random as it starts"):
        start({"sharing_threshold": 0.9})
    assert start({"token_reduction": 0.0}) is not None
    assert start({"token_reduction": (0.0, 0.0), "superpatch_levels": [2, 4]}) is not None
