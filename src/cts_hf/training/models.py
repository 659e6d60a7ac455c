# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of a training run, made from its options."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig

from ..conversion.backbones import backbone_normalization, load_backbone, load_backbone_config, load_encoder_config
from ..conversion.converters import load_policy_backbone, load_vit_weights
from ..conversion.normalization import weights_normalization
from ..data import IGNORE_INDEX, SegmentationData
from ..evaluation.existing_models import load_existing_processor
from ..evaluation.sharing import format_reduction
from ..hub.loading import image_size_of, is_own_model, load_config, load_processor, load_segmenter
from ..hub.normalization import HALF, Normalization, check_normalization, processor_normalization
from ..model.configuration_cts import CtsConfig, CtsPolicyConfig
from ..model.image_processing_cts import CtsImageProcessor
from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_policy import CtsPolicyModel
from ..model.token_sharing import check_token_reduction
from .arguments import ModelArguments, PolicyArguments, PolicySourceArguments, SuperpatchArguments
from .data_arguments import DataArguments


# Epsilon that TensorFlow's EfficientNet-Lite0 was trained with.
TF_BATCH_NORM_EPS = 1e-3
# Options that are fields of the configuration, too, and that a trained model has already.
ARCHITECTURE = (
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "use_distillation_token",
    "decoder_type",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
)
# Options that a trained model can be given but not lose, and the prefix of the weights that come with them, which
# start so that outputs are the same.
ADDITIONS = {
    "unsharing": "unsharing_residual.",
    "superpatch_embedding": "cts.embeddings.patch_embeddings.superpatch_projections.",
}
# Weights with a row or an entry for each class.
CLASSIFIERS = (
    "decode_head.class_embeddings",
    "decode_head.mask_norm",
    "decode_head.classifier",
    "decode_head.head.classifier",
    "decode_head.auxiliary_heads.",
    "unsharing_residual.output_projection",
)


def encoder_normalization(args: ModelArguments) -> Normalization:
    """What the encoder of these options sees images normalized with, known before it is built."""
    known = HALF
    if args.model and not is_own_model(args.model):
        known = processor_normalization(load_existing_processor(args.model), num_channels=3)
    elif args.model:
        config = load_config(args.model)
        known = Normalization(config.image_mean, config.image_std)
    elif args.backbone:
        known = backbone_normalization(args.backbone, load_backbone_config(args.backbone))
    elif args.backbone_weights and None in (args.image_mean, args.image_std):
        known = weights_normalization(args.backbone_weights) or HALF
    return Normalization(args.image_mean or known.image_mean, args.image_std or known.image_std)


def policy_config(
    args: PolicyArguments,
    patch_size: int,
    normalization: Normalization = HALF,
    superpatch_levels: tuple[int, ...] = (2,),
) -> CtsPolicyConfig:
    """The configuration of a policy with these options, and `normalization` where they have none."""
    return CtsPolicyConfig(
        superpatch_size=superpatch_levels[0] * patch_size,
        superpatch_levels=superpatch_levels,
        output_stride=args.policy_output_stride,
        num_stages=args.policy_num_stages,
        width_coefficient=args.policy_width_coefficient,
        depth_coefficient=args.policy_depth_coefficient,
        tf_padding=args.policy_tf_padding,
        image_mean=args.policy_image_mean or normalization.image_mean,
        image_std=args.policy_image_std or normalization.image_std,
        **({"batch_norm_eps": TF_BATCH_NORM_EPS} if args.policy_tf_padding else {}),
    )


def build_policy(
    args: PolicyArguments,
    patch_size: int,
    normalization: Normalization = HALF,
    superpatch_levels: tuple[int, ...] = (2,),
) -> CtsPolicyModel:
    """
    A policy with an ImageNet backbone if `policy_weights` name one, otherwise with random weights.

    Args:
        args: its options.
        patch_size: of the Segmenter, in pixels.
        normalization: of its images, unless its options or what its weights are known to expect differ.
        superpatch_levels: sides of the superpatches in patches.
    """
    policy = CtsPolicyModel(policy_config(args, patch_size, normalization, superpatch_levels))
    if args.policy_weights:
        given = {"image_mean": args.policy_image_mean, "image_std": args.policy_image_std}
        load_policy_backbone(policy, args.policy_weights, **given)
    return policy


def refuse_other_normalization(
    args: ModelArguments | PolicyArguments, config: CtsConfig | CtsPolicyConfig | Normalization
) -> None:
    """
    Refuses options that contradict weights which have been trained with another normalization.

    Args:
        args: the options.
        config: of the model that has these weights, or what it says of normalization.
    """
    prefix = "policy_" if isinstance(args, PolicyArguments) else ""
    for name in Normalization._fields:
        value, recorded = getattr(args, prefix + name), getattr(config, name)
        if value not in (None, recorded):
            raise ValueError(
                f"`{prefix}{name}` must be {recorded}, as the trained model's configuration says, got {value}: leave "
                "it out, or correct config.json and preprocessor_config.json there."
            )


def segmenter_config(
    args: ModelArguments,
    policy_config: CtsPolicyConfig,
    source_args: PolicySourceArguments,
    data: SegmentationData,
    image_size: int,
) -> CtsConfig:
    """The configuration of a Segmenter with these options; the arguments are those of [`build_segmenter`]."""
    options = {name: getattr(args, name) for name in ARCHITECTURE}
    image_mean, image_std = args.image_mean, args.image_std
    if args.backbone:
        options = {name: value for name, value in options.items() if name.startswith("decoder_")}
        options["backbone_config"] = load_backbone_config(args.backbone)
        image_mean, image_std = encoder_normalization(args)
    else:
        options["image_size"] = image_size
    return CtsConfig(
        intermediate_size=4 * args.hidden_size,
        **options,
        image_mean=image_mean,
        image_std=image_std,
        # The levels named, as a policy without them would have all those of the Segmenter.
        policy_config={**policy_config.to_diff_dict(), "superpatch_levels": policy_config.superpatch_levels},
        **_training_options(args, source_args, data),
    )


def _training_options(
    args: ModelArguments, source_args: PolicySourceArguments, data: SegmentationData
) -> dict[str, Any]:
    """The options of a configuration that training sets whatever the architecture."""
    return {
        "drop_path_rate": args.drop_path_rate,
        "decoder_dropout_prob": args.decoder_dropout_prob,
        "superpatch_levels": args.levels,
        "token_reduction": args.token_reduction,
        "sharing_threshold": args.sharing_threshold,
        **{name: value for name in ADDITIONS if (value := getattr(args, name)) is not None},
        "freeze_encoder": args.freeze_encoder,
        "policy_loss_weight": source_args.policy_loss_weight,
        "semantic_loss_ignore_index": IGNORE_INDEX,
        "id2label": data.id2label,
        "label2id": data.label2id,
    }


def adopt_architecture(args: ModelArguments) -> None:
    """
    Gives the options of the architecture the values of `args.model` or `args.backbone`, if there is one; its levels of
    superpatches only where the options have none, as a trained model takes others.

    Raises:
        ValueError: options that would lose weights of `args.model`.
    """
    if args.model:
        config, names = load_config(args.model), ARCHITECTURE
        for name in ADDITIONS:
            value, recorded = getattr(args, name), getattr(config, name)
            if recorded != getattr(CtsConfig, name):
                if value not in (None, recorded):
                    raise ValueError(
                        f"`{name}` must be {recorded!r}, as {args.model} was trained with it, got {value!r}: leave it "
                        "out, as the model would lose these weights."
                    )
                setattr(args, name, recorded)
    elif args.backbone:
        config = CtsConfig(backbone_config=load_backbone_config(args.backbone))
        names = tuple(name for name in ARCHITECTURE if not name.startswith("decoder_"))
    else:
        return
    for name in names:
        setattr(args, name, getattr(config, name))
    if args.superpatch_levels is None and config.superpatch_levels != args.levels:
        args.superpatch_levels = list(config.superpatch_levels)
    check_token_reduction(args.token_reduction, args.levels)


def adopt_model(superpatch_args: SuperpatchArguments, data_args: DataArguments) -> Normalization:
    """
    Gives a policy's options the patches and the image size of `for_model`, if there is one.

    Returns:
        What that model's images are normalized with.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its patches are no squares, or it has none.
    """
    source = superpatch_args.for_model
    if source is None:
        return HALF
    encoder = load_encoder_config(source)
    superpatch_args.patch_size = encoder.patch_size
    adopt_crop_size(encoder, data_args)
    return backbone_normalization(source, encoder)


def adopt_crop_size(encoder: PreTrainedConfig, data_args: DataArguments) -> None:
    """Makes the image size of an encoder's configuration the size of crops, if that is the default."""
    if data_args.crop_size == DataArguments.crop_size:
        data_args.crop_size = min(image_size_of(encoder))


def build_segmenter(
    args: ModelArguments,
    policy: CtsPolicyModel | None,
    source_args: PolicySourceArguments,
    data: SegmentationData,
    image_size: int,
) -> CtsForSemanticSegmentation:
    """
    A Segmenter with the weights of `policy`, and those that `model`, `backbone` or `backbone_weights` name, else
    random ones.

    Args:
        args: its options.
        policy: the policy, trained or not; `None` leaves that of `args.model`.
        source_args: with the weight of the policy's loss, 0 if it is frozen.
        data: its classes become the labels.
        image_size: height and width of training crops in pixels.

    Raises:
        ValueError: weights that would have no gradient: those of sharing, or of a policy that is trained jointly, in
            training without sharing, and those of a new embedding in a frozen encoder; or a model that cannot be
            trained on with these options.
    """
    _refuse_idle_additions(args)
    if source_args.policy_loss_weight > 0 and not args.shares_tokens:
        raise ValueError(
            f"policy_loss_weight is {source_args.policy_loss_weight} and token_reduction 0, at which the policy is "
            "not run: set token_reduction above 0 to train it."
        )
    if args.model:
        model = _load_segmenter(args, source_args, data)
        if policy is not None:
            model.set_policy(policy)
        refuse_without_policy(args, model.cts.policy)
        return model
    model = CtsForSemanticSegmentation(segmenter_config(args, policy.config, source_args, data, image_size))
    model.cts.policy.load_state_dict(policy.state_dict())
    if args.backbone:
        load_backbone(model, args.backbone)
    elif args.backbone_weights:
        load_vit_weights(model, args.backbone_weights, image_mean=args.image_mean, image_std=args.image_std)
    return model


def refuse_without_policy(args: ModelArguments, policy: CtsPolicyModel | None) -> None:
    """Refuses to share tokens in a trained model that has no policy."""
    if policy is None and args.shares_tokens:
        budget = format_reduction(args.token_reduction)
        raise ValueError(
            f"{args.model} has no policy and token_reduction is {budget}: pass --policy FOLDER, --policy_epochs to "
            "train one first, or --token_reduction 0."
        )


def _added(args: ModelArguments) -> dict[str, str]:
    """The options by name whose weights are new: `args.model`, if there is one, has none."""
    earlier = load_config(args.model) if args.model else CtsConfig
    values = {name: getattr(args, name) for name in ADDITIONS}
    return {name: value for name, value in values.items() if value not in (None, getattr(earlier, name))}


def _refuse_idle_additions(args: ModelArguments) -> None:
    """Refuses options whose weights training would leave as they are."""
    for name in ADDITIONS:
        value, default = getattr(args, name), getattr(CtsConfig, name)
        if value not in (None, default) and not args.shares_tokens:
            raise ValueError(
                f"`token_reduction` must be above 0 to train a model with {name} {value!r}, got 0: its weights have a "
                "part in sharing alone."
            )
    if args.freeze_encoder and "superpatch_embedding" in _added(args):
        raise ValueError(
            "`superpatch_embedding` must be 'projection' where `freeze_encoder` is set, got "
            f"{args.superpatch_embedding!r}: its weights would stay at zero. Leave out one of the two."
        )


def _load_segmenter(
    args: ModelArguments, source_args: PolicySourceArguments, data: SegmentationData
) -> CtsForSemanticSegmentation:
    options, added = _training_options(args, source_args, data), _added(args)
    new = tuple(ADDITIONS[name] for name in added)
    model = load_segmenter(args.model, ignore=CLASSIFIERS, new=new, dtype=torch.float32, **options)
    for name, value in added.items():
        PartialState().print(
            f"{args.model} has no weights for {name} {value!r}: they are new, and start so that they change nothing."
        )
    check_normalization(model.config, load_processor(args.model))
    refuse_other_normalization(args, model.config)
    return model


def build_processor(args: DataArguments, config: CtsConfig | CtsPolicyConfig) -> CtsImageProcessor:
    """
    The image processor that prepares images as training does: same size, and the normalization of `config`, which is
    that of the model it is for.
    """
    size = {"shortest_edge": args.shortest_edge}
    return CtsImageProcessor(size=size, image_mean=config.image_mean, image_std=config.image_std)
