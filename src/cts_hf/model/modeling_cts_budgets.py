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
    is_split = not isinstance(token_reduction, tuple)
    available, remaining = num_patches, token_reduction * num_patches if is_split else 0.0
    budgets: list[int | torch.Tensor] = []
    for index in reversed(range(len(levels))):
        size = levels[index] ** 2  # in patches
        if not is_split:
            removed = token_reduction[index] * num_patches
        elif index == 0:
            removed = remaining
        else:
            # The smaller levels can remove no more than this fraction of what is left to them.
            most = 1 - 1 / levels[index - 1] ** 2
            rest = _divide(remaining - most * available, 1 - most / (1 - 1 / size))
            removed = _highest(_LARGER_SHARE * remaining, rest)
        budget = _round(_divide(removed, size - 1))
        if index < len(levels) - 1:
            # The larger budgets were rounded, which can leave too little space, or less than nothing to remove.
            budget = _clamp(budget, available // size)
        budgets.insert(0, budget)
        available, remaining = available - size * budget, remaining - (size - 1) * budget
    return tuple(budget.long() if isinstance(budget, torch.Tensor) else budget for budget in budgets)


def _divide(value: float | torch.Tensor, divisor: float) -> float | torch.Tensor:
    # By a tensor, as division by a number may be done as a product with its inverse, and be rounded otherwise.
    return value / (torch.full_like(value, divisor) if isinstance(value, torch.Tensor) else divisor)


def _highest(value: float | torch.Tensor, other: float | torch.Tensor) -> float | torch.Tensor:
    return torch.maximum(value, other) if isinstance(value, torch.Tensor) else max(value, other)


def _clamp(value: int | torch.Tensor, highest: int | torch.Tensor) -> int | torch.Tensor:
    is_tensor = isinstance(value, torch.Tensor)
    return torch.minimum(value.clamp(min=0), highest) if is_tensor else max(0, min(value, highest))


def _round(value: float | torch.Tensor) -> int | torch.Tensor:
    return value.round() if isinstance(value, torch.Tensor) else round(value)


__all__ = ["split_budget"]
