# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The strategies that choose which superpatches share a token."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.configuration_cts_checks import check_threshold
from ..model.modeling_cts_outputs import per_level
from ..model.modeling_cts_targets import IGNORED_TARGET
from ..model.token_sharing import check_token_reduction


STRATEGIES = ("none", "learned", "random", "oracle")


class TokenReduction:
    """
    The type of the option `--token_reduction`: reads a word of the command line or of a recipe, `0.3` as a `float` and
    `0.2,0.3`, what each of several levels removes, as a `tuple`.
    """

    allowed = "a decimal number, such as 0.3, or one for each level, such as 0.2,0.3"

    def __new__(cls, word: str | float) -> float | tuple[float, ...]:
        fractions = tuple(map(float, str(word).split(",")))
        return fractions if len(fractions) > 1 else fractions[0]


class Sharing(NamedTuple):
    """
    Which superpatches share a token: so many of them, or all those that the policy is sure enough about.

    Attributes:
        strategy: "none", "learned" (by the model's policy), "random" or "oracle" (by ground truth: those of one class
            first).
        token_reduction: fraction of the tokens that is removed, up to 1 - 1 / level**2 of the largest level, or a
            tuple of what each level removes; 0 is "none", whatever the strategy. None where there is a threshold.
        sharing_threshold: probability of one class from which on superpatches share, of learned sharing; or None.
    """

    strategy: str
    token_reduction: float | tuple[float, ...] | None = None
    sharing_threshold: float | None = None

    @property
    def budget(self) -> dict[str, Any]:
        """The budget or the threshold, as an argument of the model's forward."""
        if self.sharing_threshold is not None:
            return {"sharing_threshold": self.sharing_threshold}
        return {"token_reduction": self.token_reduction}

    @classmethod
    def of_model(cls, config: Any) -> "Sharing":
        """What a model with this configuration does if a call says nothing else."""
        if config.sharing_threshold is not None:
            return cls("learned", sharing_threshold=config.sharing_threshold)
        return cls("learned", config.token_reduction)


def check_strategy(strategy: str) -> None:
    """
    Refuses what is no sharing strategy.

    Raises:
        ValueError: it is none of `STRATEGIES`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"`sharing` must be one of {', '.join(STRATEGIES)}, got {strategy!r}: choose one.")


def check_budget(
    token_reduction: float | tuple[float, ...] | None = None, sharing_threshold: float | None = None
) -> None:
    """
    Refuses options that no model can have, before one is opened: its levels say the rest.

    Raises:
        ValueError: a budget and a threshold, or one that is out of range whatever the levels.
    """
    check_threshold(sharing_threshold)
    if token_reduction is None:
        return
    if sharing_threshold is not None:
        raise ValueError(
            f"`sharing_threshold` must be None where `token_reduction` is given, got {sharing_threshold} and "
            f"{token_reduction}: give one of them."
        )
    fractions = per_level(token_reduction)
    if not (all(fraction >= 0 for fraction in fractions) and sum(fractions) < 1):
        raise ValueError(
            "`token_reduction` must be a number between 0 (no sharing) and 1 - 1 / level**2 of the model's largest "
            f"level (0.75 for 2 x 2), or one for each level, got {format_reduction(token_reduction)}: give a "
            "fraction, such as 0.3."
        )


def checked_sharing(
    sharing: Sharing, has_policy: bool, levels: tuple[int, ...] = (2,), takes_thresholds: bool = True
) -> Sharing:
    """
    A sharing that a model can have; that of no tokens is named "none".

    Args:
        sharing: strategy, and budget or threshold.
        has_policy: whether the model has a policy.
        levels: sides of its superpatches in patches.
        takes_thresholds: whether its images may differ in the number of their tokens; models of transformers and
            encoders of theirs take budgets only.

    Raises:
        ValueError: an unknown strategy, a budget or threshold out of range, both or neither, a budget of "none", a
            threshold of others than learned sharing, or learned sharing without policy.
    """
    check_strategy(sharing.strategy)
    if (sharing.token_reduction is None) == (sharing.sharing_threshold is None):
        raise ValueError(
            "Either `token_reduction` or `sharing_threshold` must be given, got "
            f"{sharing.token_reduction!r} and {sharing.sharing_threshold!r}: give one of them."
        )
    if sharing.sharing_threshold is not None:
        _check_threshold_fits(sharing, takes_thresholds)
    else:
        sharing = sharing._replace(token_reduction=check_token_reduction(sharing.token_reduction, levels))
        if is_nothing(sharing.token_reduction):
            return sharing._replace(strategy="none")
        if sharing.strategy == "none":
            raise ValueError(
                f"`token_reduction` must be 0 where `sharing` is 'none', got {sharing.token_reduction}: leave it out, "
                "or choose another sharing."
            )
    if sharing.strategy == "learned" and not has_policy:
        raise ValueError(
            "`sharing` must be 'none', 'random' or 'oracle' for a model without policy (use_policy=False), got "
            "'learned': choose one of these, or give it a policy."
        )
    return sharing


def _check_threshold_fits(sharing: Sharing, takes_thresholds: bool) -> None:
    check_threshold(sharing.sharing_threshold)
    if sharing.strategy != "learned":
        raise ValueError(
            "`sharing` must be 'learned' with a `sharing_threshold`, a probability that the policy gives, got "
            f"{sharing.strategy!r}: give other sharings a budget, `token_reduction`."
        )
    if not takes_thresholds:
        raise ValueError(
            "`sharing_threshold` must be None for an encoder of transformers, which has as many tokens for all images "
            f"of a batch, got {sharing.sharing_threshold}: give a budget, `token_reduction`."
        )


def is_nothing(token_reduction: float | tuple[float, ...]) -> bool:
    """Whether a budget removes no token."""
    return all(part == 0 for part in per_level(token_reduction))


def format_reduction(token_reduction: float | tuple[float, ...]) -> str:
    """A budget as the command line takes it, `0.3`, or what each level removes, `0.2,0.3`."""
    return ",".join(f"{part:g}" for part in per_level(token_reduction))


def format_budget(token_reduction: float | tuple[float, ...] | None, sharing_threshold: float | None = None) -> str:
    """A budget or a threshold in a table: `0.3`, `0.2,0.3` or `p >= 0.9`."""
    return format_reduction(token_reduction) if sharing_threshold is None else f"p >= {sharing_threshold:g}"


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
    "TokenReduction",
    "check_budget",
    "check_strategy",
    "checked_sharing",
    "format_budget",
    "format_reduction",
    "is_nothing",
    "sharing_scores",
]
