# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a Segmenter with content-aware token sharing, and its policy; or a model of transformers that shares tokens.

    accelerate launch examples/train.py                                   # the built-in scenes
    accelerate launch examples/train.py --data_dir DIR --policy_epochs 10 # a folder of images and labels
    accelerate launch examples/train.py --data_dir DIR --model MODEL --output_dir TUNED  # from a trained Segmenter
    accelerate launch examples/train.py --data_dir DIR --model MODEL --policy POLICY # from a model of transformers
    accelerate launch examples/train.py --recipe examples/recipes/ade20k_512_small.yaml --data_dir ADEChallengeData2016

`--help` lists all options; a recipe is a file of them, which the command line overrides.
"""

from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator, PartialState

from cts_hf.training import (
    SegmenterArguments,
    build_accelerator,
    finished_before,
    lock_output,
    parse_recipe,
    push_to_hub,
    refuse_another_recipe,
    settle_options,
    train_segmenter,
)
from cts_hf.training.report import report_segmenter, sharings_to_compare


DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "scenes.yaml"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Returns the metrics for each sharing, none where the run was finished before."""
    arguments = parse_recipe(get_args(SegmenterArguments), argv, DEFAULT_RECIPE)
    settle_options(arguments)
    args = arguments[-1]
    if finished_before(args):
        refuse_another_recipe(Path(args.output_dir), arguments)
        PartialState().print(f"The run in {args.output_dir} is finished.")
        return []
    accelerator = build_accelerator(args, arguments)
    with lock_output(args.output_dir, accelerator):
        results = train(arguments, accelerator)
    accelerator.end_training()
    return results


def train(arguments: SegmenterArguments, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Trains, saves, and then evaluates: nothing that can fail comes between a model and its folder."""
    data_args, model_args, *_, args = arguments
    with accelerator.local_main_process_first():
        data = data_args.load()
    task = train_segmenter(arguments, data, accelerator)
    sharings = sharings_to_compare(model_args.token_reduction, model_args.sharing_threshold)
    results = task.evaluate_sharings(sharings, accelerator)
    if accelerator.is_main_process:
        report_segmenter(args.output_dir, task, results, data)
        if args.push_to_hub:
            print(f"Uploaded to {push_to_hub(args.output_dir, args.hub_model_id)}.")
    return results


if __name__ == "__main__":
    main()
