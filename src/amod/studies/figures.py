"""The pictures of the reports. Colours (Okabe and Ito's) and markers stay the same for a router in all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("agg")
from matplotlib import pyplot as plt

from amod.analysis.style import look, name_of, save
from amod.studies.claims import interval
from amod.studies.rows import METRICS, describe, measured, placed, router_order


def dots(rows: pd.DataFrame, curves: pd.DataFrame, study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Each metric's cells as a mean with its 95 % interval, the seeds as small points; hollow: one seed."""
    asked = study.get("metrics") or [study["metric"]]
    metrics = [metric for metric in asked if len(measured(rows, metric))] or asked[-1:]  # no panel without a point
    rows = rows[rows["status"] == "finished"]
    rows = rows.assign(group=rows.apply(_group, axis=1, all_data=rows["data"].nunique() > 1))
    groups = sorted(rows["group"].unique())
    beside = {group: router_order(rows[rows["group"] == group]) for group in groups}
    margin = max(2.2, 0.085 * max(map(len, groups)))
    size = (margin + 3.6 * len(metrics), 1.4 + 0.62 * len(groups))
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    alone = ""
    for axis, metric in zip(axes[0], metrics, strict=True):
        found = measured(rows, metric)
        for router in router_order(found):
            style, mine = look(router) | {"linestyle": "none"}, found[found["router"] == router]
            axis.plot([], [], **style)  # for the legend
            style.pop("label")
            for group, cell in mine.groupby("group"):
                routers = beside[str(group)]
                at = groups.index(group) + 0.13 * (routers.index(router) - (len(routers) - 1) / 2)
                values = [float(value) for value in cell[metric]]
                mean, half = interval(values)
                filled: Any = "full" if len(values) > 1 else "none"
                if len(values) > 1:
                    axis.scatter(values, [at] * len(values), s=6, color=style["color"], alpha=0.5)
                else:
                    alone = "; hollow: one seed"
                axis.errorbar(mean, at, xerr=half, capsize=2, markersize=5, fillstyle=filled, **style)
        axis.set_xlabel(METRICS[metric])
        axis.set_yticks(range(len(groups)), [group or "dense" for group in groups] if axis is axes[0][0] else [])
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="y", length=0)
        for at in range(len(groups)):
            axis.axhline(at, color="0.9", zorder=0)
    _finish(figure, study, f"{caption}; bars: 95 % interval{alone}", path)


def pareto(rows: pd.DataFrame, curves: pd.DataFrame, study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Accuracy against compute (Fig. 1), untrained, too, where the study measures that, and where models were timed
    against images per second (Fig. 27)."""
    last = study["metric"]
    untrained = [
        name for name in study.get("metrics") or () if name.endswith("_untrained") and len(measured(rows, name))
    ]
    panels = [(name, "gflops") for name in [*untrained, last]]
    panels += [(last, "speedup")] if measured(rows, last)["speedup"].notna().any() else []
    labels = {"gflops": "GFLOPs (multiply-accumulates, forward, one image)", "speedup": METRICS["speedup"]}
    size = (2 + 4.5 * len(panels), 4.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (metric, cost) in zip(axes[0], panels, strict=True):
        found = measured(rows, metric)
        if metric in untrained:  # what A-ViT cost was measured once it was trained
            found = found[found["router"] != "avit"]
        for (router, style), mine in _lines(found):
            points = [
                (float(cell[cost].mean()), *interval([float(value) for value in cell[metric]]))
                for _, cell in mine.groupby(mine.apply(_group, axis=1))
                if cell[cost].notna().any()
            ]
            if points:
                x, y, error = zip(*sorted(points), strict=True)
                axis.errorbar(x, y, yerr=error, capsize=2, **look(router) | style)
        room = 0.08 * float(found[metric].max() - found[metric].min()) or 1.0  # two seeds can have bars beyond 100 %
        axis.set_ylim(float(found[metric].min()) - room, float(found[metric].max()) + room)
        axis.set_xlabel(labels[cost])
        axis.set_ylabel(METRICS[metric])
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)
    _finish(figure, study, caption + "; bars: 95 % interval, cut off at the edge, none of one seed", path)


def _lines(rows: pd.DataFrame) -> list[tuple[tuple[str, dict[str, Any]], pd.DataFrame]]:
    """The rows of each router and, where they differ, placement (half filled) and kind of training (hollow)."""
    lines = []
    for router in router_order(rows):
        mine = rows[rows["router"] == router]
        kinds = mine["setting"].where(~mine["setting"].str.startswith("ponder"), "")
        for (placement, kind), part in mine.groupby([mine["placement"], kinds]):
            own = ", ".join(word for word in (placed(placement) if placement != "alternate" else "", kind) if word)
            filled = {"fillstyle": "none" if kind else "left", "markerfacecoloralt": "white"}
            style = {"label": f"{name_of(router)}, {own}", **filled} if own else {}
            lines.append(((router, style), part))
    return lines


def training_curves(
    rows: pd.DataFrame, curves: pd.DataFrame, study: Mapping[str, Any], caption: str, path: Path
) -> None:
    """Validation accuracy by epoch, the mean over seeds; the marker is where it is within 1 % of the peak."""
    points = curves.merge(rows.assign(group=rows.apply(_group, axis=1))[["run", "router", "group"]], on="run")
    groups = sorted(points["group"].unique())
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 3.8), layout="constrained", squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        here = points[points["group"] == group]
        for router in router_order(here):
            style = look(router)
            by_epoch = here[here["router"] == router].groupby("epoch")["val_top1"].agg(["mean", "min", "max"])
            reached = int((by_epoch["mean"] >= 0.99 * by_epoch["mean"].max()).argmax())
            axis.plot(by_epoch.index, by_epoch["mean"], markevery=[reached], **style)
            axis.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=style["color"], alpha=0.12)
        axis.set_title(group if here.groupby("router")["run"].nunique().max() > 1 else f"{group}, one seed")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epochs of the recipe (0: untrained)")
        axis.set_ylabel(METRICS["val_top1"])
        axis.grid(alpha=0.3)
    _finish(figure, study, caption + "; band: least to greatest; marker: within 1 % of the peak", path)


def stability(rows: pd.DataFrame, curves: pd.DataFrame, study: Mapping[str, Any], caption: str, path: Path) -> None:
    """Accuracy against the learning rate (Fig. 23)."""
    from amod.analysis.stability import draw_stability

    ran = rows[rows["status"] != "not run"]
    points = ran[["router", "lr", "seed"]].assign(top1=ran[study["metric"]].astype(float))
    draw_stability(points.to_dict("records"), path, study["title"], caption)  # type: ignore[arg-type]


def _group(row: Any, all_data: bool = True) -> str:
    """What the cells of all routers that stand side by side have in common."""
    capacity = {} if row["router"] == "none" else {"capacity": row["capacity"]}
    kept = {key: row[key] for key in ("placement", "variant", "keep_prefix", "budget", "setting")}
    return describe({**({"data": row["data"]} if all_data else {}), **kept, **capacity})


def _finish(figure: Any, study: Mapping[str, Any], caption: str, path: Path) -> None:
    by_label: dict[str, Any] = {}  # of all panels: dense has no untrained accuracy
    for axis in figure.axes:
        by_label |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(study["title"], fontsize=11)
    figure.supxlabel(textwrap.fill(caption, int(16 * figure.get_figwidth())), fontsize=8)
    save(figure, path, dpi=130)


Draw = Callable[[pd.DataFrame, pd.DataFrame, Mapping[str, Any], str, Path], None]
FIGURES: dict[str, Draw] = {"dots": dots, "pareto": pareto, "curves": training_curves, "stability": stability}
