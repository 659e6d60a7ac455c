# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers and the learning rate."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import OptimizationArguments


def build_optimizer(model: nn.Module, args: OptimizationArguments) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW, of the parameters of `model` that are trained."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # As in Segmenter: biases, normalizations, tokens and position embeddings are not pulled to zero.
    is_decayed = {
        name: parameter.ndim > 1 and not name.endswith(("embeddings", "_token")) for name, parameter in trained
    }
    groups = [
        {"params": [parameter for name, parameter in trained if is_decayed[name]], "weight_decay": args.weight_decay},
        {"params": [parameter for name, parameter in trained if not is_decayed[name]], "weight_decay": 0.0},
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def polynomial_lr(
    step: int, total_steps: int, base_lr: float, power: float = 0.9, min_lr: float = 1e-5, warmup_steps: int = 0
) -> float:
    """
    Learning rate after `step` steps: polynomial decay from `base_lr` to `min_lr`, after a linear rise.

    Source: mmsegmentation's PolyLR, with which Segmenter was trained.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return (base_lr - min_lr) * max(left, 0.0) ** power + min_lr


def set_step(scheduler: LambdaLR, step: int) -> None:
    """Puts a schedule, and the learning rates of its optimizer, to where they are after `step` steps."""
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **state})


def build_scheduler(optimizer: torch.optim.Optimizer, args: OptimizationArguments, total_steps: int) -> LambdaLR:
    """Schedule of the learning rate, to be stepped once an optimizer step."""

    def factor(step: int) -> float:
        if args.lr_scheduler == "constant":
            return min(1.0, (step + 1) / (args.warmup_steps + 1))
        rate = polynomial_lr(step, total_steps, args.learning_rate, args.lr_power, args.min_lr, args.warmup_steps)
        return rate / args.learning_rate

    return LambdaLR(optimizer, factor)
