# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Exports a model to ONNX, policy and token sharing included, for one image size and one budget: a Segmenter, or a model
of transformers for semantic segmentation (BEiT, Data2Vec, DPT, UperNet), as `save_cts` or its own `save_pretrained`
wrote it.

    pip install -e ".[onnx]"
    python examples/export_onnx.py --model outputs/scenes --output_dir outputs/scenes_onnx
    python examples/export_onnx.py --model outputs/camvid --output_dir camvid_onnx --image_size 360 480 --benchmark

writes model.onnx and, beside it, the configuration and an image processor that resizes images to that size, whatever
their aspect ratio: export the one that your images have. It then runs the file in ONNX Runtime and says how far its
outputs are from those of the model in PyTorch. What an earlier export wrote is only replaced with
--overwrite_output_dir, and files of others never are.
"""

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import BaseImageProcessor, HfArgumentParser, PreTrainedModel

from cts_hf.benchmark.timing import median_times
from cts_hf.evaluation.existing_models import ExistingSegmenter, load_with_policy
from cts_hf.evaluation.sharing import TokenReduction, check_budget
from cts_hf.evaluation.tables import format_table
from cts_hf.export.onnx import OnnxSegmenter, check_exportable, export_onnx
from cts_hf.hub.loading import is_own_model, load_config, load_processor, load_segmenter, read_config
from cts_hf.hub.output_folder import OutputFolder
from cts_hf.hub.publishing import CODE_FILES
from cts_hf.hub.sharing_folder import model_class
from cts_hf.model.modeling_cts_outputs import per_level
from cts_hf.model.token_sharing import check_token_reduction


EXPORTED = ("model.onnx", "model.onnx.data", "config.json", "preprocessor_config.json", *CODE_FILES)


@dataclass
class ExportArguments:
    """What is exported, and for which images."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    output_dir: str = field(metadata={"help": "Folder for model.onnx, config.json and preprocessor_config.json."})
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Height and width in pixels. Default: the model's own.", "nargs": 2}
    )
    batch_size: int = field(default=1, metadata={"help": "Images per call; 0 lets every call have its own number."})
    token_reduction: TokenReduction | None = field(
        default=None,
        metadata={
            "help": "Fraction of the tokens to remove, up to 0.75 by 2 x 2 superpatches and 0.9375 by 4 x 4, or one "
            "for each level of the model, 0.2,0.3. Default: the model's own."
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what an earlier export wrote."})
    benchmark: bool = field(
        default=False, metadata={"help": "Time PyTorch and ONNX Runtime, with and without sharing, on this machine."}
    )
    rounds: int = field(default=20, metadata={"help": "Timed calls of each in the benchmark."})

    def __post_init__(self):
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(
                f"`image_size` must be a height and a width of 1 pixel or more, got {self.image_size}: correct it."
            )
        if self.batch_size < 0:
            raise ValueError(f"`batch_size` must be at least 0 (0: any number), got {self.batch_size}: correct it.")
        if self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}: choose more.")
        check_budget(self.token_reduction)


def main() -> None:
    (args,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses()
    if Path(args.output_dir).resolve() == Path(args.model).resolve():
        raise SystemExit(
            f"`output_dir` must be another folder than the model's, got {args.output_dir}: choose a new one."
        )
    levels = (2,)
    if is_own := is_own_model(args.model):  # a wrong path leaves no folder behind
        levels = load_config(args.model).superpatch_levels
    else:
        check_exportable(model_class(read_config(args.model), args.model).__name__)
    if args.token_reduction is not None:
        check_token_reduction(args.token_reduction, levels)
    with OutputFolder(args.output_dir, "export") as output:
        output.refuse_existing(EXPORTED, args.overwrite_output_dir)
        if is_own:
            model, processor = load_segmenter(args.model, dtype=torch.float32), load_processor(args.model)
            config = sharing = model.config
        else:
            model, processor = load_with_policy(args.model, dtype=torch.float32)
            config, sharing = ExistingSegmenter(model, processor).config, model.token_sharing
        if args.token_reduction is not None:
            sharing.token_reduction = args.token_reduction
            if is_own:
                sharing.sharing_threshold = None
        image_size = tuple(args.image_size or config.image_height_and_width)
        resize_exactly(processor, image_size)
        with output.writing() as unfinished:
            export_onnx(model, unfinished / "model.onnx", image_size, args.batch_size or None)
            model.config.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
    file = Path(args.output_dir) / "model.onnx"
    print(f"{file} has {file.stat().st_size / 2**20:.1f} MiB.")

    # A number of images that it was not exported with, where that is left open.
    shape = (args.batch_size or 3, config.num_channels, *image_size)
    report_agreement(model, OnnxSegmenter(file), shape)
    if args.benchmark:
        report_times(model, file, shape, args.rounds, sum(per_level(sharing.token_reduction)))


def resize_exactly(processor: BaseImageProcessor, image_size: tuple[int, int]) -> None:
    """Makes an image processor resize all images to one size."""
    processor.do_resize, processor.size = True, {"height": image_size[0], "width": image_size[1]}
    for name, value in (("keep_aspect_ratio", False), ("ensure_multiple_of", 1)):  # of DPT
        if hasattr(processor, name):
            setattr(processor, name, value)


def report_agreement(model: PreTrainedModel, exported: OnnxSegmenter, shape: tuple[int, int, int, int]) -> None:
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, given = model(pixel_values), exported(pixel_values)
    difference = (expected.logits - given.logits).abs().max().item()
    shared = [outputs.shared_superpatches for outputs in (expected, given)]
    shared = [torch.cat([of_level.flatten() for of_level in per_level(each)]) for each in shared]
    same = (shared[0] == shared[1]).float().mean().item()
    print(f"Beside PyTorch: logits differ by {difference:.1e} at most, {same:.2%} of the superpatches share alike.")


def report_times(
    model: PreTrainedModel, file: Path, shape: tuple[int, int, int, int], rounds: int, fewer: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        export_onnx(model, plain, shape[2:], shape[0], token_reduction=0)
        runtimes = {
            "PyTorch, no sharing": partial(model, token_reduction=0),
            "PyTorch": model,
            "ONNX Runtime, no sharing": OnnxSegmenter(plain),
            "ONNX Runtime": OnnxSegmenter(file),
        }
        times = median_times(runtimes, shape, rounds)
    print(f"Median of {rounds} calls, {torch.get_num_threads()} threads, {fewer:.1%} fewer tokens, images {shape}:")
    rows = [(name, f"{time:.1f}", f"{times['PyTorch'] / time:.2f}") for name, time in times.items()]
    print(format_table(("", "ms", "times as fast as PyTorch"), rows))


if __name__ == "__main__":
    main()
