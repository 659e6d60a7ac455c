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
Mean IoU of a model on a data set, under one policy and budget or many.

    python examples/evaluate.py --model outputs/camvid --data_dir camvid --ignore_index 11
    accelerate launch examples/evaluate.py --model outputs/camvid --data_dir camvid --ignore_index 11 --split test \
        --policy learned random oracle --token_reduction 0 0.15 0.3 0.4375 0.6 0.75

prints a table and writes evaluation.json, and of several budgets evaluation.png: mean IoU against tokens and
multiply-adds. Under `accelerate launch` every process takes its share of the images; the results are the same.

Images have the size that the model's image processor gives them, or another one with --shortest_edge: 480 x 360 images
are evaluated at native size with --shortest_edge 360, and enlarged twice with --shortest_edge 720. Predictions are
always compared with the labels at the size of the labels.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

from cts_hf.budget_sweep import budget_sweep, format_table, plot_sweep, to_json
from cts_hf.data.arguments import DatasetArguments
from cts_hf.evaluation import POLICIES
from cts_hf.inference import InferenceOptions
from cts_hf.loading import load_processor, load_segmenter


@dataclass
class EvaluationArguments:
    """What is evaluated."""

    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder for the results."})
    split: str | None = field(
        default=None, metadata={"help": "Split of the data set; 'val' or 'validation' if unset."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate the first images only."})
    policy: list[str] = field(
        default_factory=lambda: ["learned"],
        metadata={"help": "What chooses the superpatches that share a token.", "choices": POLICIES},
    )
    token_reduction: list[float] | None = field(
        default=None, metadata={"help": "Fractions of the tokens to remove, 0 to 0.75. Default: the model's own."}
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})
    seed: int = field(default=0, metadata={"help": "Seed of the random policy."})


def main():
    parser = HfArgumentParser((EvaluationArguments, DatasetArguments, InferenceOptions))
    arguments, dataset_arguments, options = parser.parse_args_into_dataclasses()
    accelerator = Accelerator()
    model = load_segmenter(arguments.model).to(accelerator.device)
    processor = load_processor(arguments.model)
    with accelerator.main_process_first():
        data = dataset_arguments.load()
    if data.num_classes != model.config.num_labels:
        raise SystemExit(
            f"The data set has {data.num_classes} classes, the model {model.config.num_labels}: give the data set "
            "that the model was trained on, with the same options."
        )
    if arguments.split is not None and arguments.split not in data.splits:
        raise SystemExit(f"There is no split {arguments.split!r}, the data set has {', '.join(data.splits)}.")
    rows = data.validation if arguments.split is None else data.splits[arguments.split]
    if arguments.max_samples is not None:
        rows = rows.take(arguments.max_samples)

    results = budget_sweep(
        model,
        rows,
        processor,
        arguments.policy,
        arguments.token_reduction or [model.config.token_reduction],
        options=options,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
        accelerator=accelerator,
        show_progress=True,
    )
    if accelerator.is_main_process:
        write(results, data.classes, {**asdict(arguments), **asdict(dataset_arguments), **asdict(options)})
    accelerator.end_training()


def write(results: list[dict], classes: tuple[str, ...], settings: dict) -> None:
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(
        to_json({"settings": settings, "classes": classes, "results": results}), encoding="utf-8"
    )
    print(format_table(results))
    if len(results) == 1:
        for name, iou in zip(classes, results[0]["per_category_iou"], strict=True):
            print(f"IoU of {name}: {100 * iou:.2f} %")
    else:
        plot_sweep(results, folder / "evaluation.png", Path(settings["model"]).name)
    print(f"Written to {folder}")


if __name__ == "__main__":
    main()
