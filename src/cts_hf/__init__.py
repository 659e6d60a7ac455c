# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Content-aware Token Sharing (CTS) for semantic segmentation with Vision Transformers."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .existing import CtsBackbone, CtsBackboneConfig, apply_cts, load_cts, remove_cts, save_cts
from .existing.backbone import WEIGHT_NAMES
from .model.configuration_cts import CtsConfig, CtsPolicyConfig
from .model.image_processing_cts import CtsImageProcessor
from .model.image_processing_pil_cts import CtsImageProcessorPil
from .model.modeling_cts import (
    CtsForSemanticSegmentation,
    CtsModel,
    CtsModelOutput,
    CtsPreTrainedModel,
    CtsSemanticSegmenterOutput,
)
from .model.modeling_cts_policy import CtsPolicyModel, CtsPolicyOutput
from .model.modeling_cts_targets import superpatch_targets
from .model.token_sharing import TokenLayout, build_layout, num_shared_superpatches, share, unshare


__version__ = "0.1.0"

AutoConfig.register(CtsBackboneConfig.model_type, CtsBackboneConfig, exist_ok=True)
AutoConfig.register(CtsConfig.model_type, CtsConfig, exist_ok=True)
AutoConfig.register(CtsPolicyConfig.model_type, CtsPolicyConfig, exist_ok=True)
AutoBackbone.register(CtsBackboneConfig, CtsBackbone, exist_ok=True)
register_checkpoint_conversion_mapping(CtsBackboneConfig.model_type, WEIGHT_NAMES, overwrite=True)
AutoModel.register(CtsConfig, CtsModel, exist_ok=True)
AutoModel.register(CtsPolicyConfig, CtsPolicyModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(CtsConfig, CtsForSemanticSegmentation, exist_ok=True)
# The pipeline looks for the name here, and otherwise says that the model is not supported before it runs it.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[CtsConfig.model_type] = CtsForSemanticSegmentation.__name__
AutoImageProcessor.register(
    CtsConfig,
    image_processor_classes={"torchvision": CtsImageProcessor, "pil": CtsImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "CtsBackbone",
    "CtsBackboneConfig",
    "CtsConfig",
    "CtsForSemanticSegmentation",
    "CtsImageProcessor",
    "CtsImageProcessorPil",
    "CtsModel",
    "CtsModelOutput",
    "CtsPolicyConfig",
    "CtsPolicyModel",
    "CtsPolicyOutput",
    "CtsPreTrainedModel",
    "CtsSemanticSegmenterOutput",
    "TokenLayout",
    "__version__",
    "apply_cts",
    "build_layout",
    "load_cts",
    "num_shared_superpatches",
    "remove_cts",
    "save_cts",
    "share",
    "superpatch_targets",
    "unshare",
]

# `save_pretrained` then puts the code beside the weights, for those who load a checkpoint without this package.
CtsConfig.register_for_auto_class()
CtsPolicyConfig.register_for_auto_class()
CtsImageProcessor.register_for_auto_class()
CtsImageProcessorPil.register_for_auto_class()
CtsModel.register_for_auto_class("AutoModel")
CtsPolicyModel.register_for_auto_class("AutoModel")
CtsForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
