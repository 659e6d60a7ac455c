import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .training_runs import largest_difference, reset_accelerate, write_scenes
from .two_processes import RUNS, main


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", num_train=8)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    # As `accelerate launch --multi_gpu --num_processes 2` starts them, in a third of the time.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.two_processes", str(scenes), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    main(scenes, tmp_path / "one")
    reset_accelerate()

    one, two = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two"))
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    for name in RUNS:
        states = [torch.load(tmp_path / folder / f"{name}.pt") for folder in ("one", "two")]
        difference = largest_difference(*states)
        print(f"{name}: largest difference of the weights after 3 steps {difference:.1e}")
        # AdamW divides by the size of the gradient: where that is almost zero, its rounding shows.
        assert difference < (1e-4 if name == "adamw" else 1e-6)
    assert (tmp_path / "two" / "sgd" / "checkpoints" / "step_00000003" / "random_states_1.pkl").exists()
    print("mean IoU and policy metrics:", one, two)
    assert one == two
