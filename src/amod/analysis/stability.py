"""Accuracy against the learning rate, a line per router (the paper's Fig. 23)."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amod.analysis.style import NAMES, look, save, variant


def draw_stability(rows: Sequence[Mapping[str, Any]], path: Path, title: str, caption: str) -> None:
    """Mean accuracy over the seeds at each learning rate, with a bar from the worst seed to the best.

    Args:
        rows: one per run: ``router`` (a name of conf/router), ``lr``, ``seed``, and ``top1`` in percent, which is None
            or not finite where the run failed. Failed runs are named at the foot of the picture, with their number
            where it is not 1, and enter no mean.
        caption: model, data, capacity and seeds; which accuracy it is.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    routers = sorted(
        {row["router"] for row in rows}, key=lambda router: [*NAMES, variant(router)].index(variant(router))
    )
    rates = sorted({float(row["lr"]) for row in rows})
    gap = min([b / a for a, b in itertools.pairwise(rates)] + [10.0])
    any_failed = any_single = False
    for place, router in enumerate(routers):
        style = look(router)
        shift = gap ** (0.3 * ((place + 0.5) / len(routers) - 0.5))  # side by side, so that no bar hides another
        points, single = [], []
        for lr in rates:
            found = [row["top1"] for row in rows if row["router"] == router and float(row["lr"]) == lr]
            finished = [float(top1) for top1 in found if top1 is not None and math.isfinite(top1)]
            if finished:
                points.append((lr * shift, statistics.fmean(finished), min(finished), max(finished)))
                if len(finished) == 1:
                    single.append(points[-1])
            if failed := len(found) - len(finished):
                any_failed = True
                text = f"× {style['label']}" + (f" ({failed})" if failed > 1 else "")
                foot, height = axis.get_xaxis_transform(), 0.03 + 0.05 * place
                axis.text(
                    lr,
                    height,
                    text,
                    color=style["color"],
                    fontsize=8,
                    fontweight="bold",
                    ha="center",
                    va="center",
                    transform=foot,
                )
        axis.errorbar(
            [lr for lr, *_ in points],
            [mean for _, mean, *_ in points],
            yerr=[[mean - low for _, mean, low, _ in points], [high - mean for _, mean, _, high in points]],
            capsize=3,
            elinewidth=1,
            **style,
        )
        if single and any(low < high for _, _, low, high in points):
            any_single = True
            hollow: dict[str, Any] = {
                "linestyle": "none",
                "markeredgecolor": style["color"],
                "markerfacecolor": "white",
                "zorder": 3,
            }
            axis.plot([lr for lr, *_ in single], [mean for _, mean, *_ in single], marker=style["marker"], **hollow)
    axis.set_xscale("log")
    margin = max(gap**0.5, (rates[-1] / rates[0]) ** 0.12)  # failed runs have no point that would make room for them
    axis.set_xlim(rates[0] / margin, rates[-1] * margin)
    axis.set_xlabel("learning rate")
    axis.set_ylabel("top-1 accuracy (%)")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    if any_failed:
        axis.margins(y=0.05 * (len(routers) + 1))
    figure.legend(loc="outside right upper", fontsize=9)
    notes = "Mean over the seeds; bars from the worst seed to the best." + " Hollow: one seed." * any_single
    notes += " ×: failed runs." * any_failed
    figure.supxlabel("\n".join([*textwrap.wrap(caption, 120), notes]), fontsize=8)
    save(figure, path, dpi=150)
