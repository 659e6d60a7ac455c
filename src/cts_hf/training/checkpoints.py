# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints to resume from: whole or not there at all, whenever the process is killed, and read without running code
that a file may hold.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.other import load as load_weights_only

from ..hub.output_folder import UNFINISHED, OutputFolder


CHECKPOINTS = "checkpoints"
# The file that is written last and deleted first: a folder that has it is whole.
PROGRESS = "progress.json"
# What a checkpoint is made of, by accelerate's names.
CHECKPOINT_FILES = ("model.safetensors", "optimizer.bin", "scaler.pt", "random_states_*.pkl", PROGRESS)
_NAME = re.compile(r"step_(\d+)")
# What earlier versions wrote; such files can run code when they are opened.
_PICKLES = "custom_checkpoint_*.pkl"


class CheckpointFolder:
    """
    The checkpoints of a run, `<output_dir>/checkpoints/step_00001000`: whatever the accelerator has prepared, the
    random states of each process, and `progress.json`.

    Args:
        output_dir: folder of the run.
        total_limit: checkpoints to keep.
    """

    def __init__(self, output_dir: str | Path, total_limit: int = 2):
        self.output = OutputFolder(output_dir, "training")
        self.folder = self.output.path / CHECKPOINTS
        self.total_limit = total_limit

    def list(self) -> list[Path]:
        """Whole checkpoints in the order in which they were written; damaged ones last, so that they are noticed."""
        found = [
            path
            for path in self.folder.glob("step_*")
            if _NAME.fullmatch(path.name) and ((path / PROGRESS).is_file() or any(path.glob(_PICKLES)))
        ]
        return sorted(found, key=lambda path: (_serial(path), int(_NAME.fullmatch(path.name)[1])))

    def find(self, which: str) -> Path | None:
        """
        The checkpoint to resume from.

        Args:
            which: "latest", or a folder.

        Returns:
            its folder; None where "latest" finds none.

        Raises:
            ValueError: a folder that is not there, or no checkpoint.
        """
        checkpoints = self.list()
        if which == "latest":
            return checkpoints[-1] if checkpoints else None
        there = ", ".join(map(str, checkpoints)) or "none"
        if not Path(which).is_dir():
            raise ValueError(f"There is no checkpoint {which}. Pass 'latest' or one of these: {there}.")
        if not (Path(which) / PROGRESS).is_file() and not any(Path(which).glob(_PICKLES)):
            raise ValueError(
                f"{which} is no checkpoint, it has no {PROGRESS}. Pass 'latest' or one of these: {there}."
            )
        return Path(which)

    def contains(self, checkpoint: Path | None) -> bool:
        """Whether a checkpoint is one of this run, so that resuming from it goes on with this run."""
        return checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()

    def save(self, accelerator: Accelerator, step: int, progress: dict[str, Any]) -> None:
        """
        Writes a checkpoint under another name, moves it to its place when it is whole, then deletes the oldest.

        Args:
            accelerator: its models, optimizers and random states are saved; every process has to call this.
            step: number of the checkpoint.
            progress: anything else that JSON can hold.

        Raises:
            ValueError: the checkpoint cannot be written. What was half written is gone, and so is no earlier one.
        """
        name = f"step_{step:08d}"
        unfinished = None
        try:
            if accelerator.is_main_process:
                unfinished = self.output.scratch(f"{CHECKPOINTS}/{UNFINISHED}_{name}")
            unfinished = broadcast_object_list([unfinished])[0]
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                # The step does not show which is the latest, where a run was resumed from an earlier one.
                serial = 1 + max(filter(math.isfinite, map(_serial, self.list())), default=0)
                _write_progress(unfinished, {"serial": serial, **progress})
                self._delete(self.folder / name)  # of a run that was resumed from an earlier one
                self._move(unfinished, self.folder / name)
                for old in self.list()[: -self.total_limit]:
                    self._delete(old)
        except Exception as error:  # each library that writes here has an error of its own for a full disk
            if accelerator.is_main_process and unfinished is not None and unfinished.exists():
                self.output.delete([f"{self._relative(unfinished)}/"])
            last = self.list()
            advice = f"resume with --resume_from_checkpoint {last[-1]}" if last else "start again"
            raise ValueError(
                f"The checkpoint of step {step} could not be written to {self.folder}: {error}. Make room there or "
                f"correct the cause, and {advice}."
            ) from error
        accelerator.wait_for_everyone()

    def update(self, accelerator: Accelerator, step: int, progress: dict[str, Any]) -> None:
        """Replaces what the checkpoint of this step, if there is one here, was given as `progress`."""
        checkpoint = self.folder / f"step_{step:08d}"
        if accelerator.is_main_process and (checkpoint / PROGRESS).exists():
            with self.output.writing(self._relative(checkpoint)) as unfinished:
                _write_progress(unfinished, {"serial": _serial(checkpoint), **progress})
        accelerator.wait_for_everyone()

    def delete_leftovers(self) -> None:
        """Deletes what was written of checkpoints that are not whole, as a killed run leaves them."""
        whole = {self._relative(path) for path in self.list()}
        prefix = f"{CHECKPOINTS}/"
        names = [
            name
            for name in sorted(self.output.written)
            if name.startswith(prefix) and "/".join(name.split("/")[:2]) not in whole and self.output.may_delete(name)
        ]
        self.output.delete(names)

    def read_progress(self, checkpoint: Path) -> dict[str, Any]:
        """
        What [`save`] was given as `progress`.

        Raises:
            ValueError: a checkpoint of an earlier version, or one that is damaged.
        """
        if pickles := sorted(path.name for path in checkpoint.glob(_PICKLES)):
            raise ValueError(
                f"{checkpoint} holds {', '.join(pickles)}, pickles of an earlier version of this package. They are "
                "not opened, as they can run code: finish that run with the version that wrote it, or start a new one "
                "in another --output_dir."
            )
        try:
            progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
            parts = [progress[name] for name in ("progress", "options", "data")]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(checkpoint / PROGRESS, error) from error
        if not all(isinstance(part, dict) for part in parts):
            raise _damaged(checkpoint / PROGRESS, TypeError("progress, options and data must be mappings"))
        return progress

    def load(self, accelerator: Accelerator, checkpoint: Path) -> None:
        """
        Gives what the accelerator has prepared, and this process's random numbers, the state of a checkpoint.

        Raises:
            ValueError: a file that is missing or damaged, or that holds more than tensors and numbers.
        """
        needed = ["model.safetensors", "optimizer.bin", f"random_states_{accelerator.process_index}.pkl"]
        if accelerator.scaler is not None:
            needed.append("scaler.pt")
        for name in needed:
            file = checkpoint / name
            if not file.is_file():
                raise ValueError(f"{checkpoint} has no {name}: it is not whole. Resume from another checkpoint.")
            if file.suffix == ".safetensors":
                continue
            try:
                # accelerate silently goes on where random states cannot be read.
                load_weights_only(file, map_location="cpu")
            except Exception as error:  # the error depends on which part of the archive is damaged
                raise _damaged(file, error) from error
        try:
            accelerator.load_state(str(checkpoint))
            for optimizer in accelerator._optimizers:
                _check_shapes(optimizer.optimizer)
        except Exception as error:
            raise _damaged(checkpoint, error) from error

    def _move(self, unfinished: Path, checkpoint: Path) -> None:
        """Moves a checkpoint to its place at once, or file by file where others have put files there."""
        names = sorted((path.name for path in unfinished.iterdir()), key=lambda name: name == PROGRESS)
        self.output.record(f"{self._relative(checkpoint)}/{name}" for name in names)
        if not checkpoint.exists():
            os.replace(unfinished, checkpoint)
        else:
            for name in names:  # the one that makes it whole last
                os.replace(unfinished / name, checkpoint / name)
        self.output.delete([f"{self._relative(unfinished)}/"])

    def _delete(self, checkpoint: Path) -> None:
        """Deletes what was written of a checkpoint, the file that makes it whole first."""
        prefix = f"{self._relative(checkpoint)}/"
        names = [name for name in self.output.written if name.startswith(prefix) and self.output.may_delete(name)]
        self.output.delete(sorted(names, key=lambda name: not name.endswith(f"/{PROGRESS}")))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.output.path).as_posix()


def _serial(checkpoint: Path) -> float:
    """The position of a checkpoint, from 1, in the order of writing; infinity if it is damaged and has none."""
    try:
        serial = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))["serial"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return serial if isinstance(serial, int) else math.inf


def _write_progress(folder: Path, progress: dict[str, Any]) -> None:
    (folder / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        shapes = {tuple(value.shape) for value in state.values() if isinstance(value, torch.Tensor) and value.ndim}
        if shapes - {tuple(parameter.shape)}:
            raise ValueError(
                f"the optimizer has states of the shapes {shapes} for weights of {tuple(parameter.shape)}"
            )


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return ValueError(f"{path} cannot be read as part of a checkpoint ({reason}). Resume from another checkpoint.")
