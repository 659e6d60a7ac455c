# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains a Segmenter with content-aware token sharing, and its policy.

    accelerate launch examples/train.py                                   # the built-in scenes
    accelerate launch examples/train.py --data_dir DIR --policy_epochs 10 # a folder of images and labels
    accelerate launch examples/train.py --data_dir DIR --model MODEL --output_dir TUNED  # from a trained Segmenter
    accelerate launch examples/train.py --recipe examples/recipes/ade20k_512_small.yaml --data_dir ADEChallengeData2016

`--help` lists all options; a recipe is a file of them, which the command line overrides.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from PIL import Image

from cts_hf import CtsForSemanticSegmentation, CtsPolicyModel
from cts_hf.conversion.checkpoints import load_policy_folder
from cts_hf.data import SegmentationData
from cts_hf.evaluation.evaluator import Sharing
from cts_hf.evaluation.visualization import prediction_panel
from cts_hf.hub.output_folder import OutputFolder
from cts_hf.model.image_processing_cts import CtsImageProcessor
from cts_hf.training import (
    CheckpointFolder,
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicySourceArguments,
    PolicyTask,
    SegmentationTask,
    SuperpatchArguments,
    adopt_architecture,
    build_accelerator,
    build_policy,
    build_processor,
    build_segmenter,
    check_hub_name,
    encoder_normalization,
    finished_before,
    fit,
    is_finished,
    lock_output,
    parse_recipe,
    push_to_hub,
    refuse_another_recipe,
    refuse_inside_data,
    refuse_other_normalization,
    refuse_own_sources,
    save_card,
    settle_precision,
)


DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "scenes.yaml"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    types = (DataArguments, ModelArguments, PolicyArguments, PolicySourceArguments, OptimizationArguments)
    arguments = parse_recipe(types, argv, DEFAULT_RECIPE)
    data_args, model_args, policy_args, policy_source, args = arguments
    args.output_dir = args.output_dir or f"outputs/{data_args.name}"
    check_hub_name(args)
    refuse_inside_data(args.output_dir, data_args.data_dir)
    sources = {"model": model_args.model, "backbone_weights": model_args.backbone_weights}
    sources |= {"policy": policy_source.policy, "policy_weights": policy_args.policy_weights}
    refuse_own_sources(args.output_dir, sources)
    if policy_source.policy_epochs > 0:
        refuse_own_sources(args.output_dir, sources, "policy")
    adopt_architecture(model_args)
    settle_precision(args)
    if finished_before(args):
        refuse_another_recipe(Path(args.output_dir), arguments)
        PartialState().print(f"The run in {args.output_dir} is finished.")
        return []
    accelerator = build_accelerator(args, arguments)
    with lock_output(args.output_dir, accelerator):
        results = train(arguments, accelerator)
    accelerator.end_training()
    return results


def train(arguments: tuple, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Trains, saves, and then evaluates: nothing that can fail comes between a model and its folder."""
    data_args, model_args, policy_args, policy_source, args = arguments
    with accelerator.local_main_process_first():
        data = data_args.load()
    eval_rows = data_args.evaluation_rows(data)

    policy = initial_policy(model_args, policy_args, policy_source)
    set_seed(args.seed)  # again, as policies that are loaded and those that are made differ in random numbers
    model = build_segmenter(model_args, copy.deepcopy(policy), policy_source, data, data_args.crop_size)
    refuse_other_normalization(policy_args, model.config.policy_config)
    processor = build_processor(data_args, model.config)
    task = SegmentationTask(model, processor, eval_rows, arguments, data_args.inference())
    # A checkpoint of the Segmenter has its policy.
    is_resumed = args.resume_from_checkpoint and CheckpointFolder(args.output_dir).find(args.resume_from_checkpoint)
    if policy_source.policy_epochs > 0 and not is_resumed:
        task.check(accelerator)  # before the policy is trained, not only after it
        trained = train_policy(policy, arguments, data)
        model.cts.policy.load_state_dict(trained.state_dict())
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    samples = data_args.training_samples(data, args.seed, data_args.transform(model.config))
    model = fit(task, samples, args, accelerator, data_args.num_workers)

    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        task.save(folder, {})
        print(f"The model is in {folder}.")
    results = task.evaluate_sharings(sharings(model_args.token_reduction), accelerator)
    if accelerator.is_main_process:
        save_card(folder, model, {f"mean IoU, {describe(result)}": result["mean_iou"] for result in results})
        print(table(results))
        picture = draw_prediction(model, processor, next(iter(eval_rows)), data)
        with OutputFolder(folder, "training") as output, output.writing() as unfinished:
            picture.save(unfinished / "prediction.png")
        if args.push_to_hub:
            print(f"Uploaded to {push_to_hub(folder, args.hub_model_id)}.")
    return results


def initial_policy(
    model_args: ModelArguments, policy_args: PolicyArguments, policy_source: PolicySourceArguments
) -> CtsPolicyModel | None:
    """The policy that the options name, or one to train; `None`: that of the model that training goes on from."""
    if policy_source.policy:
        return load_policy_folder(policy_source.policy)
    if model_args.model and policy_source.policy_epochs == 0:
        return None
    is_trained = policy_source.policy_epochs > 0 or policy_source.policy_loss_weight > 0
    if not is_trained and model_args.token_reduction > 0:
        raise ValueError(
            "The policy would stay as random as it starts. Pass --policy FOLDER (of examples/train_policy.py), "
            "--policy_epochs to train it first, --policy_loss_weight to train it jointly, or --token_reduction 0."
        )
    return build_policy(policy_args, model_args.patch_size, encoder_normalization(model_args))


def train_policy(policy: CtsPolicyModel, arguments: tuple, data: SegmentationData) -> CtsPolicyModel:
    """Trains the policy alone, in `<output_dir>/policy`; when the run is resumed, unless that has been done."""
    data_args, model_args, policy_args, policy_source, args = arguments
    folder = Path(args.output_dir) / "policy"
    policy_optimization = replace(
        args,
        output_dir=str(folder),
        num_epochs=policy_source.policy_epochs,
        max_steps=0,
        optimizer="adamw",
        learning_rate=policy_source.policy_learning_rate,
        min_lr=0.0,
        weight_decay=1e-3,
        resume_from_checkpoint=args.resume_from_checkpoint and "latest",
        report_to=[],
    )
    superpatch_args = SuperpatchArguments(model_args.patch_size, model_args.token_reduction)
    policy_arguments = (data_args, superpatch_args, policy_args, policy_optimization)
    if args.resume_from_checkpoint and is_finished(folder):
        refuse_another_recipe(folder, policy_arguments)
        PartialState().print(f"The policy in {folder} is trained already.")
        return load_policy_folder(folder)
    # An accelerator saves all that it was ever given: the policy gets one of its own.
    accelerator = build_accelerator(policy_optimization)
    eval_rows = data_args.evaluation_rows(data)
    processor = build_processor(data_args, policy.config)
    task = PolicyTask(policy, processor, eval_rows, policy_arguments, model_args.token_reduction)
    samples = data_args.training_samples(data, args.seed, data_args.transform(policy.config))
    policy = fit(task, samples, policy_optimization, accelerator, data_args.num_workers)
    if accelerator.is_main_process:
        task.save(folder, {})
    metrics = task.evaluate(accelerator)
    accelerator.print("policy: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    if accelerator.is_main_process:
        save_card(folder, policy, metrics)
    accelerator.wait_for_everyone()
    return policy


def sharings(token_reduction: float) -> list[Sharing]:
    """No sharing, and every other strategy at the budget that the model was trained with."""
    shared = [Sharing(strategy, token_reduction) for strategy in ("learned", "random", "oracle")]
    return [Sharing("none", 0.0), *(shared if token_reduction > 0 else [])]


def describe(result: dict[str, Any]) -> str:
    if result["token_reduction"] == 0:
        return "no sharing"
    return f"{result['sharing']} sharing of {result['token_reduction']:.0%} of the tokens"


def table(results: list[dict[str, Any]]) -> str:
    """Mean IoU of each policy, and how many of the superpatches it shares hold one class."""
    lines = ["", f"{'sharing':<12}{'fewer tokens':>14}{'mean IoU':>10}{'one class':>11}"]
    for result in results:
        reduction = result["token_reduction"]
        name, precision = result["sharing"], f"{result.get('policy_precision_at_budget', float('nan')):.3f}"
        if reduction == 0:
            name, precision = "none", "-"
        lines.append(f"{name:<12}{f'{reduction:.1%}':>14}{result['mean_iou']:>10.4f}{precision:>11}")
    return "\n".join([*lines, ""])


@torch.no_grad()
def draw_prediction(
    model: CtsForSemanticSegmentation, processor: CtsImageProcessor, row: dict, data: SegmentationData
) -> Image.Image:
    """Image, ground truth, prediction and sharing grid of one row, at the size that the model sees."""
    model.eval()
    inputs = processor(row["image"], segmentation_maps=row["label"], return_tensors="pt")
    height, width = inputs["pixel_values"].shape[-2:]
    outputs = model(inputs["pixel_values"].to(model.device))
    return prediction_panel(
        row["image"].resize((width, height)),
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])[0],
        labels=np.asarray(inputs["labels"][0]),
        shared_superpatches=outputs.shared_superpatches[0],
        palette=data.palette,
        superpatch_size=2 * model.config.patch_size,
        patch_size=model.config.patch_size,
        classes=data.classes,
    )


if __name__ == "__main__":
    main()
