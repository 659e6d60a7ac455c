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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from PIL import Image

from cts_hf import CtsForSemanticSegmentation
from cts_hf.data import SegmentationData
from cts_hf.evaluation.sharing import Sharing
from cts_hf.evaluation.tables import format_table
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
    SegmentationTask,
    adopt_architecture,
    build_accelerator,
    build_processor,
    build_segmenter,
    check_hub_name,
    finished_before,
    fit,
    initial_policy,
    lock_output,
    parse_recipe,
    push_to_hub,
    refuse_another_recipe,
    refuse_inside_data,
    refuse_other_normalization,
    refuse_own_sources,
    save_card,
    settle_precision,
    train_policy,
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


def sharings(token_reduction: float) -> list[Sharing]:
    """No sharing, and every other strategy at the budget that the model was trained with."""
    shared = [Sharing(strategy, token_reduction) for strategy in ("learned", "random", "oracle")]
    return [Sharing("none", 0.0), *(shared if token_reduction > 0 else [])]


def describe(result: dict[str, Any]) -> str:
    if result["token_reduction"] == 0:
        return "no sharing"
    return f"{result['sharing']} sharing of {result['token_reduction']:.0%} of the tokens"


def table(results: list[dict[str, Any]]) -> str:
    """Mean IoU of each strategy, and how many of the superpatches that share a token hold one class."""
    rows = []
    for result in results:
        is_shared = result["token_reduction"] > 0
        precision = f"{result.get('policy_precision_at_budget', float('nan')):.3f}" if is_shared else "-"
        rows.append([result["sharing"], f"{result['token_reduction']:.1%}", f"{result['mean_iou']:.4f}", precision])
    return "\n" + format_table(["sharing", "fewer tokens", "mean IoU", "one class"], rows) + "\n"


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
        superpatch_size=model.config.superpatch_size,
        patch_size=model.config.patch_size,
        classes=data.classes,
    )


if __name__ == "__main__":
    main()
