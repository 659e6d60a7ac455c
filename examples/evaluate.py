# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Mean IoU of a model on a data set, under one sharing strategy and budget or several, or thresholds of its policy.

    python examples/evaluate.py --model outputs/camvid --data_dir camvid --ignore_index 11
    accelerate launch examples/evaluate.py --model outputs/camvid --data_dir camvid --ignore_index 11 --split test \
        --sharing learned random oracle --token_reduction 0 0.15 0.3 0.4375 0.6 0.75 --output_dir outputs/sweep

prints a table and writes evaluation.json, and of several budgets evaluation.png: mean IoU against tokens and
multiply-adds. Those of an earlier run are only replaced with --overwrite_output_dir. Under `accelerate launch` every
process takes its share of the images; the results are the same. Several processes on a CPU need `--multi_gpu` there,
or `torchrun --nproc_per_node 2 examples/evaluate.py`.

A budget of a model with several levels of superpatches is one number, or one for each level; a threshold shares as
many tokens of each image as the policy is sure enough about, and the results say how many that were:

    python examples/evaluate.py --model outputs/camvid_levels --data_dir camvid --ignore_index 11 \
        --token_reduction 0.3 0.2,0.3 --sharing_threshold 0.8 0.9 0.95

The model is one of this package or one of transformers for semantic segmentation that `apply_cts` takes, such as
BEiT, DPT, UperNet, EoMT or Mask2Former: what `save_cts` wrote, or a plain checkpoint, which shares tokens with
--with_policy FOLDER, or with random and oracle sharing.

    python examples/evaluate.py --model microsoft/beit-base-finetuned-ade-640-640 --with_policy outputs/policy \
        --dataset ade20k --data_dir ADEChallengeData2016 --token_reduction 0 0.3

Images have the size that the model's image processor gives them, or another one with --shortest_edge: 480 x 360 images
are evaluated at native size with --shortest_edge 360, and enlarged twice with --shortest_edge 720. Predictions are
always compared with the labels at the size of the labels.
"""

import sys
from argparse import SUPPRESS, Action
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

from cts_hf.data import DataError
from cts_hf.data.arguments import DatasetArguments
from cts_hf.evaluation.command_line import new_accelerator, print_text
from cts_hf.evaluation.existing_models import load_any
from cts_hf.evaluation.sharing import STRATEGIES, Sharing, TokenReduction, check_budget
from cts_hf.evaluation.sweep import budget_sweep, format_sweep, plot_sweep, to_json
from cts_hf.evaluation.windows import InferenceOptions
from cts_hf.hub.loading import is_own_model, load_config
from cts_hf.hub.output_folder import OutputFolder
from cts_hf.model.token_sharing import check_token_reduction


RESULTS, PLOT = "evaluation.json", "evaluation.png"


@dataclass
class EvaluationArguments:
    """What is evaluated."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    # Not `policy`: that was the name of `sharing`, see below.
    with_policy: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a policy, in place of the model's. Default: the model's."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results, outputs/evaluation/<name of the model> by default."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the results of an earlier run in the folder."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of the data set; 'val' or 'validation' if unset."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate the first images only."})
    sharing: list[str] = field(
        default_factory=lambda: ["learned"],
        metadata={"help": "What chooses the superpatches that share a token.", "choices": STRATEGIES},
    )
    token_reduction: list[TokenReduction] | None = field(
        default=None,
        metadata={
            "help": "Fractions of the tokens to remove, up to 0.75 by 2 x 2 superpatches and 0.9375 by 4 x 4, or one "
            "for each level of the model, 0.2,0.3. Default: the model's own budget or threshold."
        },
    )
    sharing_threshold: list[float] | None = field(
        default=None,
        metadata={
            "help": "Thresholds, beside budgets or in their place: share where the policy's probability of one class "
            "is at least this."
        },
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})
    seed: int = field(default=0, metadata={"help": "Seed of random sharing, and of ties under the oracle."})

    def __post_init__(self):
        self.output_dir = self.output_dir or f"outputs/evaluation/{Path(self.model).resolve().name}"
        for name, least in (("max_samples", 1), ("num_workers", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}: correct it.")
        for token_reduction in self.token_reduction or []:
            check_budget(token_reduction)
        for sharing_threshold in self.sharing_threshold or []:
            check_budget(sharing_threshold=sharing_threshold)


class RefusePolicy(Action):
    """Ends the command with the new name of an option that it had."""

    def __call__(self, parser, *_):
        parser.error(f"`--policy` is now `--sharing`, one or more of {', '.join(STRATEGIES)}: rename the option.")


def main():
    parser = HfArgumentParser((EvaluationArguments, DatasetArguments, InferenceOptions))
    parser.add_argument("--policy", nargs="*", action=RefusePolicy, default=SUPPRESS, help=SUPPRESS)
    arguments, dataset_arguments, options = parser.parse_args_into_dataclasses()
    if is_own_model(arguments.model):  # a wrong path, or a budget that its levels do not allow, leaves no folder
        levels = load_config(arguments.model).superpatch_levels
        for token_reduction in arguments.token_reduction or []:
            check_token_reduction(token_reduction, levels)
    accelerator = new_accelerator()
    folder = OutputFolder(arguments.output_dir, "evaluation")
    with folder if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            folder.refuse_existing([RESULTS, PLOT], arguments.overwrite_output_dir)
        results, classes = evaluate(arguments, dataset_arguments, options, accelerator)
        if accelerator.is_main_process:
            settings = {**asdict(arguments), **asdict(dataset_arguments), **asdict(options)}
            # A full disk does not keep results from being printed, nor a closed pipe from being saved.
            try:
                write(folder, results, classes, settings)
            finally:
                print_results(results, classes)
            print_text(f"Written to {folder.path}")
    accelerator.end_training()


def evaluate(
    arguments: EvaluationArguments,
    dataset_arguments: DatasetArguments,
    options: InferenceOptions,
    accelerator: Accelerator,
) -> tuple[list[dict], tuple[str, ...]]:
    """The results of the sweep and the names of the classes."""
    with accelerator.main_process_first():
        data = dataset_arguments.load()
    try:
        rows = data.evaluation_rows(arguments.split, arguments.max_samples)
    except DataError as error:
        raise SystemExit(str(error)) from error
    model, processor = load_any(arguments.model, arguments.with_policy)
    model = model.to(accelerator.device)
    if data.num_classes != model.config.num_labels:
        raise SystemExit(
            f"The data set has {data.num_classes} classes, the model {model.config.num_labels}: give the data set "
            "that the model was trained on, with the same options."
        )
    if warning := compare_names(
        tuple(model.config.id2label[index] for index in range(data.num_classes)), data.classes
    ):
        accelerator.print(warning, file=sys.stderr)
    token_reductions, thresholds = arguments.token_reduction, arguments.sharing_threshold
    if token_reductions is None and thresholds is None:
        own = Sharing.of_model(model.config)
        token_reductions = [own.token_reduction] if own.sharing_threshold is None else []
        thresholds = [own.sharing_threshold] if own.sharing_threshold is not None else []
    results = budget_sweep(
        model,
        rows,
        processor,
        arguments.sharing,
        token_reductions or [],
        sharing_thresholds=thresholds or [],
        options=options,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
        accelerator=accelerator,
        show_progress=True,
    )
    return results, data.classes


def compare_names(of_model: tuple[str, ...], of_data: tuple[str, ...]) -> str | None:
    """A warning about classes of other names than the model's; the same names in another order are refused."""
    differences = [index for index, name in enumerate(of_data) if name != of_model[index]]
    if not differences or any(map(is_unnamed, (of_model, of_data))):
        return None
    first = differences[0]
    if sorted(of_model) == sorted(of_data):
        raise SystemExit(
            f"The classes of the data set must be in the order of the model's, got {of_data[first]!r} for class "
            f"{first}, which is {of_model[first]!r} in the model: give the data set that the model was trained on, or "
            "put its names in the order of the ids in its label maps."
        )
    return (
        f"Warning: {len(differences)} of {len(of_data)} classes have other names in the data set than in the model, "
        f"such as class {first}: {of_data[first]!r} and {of_model[first]!r}. Results are listed by those of the data "
        "set."
    )


def is_unnamed(classes: tuple[str, ...]) -> bool:
    """Whether these are numbered names, as `transformers` and data sets give to classes without names."""
    return any(all(name == f"{stem}_{index}" for index, name in enumerate(classes)) for stem in ("LABEL", "class"))


def print_results(results: list[dict], classes: tuple[str, ...]) -> None:
    print_text(format_sweep(results))
    if len(results) == 1:
        for name, iou in zip(classes, results[0]["per_category_iou"], strict=True):
            print_text(f"IoU of {name}: {100 * iou:.2f} %")


def write(folder: OutputFolder, results: list[dict], classes: tuple[str, ...], settings: dict) -> None:
    """Writes the results, then draws them, so that a plot that fails loses nothing."""
    with folder.writing() as unfinished:
        text = to_json({"settings": settings, "classes": classes, "results": results})
        (unfinished / RESULTS).write_text(text, encoding="utf-8")
    # A plot of an earlier run would be taken for one of these results.
    folder.delete(folder.written.keys() & {PLOT})
    if len(results) > 1:
        with folder.writing() as unfinished:
            plot_sweep(results, unfinished / PLOT, Path(settings["model"]).name)


if __name__ == "__main__":
    main()
