# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a forward pass costs, counted without running one: tokens and multiply-adds."""

import copy
import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_grid import PatchGrid
from ..model.token_sharing import num_shared_superpatches
from .existing_models import ExistingSegmenter, Segmenter


def num_tokens(model: Segmenter, size: tuple[int, int], token_reduction: float | tuple[float, ...]) -> int:
    """Tokens of patches and superpatches that the encoder sees of an image of `size` (height, width), in pixels."""
    grid = PatchGrid.of_config(model.config, size)
    budgets = num_shared_superpatches(token_reduction, grid.num_patches, grid.levels)
    budgets = budgets if len(grid.levels) > 1 else (budgets,)
    # Where images are not padded, an odd last row or column of patches cannot share.
    saved = [
        (level**2 - 1) * min(budget, math.prod(grid.shape(level)))
        for level, budget in zip(grid.levels, budgets, strict=True)
    ]
    return grid.num_patches - sum(saved)


def multiply_adds(
    model: Segmenter,
    size: tuple[int, int],
    token_reduction: float | tuple[float, ...],
    runs_policy: bool = True,
) -> int:
    """
    Multiply-adds of a forward pass of one image: those of matrix products, attention and convolutions.

    Args:
        model: of any device and type; of a Segmenter, a copy without values is counted.
        size: height and width of the image in pixels.
        token_reduction: the budget, a number or a tuple.
        runs_policy: whether the model's policy is part of it, or else its scores are given.
    """
    grid, num_channels = PatchGrid.of_config(model.config, size), model.config.num_channels
    device = model.device  # of a model of transformers: not all heads run without values
    if not isinstance(model, ExistingSegmenter):
        config, device = copy.deepcopy(model.config), torch.device("meta")
        config._attn_implementation = "eager"
        with device:
            model = CtsForSemanticSegmentation(config).eval()
    # Whatever kernel there is, it computes the products of the plain one.
    with device, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores = tuple(torch.zeros(1, *grid.shape(level)) for level in grid.levels)
        scores = scores if len(scores) > 1 else scores[0]
        model(
            torch.zeros(1, num_channels, *size),
            superpatch_scores=None if runs_policy else scores,
            token_reduction=token_reduction,
        )
    return counter.get_total_flops() // 2


__all__ = ["multiply_adds", "num_tokens"]
