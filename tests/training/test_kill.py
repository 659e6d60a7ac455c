# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import os
import signal
import subprocess
import sys

import pytest

from cts_hf.training import CheckpointFolder

from ..helpers.scripts import ROOT, command_line
from ..helpers.training_runs import (
    EXAMPLES,
    TINY_MODEL,
    TINY_POLICY,
    TINY_RUN,
    largest_difference,
    run_example,
    write_scenes,
)


# It dies at step 6: the policy has fewer steps, the Segmenter more.
KILLED_RUN = ROOT / "tests" / "helpers" / "killed_run.py"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", num_train=10)
    options = {**TINY_POLICY, **TINY_MODEL, **TINY_RUN, "crop_size": 64, "policy_learning_rate": 1e-3}
    options.update(data_dir=scenes, policy_epochs=2, max_steps=30, save_steps=2, num_workers=1)

    output = tmp_path / "killed"
    command = [
        sys.executable,
        str(KILLED_RUN),
        str(EXAMPLES / "train.py"),
        *command_line({**options, "output_dir": output}),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert [path.name for path in CheckpointFolder(output).list()] == ["step_00000002", "step_00000004"]

    run_example("train.py", **options, output_dir=output, resume_from_checkpoint="latest")
    run_example("train.py", **{**options, "save_steps": 0}, output_dir=tmp_path / "whole")
    for model in ("model.safetensors", "policy/model.safetensors"):
        assert largest_difference(output / model, tmp_path / "whole" / model) == 0
