"""efficiency.png and parts.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amod.analysis.style import COLOURS, MARKERS, NAMES, save
from amod.analysis.throughput.figures import Record, efficiency, label, milliseconds, model_of, setting
from amod.analysis.throughput.parts import PARTS
from amod.analysis.throughput.timing import Quartiles

PART_COLOURS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#999999"), strict=True))


def draw(folder: Path, records: Sequence[Record]) -> list[str]:
    """efficiency.png and parts.png, as far as there is something to show; returns the names of the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    names = []
    for name, painter, key in (("efficiency.png", _draw_efficiency, "seconds"), ("parts.png", _draw_parts, "parts")):
        chosen = [record for record in records if key in record]
        if painter is _draw_efficiency:  # is of a capacity's variants
            chosen = [record for record in chosen if any("@" in variant for variant in record["cell"]["variants"])]
        if chosen:
            figure = painter(chosen)
            save(figure, folder / name, dpi=150, bbox_inches="tight")
            names.append(name)
    return names


def _draw_efficiency(records: Sequence[Record]) -> Any:
    """One panel per model; a line per setting, batch size and capacity that was measured of it, a dot per variant, bars
    from quartile to quartile."""
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, dict[str, Quartiles]]] = {}  # model, line, variant
    for record in records:
        cell = record["cell"]
        for variant in cell["variants"]:
            kind, _, capacity = variant.partition("@")
            if capacity:
                line = f"{setting(cell)}, batch {cell['batch']}, C = {capacity}"
                panels.setdefault(model_of(record), {}).setdefault(line, {})[kind] = efficiency(record, variant)
    heights = [len(lines) for lines in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.34 * sum(heights) + 0.9 * len(panels) + 0.4), sharex=True, squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    shown: dict[str, Any] = {}
    for axis, (model, lines) in zip(axes.flat, panels.items(), strict=True):
        for row, found in enumerate(lines.values()):
            for place, (kind, q) in enumerate(found.items()):
                shown[kind] = axis.errorbar(
                    q.median,
                    row + 0.6 * ((place + 0.5) / len(found) - 0.5),
                    xerr=[[q.median - q.low], [q.high - q.median]],
                    fmt=MARKERS[kind],
                    color=COLOURS[kind],
                    markersize=4,
                    capsize=2,
                    linewidth=1,
                )
        axis.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
        axis.set_title(model, fontsize=9)
        axis.set_yticks(range(len(lines)), lines, fontsize=7)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("efficiency (speed-up / FLOPs ratio)")
    handles = {NAMES[kind]: shown[kind] for kind in MARKERS if kind in shown}
    figure.tight_layout()
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), bbox_to_anchor=(0.5, 1.0))
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
