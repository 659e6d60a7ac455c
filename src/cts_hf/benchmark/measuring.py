# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How much faster is token sharing, in fact? Measures a model that shares tokens, an own one or one of transformers,
against itself with `token_reduction=0`, everything else being equal: weights, attention implementation, dtype,
compilation and images. The runs of the two alternate in one process, so that a slow moment of the machine hits both,
and the ratio is the median over these pairs.
"""

import json
import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from transformers import HfArgumentParser, PreTrainedModel

from ..evaluation.command_line import print_text
from ..evaluation.cost import multiply_adds
from ..evaluation.existing_models import image_size_of
from ..hub.loading import is_own_model, load_config, load_segmenter
from ..hub.output_file import prepare_file, written_whole
from ..model.configuration_cts import CtsConfig
from ..model.image_processing_label_maps_cts import upsampled_argmax
from ..model.modeling_cts import CtsForSemanticSegmentation
from ..model.modeling_cts_grid import PatchGrid
from ..model.modeling_cts_policy import CtsPolicyModel
from ..model.token_sharing import check_token_reduction
from .existing import (
    EXISTING_PRESETS,
    build_existing,
    call_options,
    count_multiply_adds,
    scores_shape,
)
from .report import format_report, plot_report
from .timing import Stopwatch, marked_parts, peak_memory


# The splits of the paper, as fractions of the tokens: 103 of 256 superpatches share at 512 pixels, 160 of 400 at 640,
# 336 of 576 at 768.
_REDUCTION_512, _REDUCTION_640, _REDUCTION_768 = 309 / 1024, 0.3, 0.4375
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}


@dataclass(frozen=True)
class Preset:
    """A Segmenter of the paper with patches of 16 pixels, 150 classes, random weights and a half-resolution policy."""

    size: dict[str, int]
    image_size: int
    token_reduction: float
    batch_size: int

    def config(self) -> CtsConfig:
        """The configuration of this Segmenter."""
        return CtsConfig(
            image_size=self.image_size,
            token_reduction=self.token_reduction,
            num_labels=150,
            policy_config={"output_stride": 16},
            **self.size,
        )


PRESETS = {
    "tiny-512": Preset(_TINY, 512, _REDUCTION_512, batch_size=4),
    "small-512": Preset(_SMALL, 512, _REDUCTION_512, batch_size=4),
    "small-768": Preset(_SMALL, 768, _REDUCTION_768, batch_size=2),
    "base-512": Preset(_BASE, 512, _REDUCTION_512, batch_size=4),
    "large-640": Preset(_LARGE, 640, _REDUCTION_640, batch_size=1),
}


_PRESET_NAMES = (*PRESETS, *EXISTING_PRESETS)
Model = CtsForSemanticSegmentation | PreTrainedModel


@dataclass
class BenchmarkArguments:
    """What to measure. Several sizes, reductions or batch sizes are measured in every combination."""

    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join([*PRESETS, *EXISTING_PRESETS])}."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a preset: a checkpoint, or a folder with a config.json only, of this package or of a "
            "model that `apply_cts` takes."
        },
    )
    given_scores: bool = field(
        default=False,
        metadata={"help": "Share by random scores instead of a policy: what the encoder alone could gain."},
    )
    token_reduction: list[float] = field(
        default_factory=list, metadata={"help": "Fractions of the tokens to remove, instead of the model's own."}
    )
    image_size: list[int] = field(
        default_factory=list, metadata={"help": "Sides of square images in pixels, instead of the model's own."}
    )
    batch_size: list[int] = field(
        default_factory=list, metadata={"help": "Images per forward, instead of the preset's (a model's is 1)."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda or cuda:1."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the model."})
    compile: bool = field(default=False, metadata={"help": "Compile the model, plain and sharing, as a whole."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Any that transformers has."})
    rounds: int | None = field(
        default=None, metadata={"help": "Pairs of runs; by default what fits in half a minute, 3 to 20."}
    )
    json: str | None = field(default=None, metadata={"help": "File for the results."})
    plot: str | None = field(default=None, metadata={"help": "Picture of the results, .png or .svg."})
    overwrite: bool = field(default=False, metadata={"help": "Replace these two files if they exist."})

    def __post_init__(self):
        if (self.preset is None) == (self.model is None):
            raise ValueError(
                f"Either `preset`, one of {', '.join(_PRESET_NAMES)}, or `model` must be given, got {self.preset!r} "
                f"and {self.model!r}: give one of them."
            )
        if self.preset is not None and self.preset not in _PRESET_NAMES:
            raise ValueError(f"`preset` must be one of {', '.join(_PRESET_NAMES)}, got {self.preset!r}: choose one.")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {self.rounds}: choose more.")
        for name in ("image_size", "batch_size"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(
                    f"`{name}` must be whole numbers of 1 or more, got {getattr(self, name)}: correct it."
                )
        for token_reduction in self.token_reduction:
            check_token_reduction(token_reduction)
        if self.plot is not None and Path(self.plot).suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"`plot` must be the path of a .png or .svg file, got {self.plot}: rename it.")
        if self.plot is not None and self.json is not None and _same_file(self.plot, self.json):
            raise ValueError(f"`plot` must be another file than `json`, got {self.plot} for both: rename one.")


@torch.inference_mode()
def measure(
    model: Model,
    token_reduction: float,
    image_size: tuple[int, int],
    batch_size: int,
    rounds: int | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """
    Measures a model against itself with `token_reduction=0`.

    Args:
        model ([`CtsForSemanticSegmentation`], or one that [`apply_cts`] has changed): In evaluation mode, on the
            device and in the dtype to measure. One without policy gets random scores.
        token_reduction (`float`): Fraction of the tokens to remove.
        image_size (pair of `int`): Height and width in pixels.
        batch_size (`int`): Images per forward.
        rounds (`int`, *optional*): Pairs of runs; by default as many as fit in half a minute, from 3 to 20.
        compile (`bool`): Whether to compile the model. The times of the parts are those of the uncompiled one.

    Returns:
        `dict`: `ratio` of the times of the forward, plain / sharing: the median over the rounds, with
        `ratio_quartiles`; `bound`, the ratio of the multiply-adds, and `reached`, the share of it that `ratio` is;
        `parts` and `plain_parts`, median milliseconds by part, where `upsampling` to the size of the image, the same
        for both, follows the forward; `ratio_with_upsampling` (models of transformers have neither, and are a single
        part); and for `plain` and `cts` latency (milliseconds per
        batch), images per second, peak memory (MiB) beyond the weights and multiply-adds per batch.
    """
    is_own = isinstance(model, CtsForSemanticSegmentation)
    shape = (batch_size, 3 if not is_own else model.config.num_channels, *image_size)
    reductions = {"plain": 0.0, "cts": token_reduction}
    generator = torch.Generator(model.device).manual_seed(0)
    stopwatch = Stopwatch(model.device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False) if compile else model

    def run(forward: Callable, kind: str, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        stopwatch.start()
        forward(**inputs, token_reduction=reductions[kind])
        stopwatch.mark("unsharing" if is_own else "forward")
        return stopwatch.parts()

    def run_pairs(forward: Callable, rounds: int) -> dict[str, list[dict[str, float]]]:
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "cts": []}
        for index in range(rounds):
            inputs = _inputs(model, shape, generator)
            for kind in ("plain", "cts") if index % 2 == 0 else ("cts", "plain"):
                runs[kind].append(run(forward, kind, inputs))
        return runs

    with nullcontext() if compile or not is_own else marked_parts(model, stopwatch):
        memory, milliseconds = {}, 0.0
        for kind in reductions:
            inputs = _inputs(model, shape, generator)
            if compile:
                run(compiled, kind, inputs)
            stopwatch.start()
            memory[kind] = peak_memory(partial(compiled, **inputs, token_reduction=reductions[kind]), model.device)
            stopwatch.mark("after the last part")
            milliseconds += sum(stopwatch.parts().values())
        if rounds is None:
            rounds = int(np.clip(30_000 / milliseconds, 3, 20))
        runs = run_pairs(compiled, rounds)
    part_runs = runs
    if compile and is_own:
        with marked_parts(model, stopwatch):
            part_runs = run_pairs(model, 3)

    runs_policy = _policy(model) is not None
    count = multiply_adds if is_own else count_multiply_adds
    costs = {kind: batch_size * count(model, image_size, value, runs_policy) for kind, value in reductions.items()}
    upsampling = 0.0
    if is_own:
        logits = model(**_inputs(model, shape, generator), token_reduction=token_reduction).logits
        upsampling = float(np.median([_upsampling_time(logits, image_size, stopwatch) for _ in range(3)]))
    result = _summary(runs, part_runs, upsampling, costs["plain"] / costs["cts"])
    for kind in reductions:
        result[kind] |= {
            "images_per_second": 1000 * batch_size / result[kind]["latency_ms_p50"],
            "peak_memory_mib": memory[kind],
            "multiply_adds": costs[kind],
        }
    case = {"image_size": list(image_size), "batch_size": batch_size, "token_reduction": token_reduction}
    return {**case, "rounds": rounds, **result}


def _upsampling_time(logits: torch.Tensor, image_size: tuple[int, int], stopwatch: Stopwatch) -> float:
    stopwatch.start()
    for image_logits in logits:
        upsampled_argmax(image_logits, image_size)
    stopwatch.mark("upsampling")
    return stopwatch.parts()["upsampling"]


def _summary(
    runs: dict[str, list[dict[str, float]]],
    part_runs: dict[str, list[dict[str, float]]],
    upsampling: float,
    bound: float,
) -> dict[str, Any]:
    forwards = {kind: np.array([sum(parts.values()) for parts in runs[kind]]) for kind in runs}
    ratios = forwards["plain"] / forwards["cts"]
    ratio = float(np.median(ratios))
    medians = {
        kind: {part: float(np.median([parts[part] for parts in part_runs[kind]])) for part in part_runs[kind][0]}
        for kind in part_runs
    }
    latencies = {
        kind: {f"latency_ms_p{level}": float(np.percentile(forwards[kind], level)) for level in (50, 95)}
        for kind in runs
    }
    return {
        "ratio": ratio,
        "ratio_quartiles": [float(np.percentile(ratios, level)) for level in (25, 75)],
        "ratio_with_upsampling": float(np.median((forwards["plain"] + upsampling) / (forwards["cts"] + upsampling))),
        "bound": bound,
        "reached": ratio / bound,
        "parts": {**medians["cts"], "upsampling": upsampling},
        "plain_parts": {**medians["plain"], "upsampling": upsampling},
        **latencies,
    }


def _policy(model: Model) -> CtsPolicyModel | None:
    return model.cts.policy if isinstance(model, CtsForSemanticSegmentation) else model.token_sharing.policy


def _inputs(model: Model, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    options = {"device": model.device, "generator": generator}
    inputs = {"pixel_values": torch.randn(shape, dtype=model.dtype, **options)}
    if not isinstance(model, CtsForSemanticSegmentation):
        if _policy(model) is None:
            inputs["superpatch_scores"] = torch.rand(shape[0], *scores_shape(model, shape[2:]), **options)
        return {**inputs, **call_options(model)}
    if _policy(model) is None:
        grid = PatchGrid.of_config(model.config, shape[2:])
        scores = (torch.rand(shape[0], *grid.shape(level), **options) for level in grid.levels)
        inputs["superpatch_scores"] = tuple(scores)
    return inputs


def build_model(arguments: BenchmarkArguments) -> Model:
    """The model to measure: a checkpoint, or random weights; ready for inference, batch normalizations folded."""
    torch.manual_seed(0)
    if arguments.preset in EXISTING_PRESETS or (arguments.model is not None and not is_own_model(arguments.model)):
        reduction = (arguments.token_reduction or [0.3])[0]
        model = build_existing(arguments.preset, arguments.model, reduction, not arguments.given_scores)
    elif arguments.preset is not None:
        model = CtsForSemanticSegmentation(PRESETS[arguments.preset].config())
    elif Path(arguments.model).is_dir() and not _has_weights(Path(arguments.model)):
        model = CtsForSemanticSegmentation(load_config(arguments.model))
    else:
        model = load_segmenter(arguments.model)
    if arguments.attn_implementation != "sdpa" or type(model)._supports_sdpa:  # some wrappers name none themselves
        model.set_attn_implementation(arguments.attn_implementation)
    model = model.to(arguments.device, getattr(torch, arguments.dtype)).eval()
    if arguments.given_scores and isinstance(model, CtsForSemanticSegmentation):
        model.cts.policy = None
    elif arguments.given_scores:
        model.token_sharing.policy = None
    if (policy := _policy(model)) is not None:
        policy.fuse_batch_norm()
    return model


def _has_weights(folder: Path) -> bool:
    # Of any kind: those that cannot be read must be refused, and not be replaced by random ones.
    return any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def describe_setup(arguments: BenchmarkArguments) -> dict[str, Any]:
    """The device, the options and the versions of libraries that results depend on."""
    if torch.device(arguments.device).type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    else:
        device = _processor_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "attention": arguments.attn_implementation,
        "compiled": arguments.compile,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    """
    Measures every combination of sizes, reductions and batch sizes.

    Returns:
        `dict`: The `setup`, all `rows` as [`measure`] gives them, and the first row's results once more.
    """
    model = build_model(arguments)
    own_batch_size = PRESETS[arguments.preset].batch_size if arguments.preset in PRESETS else 1
    if isinstance(model, CtsForSemanticSegmentation):
        own_size, own_reduction = model.config.image_height_and_width, model.config.token_reduction
    else:
        own_size, own_reduction = image_size_of(model.config), model.token_sharing.token_reduction
    rows = [
        measure(model, token_reduction, size, batch_size, arguments.rounds, arguments.compile)
        for size in [(side, side) for side in arguments.image_size] or [own_size]
        for token_reduction in arguments.token_reduction or [own_reduction]
        for batch_size in arguments.batch_size or [own_batch_size]
    ]
    name = arguments.preset or arguments.model
    return {"name": name, "arguments": asdict(arguments), "setup": describe_setup(arguments), **rows[0], "rows": rows}


def main(command_line: list[str] | None = None) -> None:
    """The command: measures, prints the tables, and writes the files that were asked for."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(command_line)
    for name in ("json", "plot"):
        if getattr(arguments, name) is not None:
            prepare_file(name, Path(getattr(arguments, name)), arguments.overwrite)
    report = run_benchmark(arguments)
    # A full disk does not keep results from being printed, nor a closed pipe from being saved.
    try:
        if arguments.json is not None:
            with written_whole(Path(arguments.json)) as unfinished:
                unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if arguments.plot is not None:
            with written_whole(Path(arguments.plot)) as unfinished:
                plot_report(report, unfinished)
    finally:
        print_text(format_report(report))


def _same_file(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


__all__ = ["PRESETS", "BenchmarkArguments", "build_model", "main", "measure", "run_benchmark"]
