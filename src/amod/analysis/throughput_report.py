"""What `src/benchmark.py` writes: report.md, results.json and the pictures, all from the raw seconds of the cells.

efficiency = speed-up / FLOPs ratio, both against dense timm with its fused attention in the same rounds: 1 means that
the clock sees every saved multiply-accumulate. ``median [lower, upper quartile]`` of the ratios within each round.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amod.analysis.style import COLOURS, MARKERS, NAMES
from amod.analysis.throughput import PARTS, Quartiles, paired, quartiles

Record = Mapping[str, Any]

PART_COLOURS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#999999"), strict=True))


# --- figures ------------------------------------------------------------------------------------------------------


def speed_up(record: Record, variant: str, baseline: str = "dense") -> Quartiles:
    """How many times as many images per second as ``baseline``."""
    return paired(record["seconds"][baseline], record["seconds"][variant])


def flops_ratio(record: Record, variant: str) -> float:
    return record["flops"]["dense"] / record["flops"][variant]


def efficiency(record: Record, variant: str) -> Quartiles:
    return paired(record["seconds"]["dense"], record["seconds"][variant], 1 / flops_ratio(record, variant))


def images_per_second(record: Record, variant: str) -> float:
    return record["cell"]["batch"] / statistics.median(record["seconds"][variant])


def title(cell: Mapping[str, Any]) -> str:
    size = f" at {cell['kwargs']['img_size']} pixels" if cell["kwargs"].get("img_size") else ""
    what = {"speed": "", "parts": ", where the time goes", "memory": ", peak memory"}[cell["measure"]]
    return f"{cell['model']}{size}, batch {cell['batch']}, {_setting(cell)}{what}"


def _setting(cell: Mapping[str, Any]) -> str:
    mode = "training step" if cell["mode"] == "train" else "forward"
    return f"{mode}, {'compiled' if cell['compile'] else 'eager'}, {cell['precision']}"


def label(record: Record, variant: str) -> str:
    name, _, capacity = variant.partition("@")
    name = "tome" if name.startswith("tome_r") else name
    note = record["notes"][variant]
    parts = [f"C = {float(capacity):g}" if capacity else "", note if name in ("isoflop", "tome") else ""]
    return ", ".join([NAMES[name], *filter(None, parts)])


def summary(record: Record) -> str:
    """One line on a finished cell."""
    names = [v for v in record["cell"]["variants"] if v != "dense"]
    if record["cell"]["measure"] == "speed":
        rounds = len(record["seconds"]["dense"])
        figures = (f"{v} {speed_up(record, v).median:.2f}x (eff. {efficiency(record, v).median:.3f})" for v in names)
        return f"{', '.join(figures)}; {rounds} rounds, {record['took']:.0f} s"
    if record["cell"]["measure"] == "memory":
        return ", ".join(f"{v} {memory_ratio(record, v):.3f} of dense" for v in names)
    return f"{len(record['parts']['dense']['rest'])} rounds, {record['took']:.0f} s"


def memory_ratio(record: Record, variant: str, kind: str = "tensors") -> float:
    return record["memory"][variant][kind] / record["memory"]["dense"][kind]


# --- goals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the goals table; ``reached`` is None where it was not run."""

    goal: str
    limit: str
    where: str
    measured: Quartiles | None
    reached: bool | None
    remark: str = ""


Value = Callable[[Record, str], Quartiles]


def goals(records: Sequence[Record]) -> list[Row]:
    """The goals of the project's issue 3, each with every cell of ``records`` that speaks about it."""
    batch_32 = {"measure": "speed", "batch": 32, "precision": "32-true"}
    models = ("deit_tiny", "deit_small", "vit_base")
    rows = []
    for name, least, settings in (
        ("efficiency, forward, compiled", 0.99, {"mode": "forward", "compile": True}),
        ("efficiency, forward, eager", 0.95, {"mode": "forward", "compile": False}),
        ("efficiency, training step, eager", 0.95, {"mode": "train", "compile": False}),
    ):
        rows += _rows(records, name, least, {**batch_32, **settings}, models, efficiency, ("attention@",))
    for mode, what in (("forward", "forward"), ("train", "training step")):
        settings = {**batch_32, "mode": mode, "compile": False}
        rows += _rows(
            records, f"A-MoD / MoD, {what}, eager", 1.0, settings, models, _against("linear"), ("attention@",)
        )
    eager = {**batch_32, "mode": "forward", "compile": False}
    for capacity, rival in (("0.125", "tome_r13"), ("0.125", "tome@0.125"), ("0.5", "tome@0.5")):
        rows += _rows(
            records,
            "A-MoD / ToMe at equal GFLOPs, forward, eager",
            1.1,
            eager,
            ("deit_small",),
            lambda record, variant, rival=rival: speed_up(record, variant, rival),  # type: ignore[misc]
            (f"attention@{capacity}",),
            rival,
        )
    one = {**eager, "batch": 1}
    rows += _rows(records, "speed-up, batch 1, forward, eager", 1.65, one, models[1:2], speed_up, ("attention@0.125",))
    return rows + _memory_rows(records)


def _against(router: str) -> Value:
    return lambda record, variant: speed_up(record, variant, variant.replace("attention", router))


def _rows(
    records: Sequence[Record],
    goal: str,
    least: float,
    settings: Mapping[str, Any],
    models: Sequence[str],
    value: Value,
    starts: tuple[str, ...],
    rival: str = "dense",
) -> list[Row]:
    rows = []
    for model in models:
        found = False
        wanted = {**settings, "model": model}
        for record in records:
            cell = record["cell"]
            if any(cell[key] != wanted[key] for key in wanted) or cell["kwargs"].get("img_size"):
                continue
            for variant in cell["variants"]:
                needed = rival if rival != "dense" or "MoD" not in goal else variant.replace("attention", "linear")
                if variant.startswith(starts) and needed in cell["variants"]:
                    found = True
                    measured = value(record, variant)
                    remark = "" if rival == "dense" else _gflops(record, variant, rival)
                    where = f"{model}, C = {variant.partition('@')[2]}"
                    rows.append(Row(goal, f">= {least:g}", where, measured, measured.median >= least, remark))
        if not found:
            rows.append(Row(goal, f">= {least:g}", model, None, None))
    return rows


def _gflops(record: Record, variant: str, rival: str) -> str:
    ours, theirs = (record["flops"][v] / 1e9 for v in (variant, rival))
    return f"{record['notes'][rival]}; {ours:.2f} G, ToMe {theirs:.2f} G"


def _memory_rows(records: Sequence[Record]) -> list[Row]:
    goal, limit = "peak memory at 4097 tokens, forward, / dense", "<= 1.05"
    rows = []
    for record in records:
        cell = record["cell"]
        large = cell["model"] == "deit_small" and cell["kwargs"].get("img_size") == 1024
        if cell["measure"] != "memory" or not large or cell["mode"] != "forward" or cell["precision"] != "32-true":
            continue
        for variant in cell["variants"]:
            if variant.startswith("attention@"):
                ratio = memory_ratio(record, variant)
                where = f"deit_small, C = {variant.partition('@')[2]}"
                remark = f"{activations_ratio(record, variant):.3f} without the weights"
                rows.append(Row(goal, limit, where, Quartiles(ratio, ratio, ratio), ratio <= 1.05, remark))
    return rows or [Row(goal, limit, "deit_small", None, None)]


def activations_ratio(record: Record, variant: str) -> float:
    ours, dense = (record["memory"][v]["tensors"] - record["memory"][v]["weights"] for v in (variant, "dense"))
    return ours / dense


# --- text ---------------------------------------------------------------------------------------------------------


def write(folder: Path, head: Mapping[str, Any], records: Sequence[Record], failed: Sequence[Record]) -> str:
    """Write everything into ``folder``; returns what the command prints."""
    rows = goals(records)
    everything = {**head, "goals": [asdict(row) for row in rows], "cells": list(records), "not_run": list(failed)}
    (folder / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    pictures = draw(folder, records)
    (folder / "report.md").write_text("\n".join(report(head, records, failed, rows, pictures)) + "\n")
    goal_lines = "\n".join(_goal_table(rows)) if any(row.reached is not None for row in rows) else ""
    return f"{goal_lines}\n\n{folder / 'report.md'}"


def report(
    head: Mapping[str, Any],
    records: Sequence[Record],
    failed: Sequence[Record],
    rows: Sequence[Row],
    pictures: Sequence[str],
) -> Iterator[str]:
    commits = sorted({str(record["commit"]) for record in records})
    yield "# Benchmark"
    yield ""
    yield f"`{head['command']}`"
    yield ""
    yield (
        f"{head['kind']}; threads: {head['threads']}; {head['system']}; Python {head['python']}, "
        f"torch {head['torch']}, timm {head['timm']}; commit {', '.join(commits)} (+: with uncommitted changes)."
    )
    yield ""
    yield "Figures are medians over rounds that time every variant once, in turns; in brackets the quartiles of the"
    yield "ratios within a round. Speed-up is against dense timm with its fused attention; FLOPs ratio is dense /"
    yield "variant; **efficiency = speed-up / FLOPs ratio**. Weights are random, which does not change the time."
    yield ""
    yield "## Goals"
    yield ""
    yield from _goal_table(rows)
    for name in pictures:
        yield ""
        yield f"![{name}]({name})"
    yield ""
    yield "## Speed"
    settings = list(dict.fromkeys((_setting(r["cell"]), r["cell"]["batch"]) for r in records if "seconds" in r))
    for setting, batch in settings:
        yield ""
        yield f"### {setting}, batch {batch}"
        yield ""
        yield "| model | variant | GFLOPs | images/s | speed-up | FLOPs ratio | efficiency | rounds |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|"
        for record in records:
            if "seconds" in record and (_setting(record["cell"]), record["cell"]["batch"]) == (setting, batch):
                yield from _speed_lines(record)
    yield from _parts_section([record for record in records if "parts" in record])
    yield from _memory_section([record for record in records if "memory" in record])
    if failed:
        yield ""
        yield "## Not run"
        yield ""
        for failure in failed:
            yield f"- {title(failure['cell'])}: {failure['not_run']}"


def _goal_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| goal | | where | measured | reached |"
    yield "|---|---|---|---:|---|"
    for row in rows:
        if row.measured is None:
            measured = "not run"
        elif row.measured.low == row.measured.high:
            measured = f"{row.measured.median:.3f}"
        else:
            measured = _spread(row.measured)
        reached = {True: "yes", False: "no", None: ""}[row.reached]
        remark = f" ({row.remark})" if row.remark else ""
        yield f"| {row.goal} | {row.limit} | {row.where}{remark} | {measured} | {reached} |"


def _spread(q: Quartiles) -> str:
    return f"{q.median:.3f} [{q.low:.3f}, {q.high:.3f}]"


def _speed_lines(record: Record) -> Iterator[str]:
    for variant in record["cell"]["variants"]:
        dense = variant == "dense"
        up = "1" if dense else _spread(speed_up(record, variant))
        efficient = "1" if dense else _spread(efficiency(record, variant))
        yield (
            f"| {_model(record)} | {label(record, variant)} | {record['flops'][variant] / 1e9:.4g} "
            f"| {images_per_second(record, variant):.1f} | {up} | {flops_ratio(record, variant):.3f} | {efficient} "
            f"| {len(record['seconds'][variant])} |"
        )


def _model(record: Record) -> str:
    size = record["cell"]["kwargs"].get("img_size")
    return f"{record['cell']['model']} ({size} px)" if size else record["cell"]["model"]


def _parts_section(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield ""
    yield "## Where the time of a forward pass goes"
    yield ""
    yield "Milliseconds per image, eager, medians. Attention holds its projections and, for A-MoD, the scores; routing"
    yield "is router, top-k and weighting, or ToMe's matching; movement is take and put, or ToMe's merging; the rest is"
    yield "patch embedding, norms, residual additions and head."
    yield ""
    yield f"| model | batch | variant | {' | '.join(PARTS)} | total |"
    yield f"|---|---:|---|{'---:|' * (len(PARTS) + 1)}"
    for record in records:
        for variant in record["cell"]["variants"]:
            spent = milliseconds(record, variant)
            figures = " | ".join(f"{ms:.3f}" for ms in (*spent, sum(spent)))
            yield f"| {_model(record)} | {record['cell']['batch']} | {label(record, variant)} | {figures} |"


def milliseconds(record: Record, variant: str) -> list[float]:
    """Per image and part."""
    return [1000 * quartiles(record["parts"][variant][part]).median / record["cell"]["batch"] for part in PARTS]


def _memory_section(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield ""
    yield "## Peak memory"
    yield ""
    yield "Of one eager step, each variant in a fresh process. Tensors: the most bytes of tensors alive at once,"
    yield "weights included (on CUDA `max_memory_allocated`, on a CPU the same sum from the allocator's events)."
    yield "Process: the largest resident size, libraries included. In brackets the ratio to dense."
    yield ""
    yield "| model | batch | step | variant | tensors, MB | without weights, MB | process, MB |"
    yield "|---|---:|---|---|---:|---:|---:|"
    for record in records:
        for variant in record["cell"]["variants"]:
            used = record["memory"][variant]
            alone = (used["tensors"] - used["weights"]) / 1e6
            process = "-"
            if used["process"]:
                process = f"{used['process'] / 1e6:.1f} ({memory_ratio(record, variant, 'process'):.3f})"
            yield (
                f"| {_model(record)} | {record['cell']['batch']} | {_setting(record['cell'])} "
                f"| {label(record, variant)} | {used['tensors'] / 1e6:.1f} ({memory_ratio(record, variant):.3f}) "
                f"| {alone:.1f} ({activations_ratio(record, variant):.3f}) | {process} |"
            )


# --- pictures -----------------------------------------------------------------------------------------------------


def draw(folder: Path, records: Sequence[Record]) -> list[str]:
    """efficiency.png and parts.png, as far as there is something to show; returns the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    names = []
    for name, painter, key in (("efficiency.png", _draw_efficiency, "seconds"), ("parts.png", _draw_parts, "parts")):
        chosen = [record for record in records if key in record]
        if chosen:
            figure = painter(chosen)
            figure.savefig(folder / name, dpi=150, bbox_inches="tight")
            names.append(name)
    return names


def _draw_efficiency(records: Sequence[Record]) -> Any:
    """One panel per setting; a line per model and capacity, a dot per variant, bars from quartile to quartile."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((_setting(r["cell"]), r["cell"]["batch"]) for r in records))
    lines = list(
        dict.fromkeys((_model(r), v.partition("@")[2]) for r in records for v in r["cell"]["variants"] if "@" in v)
    )
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.2 * columns + 1.5, (0.55 * len(lines) + 1.4) * height), sharey=True, squeeze=False
    )
    shown: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for record in records:
            if (_setting(record["cell"]), record["cell"]["batch"]) != panel:
                continue
            routed = [v for v in record["cell"]["variants"] if "@" in v]
            kinds = list(dict.fromkeys(v.partition("@")[0] for v in routed))
            for variant in routed:
                kind, _, capacity = variant.partition("@")
                q = efficiency(record, variant)
                offset = 0.5 * ((kinds.index(kind) + 0.5) / len(kinds) - 0.5)
                shown[kind] = axis.errorbar(
                    q.median,
                    lines.index((_model(record), capacity)) + offset,
                    xerr=[[q.median - q.low], [q.high - q.median]],
                    fmt=MARKERS[kind],
                    color=COLOURS[kind],
                    markersize=5,
                    capsize=2,
                    linewidth=1.2,
                )
        axis.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
        axis.set_title(f"{panel[0]}, batch {panel[1]}", fontsize=9)
        axis.set_xlabel("efficiency (speed-up / FLOPs ratio)")
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_yticks(range(len(lines)), [f"{model}\nC = {c}" for model, c in lines], fontsize=8)
    axes[0, 0].set_ylim(len(lines) - 0.5, -0.5)
    handles = {NAMES[kind]: shown[kind] for kind in MARKERS if kind in shown}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def _draw_parts(records: Sequence[Record]) -> Any:
    """One panel per cell; a bar per variant, its segments the parts."""
    import matplotlib.pyplot as plt

    bars = max(len(record["cell"]["variants"]) for record in records)
    columns = min(2, len(records))
    height = -(-len(records) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(6.2 * columns, (0.34 * bars + 1.2) * height), squeeze=False)
    for axis, record in zip(axes.flat, records, strict=False):
        variants = record["cell"]["variants"]
        left = [0.0] * len(variants)
        for part, values in zip(PARTS, zip(*(milliseconds(record, v) for v in variants), strict=True), strict=True):
            axis.barh(range(len(variants)), values, left=left, color=PART_COLOURS[part], label=part, height=0.75)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set_yticks(range(len(variants)), [label(record, v) for v in variants], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{_model(record)}, batch {record['cell']['batch']}, {_setting(record['cell'])}", fontsize=9)
        axis.set_xlabel("milliseconds per image")
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(PARTS), bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure
