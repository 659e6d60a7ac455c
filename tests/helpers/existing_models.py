# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers, one for each kind that can share tokens; patches have 8 pixels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cts_hf import apply_cts, save_cts


PATCH_SIZE, IMAGE_SIZE, WIDTH = 8, 64, 32
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
WITH_MLP = {**ENCODER, "intermediate_size": 48}
RELATIVE = {**WITH_MLP, "use_relative_position_bias": True}
STAGES = {"out_features": ["stage1", "stage2", "stage3"]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
QUERIES = {"num_queries": 6, "num_register_tokens": 4, "num_blocks": 1, "num_labels": 5, "num_upscale_blocks": 1}


@dataclass
class Kind:
    """How a model is built and called."""

    model: str
    config: str
    options: dict[str, Any]
    backbone: tuple[str, dict[str, Any]] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    # Upstream takes images of the configuration's size only.
    is_fixed: bool = False


def four_stages(**options: Any) -> dict[str, Any]:
    return {**options, "num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}


ANY_SIZE = {"interpolate_pos_encoding": True}
KINDS = {
    "vit": Kind("ViTModel", "ViTConfig", WITH_MLP, call=ANY_SIZE),
    "deit": Kind("DeiTModel", "DeiTConfig", WITH_MLP, call=ANY_SIZE),
    "beit": Kind("BeitModel", "BeitConfig", RELATIVE),
    "beit_shared_bias": Kind(
        "BeitBackbone",
        "BeitConfig",
        {
            **WITH_MLP,
            **STAGES,
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
        },
    ),
    "beit_segmentation": Kind(
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {**RELATIVE, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "num_labels": 5},
    ),
    "data2vec": Kind("Data2VecVisionModel", "Data2VecVisionConfig", RELATIVE),
    "data2vec_segmentation": Kind(
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {**RELATIVE, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "num_labels": 5},
        is_fixed=True,
    ),
    "dinov2": Kind("Dinov2Model", "Dinov2Config", ENCODER),
    "dinov2_backbone": Kind("Dinov2Backbone", "Dinov2Config", {**ENCODER, **STAGES}),
    "dinov2_registers": Kind(
        "Dinov2WithRegistersBackbone",
        "Dinov2WithRegistersConfig",
        {**ENCODER, **STAGES, "num_register_tokens": 4},
    ),
    "dinov3": Kind("DINOv3ViTModel", "DINOv3ViTConfig", {**WITH_MLP, "num_register_tokens": 4}),
    "dinov3_backbone": Kind("DINOv3ViTBackbone", "DINOv3ViTConfig", {**WITH_MLP, **STAGES}),
    "pixio": Kind("PixioBackbone", "PixioConfig", {**ENCODER, **STAGES, "n_cls_tokens": 3}),
    "dpt_segmentation": Kind(
        "DPTForSemanticSegmentation",
        "DPTConfig",
        {**WITH_MLP, **NECK, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "num_labels": 5},
        is_fixed=True,
    ),
    "dpt_depth": Kind(
        "DPTForDepthEstimation",
        "DPTConfig",
        NECK,
        backbone=("Dinov2Config", four_stages(**ENCODER, reshape_hidden_states=False)),
    ),
    "depth_anything": Kind(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        {**NECK, "patch_size": PATCH_SIZE, "reassemble_hidden_size": WIDTH},
        backbone=("Dinov2Config", four_stages(**ENCODER, reshape_hidden_states=False)),
    ),
    "zoedepth": Kind(
        "ZoeDepthForDepthEstimation",
        "ZoeDepthConfig",
        {**NECK, "bottleneck_features": 16, "num_relative_features": 8},
        backbone=("BeitConfig", four_stages(**RELATIVE, reshape_hidden_states=False)),
    ),
    "upernet_dinov2": Kind(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 16, "auxiliary_channels": 16, "auxiliary_in_channels": WIDTH, "num_labels": 5},
        backbone=("Dinov2Config", four_stages(**ENCODER)),
    ),
    "upernet_beit": Kind(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 16, "auxiliary_channels": 16, "auxiliary_in_channels": WIDTH, "num_labels": 5},
        backbone=("BeitConfig", four_stages(**RELATIVE)),
    ),
    "mask2former": Kind(
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
            "num_queries": 6,
            "num_labels": 5,
        },
        backbone=("Dinov2Config", four_stages(**ENCODER)),
    ),
    "eomt": Kind("EomtForUniversalSegmentation", "EomtConfig", {**ENCODER, **QUERIES}, is_fixed=True),
    "eomt_dinov3": Kind(
        "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", {**WITH_MLP, **QUERIES}, is_fixed=True
    ),
}
# The image processors of those that segment. Images of EoMT's are cut into windows.
_WINDOWS = {"size": {"shortest_edge": 64, "longest_edge": None}, "do_split_image": True}
PROCESSORS = {
    "beit_segmentation": ("BeitImageProcessor", {"size": {"height": 72, "width": 56}}),  # an odd grid
    "data2vec_segmentation": ("BeitImageProcessor", {"size": {"height": 64, "width": 64}}),
    "dpt_segmentation": ("DPTImageProcessor", {"size": {"height": 64, "width": 64}}),
    "upernet_dinov2": ("SegformerImageProcessor", {"size": {"height": 48, "width": 100}}),  # 12.5 columns
    "mask2former": ("Mask2FormerImageProcessor", {"size": {"shortest_edge": 64, "longest_edge": 128}}),
    "eomt": ("EomtImageProcessor", _WINDOWS),
    "eomt_dinov3": ("EomtImageProcessor", _WINDOWS),
}
# The encoders by themselves.
ENCODER_KINDS = [
    *("vit", "deit", "beit", "beit_shared_bias", "data2vec", "dinov2", "dinov2_backbone", "dinov2_registers"),
    *("dinov3", "dinov3_backbone", "pixio"),
]


def build_existing(name: str, attn_implementation: str = "eager", seed: int = 0, **overrides: Any):
    """A random model in evaluation mode; skips the test where this transformers lacks the kind."""
    kind = KINDS[name]
    if not hasattr(transformers, kind.model):
        pytest.skip(f"transformers {transformers.__version__} has no {kind.model}")
    options = {**kind.options, **(overrides if kind.backbone is None else {})}
    if kind.backbone is not None:
        config, backbone_options = kind.backbone
        options["backbone_config"] = getattr(transformers, config)(**{**backbone_options, **overrides})
    torch.manual_seed(seed)
    config = getattr(transformers, kind.config)(**options)
    model = getattr(transformers, kind.model)._from_config(config, attn_implementation=attn_implementation)
    # At initialization much is 0 or 1: tests would not see it mixed up.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if name.startswith("eomt"):
        model.attn_mask_probs.zero_()  # as in published models, whose queries are not masked any more
    return model.eval()


def build_processor(name: str, **overrides: Any):
    """The image processor of a model for segmentation."""
    kind, options = PROCESSORS[name]
    return getattr(transformers, kind)(**{**options, **overrides})


def save_existing(folder: Path, name: str, policy: Any = None, **options: Any) -> Path:
    """A model and its image processor in a folder: with options of `apply_cts`, one that shares tokens."""
    model = build_existing(name)
    if policy or options:
        save_cts(apply_cts(model, policy, **options), folder)
    else:
        model.save_pretrained(folder)
    normalization = {option: [value] * 3 for option, value in options.items() if option.startswith("image_")}
    build_processor(name, **normalization).save_pretrained(folder)
    return folder


def sizes(name: str) -> list[tuple[int, int]]:
    """Images of the configuration's size, others, and some with an odd row or column of patches."""
    return [(64, 64)] if KINDS[name].is_fixed else [(64, 64), (48, 96), (72, 56)]


def call_existing(model, name: str, images: torch.Tensor, **options: Any):
    return model(images, **{**KINDS[name].call, **options})


def tensors(outputs) -> dict[str, torch.Tensor]:
    """All tensors of an output, without what sharing adds."""
    found = {}
    for name, value in outputs.items():
        if name in ("shared_superpatches", "num_tokens"):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        found |= {f"{name}.{index}": item for index, item in enumerate(values) if isinstance(item, torch.Tensor)}
    return found


def random_scores(height, width, batch_size=2, seed=1):
    shape = (batch_size, height // PATCH_SIZE // 2, width // PATCH_SIZE // 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def differences(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    return {name: (first[name].float() - second[name].float()).abs().max().item() for name in first}


def states(outputs):
    """What a model gives in the end, of any kind."""
    for name in ("logits", "masks_queries_logits", "predicted_depth", "last_hidden_state"):
        if outputs.get(name) is not None:
            return outputs[name]
    return outputs.feature_maps[-1]
