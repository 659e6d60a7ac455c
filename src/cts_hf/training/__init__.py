# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of Segmenters and policies: options and recipes, the loop, checkpoints to resume from."""

from .arguments import (
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    PolicyArguments,
    PolicyOptimizationArguments,
    PolicySourceArguments,
    SuperpatchArguments,
    check_hub_name,
    settle_precision,
)
from .checkpoints import CheckpointFolder
from .loop import build_accelerator, fit
from .models import (
    adopt_architecture,
    build_policy,
    build_processor,
    build_segmenter,
    encoder_normalization,
    refuse_other_normalization,
)
from .optimization import build_optimizer, build_scheduler, polynomial_lr
from .output import finished_before, is_finished, lock_output, refuse_inside_data, refuse_own_sources
from .policy_stage import initial_policy, train_policy
from .recipe import parse_recipe, refuse_another_recipe, save_recipe
from .saving import push_to_hub, save_card, save_model_folder
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
    "SuperpatchArguments",
    "TrainingSteps",
    "adopt_architecture",
    "build_accelerator",
    "build_optimizer",
    "build_policy",
    "build_processor",
    "build_scheduler",
    "build_segmenter",
    "check_hub_name",
    "encoder_normalization",
    "finished_before",
    "fit",
    "initial_policy",
    "is_finished",
    "lock_output",
    "parse_recipe",
    "polynomial_lr",
    "push_to_hub",
    "refuse_another_recipe",
    "refuse_inside_data",
    "refuse_other_normalization",
    "refuse_own_sources",
    "save_card",
    "save_model_folder",
    "save_recipe",
    "settle_precision",
    "train_policy",
]
