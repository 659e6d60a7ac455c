# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Stops a training whose loss or weights are not finite, before they are saved."""

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..hub.loading import describe_not_finite


class FiniteLoss:
    """
    Records the first step whose loss is not finite. The record stays on the device, so that no step waits for it.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device):
        self._first_step = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros(1, device=device)
        self._step = 0

    def update(self, loss: torch.Tensor, step: int) -> None:
        """Looks at the loss, a scalar, of step number `step`, which counts from 1."""
        self._step = step
        is_first = ~loss.isfinite() & (self._first_step == 0)
        self._first_step = torch.where(is_first, step, self._first_step)
        self._loss = torch.where(is_first, loss.float(), self._loss)

    def check(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        """
        Raises `ValueError` in every process if a loss of any process, or a weight of `model`, is not finite. To be
        called by all processes before anything is saved.
        """
        steps, losses = (accelerator.gather(value) for value in (self._first_step, self._loss))
        if steps.any():
            process = int(torch.where(steps > 0, steps, steps.max() + 1).argmin())
            raise ValueError(
                f"The loss must be finite, got {losses[process].item()} at step {steps[process].item()}. {_ADVICE}"
            )
        self.check_weights(model, self._step)

    @staticmethod
    def check_weights(model: PreTrainedModel, step: int) -> None:
        """Raises `ValueError` if a weight of `model` is not finite after `step` steps."""
        if found := describe_not_finite(model):
            raise ValueError(f"Weights must be finite, got {found}, after step {step}. {_ADVICE}")


_ADVICE = (
    "Nothing of it was saved; earlier checkpoints are as they were. Try a lower --learning_rate, a longer "
    "--warmup_steps, --max_grad_norm 1, or --mixed_precision bf16 or no instead of fp16."
)
