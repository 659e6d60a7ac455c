# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers and the learning rate."""

import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import OptimizationArguments


_ENCODER_LAYER = re.compile(r"(encoder\.|model\.)?layers?\.(?P<index>\d+)\.")


def build_optimizer(model: nn.Module, args: OptimizationArguments) -> torch.optim.Optimizer:
    """
    SGD with momentum 0.9, or AdamW, of the parameters of `model` that are trained. With `layer_decay`, encoder layers
    and the embeddings below them learn the slower the lower they are, as BEiT's are fine-tuned.
    """
    prefix = encoder_prefix(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    num_layers = 1 + max((_encoder_layer(name, prefix) or 0 for name, _ in model.named_parameters()), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        # As in Segmenter: biases, normalizations, tokens and position embeddings are not pulled to zero.
        is_decayed = parameter.ndim > 1 and not name.endswith(("embeddings", "_token"))
        layer = _encoder_layer(name, prefix)
        scale = 1.0 if layer is None else args.layer_decay ** (num_layers - layer)
        groups.setdefault((scale, is_decayed), []).append(parameter)
    # In a fixed order, as a checkpoint of the optimizer has its groups by number.
    options = [
        {
            "params": parameters,
            "weight_decay": args.weight_decay if is_decayed else 0.0,
            "lr": args.learning_rate * scale,
        }
        for (scale, is_decayed), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(options, lr=args.learning_rate, momentum=0.9)
    return torch.optim.AdamW(options, lr=args.learning_rate)


def encoder_prefix(model: nn.Module) -> str | None:
    """
    What the names of the encoder's parameters start with, those of its embeddings and layers; empty if the encoder is
    not a module of its own, and `None` if there is none.
    """
    names = (name for name, _ in model.named_modules() if name.rpartition(".")[2] == "embeddings")
    embeddings = next(names, None)
    return None if embeddings is None else embeddings.removesuffix("embeddings")


def _encoder_layer(name: str, prefix: str | None) -> int | None:
    """The number of the encoder layer, from 1 on, that a parameter is of; 0 for embeddings; `None` for all others."""
    if prefix is None or not name.startswith(prefix):
        return None
    name = name.removeprefix(prefix)
    if match := _ENCODER_LAYER.match(name):
        return int(match["index"]) + 1
    return 0 if name.startswith("embeddings.") else None


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
