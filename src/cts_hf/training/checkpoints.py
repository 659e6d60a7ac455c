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
"""Checkpoints to resume from: whole or not there at all, whenever the process is killed."""

import os
import re
import shutil
from pathlib import Path

from accelerate import Accelerator


CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step_(\d+)")
_UNFINISHED = ".unfinished_"


class CheckpointFolder:
    """
    The checkpoints of a run, `<output_dir>/checkpoints/step_00001000`, of whatever the accelerator has prepared.

    Args:
        output_dir: folder of the run.
        total_limit: checkpoints to keep.
    """

    def __init__(self, output_dir: str | Path, total_limit: int = 2):
        self.folder = Path(output_dir) / CHECKPOINTS
        self.total_limit = total_limit

    def list(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))

    def find(self, which: str) -> Path | None:
        """
        The checkpoint to resume from.

        Args:
            which: "latest", or a folder.

        Returns:
            its folder; None where "latest" finds none.

        Raises:
            ValueError: a folder that is not there.
        """
        checkpoints = self.list()
        if which == "latest":
            return checkpoints[-1] if checkpoints else None
        if not Path(which).is_dir():
            there = ", ".join(map(str, checkpoints)) or "none"
            raise ValueError(f"There is no checkpoint {which}. Pass 'latest' or one of these: {there}.")
        return Path(which)

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Writes a checkpoint under another name, renames it when it is whole, then deletes the oldest."""
        final = self.folder / f"step_{step:08d}"
        unfinished = self.folder / f"{_UNFINISHED}{final.name}"
        if accelerator.is_main_process:
            for leftover in self.folder.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if final.exists():  # a run that was resumed from an earlier checkpoint comes by again
                delete_folder(final)
            os.replace(unfinished, final)
            for old in self.list()[: -self.total_limit]:
                delete_folder(old)
        accelerator.wait_for_everyone()

    def clear(self) -> None:
        """Deletes all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def refuse_leftovers(self) -> None:
        """Raises ValueError where an earlier run has left checkpoints."""
        if found := self.list():
            raise ValueError(
                f"{self.folder} holds checkpoints of an earlier run, up to {found[-1].name}. Go on with "
                "--resume_from_checkpoint latest, choose another --output_dir, or delete them with "
                "--overwrite_output_dir."
            )


def delete_folder(path: Path) -> None:
    """Deletes a folder so that it is never seen half deleted."""
    hidden = path.with_name(f"{_UNFINISHED}old_{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def replace_files(source: Path, destination: Path) -> None:
    """Moves all files of one folder over those of another on the same file system, each one at once."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        os.replace(path, destination / path.name)
    source.rmdir()
