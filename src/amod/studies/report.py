"""What a study found: results/STUDY/SCALE/{report.md, runs.csv, curves.csv, figure.png}, from the folders of its runs.

Every figure is a mean over seeds with its 95 % interval (Student's t), and every claim is tested on differences of runs
of the same seed. Runs that failed or were not run are listed, and a cell without runs stays empty.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amod.analysis import style
from amod.studies import paper
from amod.studies.plan import Run
from amod.studies.runner import finished, last_line
from amod.training.compose import compose_config

NAMES = {
    "none": "dense",
    **{router: style.NAMES[router] for router in ("isoflop", "random", "linear", "attention", "attention_weighted")},
}
METRICS = {
    "test_top1": "test top-1 (%)",
    "val_top1": "validation top-1 (%)",
    "val_top1_untrained": "untrained top-1 (%)",
    "test_top1_untrained": "untrained test top-1 (%)",
    "epochs_to_peak": "epochs to within 1 % of the peak",
}
AXES = ("data", "model", "variant", "placement", "keep_prefix", "lr", "capacity", "router")
COLUMNS = (
    *("run", "status", "stage", *AXES, "seed", "gflops", "params", "depth", *METRICS),
    *("best_epoch", "epochs", "seconds", "threads", "git_commit", "git_changed", "note"),
)
Row = dict[str, Any]


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Run], root: Path, failed: Mapping[str, str]) -> tuple[list[Row], list[Row]]:
    """(one row for each run, one row for each validation of each run)."""
    rows, curves = [], []
    for run in runs:
        settings = run.settings
        row: Row = dict.fromkeys(COLUMNS)
        row |= {
            "run": run.name,
            "status": "finished" if finished(run, root) else "failed" if run.name in failed else "not run",
            "stage": run.stage,
            "data": settings["data"],
            "model": settings["model"],
            "variant": run.variant,
            "placement": settings.get("placement", "alternate"),
            "keep_prefix": settings.get("router.keep_prefix", "false"),
            "lr": settings.get("schedule.lr"),
            "capacity": float(settings.get("capacity", 1)),
            "router": settings["router"],
            "seed": int(settings["seed"]),
            "note": failed.get(run.name),
        }
        if finished(run, root):
            folder = root / run.name
            summary = json.loads((folder / "summary.json").read_text())
            environment = json.loads((folder / "environment.json").read_text())
            row |= {key: value for key, value in (environment | summary).items() if key in COLUMNS and key not in AXES}
            curve = curve_of(folder, summary["val_top1_untrained"])
            row["epochs_to_peak"] = epochs_to_peak(curve)
            curves += [{"run": run.name, "epoch": epoch, "val_top1": value} for epoch, value in curve]
        elif row["status"] == "not run":
            row["note"] = last_line(run, root) or None
        rows.append(row)
    return rows, curves


def curve_of(folder: Path, untrained: float | None) -> list[tuple[int, float]]:
    """(epochs trained, validation top-1 in percent), the untrained accuracy first where there is one."""
    with open(folder / "metrics.csv", newline="") as file:
        trained = [(int(row["epoch"]) + 1, float(row["val/top1"])) for row in csv.DictReader(file) if row["val/top1"]]
    return trained if untrained is None else [(0, untrained), *trained]


def epochs_to_peak(curve: Sequence[tuple[int, float]]) -> int | None:
    """Epochs until the accuracy is first at least 0.99 of its highest (Sec. 4.3: "within 1 % of its peak")."""
    peak = max((value for _, value in curve), default=None)
    return None if peak is None else next(epoch for epoch, value in curve if value >= 0.99 * peak)


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """The rows of a runs.csv or curves.csv: figures as numbers, other columns as text, empty cells as None."""
    text = {"run", "status", "stage", *AXES, "git_commit", "git_changed", "note"} - {"capacity"}

    def value(key: str, cell: str) -> Any:
        if key == "variant" or (cell and key in text):
            return cell
        if not cell:
            return None
        return int(cell) if cell.lstrip("-").isdigit() and key != "capacity" else float(cell)

    with path.open(newline="") as file:
        return [{key: value(key, cell) for key, cell in row.items()} for row in csv.DictReader(file)]


# --- statistics -----------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval by Student's t; NaN for fewer than two values)."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def cells(rows: Sequence[Row], metric: str) -> dict[tuple[Any, ...], dict[int, float]]:
    """Axes' values (in the order of AXES) -> {seed: value}, of the finished runs that have the metric."""
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["status"] == "finished" and row[metric] is not None:
            found.setdefault(tuple(row[axis] for axis in AXES), {})[row["seed"]] = row[metric]
    return found


def examine(claim: Mapping[str, Any], rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """A claim "higher is above lower, give or take the margin", cell by cell.

    A cell is held when the 95 % interval of the differences, seed by seed, lies above -margin. Returns the verdict
    ("held", "not held", "held in k of n cells", "not tested") and a line for each cell.
    """
    metric = claim.get("metric", metric)
    axis, where = claim.get("axis", "router"), {key: str(value) for key, value in claim.get("where", {}).items()}
    by_cell = cells(rows, metric)
    margin = float(claim.get("margin", 0.0))
    routed = [key for key in by_cell if key[AXES.index("router")] != "none"]
    varying = {name for at, name in enumerate(AXES) if len({key[at] for key in routed}) > 1} | {"capacity"}
    lines, held, tested = [], 0, 0
    for key, values in by_cell.items():
        labels = dict(zip(AXES, key, strict=True))
        if labels[axis] != claim["higher"] or any(str(labels[name]) != value for name, value in where.items()):
            continue
        other = labels | {axis: claim["lower"]}
        if claim["lower"] == "none":  # the dense model has one capacity and no placement
            other |= {"capacity": 1.0, "placement": "alternate"}
        below = by_cell.get(tuple(other[name] for name in AXES), {})
        differences = [values[seed] - below[seed] for seed in sorted(values.keys() & below.keys())]
        shown = describe({name: value for name, value in labels.items() if name != axis and name in varying})
        if len(differences) < 2:
            lines.append(f"{shown}: {len(differences)} pairs of runs, not tested")
            continue
        mean, half = interval(differences)
        if half == 0:  # epochs are whole numbers: no spread says nothing about the interval
            lines.append(f"{shown}: {mean:+.2f} in every seed (n = {len(differences)}), not tested")
            continue
        tested += 1
        held += mean - half > -margin
        lines.append(f"{shown}: {mean:+.2f} ± {half:.2f} (n = {len(differences)})")
    verdict = "not tested" if not tested else f"held in {held} of {tested} cells"
    if tested and held in (0, tested):
        verdict = "held" if held else "not held"
    return {"text": claim["text"], "metric": metric, "verdict": verdict, "lines": lines}


def describe(labels: Mapping[str, Any]) -> str:
    """The labels that are worth showing: what every run shares by default is left out."""
    usual = {"placement": "alternate", "keep_prefix": "false", "variant": ""}
    parts = [str(value) for key, value in labels.items() if key in ("data", "model")]
    parts += [f"{value}" for key, value in labels.items() if key in ("placement", "variant") and value != usual[key]]
    parts += ["class token kept"] if labels.get("keep_prefix", "false") != "false" else []
    parts += [f"lr {labels['lr']}"] if labels.get("lr") is not None else []
    parts += [f"C = {labels['capacity']:g}"] if "capacity" in labels else []
    parts += [NAMES[labels["router"]]] if "router" in labels else []
    return ", ".join(parts)


# --- the report -----------------------------------------------------------------------------------------------------


def ours_of(study: Mapping[str, Any], scale: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """The rows that the study is about: of the runs that others start from, only where it says with_start."""
    start = scale["stages"][study["stage"]].get("start") if study.get("with_start") else None
    return [row for row in rows if row["stage"] in (study["stage"], start)]


def write_report(
    study: Mapping[str, Any], scale: Mapping[str, Any], rows: Sequence[Row], curves: Sequence[Row], output: Path
) -> Path:
    """Write report.md, runs.csv, curves.csv and figure.png of what ``rows_of`` found; returns report.md's path.

    A report of more finished runs stays as it is: a part of a study is written to `output`/partial instead.
    """
    ours = ours_of(study, scale, rows)
    before = read_csv(output / "runs.csv") if (output / "runs.csv").exists() else []
    if sum(row["status"] == "finished" for row in before) > sum(row["status"] == "finished" for row in rows):
        output = output / "partial"
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "runs.csv", rows, COLUMNS)
    write_csv(output / "curves.csv", curves, ("run", "epoch", "val_top1"))
    parts = [head(study, scale, rows), table(ours, study.get("metrics") or [study["metric"]])]
    if any(row["status"] == "finished" for row in ours):
        from amod.studies.figures import FIGURES

        models = sorted({row["model"] for row in ours})
        for model in models:  # a picture each
            mine = [row for row in ours if row["model"] == model]
            caption = "; ".join([model, ", ".join(sorted({row["data"] for row in mine})), seeds_of(mine)])
            name = "figure.png" if len(models) == 1 else f"figure-{model}.png"
            FIGURES[study.get("figure", "dots")](mine, curves, study, caption, output / name)
            parts.append(f"![{study['title']}]({name})")
    if study["claims"]:
        parts.append(claims_section(study, scale, ours))
    if study["name"] in paper.ACCURACY:
        parts.append(beside_the_paper(study, ours))
    parts.append(runs_section(rows))
    report = output / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def head(study: Mapping[str, Any], scale: Mapping[str, Any], rows: Sequence[Row]) -> str:
    counted = {status: sum(row["status"] == status for row in rows) for status in ("finished", "failed", "not run")}
    commits = sorted({str(row["git_commit"])[:7] for row in rows if row["git_commit"]})
    changed = any(str(row["git_changed"]) == "True" for row in rows)
    stages = [study["stage"], *filter(None, [scale["stages"][study["stage"]].get("start")])]
    recipes = "\n".join(f"- {stage}: `{' '.join(map(str, scale['stages'][stage]['settings']))}`" for stage in stages)
    return (
        f"# {study['title']} ({scale['name']} scale)\n\n"
        f"`python src/reproduce.py study={study['name']} scale={scale['name']}`, trained at commit "
        f"{', '.join(commits) or '-'}{' with changes' if changed else ''}; "
        + ", ".join(f"{number} runs {status}" for status, number in counted.items() if number)
        + f"; {seeds_of(rows)}.\n\nRecipes, over those of conf/schedule:\n\n{recipes}"
        + (f"\n\n{scale['remark']}" if "remark" in scale else "")
    )


def seeds_of(rows: Sequence[Row]) -> str:
    seeds = sorted({row["seed"] for row in rows if row["status"] == "finished"})
    return f"seeds {', '.join(map(str, seeds))}" if seeds else "no seed finished"


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A line for each cell: mean ± half of the 95 % interval over seeds, and the seeds' own values for the last."""
    keys = sorted({tuple(row[axis] for axis in AXES) for row in rows}, key=order)
    routed = [dict(zip(AXES, key, strict=True)) for key in keys if key[AXES.index("router")] != "none"]
    shown = [axis for axis in AXES if axis in ("capacity", "router") or len({labels[axis] for labels in routed}) > 1]
    titles = {"capacity": "C", "router": "configuration", "keep_prefix": "class token kept", "lr": "learning rate"}
    header = [
        *(titles.get(axis, axis) for axis in shown),
        "GFLOPs",
        "runs",
        *(METRICS[m] for m in metrics),
        "each seed",
    ]
    by_metric = {metric: cells(rows, metric) for metric in metrics}
    lines = [header, ["---"] * len(shown) + ["---:"] * (len(header) - len(shown))]
    for key in keys:
        labels = dict(zip(AXES, key, strict=True))
        of_cell = [row for row in rows if tuple(row[axis] for axis in AXES) == key]
        compute = next((f"{row['gflops']:.4f}" for row in of_cell if row["gflops"]), "")
        last = by_metric[metrics[-1]].get(key, {})
        lines.append(
            [
                *(cell_text(axis, labels[axis]) for axis in shown),
                compute,
                f"{sum(row['status'] == 'finished' for row in of_cell)}/{len(of_cell)}",
                *(mean_text(by_metric[metric].get(key, {}).values()) for metric in metrics),
                " ".join(f"{last[seed]:.4g}" for seed in sorted(last)),
            ]
        )
    note = "Mean ± half of the 95 % interval over seeds (Student's t); with one seed the value alone."
    return f"{note}\n\n{markdown(lines)}"


def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    labels = dict(zip(AXES, key, strict=True))
    values = [float(v or 0) if axis == "lr" else v for axis, v in labels.items() if axis not in ("router", "capacity")]
    return (labels["router"] != "none", *values, labels["capacity"], list(NAMES).index(labels["router"]))


def cell_text(axis: str, value: Any) -> str:
    if axis == "router":
        return NAMES[value]
    return f"{value:g}" if isinstance(value, float) else str(value or "-")


def mean_text(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def claims_section(study: Mapping[str, Any], scale: Mapping[str, Any], rows: Sequence[Row]) -> str:
    lines = [["claim", "on", "verdict here", "difference by cell"], ["---"] * 4]
    for claim in (examine(claim, rows, study["metric"]) for claim in study["claims"]):
        by_cell = "<br>".join(claim["lines"]) or "no runs"
        lines.append([claim["text"], METRICS[claim["metric"]], f"**{claim['verdict']}**", by_cell])
    return (
        "## Claims\n\nA cell is held when the 95 % interval of the differences between runs of the same seed "
        "(Student's t) lies above zero, or above minus the margin that the claim names. Held and not held are about "
        f"the {scale['name']} scale alone; not held says that it was not shown, not that the opposite is true.\n\n"
        + markdown(lines)
    )


def write_claims(
    reports: Sequence[tuple[Mapping[str, Any], Sequence[Row]]],
    untested: Sequence[Mapping[str, str]],
    scale: str,
    output: Path,
) -> Path:
    """Every claim of every study on one page, and those that no study tests, with the reason."""
    lines = [["claim", "study", "verdict", "difference by cell"], ["---"] * 4]
    for study, rows in reports:
        for claim in study["claims"]:
            tested = examine(claim, rows, study["metric"])
            report = f"{study['name']}/{scale}/report.md"
            link = f"[{study['name']}]({report})" if (output / report).exists() else study["name"]
            lines.append([claim["text"], link, f"**{tested['verdict']}**", "<br>".join(tested["lines"]) or "no runs"])
    lines += [[claim["text"], "-", "**not tested**", claim["why"]] for claim in untested]
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"claims-{scale}.md"
    path.write_text(
        f"# The claims, at {scale} scale\n\n`python src/reproduce.py study=all scale={scale}`. How a verdict is "
        f'reached stands in each report; claims that begin with "ours" are not the paper\'s.\n\n{markdown(lines)}\n'
    )
    return path


def beside_the_paper(study: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The paper's cells: its compute beside ours, and its accuracy beside ours where we ran it."""
    lines = [["data", "model", "configuration", "C", "GFLOPs, paper", "GFLOPs, computed", "paper (%)", "ours (%)"]]
    lines.append(["---"] * 3 + ["---:"] * 5)
    placement = paper.PLACEMENT.get(study["name"], "alternate")
    mine: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        placed = row["router"] in ("none", "isoflop") or row["placement"] == placement
        if placed and row["status"] == "finished" and row[study["metric"]] is not None:
            key = (row["data"], row["model"], row["router"], row["capacity"])
            mine.setdefault(key, []).append(row[study["metric"]])
    wanted = {(row["router"], row["capacity"]) for row in rows}
    for data, printed in paper.ACCURACY[study["name"]].items():
        for (model, router, capacity), accuracy in printed.items():
            if (router, capacity) not in wanted:
                continue
            theirs = paper.GFLOPS.get(study["name"], {}).get((model, router, capacity), "")
            values = mine.get((data, model, router, capacity), [])
            lines.append(
                [
                    *(data, model, NAMES[router], f"{capacity:g}", theirs),
                    f"{computed_gflops(model, router, capacity, placement, data):.4f}",
                    f"{accuracy:g}",
                    mean_text(values) if values else "not run",
                ]
            )
    note = "The paper's GFLOPs are rounded or cut off after their last digit; where none stand, it prints none."
    return f"## The paper's figures\n\n{note}\n\n{markdown(lines)}"


def computed_gflops(model: str, router: str, capacity: float, placement: str, data: str) -> float:
    """Our count for one of the paper's models, with a head for the classes of `data`."""
    import timm
    import torch

    import amod

    name = paper.ARCHITECTURES[model]
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=compose_config("train", [f"data={data}"]).data.num_classes)
    assert isinstance(vit, timm.models.VisionTransformer)
    if router == "isoflop":
        vit = amod.truncate(vit, amod.PAPER_DEPTHS[name][capacity])
    elif router != "none":
        vit = amod.convert(vit, router, capacity, placement)
    return amod.count_flops(vit) / 1e9


def runs_section(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row["status"] != "finished"]
    if not bad:
        return "All runs are finished: [runs.csv](runs.csv), a line for each, and their [curves.csv](curves.csv)."
    lines = [["run", "status", "note"], ["---"] * 3, *([r["run"], r["status"], r["note"] or ""] for r in bad)]
    return f"## Runs that did not finish\n\nThe others are in [runs.csv](runs.csv).\n\n{markdown(lines)}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
