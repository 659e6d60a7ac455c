# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys

import pytest
import torch

from ..helpers.scripts import ROOT
from ..helpers.training_runs import largest_difference, write_scenes
from ..helpers.two_processes import RUNS, main


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    scenes = write_scenes(tmp_path / "scenes", num_train=8)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    # As `accelerate launch --multi_gpu --num_processes 2` starts them, in a third of the time.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.helpers.two_processes", str(scenes), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    main(scenes, tmp_path / "one")

    one, two = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two"))
    assert (one.pop("num_processes"), two.pop("num_processes")) == (1, 2)
    start = torch.load(tmp_path / "one" / "start.pt")
    for name in RUNS.keys() - {"start"}:
        states = [torch.load(tmp_path / folder / f"{name}.pt") for folder in ("one", "two")]
        difference, moved = largest_difference(*states), largest_difference(start, states[0])
        print(f"{name}: the weights went {moved:.1e} in 3 steps and differ by {difference:.1e}")
        # SGD goes as far as the gradients are large, and these differ by rounding, about a millionth.
        assert difference < 1e-3 * moved
    assert (tmp_path / "two" / "sgd" / "checkpoints" / "step_00000003" / "random_states_1.pkl").exists()
    print("mean IoU and policy metrics:", one, two)
    assert one == two
