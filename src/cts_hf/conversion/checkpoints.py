# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whole checkpoints of other implementations: files and folders in, a model and its image processor out, and back. What
kind of checkpoint it is shows in the names of its weights.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.benchmarks.ade20k import ADE20K_CLASSES
from ..data.benchmarks.cityscapes import CITYSCAPES_CLASSES
from ..data.benchmarks.pascal_context import PASCAL_CONTEXT_CLASSES
from ..hub.loading import check_finite, load_policy_folder
from ..hub.normalization import HALF, IMAGENET, Normalization, check_normalization
from ..model.configuration_cts import CtsConfig
from ..model.image_processing_base_cts import CtsImageProcessingMixin
from ..model.image_processing_cts import CtsImageProcessor
from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_policy import CtsPolicyModel
from ..model.token_sharing import num_shared_superpatches
from .converters import convert_mmsegmentation, convert_policy, convert_segmenter, to_original
from .normalization import choose_normalization
from .weight_files import read_checkpoint, read_variant, read_weights, weights_of
from .weight_names import require_weight


BENCHMARK_CLASSES = {
    "ade20k": ADE20K_CLASSES,
    "cityscapes": CITYSCAPES_CLASSES,
    "pascal_context": PASCAL_CONTEXT_CLASSES,
}
# By the name that Segmenter has for them.
_NORMALIZATIONS = {"vit": HALF, "deit": IMAGENET}
# A weight that only this kind of checkpoint has.
_KINDS_BY_WEIGHT = {
    "encoder.patch_embed.proj.weight": "segmenter",
    "backbone.patch_embed.projection.weight": "mmsegmentation",
    "backbone.conv_stem.weight": "policy",
    "conv_stem.weight": "policy backbone",
    "_conv_stem.weight": "policy backbone",
}
_IMAGENET_CLASSES = 1000


def convert_checkpoint(
    source: str | Path,
    *,
    policy: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> tuple[CtsForSemanticSegmentation, CtsImageProcessor]:
    """
    Converts a checkpoint of CTS, of Segmenter, or of mmsegmentation's Segmenter or SETR.

    Args:
        source (`str` or `Path`):
            Folder with `checkpoint.pth` and `variant.yml`, as Segmenter and CTS write it, or a file of weights. What
            `variant.yml` says is taken over: size, heads, dropout, normalization, classes and budget.
        policy (`str` or `Path`, *optional*):
            A policy to give the model: a folder of this package, the `model.pth` of the original policy network, or
            whatever else [`load_policy`] opens.
        class_names (`Sequence[str]`, *optional*):
            One for each class; those of the data set or of mmsegmentation's metadata where these are known.
        options:
            As for [`convert_segmenter`]; they win over `variant.yml`. Where neither says what images are normalized
            with, Segmenter's weights with a distillation token are taken for DeiT's (ImageNet's mean and standard
            deviation), and without one for those of a ViT (0.5), which is then logged. mmsegmentation's Segmenter has
            0.5, and its SETR ImageNet's.

    Returns:
        [`CtsForSemanticSegmentation`] in float32 and evaluation mode, and its [`CtsImageProcessor`], which normalizes
        as its configuration says.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of another kind, its weights do not fit or are not finite, or names and classes differ in
            number.
    """
    checkpoint = read_checkpoint(source)
    state_dict = _strip_module(weights_of(checkpoint, source))
    kind = _recognize(state_dict, source)
    variant = read_variant(source) if kind == "segmenter" and Path(source).exists() else {}
    names = class_names or _class_names(variant, checkpoint, state_dict)
    if names:
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: index for index, name in enumerate(names)}
    if kind == "segmenter":
        options = {**_variant_options(variant), **options}
        options |= _choose_normalization(source, state_dict, kind, options)
        model = convert_segmenter(state_dict, **options)
    elif kind == "mmsegmentation":
        model = convert_mmsegmentation(state_dict, **options)
    else:
        raise ValueError(f"{source} must hold a segmentation model, got a {kind}: convert it with `load_policy`.")
    if policy is not None:
        model.set_policy(load_policy(policy, superpatch_size=model.config.superpatch_size))
    check_finite(model, source)
    return model.eval(), _build_processor(model.config, variant)


def load_policy(source: str | Path, **options: Any) -> CtsPolicyModel:
    """
    Opens a policy of any kind: a folder of this package, a policy network of the original, or an ImageNet backbone,
    which gets a classifier with random weights.

    Args:
        source (`str` or `Path`): A folder with `config.json`, or what [`read_weights`] opens.
        options: As for [`convert_policy`], for weights that are not this package's. A backbone's normalization is the
            one that [`weights_normalization`] knows by default, else 0.5, which is then logged.

    Raises:
        FileNotFoundError: If there is no such policy.
        ValueError: If these are the weights of something else, incomplete or not finite.
    """
    if (Path(source) / "config.json").is_file():
        return load_policy_folder(source)
    state_dict = _strip_module(read_weights(source))
    kind = _recognize(state_dict, source)
    if kind not in ("policy", "policy backbone"):
        raise ValueError(f"{source} must hold a policy, got a {kind} model: convert it with `convert_checkpoint`.")
    if kind == "policy backbone":
        options |= _choose_normalization(source, state_dict, kind, options)
    converted = convert_policy(state_dict, **options)
    check_finite(converted, source)
    return converted


def save_original(model: CtsForSemanticSegmentation, processor: CtsImageProcessingMixin, folder: str | Path) -> None:
    """
    Writes `checkpoint.pth` and `variant.yml` as the original CTS reads them. Its encoder has an ImageNet classifier
    too, which it loads and never uses: it is all zeros.

    Args:
        model ([`CtsForSemanticSegmentation`]): With or without policy.
        processor ([`CtsImageProcessor`]): Its size is that of the data; it normalizes as the configuration says.
        folder (`str` or `Path`): Created if it is not there.

    Raises:
        FileExistsError: If there is a checkpoint or a `variant.yml` already.
        ValueError: If the original has no such normalization or resizing, or options that it cannot express have other
            values than its own: all of them are listed.
    """
    folder = Path(folder)
    for name in ("checkpoint.pth", "variant.yml"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is there already. Remove it or name another folder.")
    config = model.config
    _refuse_inexpressible(config)
    check_normalization(config, processor)
    normalization = _normalization_name(config)
    if not processor.size.shortest_edge:
        raise ValueError(
            f"The image processor must have a size of shortest_edge, as the original resizes images, got "
            f"{dict(processor.size)}: give one with `size={{'shortest_edge': ...}}`."
        )
    state_dict = to_original(model)
    for head in ("head", "head_dist") if config.use_distillation_token else ("head",):
        state_dict[f"encoder.{head}.weight"] = torch.zeros(_IMAGENET_CLASSES, config.hidden_size)
        state_dict[f"encoder.{head}.bias"] = torch.zeros(_IMAGENET_CLASSES)
    folder.mkdir(parents=True, exist_ok=True)
    variant = {
        "dataset_kwargs": {"image_size": processor.size["shortest_edge"], "normalization": normalization},
        "net_kwargs": {**_net_kwargs(model), "normalization": normalization},
    }
    (folder / "variant.yml").write_text(yaml.safe_dump(variant, sort_keys=False), encoding="utf-8")
    torch.save({"model": state_dict, "n_cls": config.num_labels}, folder / "checkpoint.pth")


def _refuse_inexpressible(config: CtsConfig) -> None:
    """Refuses options that change outputs and that the code of the original has a fixed value for."""
    fixed = {
        "superpatch_levels": (2,),
        "sharing_threshold": None,
        "num_channels": 3,
        "intermediate_size": 4 * config.hidden_size,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-5,
    }
    if config.decoder_type == "mask_transformer":
        fixed |= {"decoder_num_attention_heads": max(1, config.hidden_size // 64), "decoder_layer_norm_eps": 1e-5}
    if config.use_policy:
        # EfficientNet-Lite0 on images at full resolution, with one output for 32 x 32 pixels.
        fixed_of_policy = {
            "superpatch_size": 32,
            "output_stride": 32,
            "built_stages": 7,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "batch_norm_eps": 1e-5,
            "tf_padding": False,
        }
        # The policy sees the images of the encoder.
        fixed_of_policy |= {"image_mean": config.image_mean, "image_std": config.image_std}
        fixed |= {f"policy_config.{name}": value for name, value in fixed_of_policy.items()}
    differing = [
        f"{name}={value!r} (original: {theirs!r})"
        for name, theirs in fixed.items()
        if (value := attrgetter(name)(config)) != theirs
    ]
    if differing:
        raise ValueError(
            f"The original CTS cannot express {', '.join(differing)}: it would compute something else with these "
            "weights. Keep the model in the format of this package (`save_pretrained`), or train one with the "
            "original's values. A model without policy (use_policy=False) has no options of the policy."
        )


def _net_kwargs(model: CtsForSemanticSegmentation) -> dict[str, Any]:
    config = model.config
    grid = model.cts.embeddings.grid
    num_patches = grid[0] * grid[1]
    num_shared = num_shared_superpatches(config.token_reduction, num_patches)
    decoder: dict[str, Any] = {"name": config.decoder_type}
    if config.decoder_type == "mask_transformer":
        decoder["n_layers"] = config.decoder_num_hidden_layers
        decoder["drop_path_rate"] = config.decoder_drop_path_rate
        decoder["dropout"] = config.decoder_dropout_prob
    return {
        "image_size": [side * config.patch_size for side in grid],
        "patch_size": config.patch_size,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "distilled": config.use_distillation_token,
        "backbone": "",
        "dropout": config.hidden_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "decoder": decoder,
        "n_cls": config.num_labels,
        "policy_method": "policy_net" if config.use_policy else "no_sharing",
        "policy_schedule": [num_patches - 4 * num_shared, num_shared],
        "policynet_ckpt": None,
    }


def _normalization_name(config: CtsConfig) -> str:
    ours = Normalization(config.image_mean, config.image_std)
    for name, theirs in _NORMALIZATIONS.items():
        if ours == theirs:
            return name
    raise ValueError(
        f"Mean and standard deviation must be those of a normalization that the original has, "
        f"{', '.join(f'{name} {tuple(values)}' for name, values in _NORMALIZATIONS.items())}, got {tuple(ours)}: keep "
        "the model in the format of this package (`save_pretrained`)."
    )


def _variant_options(variant: Mapping[str, Any]) -> dict[str, Any]:
    """The options of [`convert_segmenter`] that a `variant.yml` holds."""
    if not variant:
        return {}
    net = variant["net_kwargs"]
    decoder = net.get("decoder") or {}
    image_size = net["image_size"] if isinstance(net.get("image_size"), list) else [net.get("image_size")] * 2
    options = {
        "image_size": image_size[0] if image_size[0] == image_size[1] else tuple(image_size),
        "patch_size": net.get("patch_size"),
        "num_attention_heads": net.get("n_heads"),
        "hidden_dropout_prob": net.get("dropout"),
        "drop_path_rate": net.get("drop_path_rate"),
        "decoder_dropout_prob": decoder.get("dropout"),
        "decoder_drop_path_rate": decoder.get("drop_path_rate"),
    }
    schedule = net.get("policy_schedule")
    if net.get("policy_method") == "policy_net" and schedule and None not in schedule:
        num_unshared, num_shared = schedule
        options["token_reduction"] = 3 * num_shared / (num_unshared + 4 * num_shared)
    normalization = net.get("normalization")
    if normalization is not None and normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"`net_kwargs.normalization` in variant.yml must be one of {', '.join(_NORMALIZATIONS)}, got "
            f"{normalization!r}: correct it."
        )
    if normalization is not None:
        options |= _NORMALIZATIONS[normalization]._asdict()
    return {name: value for name, value in options.items() if value is not None}


def _choose_normalization(
    source: str | Path, state_dict: Mapping[str, torch.Tensor], kind: str, options: Mapping[str, Any]
) -> dict[str, list[float]]:
    """`image_mean` and `image_std`: those of `options`, else what is known of the weights, else 0.5."""
    first_weight = next(name for name in _KINDS_BY_WEIGHT if _KINDS_BY_WEIGHT[name] == kind and name in state_dict)
    num_channels = require_weight(state_dict, first_weight, num_dims=4).shape[1]
    default = Normalization([0.5] * num_channels, [0.5] * num_channels)
    given = (options.get("image_mean"), options.get("image_std"))
    return choose_normalization(source, state_dict, *given, default)._asdict()


def _class_names(
    variant: Mapping[str, Any], checkpoint: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> Sequence[str] | None:
    """The names that `variant.yml` or the metadata of mmsegmentation (either of its forms) say, if they do."""
    dataset = (variant.get("dataset_kwargs") or {}).get("dataset")
    if dataset in BENCHMARK_CLASSES:
        return BENCHMARK_CLASSES[dataset]
    meta = checkpoint.get("meta")
    names = None
    if isinstance(meta, dict):
        dataset_meta = meta.get("dataset_meta")
        names = meta.get("CLASSES") or (dataset_meta.get("classes") if isinstance(dataset_meta, dict) else None)
    is_list_of_names = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return names if is_list_of_names else None


def _build_processor(config: CtsConfig, variant: Mapping[str, Any]) -> CtsImageProcessor:
    image_size = config.image_size
    shortest_edge = image_size if isinstance(image_size, int) else min(image_size)
    if variant:
        shortest_edge = (variant.get("dataset_kwargs") or {}).get("image_size") or shortest_edge
    size = {"shortest_edge": shortest_edge}
    return CtsImageProcessor(size=size, image_mean=config.image_mean, image_std=config.image_std)


def _strip_module(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # What `DistributedDataParallel` puts before every name.
    return {name.removeprefix("module."): value for name, value in state_dict.items()}


def _recognize(state_dict: Mapping[str, torch.Tensor], source: str | Path) -> str:
    for name, kind in _KINDS_BY_WEIGHT.items():
        if name in state_dict:
            return kind
    if "embeddings.patch_embeddings.projection.weight" in state_dict or "patch_embed.proj.weight" in state_dict:
        raise ValueError(
            f"{source} must hold a segmentation model or a policy, got an image encoder: load it into a model with "
            "`cts_hf.conversion.load_vit_weights`, or train with `--backbone_weights`."
        )
    raise ValueError(
        f"{source} must be a checkpoint of CTS, of Segmenter, of mmsegmentation's Segmenter or SETR, or of a policy "
        f"network, got weights of other names: {', '.join(sorted(state_dict)[:5])}, ..."
    )


__all__ = ["BENCHMARK_CLASSES", "convert_checkpoint", "load_policy", "load_policy_folder", "save_original"]
