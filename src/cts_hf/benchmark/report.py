# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of a benchmark as tables and as a picture."""

from typing import Any

from ..evaluation.tables import format_table
from ..model.modeling_cts_outputs import per_level
from .running import KINDS


PARTS = ("policy", "embedding_and_sharing", "encoder", "decoder", "unsharing", "upsampling")
_KEY_TITLES = ("size", "reduction", "batch")
_STAGES = ("preprocessing", "forward", "postprocessing")


def format_report(report: dict[str, Any]) -> str:
    """The setup in a line, a row per case, and the time of each part."""
    setup = report["setup"]
    lines = [
        f"{report['name']}: {setup['device']}, {setup['threads']} threads, {setup['dtype']}, {setup['attention']} "
        f"attention, {'compiled' if setup['compiled'] else 'eager'}; torch {setup['torch']}, transformers "
        f"{setup['transformers']}, Python {setup['python']}",
        "",
        format_table(_CASE_TITLES, [_case_cells(row) for row in report["rows"]]),
    ]
    if "encoder" in report["rows"][0]["parts"]:
        lines += [
            "",
            "Milliseconds by part, plain / CTS (upsampling to the size of the image follows the forward)",
            "",
            format_table((*_KEY_TITLES, *PARTS), [_part_cells(row) for row in report["rows"]]),
        ]
    if (whole := report["rows"][0]["end_to_end"]) is not None:
        whose = "smooth random logits, as weights are random" if whole["draws_logits"] else "the model's own logits"
        lines += [
            "",
            f"From picture to label map, plain / CTS (label maps of {whose})",
            "",
            format_table(_WHOLE_TITLES, [_whole_cells(row) for row in report["rows"]]),
        ]
    for row in report["rows"]:
        lines += [
            "",
            f"{_case_name(row)}: ratio {_ratio(row)}, {row['rounds']} rounds, bound by multiply-adds "
            f"{row['bound']:.2f}, {100 * row['reached']:.0f} % of it reached"
            + (f"; with upsampling {row['ratio_with_upsampling']:.2f}" if row["parts"]["upsampling"] else "")
            + (f"; from picture to label map {_ratio(row['end_to_end'])}" if row["end_to_end"] else "")
            + f"; peak memory with {row['weights_mib']:.0f} MiB of weights, plain / CTS {row['memory_ratio']:.2f}",
        ]
    return "\n".join(lines)


# The title of each column, the key of its value in what is known of a kind of runs, digits and scale.
_CASE_COLUMNS = (
    ("tokens", "num_tokens", 0, 1), ("ms p50", "latency_ms_p50", 0, 1), ("ms p95", "latency_ms_p95", 0, 1),
    ("images/s", "images_per_second", 2, 1), ("peak MiB", "peak_memory_mib", 0, 1),
    ("G multiply-adds", "multiply_adds", 1, 1e-9),
)  # fmt: skip
_WHOLE_COLUMNS = tuple(column for column in _CASE_COLUMNS if column[0] not in ("tokens", "G multiply-adds"))
_CASE_TITLES = (*_KEY_TITLES, "model", *(title for title, *_ in _CASE_COLUMNS))
_WHOLE_TITLES = (*_KEY_TITLES, *(title for title, *_ in _WHOLE_COLUMNS), *(f"{stage} %" for stage in _STAGES))


def _case_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (*_key_cells(row), "plain / CTS", *(_both(row, *column) for _, *column in _CASE_COLUMNS))


def _whole_cells(row: dict[str, Any]) -> tuple[str, ...]:
    whole = row["end_to_end"]
    shares = {kind: whole[kind]["shares"] for kind in KINDS}
    values = (_both(whole, *column) for _, *column in _WHOLE_COLUMNS)
    return (*_key_cells(row), *values, *(_both(shares, stage, 1, 100) for stage in _STAGES))


def _both(of_kinds: dict[str, Any], key: str, digits: int, scale: float) -> str:
    return " / ".join(f"{of_kinds[kind][key] * scale:.{digits}f}" for kind in KINDS)


def _ratio(result: dict[str, Any]) -> str:
    low, high = result["ratio_quartiles"]
    return f"{result['ratio']:.2f} (quartiles {low:.2f} to {high:.2f})"


def _part_cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row['plain_parts'].get(part, 0):.1f} / {row['parts'].get(part, 0):.1f}" for part in PARTS)
    return (*_key_cells(row), *times)


def _key_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    if row["sharing_threshold"] is not None:
        on_average = 1 - row["cts"]["num_tokens"] / row["plain"]["num_tokens"]
        reduction = f"at {row['sharing_threshold']:g}, {100 * on_average:.2f} %"
    else:
        reduction = " + ".join(f"{100 * of_level:.2f} %" for of_level in per_level(row["token_reduction"]))
    return "x".join(map(str, row["image_size"])), reduction, str(row["batch_size"])


def _case_name(row: dict[str, Any]) -> str:
    size, reduction, batch_size = _key_cells(row)
    return f"{size}, {reduction} fewer tokens, batch {batch_size}"


def plot_report(report: dict[str, Any], path: str) -> None:
    """Draws, for each case, the ratio below its bound and the time of each part, into a picture file."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    names = [_case_name(row) for row in rows]
    figure = Figure(figsize=(12, 2 + 0.7 * len(rows)), layout="constrained")
    ratio_axes, part_axes = figure.subplots(1, 2)
    for index, row in enumerate(rows):
        low, high = row["ratio_quartiles"]
        ratio_axes.barh(index, row["ratio"], color="tab:blue", height=0.6)
        ratio_axes.plot([low, high], [index, index], color="black")
        ratio_axes.plot([row["bound"]] * 2, [index - 0.3, index + 0.3], color="tab:red")
    ratio_axes.axvline(1, color="gray", linestyle=":")
    ratio_axes.set_yticks(range(len(rows)), names)
    ratio_axes.set_xlabel("plain / CTS time (black: quartiles, red: bound by multiply-adds)")

    drawn = PARTS if "encoder" in rows[0]["parts"] else ("forward",)  # models of transformers are a single part
    colors = [f"C{index}" for index in range(len(drawn))]
    for index, row in enumerate(rows):
        for offset, key in ((-0.2, "plain_parts"), (0.2, "parts")):
            left = 0.0
            for part, color in zip(drawn, colors, strict=True):
                time = row[key].get(part, 0.0)
                label = part.replace("_", " ") if (index, key) == (0, "parts") else None
                part_axes.barh(index + offset, time, left=left, height=0.35, color=color, label=label)
                left += time
    part_axes.set_yticks([])
    part_axes.set_xlabel("milliseconds per batch (above: plain, below: CTS)")
    figure.legend(loc="outside lower center", ncols=len(drawn), fontsize="small")
    for axes in (ratio_axes, part_axes):
        axes.invert_yaxis()
    figure.suptitle(f"{report['name']} on {report['setup']['device']}", parse_math=False)  # a name may hold dollars
    figure.savefig(path)


__all__ = ["format_report", "plot_report"]
