# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny training runs for the tests: a folder of small scenes, a model of two layers, a few steps."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from cts_hf.data import SCENE_CLASSES, build_scenes
from cts_hf.hub.output_folder import LOCK
from cts_hf.training import (
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicySourceArguments,
    SegmentationTask,
    build_accelerator,
    build_policy,
    build_processor,
    build_segmenter,
    fit,
    loop,
)

from .scripts import ROOT, command_line, run_script


EXAMPLES = ROOT / "examples"
TINY_POLICY = {"policy_output_stride": 8, "policy_width_coefficient": 0.1, "policy_depth_coefficient": 0.3}
TINY_DATA = {"crop_size": 64, "num_workers": 0}
TINY_MODEL = {
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
}
TINY_RUN = {"batch_size": 4, "optimizer": "adamw", "cpu_threads": 1}


def write_scenes(folder, num_train=12, num_val=3, size=64, ignored_rows=True):
    """Writes scenes as a folder data set; some labels ignore many pixels, so that images weigh differently."""
    for index, row in enumerate(build_scenes(num_train + num_val, size)):
        split = "train" if index < num_train else "val"
        label = row["label"]
        if ignored_rows and index % 3:
            label.paste(255, (0, 0, size, index % 3 * size // 4))
        for kind, picture in (("images", row["image"]), ("labels", label)):
            path = Path(folder) / kind / split / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    (Path(folder) / "classes.txt").write_text("\n".join(SCENE_CLASSES))
    return Path(folder)


def reset_accelerate():
    """Lets the next accelerator of this process have another configuration."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(data_dir, output_dir, transform=None, model_options=None, policy_loss_weight=0.0, trackers=(), **options):
    """Trains a tiny Segmenter; returns it, its task and the accelerator."""
    reset_accelerate()
    args = OptimizationArguments(output_dir=str(output_dir), **{**TINY_RUN, "save_steps": 0, **options})
    accelerator = build_accelerator(args)
    accelerator.trackers = list(trackers)
    data_args = DataArguments(data_dir=str(data_dir), **TINY_DATA)
    model_args = ModelArguments(**{**TINY_MODEL, **(model_options or {})})
    data = data_args.load()
    policy = build_policy(PolicyArguments(**TINY_POLICY), model_args.patch_size, superpatch_levels=model_args.levels)
    source = PolicySourceArguments(policy_loss_weight=policy_loss_weight)
    model = build_segmenter(model_args, policy, source, data, data_args.crop_size)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    rows = data_args.evaluation_rows(data)
    task = SegmentationTask(model, build_processor(data_args, model.config), rows, (data_args, model_args, args))
    transform = transform or data_args.transform(model.config)
    fit(task, data_args.training_samples(data, args.seed, transform), args, accelerator)
    return model, task, accelerator


def largest_difference(state, other):
    """Largest absolute difference between two state dicts, or files of them."""
    state, other = (load_file(given) if isinstance(given, Path) else given for given in (state, other))
    assert state.keys() == other.keys()
    return max((state[name].double() - other[name].double()).abs().max().item() for name in state)


def train_example(scenes, folder, *flags, **options):
    """`examples/train.py` for two steps."""
    defaults = {**TINY_POLICY, **TINY_MODEL, **TINY_RUN, "crop_size": 64, "num_workers": 0, "max_steps": 2}
    defaults |= {"data_dir": scenes, "output_dir": folder, "policy_loss_weight": 0.5}
    return run_example("train.py", *flags, **{**defaults, **options})


def run_example(script, *flags, **options):
    """What `main` of an example returns. The next accelerator may have another configuration."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            return run_script(patch, EXAMPLES / script, [*command_line(options), *flags])
    finally:
        reset_accelerate()


def no_step(monkeypatch):
    """Makes the first step of training fail the test."""
    monkeypatch.setattr(loop, "_backward", lambda *_: pytest.fail("a step was made"))


def contents(folder):
    """The bytes of each file in a folder, but for the lock."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file() and path.name != LOCK}
