# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that are trained with token sharing: opened, given other classes, and checked."""

import inspect
import math

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..conversion.backbones import load_encoder_config
from ..data import IGNORE_INDEX, SegmentationData
from ..evaluation.existing_models import check_makes_label_maps, load_with_policy
from ..hub.loading import image_size_of, is_own_model, read_config
from ..hub.normalization import processor_normalization
from ..hub.problems import first_line
from ..hub.sharing_folder import model_class
from ..model.configuration_cts import CtsConfig
from ..model.modeling_cts_policy import CtsPolicyModel
from .arguments import DataArguments, ModelArguments, PolicyArguments, PolicySourceArguments
from .models import ADDITIONS, adopt_crop_size, refuse_other_normalization, refuse_without_policy
from .optimization import encoder_prefix
from .tasks import SegmentationTask


# Weights with a row or an entry for each class.
CLASSIFIERS = (
    "decode_head.classifier.",
    "auxiliary_head.classifier.",
    "head.head.4.",
    "auxiliary_head.head.4.",
    "class_predictor.",
    "criterion.empty_weight",
)
# Names of the label that losses leave out, in configurations.
_IGNORED_LABELS = ("semantic_loss_ignore_index", "loss_ignore_index")


def is_existing(args: ModelArguments) -> bool:
    """Whether training starts from a model of transformers, and not from one of this package."""
    return args.model is not None and not is_own_model(args.model)


def adopt_existing(args: ModelArguments, policy_source: PolicySourceArguments, data_args: DataArguments) -> None:
    """
    Gives options the values of the model of transformers that training starts from.

    Raises:
        ValueError: a model that gives no label maps, or a policy that is to be trained with it.
    """
    kind = model_class(read_config(args.model), args.model).__name__
    try:
        check_makes_label_maps(kind)
    except ValueError as error:
        raise ValueError(f"{args.model} cannot be trained: {error} --backbone takes an encoder alone.") from error
    if policy_source.policy_loss_weight > 0:
        raise ValueError(
            f"`policy_loss_weight` must be 0 for a model of transformers, whose policy stays frozen, got "
            f"{policy_source.policy_loss_weight}: pass --policy FOLDER, or --policy_epochs to train one first."
        )
    for name in ("superpatch_levels", "sharing_threshold", *ADDITIONS):
        value = getattr(args, name)
        if (tuple(value) if isinstance(value, list) else value) not in (None, getattr(CtsConfig, name)):
            raise ValueError(
                f"`{name}` must be left out for a model of transformers, which shares tokens of 2 x 2 patches by a "
                f"fixed budget, got {value!r}."
            )
    encoder = load_encoder_config(args.model)
    for name in ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        setattr(args, name, getattr(encoder, name))
    adopt_crop_size(encoder, data_args)


def build_existing(
    args: ModelArguments,
    policy: CtsPolicyModel | None,
    policy_args: PolicyArguments,
    data_args: DataArguments,
    data: SegmentationData,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A model of transformers that shares tokens, with the classes of a data set, and its image processor.

    Args:
        args: its options, completed by [`adopt_existing`].
        policy: the policy; `None` leaves that of a folder that `save_cts` wrote.
        policy_args: options that must not contradict the policy's normalization.
        data_args: the size of crops; the image processor resizes images as [`resized_processor`] says.
        data: its classes become the labels.

    Raises:
        FileNotFoundError: there is no such model, or it has no image processor.
        ValueError: a model that is incomplete or that cannot be trained with these options.
    """
    labels = {"id2label": data.id2label, "label2id": data.label2id}
    model, processor = load_with_policy(args.model, policy, CLASSIFIERS, dtype=torch.float32, **labels)
    sharing = model.token_sharing
    _refuse_other_pixels(processor)
    refuse_without_policy(args, sharing.policy)
    sharing.token_reduction = args.token_reduction
    refuse_other_normalization(args, processor_normalization(processor, sharing.num_channels))
    if sharing.policy is not None:
        refuse_other_normalization(policy_args, sharing.policy.config)
    for name in _IGNORED_LABELS:
        if hasattr(model.config, name):
            setattr(model.config, name, IGNORE_INDEX)
    if args.freeze_encoder:
        _freeze_encoder(model)
    return model, resized_processor(processor, model.config, data_args)


def predicts_masks(model: PreTrainedModel) -> bool:
    """Whether a model predicts masks and the class of each, and not a class for each patch."""
    return "mask_labels" in inspect.signature(type(model).forward).parameters


def resized_processor(
    processor: BaseImageProcessor, config: PreTrainedConfig, data_args: DataArguments
) -> BaseImageProcessor:
    """
    The image processor for a model that is trained on crops of another size than `config`, its configuration, names:
    with the shorter side that `data_args` ask for, and for label maps of class ids that start at 0.
    """
    options = processor.to_dict()
    size = {name: length for name, length in dict(processor.size).items() if length is not None}
    if data_args.shortest_edge != min(image_size_of(config)):
        factor = data_args.shortest_edge / min(size.values())
        options["size"] = {name: round(factor * length) for name, length in size.items()}
    for name, value in (("do_reduce_labels", False), ("ignore_index", IGNORE_INDEX)):
        if hasattr(processor, name):
            options[name] = value
    return type(processor).from_dict(options)


def check_crops(task: SegmentationTask, crop_size: int) -> None:
    """
    Makes a step's loss and gradient of one empty crop, without changing a weight, and freezes weights that get none:
    several devices would wait for their gradient.

    Raises:
        ValueError: crops that the model does not take.
    """
    model = task.model.eval()  # batch norms count nothing
    batch = {"pixel_values": torch.zeros(1, 3, crop_size, crop_size)}
    batch["labels"] = torch.zeros(1, crop_size, crop_size, dtype=torch.int64)
    try:
        task.forward(model, batch).loss.backward()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"`crop_size` must be one that the {type(model).__name__} can be trained with, got {crop_size}: "
            f"{first_line(error)} Leave it out for the model's own image size."
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad()


def _refuse_other_pixels(processor: BaseImageProcessor) -> None:
    """Refuses an image processor that does not normalize pixels from 0 to 1, as training crops are."""
    factor = processor.rescale_factor if processor.do_rescale else 1
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise ValueError(
            f"The image processor must scale pixels from 0 to 1, as training does, got a {type(processor).__name__} "
            f"that multiplies them by {factor}: save one with `do_rescale=True` and `rescale_factor=1 / 255`."
        )


def _freeze_encoder(model: PreTrainedModel) -> None:
    prefix = encoder_prefix(model)
    if not prefix:
        raise ValueError(
            f"`freeze_encoder` must be False for a {type(model).__name__}, whose encoder predicts as well, got True: "
            "leave it out."
        )
    encoder = model.get_submodule(prefix.rstrip("."))
    encoder.requires_grad_(False)
    # Before each call, as `train` of the whole model would switch dropout and drop path on.
    encoder.register_forward_pre_hook(_stay_in_evaluation)


def _stay_in_evaluation(module: nn.Module, args: tuple) -> None:
    if module.training:
        module.eval()


__all__ = [
    "CLASSIFIERS",
    "adopt_existing",
    "build_existing",
    "check_crops",
    "is_existing",
    "predicts_masks",
    "resized_processor",
]
