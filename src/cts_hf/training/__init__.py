# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of Segmenters and policies: options and recipes, the loop, checkpoints to resume from."""

from .arguments import (
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicyOptimizationArguments,
    PolicySourceArguments,
    SegmenterArguments,
    SuperpatchArguments,
    settle_precision,
)
from .checkpoints import CheckpointFolder
from .data_arguments import DataArguments
from .loop import build_accelerator, fit
from .models import (
    adopt_architecture,
    adopt_model,
    build_policy,
    build_processor,
    build_segmenter,
    encoder_normalization,
    refuse_other_normalization,
)
from .optimization import build_optimizer, build_scheduler, polynomial_lr
from .output import check_hub_name, check_output, finished_before, is_finished, lock_output
from .policy_stage import fit_policy, initial_policy
from .recipe import parse_recipe, refuse_another_recipe, save_recipe
from .saving import push_to_hub, save_card, save_model_folder
from .segmenter_stage import settle_options, train_segmenter
from .steps import TrainingSteps
from .tasks import PolicyTask, SegmentationTask


__all__ = [
    "CheckpointFolder",
    "DataArguments",
    "ModelArguments",
    "OptimizationArguments",
    "PolicyArguments",
    "PolicyOptimizationArguments",
    "PolicySourceArguments",
    "PolicyTask",
    "SegmentationTask",
    "SegmenterArguments",
    "SuperpatchArguments",
    "TrainingSteps",
    "adopt_architecture",
    "adopt_model",
    "build_accelerator",
    "build_optimizer",
    "build_policy",
    "build_processor",
    "build_scheduler",
    "build_segmenter",
    "check_hub_name",
    "check_output",
    "encoder_normalization",
    "finished_before",
    "fit",
    "fit_policy",
    "initial_policy",
    "is_finished",
    "lock_output",
    "parse_recipe",
    "polynomial_lr",
    "push_to_hub",
    "refuse_another_recipe",
    "refuse_other_normalization",
    "save_card",
    "save_model_folder",
    "save_recipe",
    "settle_options",
    "settle_precision",
    "train_segmenter",
]
