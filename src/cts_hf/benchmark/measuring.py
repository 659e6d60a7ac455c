# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How much faster is token sharing, in fact? Measures a model that shares tokens, an own one or one of transformers,
against itself with `token_reduction=0`, everything else being equal: weights, attention implementation, dtype,
compilation and images. The runs of the two alternate in one process, so that a slow moment of the machine hits both,
and the ratio is the median over these pairs.
"""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import HfArgumentParser

from ..evaluation.command_line import print_text
from ..evaluation.cost import multiply_adds
from ..evaluation.prediction import find_images
from ..hub.loading import image_size_of
from ..hub.output_file import prepare_file, written_whole
from ..model.image_processing_label_maps_cts import upsampled_argmax
from ..model.modeling_cts import CtsForSemanticSegmentation
from .arguments import BenchmarkArguments
from .building import build_end_to_end, build_model, has_random_weights
from .end_to_end import EndToEnd
from .existing import count_multiply_adds
from .inputs import Batch, Model, Reduction, draw_batches, policy_of
from .presets import PRESETS
from .report import format_report, plot_report
from .running import KINDS, Runner
from .summary import memory_ratio, summarize_end_to_end, summarize_forward
from .timing import peak_memory


@torch.inference_mode()
def measure(
    model: Model,
    token_reduction: Reduction | None,
    image_size: tuple[int, int],
    batch_size: int,
    rounds: int | None = None,
    compile: bool = False,
    *,
    sharing_threshold: float | None = None,
    images: Sequence[Path] | None = None,
    draws_logits: bool = False,
    end_to_end: EndToEnd | None = None,
) -> dict[str, Any]:
    """
    Measures a model against itself with `token_reduction=0`.

    Args:
        model ([`CtsForSemanticSegmentation`], or one that [`apply_cts`] has changed): In evaluation mode, on the
            device and in the dtype to measure. One without policy gets random scores.
        token_reduction (`float`, `tuple[float, ...]` or `None`): Fraction of the tokens to remove, or what each level
            removes. With `sharing_threshold`, what images lose on average, each another fraction, by scores that are
            drawn so; or `None` for what the policy says.
        image_size (pair of `int`): Height and width in pixels.
        batch_size (`int`): Images per forward.
        rounds (`int`, *optional*): Pairs of runs; by default as many as fit in half a minute, from 3 to 20.
        compile (`bool`): Whether to compile the model. The times of the parts are those of the uncompiled one.
        sharing_threshold (`float`, *optional*): Probability to share from, instead of a budget.
        images (`Sequence[Path]`, *optional*): Files of pictures, resized to `image_size`, instead of random ones.
        draws_logits (`bool`): Whether smooth random logits take the place of a Segmenter's before label maps are made
            of them, as they should if its weights are random.
        end_to_end ([`EndToEnd`], *optional*): How pictures become label maps, to measure that around each forward.

    Returns:
        `dict`: `ratio` of the times of the forward, plain / sharing: the median over the rounds, with
        `ratio_quartiles`; `bound`, the ratio of the multiply-adds, and `reached`, the share of it that `ratio` is;
        `parts` and `plain_parts`, median milliseconds by part, where `upsampling` to the size of the image, the same
        for both, follows the forward; `ratio_with_upsampling` (models of transformers have neither, and are a single
        part); `weights_mib` and `memory_ratio`, that of the peaks, weights included; and for `plain` and `cts` latency
        (milliseconds per batch), images per second, peak memory (MiB) beyond the weights, multiply-adds per batch and
        `num_tokens`, the mean of the images, with `num_tokens_range`. `end_to_end` is `None`, or has the like of the
        whole way: `ratio`, `ratio_quartiles`, `memory_ratio`, whether `draws_logits`, and for `plain` and `cts` also
        `parts`, median milliseconds, and `shares`, which fractions of the time they are.
    """
    sharing = {"token_reduction": token_reduction}
    if sharing_threshold is not None:
        sharing = {"sharing_threshold": sharing_threshold}
    batches = draw_batches(model, image_size, batch_size, token_reduction, sharing_threshold, images)
    runner = Runner(model, sharing, draws_logits, end_to_end)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False) if compile else model
    with nullcontext() if compile else runner.marked_parts():
        times = [runner.run(compiled, kind, next(batches))[0] for kind in KINDS]  # before anything is timed
        if compile:  # that was the compilation
            times = [runner.run(compiled, kind, next(batches))[0] for kind in KINDS]
        if rounds is None:
            rounds = int(np.clip(30_000 / sum(sum(parts.values()) for parts in times), 3, 20))
        runner.run_pairs(compiled, batches, rounds)
    in_parts = runner
    if compile and runner.is_own:
        in_parts = Runner(model, sharing)
        with in_parts.marked_parts():
            in_parts.run_pairs(model, batches, 3)

    memory = _peak_memories(runner, compiled, next(batches))  # last, as the first run leaves what later ones use
    costs = _costs(runner, image_size, batch_size, token_reduction if sharing_threshold is None else None)
    upsampling = _upsampling_time(runner, next(batches), image_size) if runner.is_own else 0.0
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**20
    result = summarize_forward(runner.times, in_parts.times, upsampling, costs["plain"] / costs["cts"])
    for kind in KINDS:
        tokens = runner.num_tokens[kind]
        result[kind] |= {
            "images_per_second": 1000 * batch_size / result[kind]["latency_ms_p50"],
            "peak_memory_mib": memory["forward"][kind],
            "multiply_adds": costs[kind],
            "num_tokens": float(np.mean(tokens)),
            "num_tokens_range": [min(tokens), max(tokens)],
        }
    case = {
        "image_size": list(image_size),
        "batch_size": batch_size,
        "token_reduction": token_reduction,
        "sharing_threshold": sharing_threshold,
        "superpatch_levels": list(getattr(model.config, "superpatch_levels", (2,))),
        "rounds": rounds,
    }
    result |= {"weights_mib": weights, "memory_ratio": memory_ratio(memory["forward"], weights), "end_to_end": None}
    if end_to_end is not None:
        whole = summarize_end_to_end(runner.times, batch_size)
        for kind in KINDS:
            whole[kind]["peak_memory_mib"] = memory["end_to_end"][kind]
        whole |= {"memory_ratio": memory_ratio(memory["end_to_end"], weights), "draws_logits": draws_logits}
        result["end_to_end"] = whole
    return {**case, **result}


def _peak_memories(runner: Runner, compiled: Any, batch: Batch) -> dict[str, dict[str, float]]:
    """MiB of the forward, and of the whole way if that is measured, by kind."""
    ways: dict[str, Callable[..., Any]] = {"forward": runner.forward}
    if runner.end_to_end is not None:
        ways["end_to_end"] = runner.run
    device = runner.model.device
    return {
        name: {kind: peak_memory(partial(way, compiled, kind, batch), device) for kind in KINDS}
        for name, way in ways.items()
    }


def _costs(
    runner: Runner, image_size: tuple[int, int], batch_size: int, token_reduction: Reduction | None
) -> dict[str, float]:
    """Multiply-adds of a batch of each kind; the mean over what images shared if there is no budget."""
    runs_policy = policy_of(runner.model) is not None
    count = partial(multiply_adds if runner.is_own else count_multiply_adds, runner.model, image_size)
    plain = batch_size * count(0.0, runs_policy)
    if token_reduction is not None:
        return {"plain": plain, "cts": batch_size * count(token_reduction, runs_policy)}
    num_patches, levels = runner.num_tokens["plain"][0], runner.model.config.superpatch_levels
    of_shared = {}
    for num_shared in set(runner.num_shared):
        removed = zip(num_shared, levels, strict=True)
        fractions = tuple(number * (level**2 - 1) / num_patches for number, level in removed)
        of_shared[num_shared] = count(fractions, runs_policy)
    return {"plain": plain, "cts": batch_size * float(np.mean([of_shared[each] for each in runner.num_shared]))}


def _upsampling_time(runner: Runner, batch: Batch, image_size: tuple[int, int]) -> float:
    outputs = runner.forward(runner.model, "cts", batch)
    runner.replace_logits(outputs, batch)
    times = []
    for _ in range(3):
        runner.stopwatch.start()
        for image_logits in outputs.logits:
            upsampled_argmax(image_logits, image_size)
        runner.stopwatch.mark("upsampling")
        times.append(runner.stopwatch.parts()["upsampling"])
    return float(np.median(times))


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
    Measures every combination of sizes, sharing and batch sizes.

    Returns:
        `dict`: The `setup`, all `rows` as [`measure`] gives them, and the first row's results once more.
    """
    images = None if arguments.images is None else list(find_images(arguments.images).values())
    model = build_model(arguments)
    own_batch_size = PRESETS[arguments.preset].batch_size if arguments.preset in PRESETS else 1
    is_own, is_random = isinstance(model, CtsForSemanticSegmentation), has_random_weights(arguments)
    own_size = model.config.image_height_and_width if is_own else image_size_of(model.config)
    sharing = list(_sharing(arguments, model, is_random))
    end_to_end = build_end_to_end(arguments, model) if arguments.end_to_end else None
    rows = [
        measure(
            model,
            token_reduction,
            size,
            batch_size,
            arguments.rounds,
            arguments.compile,
            sharing_threshold=sharing_threshold,
            images=images,
            draws_logits=is_own and is_random,
            end_to_end=end_to_end,
        )
        for size in [(side, side) for side in arguments.image_size] or [own_size]
        for token_reduction, sharing_threshold in sharing
        for batch_size in arguments.batch_size or [own_batch_size]
    ]
    name, given = arguments.preset or arguments.model, asdict(arguments) | {"token_reduction": arguments.reductions}
    return {"name": name, "arguments": given, "setup": describe_setup(arguments), **rows[0], "rows": rows}


def _sharing(
    arguments: BenchmarkArguments, model: Model, is_random: bool
) -> Iterator[tuple[Reduction | None, float | None]]:
    """The budgets or thresholds to measure, the model's own if none are given, as [`measure`] takes them."""
    is_own = isinstance(model, CtsForSemanticSegmentation)
    reductions, thresholds = arguments.reductions, arguments.sharing_threshold
    own = model.config if is_own else model.token_sharing
    if is_own and not reductions and not thresholds and own.sharing_threshold is not None:
        thresholds = [own.sharing_threshold]
    if not thresholds:
        yield from ((token_reduction, None) for token_reduction in reductions or [own.token_reduction])
        return
    draws_scores = is_random or policy_of(model) is None
    if draws_scores and not all(0 < threshold < 1 for threshold in thresholds):
        raise ValueError(
            f"`sharing_threshold` must be above 0 and below 1 where scores are drawn around it, got {thresholds}: "
            "give for example 0.9."
        )
    if not draws_scores and (arguments.images is None or reductions):
        raise ValueError(
            "`sharing_threshold` must be given with `images` and without `token_reduction` for a trained policy, "
            f"which decides by what it sees, got {thresholds} with images={arguments.images!r} and "
            f"token_reduction={reductions}: give a folder of pictures, or `given_scores` to draw scores by which "
            "images lose `token_reduction` on average."
        )
    for threshold in thresholds:
        yield from ((each, threshold) for each in ((reductions or [own.token_reduction]) if draws_scores else [None]))


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


__all__ = ["main", "measure", "run_benchmark"]
