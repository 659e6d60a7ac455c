# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a policy: which superpatches show one class? `examples/train.py --policy FOLDER` then shares tokens by it.

    accelerate launch examples/train_policy.py                              # the built-in scenes
    accelerate launch examples/train_policy.py --dataset ade20k --data_dir ADEChallengeData2016 \
        --policy_weights timm/efficientnet_lite0.ra_in1k
    accelerate launch examples/train_policy.py --for_model facebook/dinov2-small --data_dir DIR  # for `apply_cts`

`--help` lists all options; a recipe is a file of them, which the command line overrides.
"""

from pathlib import Path

from accelerate import Accelerator

from cts_hf.hub.normalization import Normalization
from cts_hf.training import (
    DataArguments,
    PolicyArguments,
    PolicyOptimizationArguments,
    SuperpatchArguments,
    adopt_model,
    build_accelerator,
    build_policy,
    check_output,
    fit_policy,
    lock_output,
    parse_recipe,
    push_to_hub,
)


DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "policy_scenes.yaml"


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the metrics of the policy."""
    types = (DataArguments, SuperpatchArguments, PolicyArguments, PolicyOptimizationArguments)
    arguments = parse_recipe(types, argv, DEFAULT_RECIPE)
    data_args, superpatch_args, policy_args, args = arguments
    args.output_dir = args.output_dir or f"outputs/policy_{data_args.name}"
    sources = {"policy_weights": policy_args.policy_weights, "for_model": superpatch_args.for_model}
    check_output(args, data_args.data_dir, sources)
    normalization = adopt_model(superpatch_args, data_args)
    accelerator = build_accelerator(args, arguments)
    with lock_output(args.output_dir, accelerator):
        metrics = train(arguments, normalization, accelerator)
    accelerator.end_training()
    return metrics


def train(arguments: tuple, normalization: Normalization, accelerator: Accelerator) -> dict[str, float]:
    """Trains, saves, evaluates and, where asked to, uploads."""
    data_args, superpatch_args, policy_args, args = arguments
    with accelerator.local_main_process_first():
        data = data_args.load()
    policy = build_policy(policy_args, superpatch_args.patch_size, normalization, superpatch_args.levels)
    _, metrics = fit_policy(policy, arguments, data, accelerator)
    if accelerator.is_main_process:
        for name, value in metrics.items():
            print(f"{name:<26}{value:.4f}")
        if args.push_to_hub:
            print(f"Uploaded to {push_to_hub(args.output_dir, args.hub_model_id)}.")
    return metrics


if __name__ == "__main__":
    main()
