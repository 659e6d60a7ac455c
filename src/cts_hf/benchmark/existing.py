# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, for measuring what token sharing makes of them: real sizes, random weights."""

import copy
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, BaseImageProcessor, PreTrainedModel

from ..existing import apply_cts
from ..existing.loading import load_existing
from ..hub.sharing_folder import shares_tokens
from ..model.configuration_cts import CtsPolicyConfig
from ..model.modeling_cts_encoders import encoder_config, patch_height_and_width
from ..model.modeling_cts_policy import CtsPolicyModel


_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_DINOV2 = {**_SMALL, "image_size": 518, "patch_size": 14}
_BEIT = {**_BASE, "image_size": 640, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}
_EOMT = {"image_size": 640, "patch_size": 16, "num_labels": 150}
_EOMT_PROCESSOR = ("EomtImageProcessor", {"shortest_edge": 640, "longest_edge": 640})


class ExistingPreset(NamedTuple):
    """
    A model of transformers: the names of its class and of its configuration, and its options; and, if it makes label
    maps, the name of its image processor and the size that this gives to pictures.
    """

    model: str
    config: str
    options: dict[str, Any]
    processor: str | None = None
    processor_size: dict[str, int] | None = None

    def build(self) -> PreTrainedModel:
        """The model with random weights."""
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))
        if hasattr(model, "attn_mask_probs"):
            model.attn_mask_probs.zero_()  # as in published models, whose queries are not masked any more
        return model

    def build_processor(self) -> BaseImageProcessor:
        """The image processor of this model; refuses a model without one."""
        if self.processor is None:
            raise ValueError(
                f"`end_to_end` must be unset for a {self.model}, which makes no label maps: leave it out, or "
                "measure a model for semantic segmentation."
            )
        return getattr(transformers, self.processor)(size=self.processor_size)


EXISTING_PRESETS = {
    "dinov2-small-518": ExistingPreset("Dinov2Model", "Dinov2Config", _DINOV2),
    "dinov3-small-512": ExistingPreset(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_SMALL, "intermediate_size": 1536, "image_size": 512, "patch_size": 16, "num_register_tokens": 4},
    ),
    "eomt-small-640": ExistingPreset(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        {**_SMALL, **_EOMT, "num_queries": 200, "num_blocks": 3},
        *_EOMT_PROCESSOR,
    ),
    "eomt-large-640": ExistingPreset(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        {**_LARGE, **_EOMT, "num_queries": 200, "num_blocks": 4},
        *_EOMT_PROCESSOR,
    ),
    "beit-base-640-encoder": ExistingPreset("BeitModel", "BeitConfig", _BEIT),
    "beit-base-640": ExistingPreset(
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {**_BEIT, "out_indices": [4, 6, 8, 12], "num_labels": 150},
        "BeitImageProcessor",
        {"height": 640, "width": 640},
    ),
    "depth-anything-small-518": ExistingPreset(
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        {
            "backbone_config": {
                "model_type": "dinov2",
                **_DINOV2,
                "out_indices": [3, 6, 9, 12],
                "reshape_hidden_states": False,
                "apply_layernorm": True,
            },
            "reassemble_hidden_size": 384,
            "neck_hidden_sizes": [48, 96, 192, 384],
            "fusion_hidden_size": 64,
        },
    ),
}


def build_existing(
    preset: str | None, source: str | None, token_reduction: float, runs_policy: bool
) -> PreTrainedModel:
    """
    A model of transformers that shares tokens, in evaluation mode.

    Args:
        preset: a name in `EXISTING_PRESETS`, or `None` for `source`.
        source: the folder of a model, which shares tokens as recorded if `save_cts` wrote it; or of a configuration
            alone, which gets random weights.
        token_reduction: the budget of calls that say nothing else, of others.
        runs_policy: whether others get a policy of random weights that sees the image at half resolution.
    """
    if preset is None and any(path.suffix == ".safetensors" for path in Path(source).glob("*")):
        model = load_existing(source)
        if shares_tokens(model):
            return model
    elif preset is None:
        config = AutoConfig.from_pretrained(source)
        if config.architectures:
            model = getattr(transformers, config.architectures[0])(config)
        else:
            model = AutoModel.from_config(config)
    else:
        model = EXISTING_PRESETS[preset].build()
    policy = None
    if runs_policy:
        superpatch_size = 2 * patch_height_and_width(encoder_config(model))[0]
        policy = CtsPolicyModel(CtsPolicyConfig(superpatch_size=superpatch_size, output_stride=16))
    return apply_cts(model.eval(), policy, token_reduction)


def call_options(model: PreTrainedModel) -> dict[str, Any]:
    """What a model must be told to take images of any size."""
    parameters = inspect.signature(type(model).forward).parameters
    is_vit = model.config.model_type in ("vit", "deit")
    return {"interpolate_pos_encoding": True} if is_vit and "interpolate_pos_encoding" in parameters else {}


def scores_shape(model: PreTrainedModel, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of superpatches of an image."""
    patch_size = patch_height_and_width(encoder_config(model))
    rows, columns = (side // patch // 2 for side, patch in zip(image_size, patch_size, strict=True))
    return rows, columns


def count_multiply_adds(
    model: PreTrainedModel, image_size: tuple[int, int], token_reduction: float, runs_policy: bool
) -> int:
    """
    Multiply-adds of a forward pass of one image: those of matrix products, attention and convolutions.

    Args:
        model: of any device and type. A copy runs once, as not all heads run without values.
        image_size: height and width in pixels.
        token_reduction: the budget.
        runs_policy: whether the model's policy is part of it, or else its scores are given.
    """
    counted = copy.deepcopy(model)
    counted.set_attn_implementation("eager")  # whatever kernel there is, it computes these products
    num_channels = encoder_config(counted).num_channels
    images = torch.zeros(1, num_channels, *image_size, dtype=counted.dtype, device=counted.device)
    scores = {} if runs_policy else {"superpatch_scores": torch.zeros(1, *scores_shape(counted, image_size))}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(images, token_reduction=token_reduction, **scores, **call_options(counted))
    return counter.get_total_flops() // 2


__all__ = [
    "EXISTING_PRESETS",
    "build_existing",
    "call_options",
    "count_multiply_adds",
    "scores_shape",
]
