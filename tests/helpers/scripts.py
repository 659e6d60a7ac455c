# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Running the example scripts, in this process and in several."""

import importlib.util
import io
import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_main(monkeypatch, script, **options):
    """What `main` of an example returns, in this process."""
    return run_script(monkeypatch, ROOT / "examples" / script, command_line(options))


def run_script(monkeypatch, path, arguments):
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    return load_script(monkeypatch, path).main()


def load_script(monkeypatch, path):
    """A script as a module, for as long as the test runs."""
    name = f"example_{path.stem}"  # `evaluate` and others are packages, too
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class ClosedPipe(io.StringIO):
    """A standard output that nobody reads any more."""

    def write(self, _):
        raise BrokenPipeError("nobody reads this")


def launch(script, num_processes, **options):
    """The finished run of an example under `accelerate launch` on the processor."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), str(ROOT / "examples" / script), *command_line(options)]
    # Without what the tests set, so that it is the script that finds no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def command_line(options):
    arguments = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        arguments += [f"--{name}", *map(str, values)]
    return arguments
