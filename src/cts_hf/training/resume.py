# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Starts a training run, or resumes it from a checkpoint that was made with the same options and data."""

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import save
from torch.optim.lr_scheduler import LambdaLR

from ..data import StreamingSamples, TrainingSamples
from ..hub.sharing_folder import shares_tokens
from .arguments import FREE_ON_RESUME, OptimizationArguments
from .checkpoints import PROGRESS, CheckpointFolder
from .optimization import set_step
from .output import delete_earlier_run
from .recipe import effective_options, refuse_changed_options
from .tasks import Task


@dataclass
class Progress:
    """
    Where a run is; part of every checkpoint.

    Attributes:
        step: optimizer steps made.
        epoch, step_of_epoch: where in the data the next step starts.
        best_score: of the model in `best`; `None` if there is none.
        num_processes: of the run.
        evaluation_due: whether this step is to be evaluated, and has not been yet.
    """

    step: int = 0
    epoch: int = 0
    step_of_epoch: int = 0
    best_score: float | None = None
    num_processes: int = 1
    evaluation_due: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any], place: Path) -> "Progress":
        """The progress in a file; raises `ValueError` if it is none."""
        names = {entry.name for entry in fields(cls)}
        counts = [values.get(name) for name in ("step", "epoch", "step_of_epoch", "num_processes")]
        best = values.get("best_score")
        if (
            values.keys() != names
            or not all(type(count) is int and 0 <= count < 2**53 for count in counts)
            or not (best is None or (isinstance(best, float | int) and math.isfinite(best)))
            or not isinstance(values["evaluation_due"], bool)
        ):
            raise ValueError(
                f"{place} must hold the progress of a run ({', '.join(sorted(names))}), got {values}: it is damaged. "
                "Resume from another checkpoint."
            )
        return cls(**values)


def run_state(progress: Progress, task: Task, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of a run: its progress, its options, and its data as [`describe_data`] has them."""
    return {"progress": asdict(progress), "options": effective_options(task.arguments), "data": data}


def resume_or_start(
    checkpoints: CheckpointFolder,
    task: Task,
    data: dict[str, Any],
    scheduler: LambdaLR,
    args: OptimizationArguments,
    accelerator: Accelerator,
    total_steps: int,
) -> Progress:
    """
    Loads the checkpoint that `args` name, or clears the output folder for a new run.

    Raises:
        ValueError: a checkpoint that is damaged, or of other options, other data, more processes or more steps.
    """
    progress = Progress(num_processes=accelerator.num_processes)
    checkpoint = checkpoints.find(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if checkpoint is not None:
        progress = _resume(checkpoints, checkpoint, task, data, accelerator, total_steps)
        set_step(scheduler, progress.step)
    elif args.resume_from_checkpoint:
        accelerator.print("There is no checkpoint yet: starting a new run.")
    accelerator.wait_for_everyone()
    continues = checkpoints.contains(checkpoint)
    if not continues:
        progress.best_score = None  # its model is in another folder
    if accelerator.is_main_process:
        if continues:
            checkpoints.delete_leftovers()
        else:
            delete_earlier_run(args)
    accelerator.wait_for_everyone()
    return progress


def _resume(
    checkpoints: CheckpointFolder,
    checkpoint: Path,
    task: Task,
    data: dict[str, Any],
    accelerator: Accelerator,
    total_steps: int,
) -> Progress:
    state = checkpoints.read_progress(checkpoint)
    progress = Progress.from_json(state["progress"], checkpoint / PROGRESS)
    if progress.num_processes != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {progress.num_processes} processes, these are {accelerator.num_processes}: "
            "each process has random states of its own, so resume with as many."
        )
    refuse_changed_options(state["options"], task.arguments, checkpoint, FREE_ON_RESUME)
    _refuse_changed_data(state["data"], data, checkpoint)
    if progress.step > total_steps:
        raise ValueError(
            f"{checkpoint} was written after {progress.step} steps, and these options ask for {total_steps}: resume "
            "from an earlier checkpoint, or with more --max_steps or --num_epochs."
        )
    accelerator.print(f"Resuming from {checkpoint}.")
    checkpoints.load(accelerator, checkpoint)
    return progress


def describe_data(task: Task, samples: TrainingSamples | StreamingSamples) -> dict[str, Any]:
    """The data of a run, as far as it is known without reading images."""
    described: dict[str, Any] = {"classes": list(task.model.config.id2label.values())}
    rows = samples.dataset
    if isinstance(rows, Dataset):
        described["training images"] = len(rows)
        if "name" in rows.column_names:
            names = "\n".join(rows.with_format(None)["name"])
            described["digest of their names"] = hashlib.sha256(names.encode()).hexdigest()[:16]
    if shares_tokens(task.model) and task.model.token_sharing.policy is not None:
        # Checkpoints of models of transformers do not hold it.
        weights = save(task.model.token_sharing.policy.state_dict())
        described["digest of the policy"] = hashlib.sha256(weights).hexdigest()[:16]
    return described


def _refuse_changed_data(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    differences = [
        f"{name} {saved.get(name)!r} -> {current.get(name)!r}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"{checkpoint} was made with other data: {', '.join(differences)}. Resume with the former data, or start "
            "a new run in another --output_dir."
        )
