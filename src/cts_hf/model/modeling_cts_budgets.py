# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How many superpatches of each level share a token, so that a fraction of the tokens disappears."""

import math
from itertools import pairwise

import torch


# Of the tokens that a level and those below it are to remove, the part that this level removes.
_LARGER_SHARE = 2 / 3


def split_budget(
    token_reduction: float | torch.Tensor | tuple[float | torch.Tensor, ...],
    num_patches: int | torch.Tensor,
    levels: tuple[int, ...],
) -> tuple[int | torch.Tensor, ...]:
    """
    The budget of each level, for numbers or for tensors of shape `(batch_size,)`, both by the same operations: an
    image of a batch has the budgets that it has alone.

    Args:
        token_reduction (`float`, `torch.Tensor` or a `tuple` of one for each level):
            Fraction of the tokens to remove, or that each level removes.
        num_patches (`int` or `torch.Tensor`):
            Number of patches; of floating-point dtype if it is a tensor.
        levels (`tuple[int, ...]`):
            Sides of the superpatches in patches.

    Returns:
        `tuple` of `int` or `torch.LongTensor`, one for each level.
    """
    first_size, *sizes = (level**2 for level in levels)  # in patches
    fractions = token_reduction if isinstance(token_reduction, tuple) else _split(token_reduction, levels)
    # Rounded down, but for rounding errors: then there is always space for the smaller ones.
    budgets = [
        _floor(_divide(fraction * num_patches, size - 1) + 1e-6)
        for fraction, size in zip(fractions[1:], sizes, strict=True)
    ]
    removed = fractions[0] * num_patches
    if sizes and not isinstance(token_reduction, tuple):
        # The first level makes up for what is missing, where there is space: it covers more to remove as much.
        rest = token_reduction * num_patches
        for size, budget in zip(sizes, budgets, strict=True):
            rest = rest - (size - 1) * budget
        covered = sum(_divide(part, 1 - 1 / size) for part, size in zip(fractions, (first_size, *sizes), strict=True))
        needed = sum((size - first_size) / (first_size - 1) for size in sizes)
        removed = _choose((1 - covered) * num_patches >= needed, rest, removed)
    budgets.insert(0, _round(_divide(removed, first_size - 1)))
    return tuple(budget.long() if isinstance(budget, torch.Tensor) else budget for budget in budgets)


def _split(token_reduction: float | torch.Tensor, levels: tuple[int, ...]) -> tuple[float | torch.Tensor, ...]:
    """The fraction of the tokens that each level removes; independent of the number of patches."""
    available, remaining = 1.0, token_reduction
    fractions: list[float | torch.Tensor] = []
    for finer, level in reversed(list(pairwise(levels))):
        # The smaller levels can remove no more than this fraction of what is left to them.
        most, own_most = 1 - 1 / finer**2, 1 - 1 / level**2
        least = _divide(remaining - most * available, 1 - most / own_most)
        fraction = _choose(_LARGER_SHARE * remaining >= least, _LARGER_SHARE * remaining, least)
        fractions.insert(0, fraction)
        available, remaining = available - _divide(fraction, own_most), remaining - fraction
    return (remaining, *fractions)


def _divide(value: float | torch.Tensor, divisor: float) -> float | torch.Tensor:
    # By a tensor, as division by a number may be done as a product with its inverse, and be rounded otherwise.
    return value / (torch.full_like(value, divisor) if isinstance(value, torch.Tensor) else divisor)


def _choose(
    condition: bool | torch.Tensor, value: float | torch.Tensor, other: float | torch.Tensor
) -> float | torch.Tensor:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, value, other)
    # No `max` of numbers: with sizes that vary, torch.compile has to reason about it for minutes.
    return value if condition else other


def _floor(value: float | torch.Tensor) -> int | torch.Tensor:
    return value.floor() if isinstance(value, torch.Tensor) else math.floor(value)


def _round(value: float | torch.Tensor) -> int | torch.Tensor:
    return value.round() if isinstance(value, torch.Tensor) else round(value)


__all__ = ["split_budget"]
