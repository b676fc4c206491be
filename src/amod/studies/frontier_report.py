"""README.md and frontier.png of src/frontier.py."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from amod.analysis.style import COLOURS, MARKERS, save
from amod.entries import ClassOnly, Gate, Halt, Merge, Predict, Prune
from amod.files import write_atomically
from amod.plan import Plan, from_data

NAMES = {
    "dense": "dense",
    "amod": "A-MoD as published",
    "late": "class attention, last half",
    "evit": "EViT",
    "tome": "ToMe",
    "tome_above": "ToMe, one token less (above the budget)",
    "few_merges": "few merges + class token alone",
    "few_tokens": "the same, by tokens in two rounds",
    "merge": "the same, norms kept, counted as fewer (router=merge)",
    "searched": "searched plan",
    "as_tome": "router=merge, as strong as agrees as well as ToMe",
}
FITTED = "_fitted"
"""Ends the name of a method whose head was fitted to the dense model's classes: the same plan and time."""
LOOKS = {
    "amod": "attention",
    "late": "attention_weighted",
    "evit": "random",
    "tome_above": "tome",
    "few_tokens": "dynamicvit",
    "searched": "linear",
    "as_tome": "avit",
}
"""Colour and marker where the method has none of its own."""
RESAMPLES = 2000


def name_of(method: str) -> str:
    return NAMES[method.removesuffix(FITTED)] + (", head fitted" if method.endswith(FITTED) else "")


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval by bootstrap over images: (images,) -> mean, low, high."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def right(row: Mapping[str, Any]) -> np.ndarray:
    """(images,) 100 where the class was right, else 0."""
    return 100.0 * np.array([int(one) for one in row["right"]])


def in_words(plan: Plan) -> str:
    """A plan in one table cell, runs of equal entries together."""
    parts: list[tuple[str, list[int]]] = []
    for block, entry in sorted(plan.items()):
        if isinstance(entry, Merge):
            text = f"merge {entry.r}" + ("" if entry.by == "keys" else f" by {entry.by}")
            text += "" if entry.rounds == 1 else f" in {entry.rounds} rounds"
            text += ", norm kept" * entry.norm
            text += "" if entry.proportional == 1 else f", counted as size^{entry.proportional:g}"
        elif isinstance(entry, Prune):
            text = f"keep {entry.keep:.2f}" + ("" if entry.fuse else ", no fusing")
        elif isinstance(entry, Predict):
            text = f"keep {entry.keep:.2f}, predicted"
        elif isinstance(entry, Halt):
            text = "halting"
        elif isinstance(entry, ClassOnly):
            text = "class token alone"
        elif isinstance(entry, Gate):
            text = f"gates, {entry.skip} per {entry.per}"
        else:
            text = f"C = {100 * entry.capacity:.0f} %"
        if parts and parts[-1][0] == text:
            parts[-1][1].append(block)
        else:
            parts.append((text, [block]))
    return "; ".join(f"{text} in {_places(blocks)}" for text, blocks in parts) or "every block whole"


def _places(blocks: list[int]) -> str:
    if len(blocks) > 2 and blocks == [*range(blocks[0], blocks[-1] + 1)]:
        return f"{blocks[0]} to {blocks[-1]}"
    return ", ".join(map(str, blocks))


def write_report(
    output: Path, about: Mapping[str, Any], where: Mapping[str, Any], rows: Sequence[Any], times: Sequence[Any]
) -> None:
    rows = [row for row in rows if row is not None]
    dense = right(rows[0])
    clocks = {record["method"]: {(m, s): rest for m, s, *rest in record["times"]} for record in times}
    lines = [
        "# Without training: what a budget buys",
        "",
        f"{about['model']} {about['trained']} on {about['data']}, {about['image_size'][1]} pixels, "
        f"{about['dense_gflops']:.4f} GFLOPs dense; {about['images']} images of {about['split']}, which neither "
        f"training nor the search saw. The searches: {about['search_images']} training images without labels. One "
        "model; 95 % intervals by bootstrap over images, those of the differences paired. Disagreement: mean KL "
        "divergence of the classes from the dense model's, in nats. A fitted head (`amod.fit_head`): by least squares "
        "on the search's images. Times: one thread, in turns; median and quartiles of dense / plan within a round.",
        "",
        "| share | method | GFLOPs | top-1 (%) | points below dense | disagreement | plan |"
        + "".join(f" {c} |" for c in clocks),
        "|---|---|---:|---:|---:|---:|---|" + "---:|" * len(clocks),
    ]
    for row in rows:
        mean, low, high = interval(right(row))
        lost = interval(dense - right(row))
        cells = [
            f"{row['share']:.0%}",
            name_of(row["method"]),
            f"{row['flops'] / 1e9:.4f}",
            f"{mean:.2f} [{low:.2f}, {high:.2f}]",
        ]
        cells += [
            f"{lost[0]:.2f} [{lost[1]:.2f}, {lost[2]:.2f}]",
            f"{row['disagreement']:.4f}",
            in_words(from_data(row["plan"])),
        ]
        for found in clocks.values():
            taken = found.get((row["method"].removesuffix(FITTED), row["share"]))
            cells.append(f"{taken[2]:.2f}x [{taken[1]:.2f}, {taken[3]:.2f}]" if taken else "")
        lines.append("| " + " | ".join(cells) + " |")
    if other := [clock for clock in clocks if clock not in about["clocks"]]:
        lines += ["", f"The times of {'; '.join(other)} are an earlier command's."]
    lines += at_equal_agreement(clocks)
    picture(output / "frontier.png", rows, clocks)
    typed = [part for part in sys.argv[1:] if not part.startswith(("run=", "data.root=", "output="))]
    command = shlex.join(["python", "src/frontier.py", *typed])
    lines += [
        "",
        "![agreement and accuracy against compute and time](frontier.png)",
        "",
        f"`{command} run=RUN_FOLDER`, commit {str(where['git_commit'])[:9]}{'+' if where['git_changed'] else ''}, "
        f"torch {where['torch']}, seed {about['seed']}, effort {about['effort']:g}. The searched plans: `plan-*.yaml`; "
        "every image's outcome: `records.jsonl`.",
    ]
    write_atomically(output / "README.md", ("\n".join(lines) + "\n").encode())


def at_equal_agreement(clocks: Mapping[str, Mapping[Any, Any]]) -> list[str]:
    """What ToMe takes of the time of few merges that agree as well with the dense model on the search's images."""
    said: list[str] = []
    for clock, found in clocks.items():
        for name, share in [key for key in found if key[0] == "as_tome"]:
            tome = found.get(("tome_above", share), found.get(("tome", share)))
            if tome is not None:
                said.append(f"{found[name, share][2] / tome[2]:.2f} ({share:.0%}, {clock})")
    if not said:
        return []
    return [
        "",
        f"ToMe's time / that of router=merge where it agrees as well on the search's images: {'; '.join(said)}.",
    ]


def picture(path: Path, rows: Sequence[Any], clocks: Mapping[str, Mapping[Any, Any]]) -> None:
    """Points below dense, and disagreement, against GFLOPs; points below dense against each measured time."""
    axes_of = [("GFLOPs of one image", "points"), ("GFLOPs of one image", "disagreement")]
    axes_of += [(f"time / dense, {clock}", "points") for clock in clocks]
    across = min(3, len(axes_of))
    down = -(-len(axes_of) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(4.3 * across, 3.5 * down + 0.6), layout="constrained", squeeze=False
    )
    dense = right(rows[0])
    for axis, (label, what) in zip(grid.flat, axes_of, strict=False):
        found = clocks.get(label.removeprefix("time / dense, "))
        for name in dict.fromkeys(row["method"] for row in rows):
            points = []
            for row in rows:
                taken = found.get((name.removesuffix(FITTED), row["share"])) if found is not None else None
                if row["method"] != name or (found is not None and taken is None):
                    continue
                at = row["flops"] / 1e9 if taken is None else 1 / taken[2]
                mean, low, high = interval(dense - right(row)) if what == "points" else (row["disagreement"],) * 3
                points.append((at, mean, mean - low, high - mean))
            if not points:
                continue
            x, y, below, above = zip(*sorted(points), strict=True)
            base = name.removesuffix(FITTED)
            look = LOOKS.get(base, base)
            style = {"color": COLOURS[look], "marker": MARKERS[look], "label": name_of(name), "capsize": 2}
            style |= {"linestyle": "--", "markerfacecolor": "white"} if name.endswith(FITTED) else {}
            axis.errorbar(x, y, yerr=(below, above) if what == "points" else None, **style)
        axis.set_xlabel(label)
        axis.set_ylabel("points below dense" if what == "points" else "disagreement (KL, nats)")
        axis.set_yscale("symlog", linthresh=1 if what == "points" else 1e-3)
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    for axis in [*grid.flat][len(axes_of) :]:
        axis.set_visible(False)
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path, dpi=110)
