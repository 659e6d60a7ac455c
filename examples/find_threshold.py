# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds the `sharing_threshold` for a wanted mean reduction, or for a wanted precision of what shares.

    python examples/find_threshold.py --model outputs/camvid --images photos --token_reduction 0.3
    python examples/find_threshold.py --model outputs/camvid --data_dir camvid --ignore_index 11 --precision 0.95
    accelerate launch examples/find_threshold.py --model outputs/policy --superpatch_levels 2 4 --data_dir camvid \
        --ignore_index 11 --token_reduction 0.5 --json threshold.json

prints the threshold, what it gives on average, and the spread over the images. Only the policy is run, once on each
image. The model is a Segmenter, or a policy that one will be trained with. A reduction needs no labels: --images is
any folder. A precision, the fraction of the superpatches that share which shows one class, needs those of a data set;
where there are labels, a reduction comes with its precision.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import HfArgumentParser

from cts_hf.data import DataError
from cts_hf.data.arguments import DatasetArguments
from cts_hf.evaluation.command_line import new_accelerator, print_text
from cts_hf.evaluation.prediction import find_images
from cts_hf.evaluation.scored_images import ImageFiles, load_policy_of, score_images
from cts_hf.evaluation.sweep import to_json
from cts_hf.evaluation.thresholds import check_wanted, find_threshold, format_threshold
from cts_hf.evaluation.windows import InferenceOptions
from cts_hf.hub.output_file import prepare_file, written_whole


@dataclass
class ThresholdArguments:
    """What is wanted, of which policy, on which images."""

    model: str = field(metadata={"help": "Folder or Hub id of a Segmenter, or of a policy, with its image processor."})
    with_policy: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a policy, in place of the Segmenter's."}
    )
    superpatch_levels: list[int] | None = field(
        default=None,
        metadata={"help": "Sides, in patches, of the superpatches that share, such as 2 4. Default: the model's own."},
    )
    token_reduction: float | None = field(
        default=None, metadata={"help": "Wanted: the fraction of the tokens that images lose on average."}
    )
    precision: float | None = field(
        default=None, metadata={"help": "Wanted: the fraction of what shares that shows one class. Needs labels."}
    )
    images: str | None = field(
        default=None, metadata={"help": "Folder of images without labels, in place of a data set."}
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of the data set; 'val' or 'validation' if unset."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Take the first images only."})
    shortest_edge: int | None = field(
        default=None,
        metadata={"help": "Shorter side, in pixels, that images are resized to. Default: the image processor's size."},
    )
    batch_size: int = field(default=8, metadata={"help": "Images in a forward pass."})
    num_workers: int = field(default=2, metadata={"help": "Processes that read images."})
    json: str | None = field(default=None, metadata={"help": "File for the results."})
    overwrite: bool = field(default=False, metadata={"help": "Replace that file if it exists."})

    def __post_init__(self):
        if (self.token_reduction is None) == (self.precision is None):
            raise ValueError(
                f"Either `token_reduction` or `precision` must be wanted, got {self.token_reduction} and "
                f"{self.precision}: give one of them."
            )
        if self.images is not None and self.precision is not None:
            raise ValueError(
                f"`precision` must be None with `images`, which have no labels, got {self.precision}: give a data "
                "set, or want a `token_reduction`."
            )
        for name, least in (("max_samples", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}: correct it.")


def main():
    arguments, dataset_arguments = HfArgumentParser(
        (ThresholdArguments, DatasetArguments)
    ).parse_args_into_dataclasses()
    if arguments.images is not None and dataset_arguments != DatasetArguments():
        raise SystemExit("`images` must be given without options of a data set: leave out the ones or the other.")
    options = InferenceOptions(shortest_edge=arguments.shortest_edge, batch_size=arguments.batch_size)
    accelerator = new_accelerator()
    config, policy, processor = load_policy_of(arguments.model, arguments.with_policy, arguments.superpatch_levels)
    check_wanted(arguments.token_reduction, arguments.precision, config.superpatch_levels)
    if arguments.json is not None and accelerator.is_main_process:
        prepare_file("json", Path(arguments.json), arguments.overwrite)
    images = score_images(
        config,
        policy.to(accelerator.device),
        rows(arguments, dataset_arguments, accelerator),
        processor,
        options=options,
        num_workers=arguments.num_workers,
        accelerator=accelerator,
        show_progress=True,
    )
    if accelerator.is_main_process:
        result = find_threshold(
            images,
            config.superpatch_levels,
            token_reduction=arguments.token_reduction,
            precision=arguments.precision,
        )
        print_text(format_threshold(result))
        if arguments.json is not None:
            settings = {**asdict(arguments), **asdict(dataset_arguments)}
            with written_whole(Path(arguments.json)) as unfinished:
                unfinished.write_text(to_json({"settings": settings, **result}), encoding="utf-8")
    accelerator.end_training()


def rows(arguments: ThresholdArguments, dataset_arguments: DatasetArguments, accelerator: Accelerator):
    """The images to find the threshold on, with labels if they come from a data set."""
    if arguments.images is not None:
        return ImageFiles([*find_images(arguments.images).values()][: arguments.max_samples])
    with accelerator.main_process_first():
        data = dataset_arguments.load()
    try:
        return data.evaluation_rows(arguments.split, arguments.max_samples)
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
