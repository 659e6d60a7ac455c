# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of a Segmenter or a model of transformers, after that of its policy where the options ask for it."""

import copy
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset

from ..data import SegmentationData
from ..hub.normalization import processor_normalization
from ..hub.sharing_folder import shares_tokens
from ..model.modeling_cts_policy import CtsPolicyModel
from .arguments import SegmenterArguments, settle_precision
from .checkpoints import CheckpointFolder
from .existing_models import adopt_existing, build_existing, check_crops, is_existing, predicts_masks
from .loop import fit
from .models import adopt_architecture, build_processor, build_segmenter, refuse_other_normalization
from .output import check_output
from .policy_stage import initial_policy, train_policy_first
from .tasks import MaskTask, SegmentationTask


def settle_options(arguments: SegmenterArguments) -> None:
    """
    Completes the options of a run: its folder, the precision, and the architecture of the model it starts from.

    Raises:
        ValueError: a folder that the run must not write to, or a name that no repository can have.
    """
    data_args, model_args, policy_args, policy_source, args = arguments
    args.output_dir = args.output_dir or f"outputs/{data_args.name}"
    sources = {
        "model": model_args.model,
        "backbone": model_args.backbone,
        "backbone_weights": model_args.backbone_weights,
        "policy": policy_source.policy,
        "policy_weights": policy_args.policy_weights,
    }
    check_output(args, data_args.data_dir, sources, ("", "policy") if policy_source.policy_epochs > 0 else ("",))
    if is_existing(model_args):
        adopt_existing(model_args, policy_source, data_args)
    else:
        adopt_architecture(model_args)
    settle_precision(args)


def train_segmenter(
    arguments: SegmenterArguments, data: SegmentationData, accelerator: Accelerator
) -> SegmentationTask:
    """
    Trains a Segmenter, or a model of transformers that shares tokens, and saves it to its `output_dir`.

    Args:
        arguments: options of the run, completed by [`settle_options`].
        data: images and labels.
        accelerator: of this run alone.

    Returns:
        The task, with the trained model.
    """
    data_args, model_args, policy_args, policy_source, args = arguments
    eval_rows = data_args.evaluation_rows(data)
    policy = initial_policy(model_args, policy_args, policy_source)
    set_seed(args.seed)  # again, as policies that are loaded and those that are made differ in random numbers
    task = _build_task(arguments, copy.deepcopy(policy), data, eval_rows)
    # A checkpoint of a Segmenter has its policy, that of a model of transformers has not.
    is_resumed = args.resume_from_checkpoint and CheckpointFolder(args.output_dir).find(args.resume_from_checkpoint)
    if policy_source.policy_epochs > 0 and (not is_resumed or shares_tokens(task.model)):
        task.check(accelerator)  # before the policy is trained, not only after it
        trained = train_policy_first(policy, arguments, data)
        task.segmenter.cts.policy.load_state_dict(trained.state_dict())
    transform = data_args.transform(processor_normalization(task.processor, num_channels=3))
    samples = data_args.training_samples(data, args.seed, transform)
    task.model = fit(task, samples, args, accelerator, data_args.num_workers)
    if accelerator.is_main_process:
        task.save(Path(args.output_dir), {})
        print(f"The model is in {args.output_dir}.")
    return task


def _build_task(
    arguments: SegmenterArguments,
    policy: CtsPolicyModel | None,
    data: SegmentationData,
    eval_rows: Dataset | IterableDataset,
) -> SegmentationTask:
    data_args, model_args, policy_args, policy_source, args = arguments
    is_of_transformers = is_existing(model_args)
    if is_of_transformers:
        model, processor = build_existing(model_args, policy, policy_args, data_args, data)
    else:
        model = build_segmenter(model_args, policy, policy_source, data, data_args.crop_size)
        refuse_other_normalization(policy_args, model.config.policy_config)
        processor = build_processor(data_args, model.config)
    kind = MaskTask if predicts_masks(model) else SegmentationTask
    task = kind(model, processor, eval_rows, arguments, data_args.inference())
    if args.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(
                f"`gradient_checkpointing` must be False for a {type(model).__name__}, which transformers cannot "
                "checkpoint, got True: leave it out, and split batches with --gradient_accumulation_steps."
            )
        model.gradient_checkpointing_enable()
    if is_of_transformers:
        check_crops(task, data_args.crop_size)
    return task


__all__ = ["settle_options", "train_segmenter"]
