# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
]
