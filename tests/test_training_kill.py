import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cts_hf.training import CheckpointFolder

from .training_runs import (
    EXAMPLES,
    TINY_MODEL,
    TINY_POLICY,
    TINY_RUN,
    command_line,
    largest_difference,
    load_example,
    reset_accelerate,
    write_scenes,
)


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", num_train=10)
    options = {**TINY_POLICY, **TINY_MODEL, **TINY_RUN, "crop_size": 64, "policy_learning_rate": 1e-3}
    options.update(data_dir=scenes, policy_epochs=2, max_steps=30, save_steps=2, num_workers=1)
    argv = command_line(**options)
    train = load_example("train").main

    output = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "train.py"), *argv, "--output_dir", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(CheckpointFolder(output).list()) < 2:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "model.safetensors").exists()

    reset_accelerate()
    train([*argv, "--output_dir", str(output), "--resume_from_checkpoint", "latest"])
    reset_accelerate()
    train([*argv, "--output_dir", str(tmp_path / "whole"), "--save_steps", "0"])
    reset_accelerate()
    for model in ("model.safetensors", "policy/model.safetensors"):
        assert largest_difference(output / model, tmp_path / "whole" / model) == 0
