"""Is a claim held? On differences between runs of the same seed, which share their dense model, cell by cell.

With few seeds the one test that can decide is Student's on the paired differences (a sign test needs six seeds that
agree). Its 95 % interval lies above the claim's bound (held), below it (contradicted), or around it (undecided).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from amod.plan import BY_THEMSELVES
from amod.studies.rows import AXES, describe, measured

MOST_SEEDS = 100  # no more are suggested
NO_SPREAD = 1e-3  # percent have six digits, and one of 10,000 images is 0.01
UNLIKE = 0.02  # beyond this share, that two sides do not cost the same is said
HOW = (
    "A claim is looked at on the differences between runs of the same seed, cell by cell: *held* where their 95 % "
    "interval (Student's t, the one test that can decide with so few seeds) lies above zero, or above minus the margin "
    "that the claim names, *contradicted* where it lies below, *undecided* where it reaches to both sides. Then the "
    "number of seeds is given that would decide if mean and spread stayed as they are."
)


@dataclass(frozen=True)
class Cell:
    """Where the claim was looked at, and the differences found there: "higher" less "lower", a value for each seed."""

    where: str
    differences: tuple[float, ...]
    margin: float = 0.0

    @property
    def spread(self) -> float:
        return max(self.differences) - min(self.differences)

    @property
    def verdict(self) -> str:
        """held, contradicted, undecided, or why there is none: no pairs, one seed, no spread."""
        if len(self.differences) < 2:
            return "one seed" if self.differences else "no pairs"
        mean, half = interval(self.differences)
        if self.spread < NO_SPREAD:  # says nothing about the interval, as of epochs, which are whole numbers
            return "no spread"
        if mean - half > -self.margin:
            return "held"
        return "contradicted" if mean + half < -self.margin else "undecided"

    @property
    def text(self) -> str:
        """The difference, its interval, the number of seeds and, unless the verdict stands, what it would take."""
        if not self.differences:
            return f"{self.where}: no pairs of runs"
        mean, half = interval(self.differences)
        n = len(self.differences)
        if n == 1:
            return f"{self.where}: {mean:+.2f} (one seed)"
        if self.spread < NO_SPREAD:
            return f"{self.where}: {mean:+.2f} in every one of {n} seeds"
        shown = f"{self.where}: {mean:+.2f} ± {half:.2f} (n = {n}), {self.verdict}"
        if self.verdict != "undecided":
            return shown
        needed = seeds_to_decide(self.differences, self.margin)
        return f"{shown} ({f'{needed} seeds would decide' if needed else f'not even {MOST_SEEDS} seeds would decide'})"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t; NaN for fewer than two values)."""
    mean = float(pd.Series(values, dtype=float).mean())
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def seeds_to_decide(differences: Sequence[float], margin: float = 0.0) -> int | None:
    """The least number of seeds whose interval would not hold the bound, at the mean and the spread seen."""
    mean, spread = abs(pd.Series(differences).mean() + margin), pd.Series(differences).std()
    numbers = range(len(differences) + 1, MOST_SEEDS + 1)
    return next((n for n in numbers if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) < mean), None)


@dataclass(frozen=True)
class Finding:
    """A claim of a study with its cells."""

    text: str
    metric: str
    cells: tuple[Cell, ...]

    @property
    def verdict(self) -> str:
        return verdict_of(self.cells)


def verdict_of(cells: Sequence[Cell]) -> str:
    """One word where all tested cells agree, else how many say what; untested cells do not count.

    Where no cell has a spread, such as epochs that are the same in every seed, nothing is decided.
    """
    counted = Counter(cell.verdict for cell in cells)
    tested = {word: counted[word] for word in ("held", "contradicted", "undecided") if counted[word]}
    if not tested:
        if counted["no spread"]:
            return "undecided"
        return "one seed" if counted["one seed"] else "not tested"
    if len(tested) == 1:
        return next(iter(tested))
    return ", ".join(f"{word} in {number}" for word, number in tested.items()) + f" of {sum(tested.values())} cells"


def examine(claim: Mapping[str, Any], rows: pd.DataFrame, metric: str) -> Finding:
    """A study's claim "higher is above lower, give or take the margin", in every cell that has both."""
    metric = claim.get("metric", metric)
    axis, where = claim.get("axis", "router"), {key: str(value) for key, value in claim.get("where", {}).items()}
    found = measured(rows, metric)
    others = [name for name in AXES if name != axis]
    routed = found[found["router"] != "none"]
    varying = [name for name in others if name == "capacity" or routed[name].nunique() > 1]
    above, below = (found[found[axis] == claim[key]] for key in ("higher", "lower"))
    for key, value in where.items():
        above = above[above[key].astype(str) == value]
    if claim["lower"] == "none":  # the dense model has one capacity and no placement
        unlike = {"capacity", "budget", "placement", "setting"}
        if not set(above["lr"]) & set(below["lr"]):  # no dense model was tuned like these: it is the one before
            unlike.add("lr")
        others = [name for name in others if name not in unlike]
    if claim["lower"] in BY_THEMSELVES:  # it has blocks of its own, wherever the other one routes
        others.remove("placement")
    paired = above.merge(
        below[[*others, "seed", "gflops", metric]], on=[*others, "seed"], how="left", suffixes=("", "_below")
    )
    paired["difference"] = paired[metric] - paired[f"{metric}_below"]
    cells = []
    for key, group in paired.groupby([name for name in AXES if name != axis], sort=False, dropna=False):
        labels = dict(zip((name for name in AXES if name != axis), key, strict=True))
        group = group.dropna(subset="difference").sort_values("seed")
        shown, differences = describe({name: labels[name] for name in varying}), group["difference"]
        if axis == "router" and claim["lower"] != "none":  # two routers are to cost the same
            theirs, lower = (float(group[key].astype(float).mean()) for key in ("gflops", "gflops_below"))
            if abs(theirs - lower) > UNLIKE * max(theirs, lower):
                shown = f"{shown} ({theirs:.3g} and {lower:.3g} G)".lstrip()
        cells.append(Cell(shown, tuple(map(float, differences)), float(claim.get("margin", 0.0))))
    return Finding(claim["text"], metric, tuple(cells))
