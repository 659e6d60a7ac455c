# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Converts a checkpoint of another implementation to a folder that `from_pretrained` and `pipeline` take, and back.

    python examples/convert_checkpoint.py --source seg_small_mask --output_dir converted      # Segmenter or CTS
    python examples/convert_checkpoint.py --source segmenter_vit-s.pth --output_dir mmseg     # mmsegmentation
    python examples/convert_checkpoint.py --source policynet/model.pth --output_dir policy --kind policy
    python examples/convert_checkpoint.py --source converted --output_dir original --kind original

A plain Segmenter becomes a model with `token_reduction=0`; `--policy` gives it a policy, and `--token_reduction` a
budget. What an earlier conversion wrote is only replaced with --overwrite_output_dir, and files of others never are.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from cts_hf import CtsImageProcessor
from cts_hf.conversion.checkpoints import BENCHMARK_CLASSES, convert_checkpoint, load_policy, save_original
from cts_hf.hub.loading import load_processor, load_segmenter
from cts_hf.hub.model_card import model_card
from cts_hf.hub.output_folder import OutputFolder
from cts_hf.hub.publishing import CODE_FILES, WEIGHT_FILES
from cts_hf.model.token_sharing import check_token_reduction


CONVERTED = (*WEIGHT_FILES, "config.json", "preprocessor_config.json", "README.md", *CODE_FILES)
ORIGINAL = ("checkpoint.pth", "variant.yml")


@dataclass
class ConversionArguments:
    """What to convert, and what does not follow from the weights."""

    source: str = field(metadata={"help": "Folder or file of the checkpoint."})
    output_dir: str = field(metadata={"help": "Folder to write, or to add to."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what an earlier conversion wrote."})
    kind: str = field(
        default="segmenter",
        metadata={
            "help": "segmenter: a model of another implementation; policy: a policy network or an EfficientNet-Lite0; "
            "original: a model of this package, to the files of the original.",
            "choices": ["segmenter", "policy", "original"],
        },
    )
    policy: str | None = field(default=None, metadata={"help": "Policy to give to a segmenter: folder or file."})
    dataset: str | None = field(
        default=None, metadata={"help": "Names the classes.", "choices": sorted(BENCHMARK_CLASSES)}
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Height and width that it was trained at, if these differ.", "nargs": 2}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "hidden_size // 64 by default."})
    token_reduction: float | None = field(default=None, metadata={"help": "Fraction of the tokens to remove."})
    output_stride: int | None = field(default=None, metadata={"help": "Stage of a policy's backbone: 32, 16 or 8."})
    tf_padding: bool = field(default=False, metadata={"help": "The backbone is timm's tf_efficientnet_lite0."})
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Red, green and blue that the weights expect images to be normalized with, where pixels go from 0 "
            "to 1. Default: what the checkpoint or its repository says, else 0.5; ImageNet's for DeiT.",
            "nargs": 3,
        },
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation, likewise.", "nargs": 3})

    def __post_init__(self):
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"`image_size` must be a height and a width of 1 pixel or more, got {self.image_size}.")
        if self.num_attention_heads is not None and self.num_attention_heads < 1:
            raise ValueError(f"`num_attention_heads` must be at least 1, got {self.num_attention_heads}.")
        if self.output_stride not in (None, 8, 16, 32):
            raise ValueError(f"`output_stride` must be 8, 16 or 32, got {self.output_stride}.")
        if self.token_reduction is not None:
            check_token_reduction(self.token_reduction)


def main() -> None:
    (args,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses()
    with OutputFolder(args.output_dir, "conversion") as output:
        output.refuse_existing(ORIGINAL if args.kind == "original" else CONVERTED, args.overwrite_output_dir)
        with output.writing() as unfinished:
            done = convert(args, unfinished, output.path.resolve().name)
    print(done)


def convert(args: ConversionArguments, folder: Path, name: str) -> str:
    """Writes what was asked for into a folder, which will have the name `name`, and says what it is."""
    if args.kind == "original":
        save_original(load_segmenter(args.source), load_processor(args.source), folder)
        return f"Wrote checkpoint.pth and variant.yml to {args.output_dir}."
    if args.kind == "policy":
        eps = {"batch_norm_eps": 1e-3, "tf_padding": True} if args.tf_padding else {}
        options = given(args, "image_mean", "image_std")
        model = load_policy(args.source, output_stride=args.output_stride, **eps, **options)
        processor = CtsImageProcessor(image_mean=model.config.image_mean, image_std=model.config.image_std)
    else:
        options = given(args, "image_size", "num_attention_heads", "token_reduction", "image_mean", "image_std")
        names = BENCHMARK_CLASSES[args.dataset] if args.dataset else None
        model, processor = convert_checkpoint(args.source, policy=args.policy, class_names=names, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = model_card(model, {}, title=name, name=name, has_recipe=False)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{type(model).__name__} of {model.num_parameters():,} parameters is in {args.output_dir}."


def given(args: ConversionArguments, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


if __name__ == "__main__":
    main()
