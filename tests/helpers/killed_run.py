# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs a script until it is about to write the checkpoint of step 6, and dies there:

    python killed_run.py SCRIPT OPTION ...
"""

import os
import runpy
import signal
import sys

from cts_hf.training import CheckpointFolder


save = CheckpointFolder.save


def save_or_die(folder, accelerator, step, progress):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, accelerator, step, progress)


if __name__ == "__main__":
    CheckpointFolder.save = save_or_die
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
