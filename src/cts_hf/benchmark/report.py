# Copyright 2026 The cts_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of a benchmark as tables and as a picture."""

from typing import Any

from ..evaluation.tables import format_table


PARTS = ("policy", "embedding_and_sharing", "encoder", "decoder", "unsharing", "upsampling")


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
            format_table(("size", "reduction", "batch", *PARTS), [_part_cells(row) for row in report["rows"]]),
        ]
    for row in report["rows"]:
        lines += [
            "",
            f"{_case_name(row)}: ratio {row['ratio']:.2f} (quartiles {row['ratio_quartiles'][0]:.2f} to "
            f"{row['ratio_quartiles'][1]:.2f}, {row['rounds']} rounds), bound by multiply-adds {row['bound']:.2f}, "
            f"{100 * row['reached']:.0f} % of it reached"
            + (f"; with upsampling {row['ratio_with_upsampling']:.2f}" if row["parts"]["upsampling"] else ""),
        ]
    return "\n".join(lines)


_CASE_TITLES = (
    "size", "reduction", "batch", "model", "ms p50", "ms p95", "images/s", "peak MiB", "G multiply-adds",
)  # fmt: skip


def _case_cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = list(_key_cells(row))
    cells.append("plain / CTS")
    for key, digits, scale in (
        ("latency_ms_p50", 0, 1), ("latency_ms_p95", 0, 1), ("images_per_second", 2, 1), ("peak_memory_mib", 0, 1),
        ("multiply_adds", 1, 1e-9),
    ):  # fmt: skip
        cells.append(" / ".join(f"{row[kind][key] * scale:.{digits}f}" for kind in ("plain", "cts")))
    return tuple(cells)


def _part_cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row['plain_parts'].get(part, 0):.1f} / {row['parts'].get(part, 0):.1f}" for part in PARTS)
    return (*_key_cells(row), *times)


def _key_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return "x".join(map(str, row["image_size"])), f"{100 * row['token_reduction']:.2f} %", str(row["batch_size"])


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
