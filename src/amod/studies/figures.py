"""The pictures of the reports. Colours (Okabe and Ito's) and markers stay the same for a router in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from amod.analysis.style import COLOURS, LINES, MARKERS, variant
from amod.studies.report import AXES, METRICS, NAMES, Row, cells, describe, interval


def look(router: str) -> dict[str, Any]:
    """matplotlib's arguments for a router's points and lines."""
    name = variant(router)
    return {"color": COLOURS[name], "marker": MARKERS[name], "linestyle": LINES[name], "label": NAMES[router]}


def dots(rows: Sequence[Row], curves: Sequence[Row], study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Each metric's cells as a mean with its 95 % interval, the seeds as small points."""
    metrics = study.get("metrics") or [study["metric"]]
    groups = sorted({_group(row) for row in rows})
    figure, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(2.2 + 3.6 * len(metrics), 1.4 + 0.62 * len(groups)),
        layout="constrained",
        squeeze=False,
    )
    for axis, metric in zip(axes[0], metrics, strict=True):
        by_cell = cells(rows, metric)
        routers = [router for router in NAMES if any(key[AXES.index("router")] == router for key in by_cell)]
        for key, values in by_cell.items():
            labels = dict(zip(AXES, key, strict=True))
            style = look(labels["router"]) | {"linestyle": "none"}
            at = groups.index(_group(labels)) + 0.13 * (routers.index(labels["router"]) - (len(routers) - 1) / 2)
            mean, half = interval(list(values.values()))
            axis.scatter(list(values.values()), [at] * len(values), s=6, color=style["color"], alpha=0.5)
            axis.errorbar(mean, at, xerr=half, capsize=2, **style)
        axis.set_xlabel(METRICS[metric])
        axis.set_yticks(range(len(groups)), groups if axis is axes[0][0] else [""] * len(groups))
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    _finish(figure, axes[0][0], study, caption + "; bars: 95 % interval", path)


def pareto(rows: Sequence[Row], curves: Sequence[Row], study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Accuracy against compute (Fig. 1)."""
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    by_cell = cells(rows, study["metric"])
    for router in NAMES:
        points = []
        for key, values in by_cell.items():
            if key[AXES.index("router")] == router:
                row = next(row for row in rows if tuple(row[name] for name in AXES) == key and row["gflops"])
                points.append((row["gflops"], *interval(list(values.values()))))
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, yerr=error, capsize=2, **look(router))
    axis.set_xlabel("GFLOPs (multiply-accumulates, forward, one image)")
    axis.set_ylabel(METRICS[study["metric"]])
    axis.grid(alpha=0.3)
    _finish(figure, axis, study, caption + "; bars: 95 % interval", path)


def training_curves(
    rows: Sequence[Row], curves: Sequence[Row], study: Mapping[str, Any], caption: str, path: Path
) -> None:
    """Validation accuracy by epoch, the mean over seeds; the marker is where it is within 1 % of the peak."""
    groups = sorted({_group(row) for row in rows})
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 3.8), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        for router in NAMES:
            names = {row["run"] for row in rows if row["router"] == router and _group(row) == group}
            by_epoch: dict[int, list[float]] = {}
            for point in curves:
                if point["run"] in names:
                    by_epoch.setdefault(point["epoch"], []).append(point["val_top1"])
            if by_epoch:
                style = look(router)
                x = sorted(by_epoch)
                mean = [sum(by_epoch[epoch]) / len(by_epoch[epoch]) for epoch in x]
                reached = next(i for i, value in enumerate(mean) if value >= 0.99 * max(mean))
                axis.plot(x, mean, markevery=[reached], **style)
                lowest, highest = zip(*((min(by_epoch[epoch]), max(by_epoch[epoch])) for epoch in x), strict=True)
                axis.fill_between(x, lowest, highest, color=style["color"], alpha=0.12)
        axis.set_title(group)
        axis.set_xlabel("epochs of the recipe (0: untrained)")
        axis.set_ylabel(METRICS["val_top1"])
        axis.grid(alpha=0.3)
    _finish(figure, axes[0][0], study, caption + "; band: least to greatest; marker: within 1 % of the peak", path)


def stability(rows: Sequence[Row], curves: Sequence[Row], study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Accuracy against the learning rate (Fig. 23)."""
    from amod.analysis.stability import draw_stability

    points = [
        {"router": row["router"], "lr": float(row["lr"]), "seed": row["seed"], "top1": row[study["metric"]]}
        for row in rows
        if row["status"] != "not run"
    ]
    draw_stability(points, path, study["title"], caption)


def _group(row: Mapping[str, Any]) -> str:
    """What the cells of all routers that stand side by side have in common."""
    capacity = {} if row["router"] == "none" else {"capacity": row["capacity"]}
    kept = {key: row[key] for key in ("placement", "variant", "keep_prefix")}
    return describe({"data": row["data"], **kept, **capacity})


def _finish(figure: Any, axis: Any, study: Mapping[str, Any], caption: str, path: Path) -> None:
    handles, labels = axis.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(study["title"], fontsize=11)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


Draw = Callable[[Sequence[Row], Sequence[Row], Mapping[str, Any], str, Path], None]
FIGURES: dict[str, Draw] = {"dots": dots, "pareto": pareto, "curves": training_curves, "stability": stability}
