# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model of transformers shares tokens by."""

from typing import Any

import torch
from torch import nn

from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_layout import check_scores
from ..model.modeling_cts_policy import CtsPolicyModel, check_policy_scores, renormalize
from ..model.token_sharing import TokenLayout, build_layout, num_shared_superpatches


class TokenSharing(nn.Module):
    """
    What a model of transformers shares tokens by, its attribute `token_sharing`: policy, budget and normalization. The
    model's state dict does not hold it.

    Args:
        policy ([`CtsPolicyModel`], *optional*): Frozen, and always in evaluation mode.
        token_reduction (`float`): Fraction of the patch tokens that calls remove which say nothing else.
        image_mean (`tuple[float, ...]`): Mean that the model's images are normalized with.
        image_std (`tuple[float, ...]`): Standard deviation, likewise.
    """

    def __init__(
        self,
        policy: CtsPolicyModel | None,
        token_reduction: float,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.policy, self.token_reduction = policy, token_reduction
        self.image_mean, self.image_std = image_mean, image_std
        self.num_channels = len(image_mean)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.train(False)

    @property
    def policy_config(self) -> Any:
        return self.policy.config

    def train(self, mode: bool = True) -> "TokenSharing":
        # Neither trained nor in training mode, or its batch-norm statistics drift: `from_pretrained` makes every
        # parameter trainable before it calls this.
        self.requires_grad_(False)
        return super().train(False)

    def choose(
        self,
        images: torch.Tensor,
        grid: tuple[int, int],
        token_reduction: float,
        superpatch_scores: torch.Tensor | None,
    ) -> TokenLayout | None:
        """
        Which tokens images are encoded with.

        Args:
            images (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`): What the encoder gets.
            grid (`tuple[int, int]`): Rows and columns of patches.
            token_reduction (`float`): Fraction of the patch tokens to remove.
            superpatch_scores (`torch.Tensor` of shape `(batch_size, rows // 2, columns // 2)`, *optional*):
                Scores that replace the policy's.

        Returns:
            [`TokenLayout`], or `None` if nothing is shared.
        """
        shape = (images.shape[0], grid[0] // 2, grid[1] // 2)
        if superpatch_scores is not None:
            (superpatch_scores,) = check_scores(superpatch_scores, [shape], levels=(2,))
        # An odd last row or column lies in no superpatch.
        num_shared = min(num_shared_superpatches(token_reduction, grid[0] * grid[1]), shape[1] * shape[2])
        if num_shared == 0:
            return None
        if superpatch_scores is None:
            superpatch_scores = self._policy_scores(images, shape)
        return build_layout(superpatch_scores.to(images.device), num_shared, shape=grid)

    @torch.no_grad()
    def _policy_scores(self, images: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
        if self.policy is None:
            raise ValueError(
                "This model shares tokens without a policy: give `superpatch_scores`, or `token_reduction=0` to run "
                "it as it was, or a policy to `apply_cts`."
            )
        size = self.policy.config.superpatch_size
        images = images[..., : shape[1] * size, : shape[2] * size]
        grid = PatchGrid.of_images(images, None, size // 2)
        images = renormalize(images, grid, self)
        logits = self.policy(images.to(self.policy.head.weight.device), return_dict=True).logits
        if isinstance(logits, tuple):  # of several levels, and padded to whole superpatches of the last
            logits = logits[0][:, :, : shape[1], : shape[2]]
        scores = logits[:, 1] - logits[:, 0]
        check_policy_scores(scores, images, self.policy)
        return scores


__all__ = ["TokenSharing"]
