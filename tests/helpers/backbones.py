# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random backbones that share tokens, and the heads of transformers that take them."""

import torch
import transformers

from cts_hf import CtsBackbone, CtsBackboneConfig

from .existing_models import ENCODER, KINDS, PATCH_SIZE, RELATIVE, WITH_MLP, four_stages, tensors
from .models import TINY_BACKBONE


# Encoders of which transformers has a backbone: the configuration, and whether it can return the class token and the
# patches, as depth heads want them.
ENCODERS = {
    "beit": ("BeitConfig", RELATIVE, True),
    "dinov2": ("Dinov2Config", ENCODER, True),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", {**ENCODER, "num_register_tokens": 4}, False),
    "dinov3_vit": ("DINOv3ViTConfig", {**WITH_MLP, "num_register_tokens": 4}, False),
    "pixio": ("PixioConfig", {**ENCODER, "n_cls_tokens": 1}, True),
}
# Those of which it has the model only.
MODELS = {
    "vit": ("ViTConfig", "ViTModel", WITH_MLP),
    "deit": ("DeiTConfig", "DeiTModel", WITH_MLP),
    "data2vec-vision": ("Data2VecVisionConfig", "Data2VecVisionModel", RELATIVE),
}
# Heads, by the kind that has their options; where their backbone is; and whether they want maps.
HEADS = {
    "upernet": ("upernet_dinov2", "backbone", True),
    "mask2former": ("mask2former", "model.pixel_level_module.encoder", True),
    "dpt": ("dpt_depth", "backbone", False),
    "depth_anything": ("depth_anything", "backbone", False),
    "zoedepth": ("zoedepth", "backbone", False),
}
POLICY = {**TINY_BACKBONE, "superpatch_size": 2 * PATCH_SIZE}
SIZES = [(64, 64), (48, 96), (72, 56)]


def encoder_config(name, **options):
    config, defaults = (ENCODERS.get(name) or MODELS[name][::2])[:2]
    return getattr(transformers, config)(**{**four_stages(**defaults), **options})


def head_config(name, backbone_config):
    kind = KINDS[HEADS[name][0]]
    options = {**kind.options, "patch_size": PATCH_SIZE} if name == "depth_anything" else kind.options
    return getattr(transformers, kind.config)(**options, backbone_config=backbone_config)


def head_class(name):
    return getattr(transformers, KINDS[HEADS[name][0]].model)


def randomize(model, seed=0):
    """At initialization much is 0 or 1: tests would not see it mixed up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def load(kind, folder, **options):
    """A loaded model with weights where other models have theirs: rounding depends on the alignment in memory."""
    loaded = kind.from_pretrained(folder, **options)
    for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
        parameter.data = parameter.data.clone()
    return loaded


def build(name="dinov2", seed=0, policy_config=None, token_reduction=0.3, **options):
    """A random backbone in evaluation mode. Options are the encoder's."""
    options = {**four_stages(), **options} if name in ENCODERS else options
    config = CtsBackboneConfig(
        backbone_config=encoder_config(name, **options), policy_config=policy_config, token_reduction=token_reduction
    )
    if name in MODELS:
        config.out_features = four_stages()["out_features"]
    torch.manual_seed(seed)
    return randomize(CtsBackbone(config), seed)


def random_scores(height, width, seed=1):
    shape = (2, height // PATCH_SIZE // 2, width // PATCH_SIZE // 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def same(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
