# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of a policy alone: by itself, or as the first stage of training a Segmenter."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator, PartialState

from ..data import SegmentationData, SquashTransform
from ..hub.loading import load_policy_folder
from ..model.modeling_cts_policy import CtsPolicyModel
from .arguments import (
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicySourceArguments,
    SegmenterArguments,
    SuperpatchArguments,
)
from .data_arguments import DataArguments
from .loop import build_accelerator, fit
from .models import build_policy, build_processor, encoder_normalization
from .output import is_finished
from .recipe import refuse_another_recipe
from .saving import save_card
from .tasks import PolicyTask


def initial_policy(
    model_args: ModelArguments, policy_args: PolicyArguments, policy_source: PolicySourceArguments
) -> CtsPolicyModel | None:
    """
    The policy that a Segmenter starts from.

    Args:
        model_args: options of the Segmenter.
        policy_args: options of a new policy.
        policy_source: where the policy comes from, and whether it is trained.

    Returns:
        The policy that the options name, or one to train; `None` stands for that of the model that training starts
        from.

    Raises:
        ValueError: If it would be random and nothing would train it.
    """
    if policy_source.policy:
        return load_policy_folder(policy_source.policy)
    if model_args.model and policy_source.policy_epochs == 0:
        return None
    is_trained = policy_source.policy_epochs > 0 or policy_source.policy_loss_weight > 0
    if not is_trained and model_args.shares_tokens:
        raise ValueError(
            "The policy would stay as random as it starts. Pass --policy FOLDER (of examples/train_policy.py), "
            "--policy_epochs to train it first, --policy_loss_weight to train it jointly, or --token_reduction 0."
        )
    return build_policy(policy_args, model_args.patch_size, encoder_normalization(model_args), model_args.levels)


def fit_policy(
    policy: CtsPolicyModel,
    arguments: tuple[DataArguments, SuperpatchArguments, PolicyArguments, OptimizationArguments],
    data: SegmentationData,
    accelerator: Accelerator,
) -> tuple[CtsPolicyModel, dict[str, float]]:
    """
    Trains a policy alone, saves it, and then evaluates it: nothing that can fail comes between it and its folder.

    Args:
        policy: to be trained.
        arguments: options of the run; `output_dir` must be set.
        data: images and labels.
        accelerator: of this run alone.

    Returns:
        The trained policy, and its metrics on the validation images.
    """
    data_args, superpatch_args, _, args = arguments
    folder, processor = Path(args.output_dir), build_processor(data_args, policy.config)
    eval_rows = data_args.evaluation_rows(data)
    task = PolicyTask(policy, processor, eval_rows, arguments, superpatch_args.token_reduction)
    transform = data_args.transform(policy.config)
    if superpatch_args.squash:
        transform = SquashTransform(data_args.crop_size, policy.config.image_mean, policy.config.image_std)
    samples = data_args.training_samples(data, args.seed, transform)
    policy = fit(task, samples, args, accelerator, data_args.num_workers)
    if accelerator.is_main_process:
        task.save(folder, {})
        print(f"The policy is in {folder}.")
    metrics = task.evaluate(accelerator, show_progress=True)
    if accelerator.is_main_process:
        save_card(folder, policy, metrics)
    accelerator.wait_for_everyone()
    return policy, metrics


def train_policy_first(
    policy: CtsPolicyModel, arguments: SegmenterArguments, data: SegmentationData
) -> CtsPolicyModel:
    """
    Trains the policy of a Segmenter alone, in `<output_dir>/policy`, or loads it where the resumed run has done so.

    Args:
        policy: to be trained.
        arguments: options of the whole run.
        data: images and labels.

    Returns:
        The trained policy.
    """
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
    superpatch_args = SuperpatchArguments(
        model_args.patch_size, model_args.superpatch_levels, model_args.token_reduction
    )
    policy_arguments = (data_args, superpatch_args, policy_args, policy_optimization)
    if args.resume_from_checkpoint and is_finished(folder):
        refuse_another_recipe(folder, policy_arguments)
        PartialState().print(f"The policy in {folder} is trained already.")
        return load_policy_folder(folder)
    # An accelerator saves everything it was given: the policy gets one of its own.
    accelerator = build_accelerator(policy_optimization)
    policy, metrics = fit_policy(policy, policy_arguments, data, accelerator)
    accelerator.print("policy: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return policy


__all__ = ["fit_policy", "initial_policy", "train_policy_first"]
