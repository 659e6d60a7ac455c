# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What `tests/training/test_distributed.py` runs in two processes and in one: it trains with and without accumulation,
evaluates numbers of images that two processes cannot share evenly, and writes the results.
"""

import json
import sys
from pathlib import Path

import torch

from cts_hf.evaluation.sharing import Sharing
from cts_hf.training import DataArguments, PolicyTask, build_processor

from .models import tiny_model
from .training_runs import train


# Everything shares a token, so that rounding cannot exchange superpatches of almost equal scores.
DETERMINISTIC = {"drop_path_rate": 0.0, "decoder_dropout_prob": 0.0, "token_reduction": 0.75}
# No AdamW: it makes steps of the size of the learning rate of gradients that are zero but for rounding.
RUNS = {
    "start": {"optimizer": "sgd", "learning_rate": 1e-20, "min_lr": 0},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 1.0},
    "sgd_accumulated": {"optimizer": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2},
}
EVALUATED = (1, 2, 3)


def main(scenes, folder):
    folder = Path(folder)
    results = {}
    for name, options in RUNS.items():
        model, task, accelerator = train(
            scenes, folder / name, model_options=DETERMINISTIC, max_steps=3, save_steps=3, **options
        )
        if accelerator.is_main_process:
            torch.save(model.state_dict(), folder / f"{name}.pt")
    # Weights that are equal to the last bit, so that counts have to be equal too.
    task.model = tiny_model(num_labels=10)
    processor = build_processor(DataArguments(crop_size=64), task.model.cts.policy.config)
    policy = PolicyTask(task.model.cts.policy, processor, task.eval_dataset, (), token_reduction=0.3)
    rows = task.eval_dataset
    for num_images in EVALUATED:
        task.eval_dataset = policy.eval_dataset = rows.select(range(num_images))
        sharings = [Sharing("learned", 0.0), Sharing("learned", 0.3), Sharing("random", 0.3)]
        segmented = task.evaluate_sharings(sharings, accelerator, show_progress=False)
        results[str(num_images)] = [
            *([result["mean_iou"], result["num_images"]] for result in segmented),
            list(policy.evaluate(accelerator).values()),
        ]
    if accelerator.is_main_process:
        results["num_processes"] = accelerator.num_processes
        (folder / "results.json").write_text(json.dumps(results))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
