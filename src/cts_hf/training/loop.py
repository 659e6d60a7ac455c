# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The training loop of Segmenter and policy."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch import nn
from tqdm.auto import tqdm

from ..data import StreamingSamples, TrainingSamples
from ..evaluation.command_line import new_accelerator
from .arguments import OptimizationArguments, settle_precision
from .checkpoints import CheckpointFolder
from .finite import FiniteLoss
from .optimization import build_optimizer, build_scheduler
from .output import BEST, lock_output, refuse_earlier_run
from .recipe import effective_options
from .resume import Progress, describe_data, resume_or_start, run_state
from .steps import Batch, TrainingSteps
from .tasks import Task


def build_accelerator(args: OptimizationArguments, arguments: Sequence[Any] = ()) -> Accelerator:
    """
    The accelerator of a run, with its trackers and seeds.

    Args:
        args: how to train; `output_dir` must be set.
        arguments: options dataclasses, for the trackers.

    Raises:
        ValueError: a tracker that is not installed, or files in `output_dir` that the run must not replace.
    """
    available = [tracker.value for tracker in get_available_trackers()]
    if missing := sorted(set(args.report_to) - {"all", *available}):
        raise ValueError(f"report_to has {missing}, installed are {available or 'none'}: pip install what is missing.")
    refuse_earlier_run(args)
    settle_precision(args)
    accelerator = new_accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to or None, project_dir=args.output_dir
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(args.cpu_threads or max(1, _num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.report_to:
        # Trackers take plain values only.
        options = {name: _plain(value) for name, value in effective_options(arguments).items()}
        accelerator.init_trackers("cts_hf", options)
    set_seed(args.seed)
    return accelerator


def fit(
    task: Task,
    samples: TrainingSamples | StreamingSamples,
    args: OptimizationArguments,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> nn.Module:
    """
    Trains the model of `task`, resuming where `args` say so.

    The gradient of a step is that of the mean loss over all pixels (superpatches, for a policy) of its `batch_size`
    images that are not ignored, however they are split over processes and accumulation steps.

    Args:
        task: what is trained, evaluated and saved.
        samples: training samples.
        args: how to train; `output_dir` must be set.
        accelerator: of this run alone.
        num_workers: processes that make samples.

    Returns:
        the trained model, unwrapped.

    Raises:
        ValueError: a batch size that cannot be split, too few images, an evaluation that fails, files in `output_dir`
            that must not be replaced, no checkpoint to resume from or one of other options, or a loss that is not
            finite. All but the last before the first step.
    """
    with lock_output(args.output_dir, accelerator):
        return _fit(task, samples, args, accelerator, num_workers)


def _fit(
    task: Task,
    samples: TrainingSamples | StreamingSamples,
    args: OptimizationArguments,
    accelerator: Accelerator,
    num_workers: int,
) -> nn.Module:
    steps = TrainingSteps(samples, args, accelerator, num_workers)
    optimizer = build_optimizer(task.model, args)
    scheduler = build_scheduler(optimizer, args, steps.total)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    checkpoints = CheckpointFolder(args.output_dir, args.save_total_limit)
    refuse_earlier_run(args)
    task.check(accelerator)
    # Dropout and drop path shall differ between processes; the weights, made before, do not.
    set_seed(args.seed, device_specific=True)
    data = describe_data(task, samples)
    progress = resume_or_start(checkpoints, task, data, scheduler, args, accelerator, steps.total)

    bar = tqdm(
        total=steps.total,
        initial=progress.step,
        desc=f"training the {task.name}",
        disable=not accelerator.is_local_main_process,
    )
    model.train()
    finite = FiniteLoss(accelerator.device)
    if progress.evaluation_due:
        _evaluate(task, model, progress, args, accelerator, bar.write)
        checkpoints.update(accelerator, progress.step, run_state(progress, task, data))
    epochs = steps.iterate(progress.epoch, progress.step_of_epoch)
    while progress.step < steps.total:
        progress.epoch, step_of_epoch, batches = next(epochs)
        try:
            loss = _backward(model, batches, task, accelerator)
        except ValueError:
            # A policy whose weights are not finite cannot rank; the error of its model does not name the step.
            finite.check_weights(task.model, progress.step)
            raise
        if args.max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        progress.step += 1
        progress.step_of_epoch = step_of_epoch + 1
        finite.update(loss, progress.step)
        bar.update()

        is_last = progress.step == steps.total
        logs, evaluates, saves = (
            every > 0 and progress.step % every == 0
            for every in (args.logging_steps, args.eval_steps, args.save_steps)
        )
        if logs or evaluates or saves or is_last:
            finite.check(task.model, accelerator)
        if logs or is_last:
            values = {"loss": accelerator.reduce(loss).item(), "learning_rate": learning_rate}
            bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{learning_rate:.1e}")
            accelerator.log({f"{task.name}/{name}": value for name, value in values.items()}, step=progress.step)
        # Before the evaluation, which may fail; it draws no random numbers, so that the order changes no later step.
        progress.evaluation_due = evaluates
        if saves:
            checkpoints.save(accelerator, progress.step, run_state(progress, task, data))
        if evaluates:
            _evaluate(task, model, progress, args, accelerator, bar.write)
            if saves:
                checkpoints.update(accelerator, progress.step, run_state(progress, task, data))
    bar.close()
    finite.check(task.model, accelerator)  # once more, as a checkpoint may have left no step to make
    return accelerator.unwrap_model(model)


def _backward(model: nn.Module, batches: list[Batch], task: Task, accelerator: Accelerator) -> torch.Tensor:
    """Gradients of one step; returns this process's part of the loss, a scalar."""
    counts = [task.count(batch) for batch in batches]
    total = accelerator.reduce(torch.tensor(float(sum(counts)), device=accelerator.device)).clamp(min=1)
    step_loss = torch.zeros((), device=accelerator.device)
    for index, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        # Processes exchange gradients once a step.
        with nullcontext() if index == len(batches) - 1 else accelerator.no_sync(model):
            if not count:
                # The mean over no pixel at all is NaN, which no factor removes: any label gives gradients of 0.
                batch["labels"] = torch.zeros_like(batch["labels"])
            loss = task.forward(model, batch).loss * (count / total)
            # Processes' gradients are averaged, and should be summed.
            accelerator.backward(loss * accelerator.num_processes)
        step_loss += loss.detach()
    return step_loss


def _evaluate(
    task: Task,
    model: nn.Module,
    progress: Progress,
    args: OptimizationArguments,
    accelerator: Accelerator,
    write: Callable[[str], None],
) -> None:
    metrics = task.evaluate(accelerator)
    model.train()
    score = metrics[task.score]
    if accelerator.is_main_process:
        write(f"step {progress.step}: {task.score} {score:.4f}")
    accelerator.log({f"{task.name}/{name}": value for name, value in metrics.items()}, step=progress.step)
    if not math.isnan(score) and (progress.best_score is None or score > progress.best_score):
        progress.best_score = score
        if accelerator.is_main_process:
            task.save(Path(args.output_dir), metrics, BEST)
    progress.evaluation_due = False
    accelerator.wait_for_everyone()


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str) else str(value)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
