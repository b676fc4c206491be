"""efficiency.png and parts.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amod.analysis.style import COLOURS, MARKERS, NAMES
from amod.analysis.throughput.figures import Record, efficiency, label, milliseconds, model_of, setting
from amod.analysis.throughput.parts import PARTS

PART_COLOURS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#999999"), strict=True))


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

    panels = list(dict.fromkeys((setting(r["cell"]), r["cell"]["batch"]) for r in records))
    lines = list(
        dict.fromkeys((model_of(r), v.partition("@")[2]) for r in records for v in r["cell"]["variants"] if "@" in v)
    )
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.2 * columns + 1.5, (0.55 * len(lines) + 1.4) * height), sharey=True, squeeze=False
    )
    shown: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for record in records:
            if (setting(record["cell"]), record["cell"]["batch"]) != panel:
                continue
            routed = [v for v in record["cell"]["variants"] if "@" in v]
            kinds = list(dict.fromkeys(v.partition("@")[0] for v in routed))
            for variant in routed:
                kind, _, capacity = variant.partition("@")
                q = efficiency(record, variant)
                offset = 0.5 * ((kinds.index(kind) + 0.5) / len(kinds) - 0.5)
                shown[kind] = axis.errorbar(
                    q.median,
                    lines.index((model_of(record), capacity)) + offset,
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
        axis.set_title(f"{model_of(record)}, batch {record['cell']['batch']}, {setting(record['cell'])}", fontsize=9)
        axis.set_xlabel("milliseconds per image")
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(PARTS), bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure
