# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Segments all images of a folder.

    python examples/predict.py --model outputs/camvid --images photos --output_dir predictions
    accelerate launch examples/predict.py --model outputs/camvid --images photos --output_dir predictions

writes predictions/masks/NAME.png (the class id of every pixel), predictions/overlays/NAME.jpg and
predictions/grids/NAME.png (which superpatches shared a token). Started again, it goes on where it stopped: what this
model made with these options is not made again, unless the image has changed or the result cannot be read. Results of
another model or budget are only replaced with --overwrite_output_dir, and files that are no results, or were edited,
never are. Images that cannot be read or segmented are listed at the end, and the exit status is then 1. Several
processes on a CPU need `accelerate launch --multi_gpu`, or `torchrun --nproc_per_node 2 examples/predict.py`.

The model is one of this package or of transformers, as for examples/evaluate.py: what `save_cts` wrote, or a plain
checkpoint, which shares tokens with --with_policy FOLDER.

A video is a folder of frames: `ffmpeg -i video.mp4 frames/%06d.jpg`.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from cts_hf.evaluation.command_line import new_accelerator, print_text
from cts_hf.evaluation.existing_models import load_any
from cts_hf.evaluation.prediction import PredictionReport, find_images, predict_files
from cts_hf.evaluation.prediction_results import OUTPUTS
from cts_hf.evaluation.sharing import TokenReduction, check_budget
from cts_hf.evaluation.windows import InferenceOptions
from cts_hf.hub.output_folder import OutputFolder


@dataclass
class PredictionArguments:
    """What is segmented, and what is written."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    images: str = field(metadata={"help": "Folder of images; those in the folders below it count as well."})
    output_dir: str = field(default="outputs/predictions", metadata={"help": "Folder for the results."})
    with_policy: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a policy, in place of the model's. Default: the model's."}
    )
    outputs: list[str] | None = field(
        default=None,
        metadata={"help": "What to write. Default: all; no grids of windows, scales or flips.", "choices": [*OUTPUTS]},
    )
    token_reduction: TokenReduction | None = field(
        default=None,
        metadata={
            "help": "Fraction of the tokens to remove, up to 0.75 by 2 x 2 superpatches and 0.9375 by 4 x 4, or one "
            "for each level of the model, 0.2,0.3. Default: the model's own."
        },
    )
    sharing_threshold: float | None = field(
        default=None,
        metadata={"help": "Instead of a budget: share where the policy's probability of one class is at least this."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace results of another model, budget or other options."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})

    def __post_init__(self):
        check_budget(self.token_reduction, self.sharing_threshold)
        if self.num_workers < 0:
            raise ValueError(
                f"`num_workers` must be at least 0 (0: no processes of their own), got {self.num_workers}: correct it."
            )


def main() -> int:
    parser = HfArgumentParser((PredictionArguments, InferenceOptions))
    arguments, options = parser.parse_args_into_dataclasses()
    outputs = arguments.outputs or [output for output in OUTPUTS if output != "grids" or options.is_single_pass]
    accelerator = new_accelerator()
    # Before the output folder is made, so that a wrong path leaves nothing behind.
    images = find_images(arguments.images)
    # Locked before the model is opened, so that a second run stops at once.
    with OutputFolder(arguments.output_dir, "prediction") if accelerator.is_main_process else nullcontext():
        model, processor = load_any(arguments.model, arguments.with_policy)
        report = predict_files(
            model.to(accelerator.device),
            processor,
            images,
            arguments.output_dir,
            outputs=outputs,
            token_reduction=arguments.token_reduction,
            sharing_threshold=arguments.sharing_threshold,
            options=options,
            overwrite=arguments.overwrite_output_dir,
            num_workers=arguments.num_workers,
            accelerator=accelerator,
        )
    if accelerator.is_main_process:
        print_report(report, arguments.output_dir)
    accelerator.end_training()
    return 1 if report.problems else 0


def print_report(report: PredictionReport, output_dir: str) -> None:
    # First, as the standard output may be closed.
    if report.problems:
        print(f"Could not be segmented ({len(report.problems)}):", *report.problems, sep="\n  ", file=sys.stderr)
    print_text(
        f"{report.num_segmented} images were segmented, {report.num_done} had been already; the results are in "
        f"{output_dir}."
    )


if __name__ == "__main__":
    sys.exit(main())
