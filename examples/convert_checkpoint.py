# Copyright 2026 The cts_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Converts a checkpoint of another implementation to a folder that `from_pretrained` and `pipeline` take, and back.

    python examples/convert_checkpoint.py --source seg_small_mask --output_dir converted      # Segmenter or CTS
    python examples/convert_checkpoint.py --source segmenter_vit-s.pth --output_dir converted # mmsegmentation
    python examples/convert_checkpoint.py --source policynet/model.pth --output_dir policy --kind policy
    python examples/convert_checkpoint.py --source converted --output_dir original --kind original

A plain Segmenter becomes a model with `token_reduction=0`; `--policy` gives it a policy, and `--token_reduction` a
budget.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from cts_hf import CtsForSemanticSegmentation, CtsImageProcessor
from cts_hf.checkpoint_conversion import BENCHMARK_CLASSES, convert_checkpoint, load_policy, save_original
from cts_hf.model_card import model_card
from cts_hf.normalization import load_processor


@dataclass
class ConversionArguments:
    """What to convert, and what the weights do not tell."""

    source: str = field(metadata={"help": "Folder or file of the checkpoint."})
    output_dir: str = field(metadata={"help": "Folder to write, or to add to."})
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
    output_stride: int | None = field(default=None, metadata={"help": "Stage of a policy's trunk: 32, 16 or 8."})
    tf_padding: bool = field(default=False, metadata={"help": "The trunk is timm's tf_efficientnet_lite0."})
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Red, green and blue that the weights expect images to be normalized with, where pixels go from 0 "
            "to 1. Default: what the checkpoint or its repository says, else 0.5; ImageNet's for DeiT.",
            "nargs": 3,
        },
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Standard deviation, likewise.", "nargs": 3})


def main() -> None:
    (args,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses()
    if args.kind == "original":
        model = CtsForSemanticSegmentation.from_pretrained(args.source)
        save_original(model, load_processor(args.source, model.config), args.output_dir)
        print(f"Wrote checkpoint.pth and variant.yml to {args.output_dir}.")
        return

    if args.kind == "policy":
        eps = {"batch_norm_eps": 1e-3, "tf_padding": True} if args.tf_padding else {}
        options = given(args, "image_mean", "image_std")
        model = load_policy(args.source, output_stride=args.output_stride, **eps, **options)
        processor = CtsImageProcessor(image_mean=model.config.image_mean, image_std=model.config.image_std)
    else:
        options = given(args, "image_size", "num_attention_heads", "token_reduction", "image_mean", "image_std")
        names = BENCHMARK_CLASSES[args.dataset] if args.dataset else None
        model, processor = convert_checkpoint(args.source, policy=args.policy, class_names=names, **options)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    folder = Path(args.output_dir)
    card = model_card(model, {}, title=folder.name, name=folder.name, has_recipe=False)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{type(model).__name__} of {model.num_parameters():,} parameters is in {args.output_dir}.")


def given(args: ConversionArguments, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


if __name__ == "__main__":
    main()
