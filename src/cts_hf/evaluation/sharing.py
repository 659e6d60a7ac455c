# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The strategies that choose which superpatches share a token."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.modeling_cts_targets import IGNORED_TARGET
from ..model.token_sharing import check_token_reduction


STRATEGIES = ("none", "learned", "random", "oracle")


class Sharing(NamedTuple):
    """
    Which superpatches share a token.

    Attributes:
        strategy: "none", "learned" (by the model's policy), "random" or "oracle" (by ground truth: those of one class
            first).
        token_reduction: fraction of the tokens that is removed, 0 to 0.75 (or more with larger superpatches), or a
            tuple of what each level removes; 0 is "none", whatever the strategy.
    """

    strategy: str
    token_reduction: float | tuple[float, ...]


def check_strategy(strategy: str) -> None:
    """
    Refuses what is no sharing strategy.

    Raises:
        ValueError: it is none of `STRATEGIES`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`sharing` must be one of {', '.join(STRATEGIES)}, got {strategy!r}: choose one.")


def checked_sharing(sharing: Sharing, has_policy: bool, levels: tuple[int, ...] = (2,)) -> Sharing:
    """
    A sharing that a model can have; that of no tokens is named "none".

    Args:
        sharing: strategy and budget.
        has_policy: whether the model has a policy.
        levels: sides of its superpatches in patches.

    Raises:
        ValueError: an unknown strategy, a budget out of range, a budget of "none", or learned sharing without policy.
    """
    check_strategy(sharing.strategy)
    check_token_reduction(sharing.token_reduction, levels)
    if is_nothing(sharing.token_reduction):
        return sharing._replace(strategy="none")
    if sharing.strategy == "none":
        raise ValueError(
            f"`token_reduction` must be 0 where `sharing` is 'none', got {sharing.token_reduction}: leave it out, or "
            "choose another sharing."
        )
    if sharing.strategy == "learned" and not has_policy:
        raise ValueError(
            "`sharing` must be 'none', 'random' or 'oracle' for a model without policy (use_policy=False), got "
            "'learned': choose one of these, or give it a policy."
        )
    return sharing


def is_nothing(token_reduction: float | tuple[float, ...]) -> bool:
    """Whether a budget removes no token."""
    return not any(token_reduction) if isinstance(token_reduction, tuple) else token_reduction == 0


def format_reduction(token_reduction: float | tuple[float, ...]) -> str:
    """A budget as text, `0.3`, or what each level removes, `0.1 + 0.2`."""
    parts = token_reduction if isinstance(token_reduction, tuple) else (token_reduction,)
    return " + ".join(f"{part:g}" for part in parts)


def sharing_scores(strategy: str, targets: Tensor, generator: np.random.Generator) -> Tensor:
    """
    Scores that take the place of the policy's, so that the best of them share a token.

    Args:
        strategy: "random" or "oracle".
        targets: superpatch targets of any shape.
        generator: of the random numbers.

    Returns:
        float32, in the shape and on the device of `targets`.
    """
    # Uniform in [-0.5, 0.5).
    noise = generator.random(targets.shape, dtype=np.float32) - 0.5
    scores = torch.from_numpy(noise).to(targets.device)
    if strategy == "oracle":
        # One class first, several last, ignored ones between. Equals come in random order: the order of the grid
        # would favor the top of the image.
        scores = scores + torch.where(targets == IGNORED_TARGET, 0, 2 * targets - 1)
    return scores


__all__ = [
    "STRATEGIES",
    "Sharing",
    "check_strategy",
    "checked_sharing",
    "format_reduction",
    "is_nothing",
    "sharing_scores",
]
