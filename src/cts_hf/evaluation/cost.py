# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs, counted without running one: tokens and multiply-adds."""

import copy
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_grid import PatchGrid
from ..model.token_sharing import num_shared_superpatches


def num_tokens(
    model: CtsForSemanticSegmentation, size: tuple[int, int], token_reduction: float | tuple[float, ...]
) -> int:
    """Tokens of patches and superpatches that the encoder sees of an image of `size` (height, width), in pixels."""
    levels = model.config.superpatch_levels
    grid = PatchGrid.of_config(model.config, size)
    num_patches = grid.num_patches
    budgets = num_shared_superpatches(token_reduction, num_patches, levels)
    budgets = budgets if len(levels) > 1 else (budgets,)
    if not grid.pads:
        budgets = [min(budget, math.prod(grid.shape(level))) for level, budget in zip(levels, budgets, strict=True)]
    return num_patches - sum((level**2 - 1) * budget for level, budget in zip(levels, budgets, strict=True))


def multiply_adds(
    model: CtsForSemanticSegmentation,
    size: tuple[int, int],
    token_reduction: float | tuple[float, ...],
    runs_policy: bool = True,
) -> int:
    """
    Multiply-adds of a forward pass of one image: those of matrix products, attention and convolutions.

    Args:
        model: of any device and type; a copy without values is counted.
        size: height and width of the image in pixels.
        token_reduction: the budget, a number or a tuple.
        runs_policy: whether the model's policy is part of it, or else its scores are given.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # whatever kernel there is, it computes these products
    with torch.device("meta"), torch.no_grad():
        empty = CtsForSemanticSegmentation(config).eval()
        grid = PatchGrid.of_config(config, size)
        scores = None if runs_policy else tuple(torch.zeros(1, *grid.shape(level)) for level in grid.levels)
        with FlopCounterMode(display=False) as counter:
            pixel_values = torch.zeros(1, config.num_channels, *size)
            empty(pixel_values, superpatch_scores=scores, token_reduction=token_reduction)
    return counter.get_total_flops() // 2


__all__ = ["multiply_adds", "num_tokens"]
