"""What a study found: results/STUDY/SCALE/{report.md, runs.csv, curves.csv, figure.png}.

Every figure is a mean over seeds with its 95 % interval (Student's t), and every claim is tested on differences of runs
of the same seed. Runs that failed or were not run are listed, and a cell without runs stays empty.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from amod.analysis.style import name_of
from amod.files import write_atomically
from amod.studies import paper
from amod.studies.claims import HOW, Finding, examine, interval
from amod.studies.clock import halting_section, with_speeds
from amod.studies.plan import recipe_of
from amod.studies.rows import (
    AXES,
    METRICS,
    markdown,
    measured,
    ours_of,
    place_of,
    placed,
    router_rank,
    write,
)
from amod.training.compose import compose_config
from amod.training.config import BY_THEMSELVES, UNROUTED


def write_report(
    study: Mapping[str, Any], scale: Mapping[str, Any], rows: pd.DataFrame, curves: pd.DataFrame, output: Path
) -> Path:
    """Write report.md, runs.csv, curves.csv and figure.png of what was found to ``place_of`` it; report.md's path."""
    output = place_of(rows, output)
    rows, image_by_image = with_speeds(rows, output), halting_section(rows, output)
    ours = ours_of(study, scale, rows)
    output.mkdir(parents=True, exist_ok=True)
    write(rows, output / "runs.csv")
    write(curves, output / "curves.csv")
    parts = [head(study, scale, rows), table(ours, study.get("metrics") or [study["metric"]])]
    if (ours["status"] == "finished").any():
        from amod.studies.figures import FIGURES

        for old in output.glob("figure*.png"):  # of a report of other models
            old.unlink()
        models = sorted(ours["model"].unique())
        for model in models:  # a picture each
            mine = ours[ours["model"] == model]
            caption = "; ".join([model, ", ".join(sorted(mine["data"].unique())), seeds_of(mine)])
            name = "figure.png" if len(models) == 1 else f"figure-{model}.png"
            FIGURES[study.get("figure", "dots")](mine, curves, study, caption, output / name)
            parts.append(f"![{study['title']}]({name})")
    if image_by_image:
        parts.append(image_by_image)
    if study["claims"]:
        parts.append(
            claims_section([examine(claim, ours, study["metric"]) for claim in study["claims"]], scale["name"])
        )
    if study["name"] in paper.ACCURACY:
        parts.append(beside_the_paper(study, ours))
    if study["name"] in paper.PUBLISHED:
        parts.append(published(study["name"]))
    parts.append(runs_section(rows))
    report = output / "report.md"
    write_atomically(report, ("\n\n".join(parts) + "\n").encode())
    return report


def head(study: Mapping[str, Any], scale: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """Command, commit, what was run, seeds, recipes, and what the scale has to say about itself."""
    counted = ", ".join(
        f"{(rows['status'] == word).sum()} runs {word}" for word in STATUS if word in set(rows["status"])
    )
    commits = sorted({commit[:7] for commit in rows["git_commit"] if commit})
    changed = " with changes" if (rows["git_changed"] == "True").any() else ""
    start = scale["stages"][study["stage"]].get("start")
    recipes = {study["stage"]: recipe_of(study, scale)}
    if start in scale["stages"]:
        recipes[start] = scale["stages"][start]["settings"]
    if scale.get("settings"):
        recipes = {"all": scale["settings"], **recipes}
    typed = f" scale.weights={Path(scale['weights']).name}" if scale.get("weights") else ""
    typed += "".join(f" {shlex.quote(setting)}" for setting in scale.get("typed", ()))
    remark = study.get("remark") or scale.get("remark")
    said = "\n".join(f"- {name}: `{' '.join(map(str, settings))}`" for name, settings in recipes.items() if settings)
    return (
        f"# {study['title']} ({scale['name']} scale)\n\n"
        f"`python src/reproduce.py study={study['name']} scale={scale['name']}{typed}`, run at commit "
        f"{', '.join(commits) or '-'}{changed}; {counted}; {seeds_of(rows)}.{beginnings(rows)}\n\n"
        f"Recipes, over those of conf/schedule:\n\n{said}" + (f"\n\n{remark}" if remark else "")
    )


OWN_PLACES = (*UNROUTED, *BY_THEMSELVES)
"""No placement tells in which blocks these do something."""
STATUS = ("finished", "failed", "not run")


def seeds_of(rows: pd.DataFrame) -> str:
    done = rows[rows["status"] == "finished"]
    seeds = sorted(done["seed"].unique())
    fewer = done.groupby([*AXES], dropna=False)["seed"].nunique() < len(seeds)
    some = ", of some rows fewer" if fewer.any() else ""
    return f"seeds {', '.join(map(str, seeds))}{some}" if seeds else "no seed finished"


def beginnings(rows: pd.DataFrame) -> str:
    """Which runs of a seed began from a dense model that is not that of the others, because it was trained again."""
    said = []
    for (_, variant, seed), found in rows.groupby(["model", "variant", "seed"]):
        counted = found["start_accuracy"].dropna().value_counts().sort_index()
        if len(counted) > 1:
            of = f"seed {seed}, {variant}" if variant else f"seed {seed}"
            said.append(f"{of}: {', '.join(f'{n} from one of {accuracy:g} %' for accuracy, n in counted.items())}")
    return f" The dense model was trained more than once, and runs began from each ({'; '.join(said)})." if said else ""


def table(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    """A line for each cell: mean ± half of the 95 % interval over seeds, and the seeds' own values for the last."""
    routed = rows[rows["router"] != "none"]
    always = ["router"] if (routed["budget"] != "").any() else ["capacity", "router"]
    placed_by_name = routed[~routed["router"].isin(OWN_PLACES)]["placement"].nunique() > 1
    varies = {axis: placed_by_name if axis == "placement" else routed[axis].nunique() > 1 for axis in AXES}
    shown = [axis for axis in AXES if axis in always or varies[axis]]
    titles = {"capacity": "C", "router": "configuration", "keep_prefix": "class token kept", "lr": "learning rate"}
    titles |= {"budget": "FLOPs asked"}
    header = [
        *(titles.get(axis, axis) for axis in shown),
        "GFLOPs",
        "runs",
        *(METRICS[m] for m in metrics),
        "each seed",
    ]
    lines = [header, ["---"] * len(shown) + ["---:"] * (len(header) - len(shown))]
    cells = dict(list(rows.groupby(list(AXES), dropna=False)))
    for key in sorted(cells, key=order):
        cell = cells[key].sort_values("seed")
        labels, compute = dict(zip(AXES, key, strict=True)), cell["gflops"].dropna()
        values = [measured(cell, metric)[metric] for metric in metrics]
        lines.append(
            [
                *(cell_text(axis, labels) for axis in shown),
                f"{compute.mean():.4f}" if len(compute) else "",
                f"{(cell['status'] == 'finished').sum()}/{len(cell)}",
                *map(mean_text, values),
                " ".join(f"{value:.4g}" for value in values[-1]),
            ]
        )
    note = "Mean ± half of the 95 % interval over seeds (Student's t); with one seed the value alone."
    return f"{note}\n\n{markdown(lines)}"


def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dense first, then by every axis, the routers in their usual order."""
    labels = dict(zip(AXES, key, strict=True))
    ranks = {"lr": lambda rate: float(rate or 0), "placement": lambda name: (name != "alternate", name)}
    last = ("router", "capacity", "budget", "setting")
    values = [ranks[axis](v) if axis in ranks else v for axis, v in labels.items() if axis not in last]
    amounts = (labels["capacity"], -float(labels["budget"].rstrip("%") or 0))
    rank = router_rank(labels["router"])
    return (labels["router"] != "none", *values, *amounts, rank, labels["setting"])


def cell_text(axis: str, labels: Mapping[str, Any]) -> str:
    value = labels[axis]
    if axis == "router":
        return name_of(value)
    if axis == "capacity" and labels["router"] in BY_THEMSELVES:
        return "-"
    if axis == "placement":
        if labels["router"] == "isoflop" and not labels["budget"]:
            return f"as {placed(value)}"  # its depth is that of the FLOPs of such a model
        return "-" if labels["router"] in OWN_PLACES else placed(value)
    return f"{value:g}" if isinstance(value, float) else str(value or "-")


def mean_text(values: Iterable[float]) -> str:
    found = [float(value) for value in values]
    if not found:
        return ""
    mean, half = interval(found)
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"


def claims_section(findings: Sequence[Finding], scale: str) -> str:
    lines = [["claim", "on", "verdict here", "difference by cell"], ["---"] * 4]
    for found in findings:
        by_cell = "<br>".join(cell.text for cell in found.cells) or "no runs"
        lines.append([found.text, METRICS[found.metric], f"**{found.verdict}**", by_cell])
    return f"## Claims\n\n{HOW} Verdicts are about the {scale} scale alone.\n\n{markdown(lines)}"


def beside_the_paper(study: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """The paper's cells: its compute beside ours, and its accuracy beside ours where we ran it."""
    lines = [["data", "model", "configuration", "C", "GFLOPs, paper", "GFLOPs, computed", "paper (%)", "ours (%)"]]
    lines.append(["---"] * 3 + ["---:"] * 5)
    placement = paper.PLACEMENT.get(study["name"], "alternate")
    found = measured(rows, study["metric"])
    found = found[found["router"].isin(["none", "isoflop"]) | (found["placement"] == placement)]
    wanted = set(zip(rows["router"], rows["capacity"], strict=True))
    for data, printed in paper.ACCURACY[study["name"]].items():
        for (model, router, capacity), accuracy in printed.items():
            if (router, capacity) not in wanted:
                continue
            theirs = paper.GFLOPS.get(study["name"], {}).get((model, router, capacity), "")
            labels = {"data": data, "model": model, "router": router, "capacity": capacity}
            mine = found[(found[list(labels)] == pd.Series(labels)).all(axis=1)][study["metric"]]
            lines.append(
                [
                    *(data, model, name_of(router), f"{capacity:g}", theirs),
                    f"{computed_gflops(model, router, capacity, placement, data):.4f}",
                    f"{accuracy:g}",
                    mean_text(mine) or "not run",
                ]
            )
    note = "The paper's GFLOPs are rounded or cut off after their last digit; where none stand, it prints none."
    return f"## The paper's figures\n\n{note}\n\n{markdown(lines)}"


def published(study: str) -> str:
    """What the methods' own papers and code print, on ImageNet, beside which ours stand as they are."""
    lines = [["method", "model", "top-1 (%)", "GFLOPs", "where"], ["---"] * 2 + ["---:"] * 2 + ["---"]]
    lines += [list(row) for row in paper.PUBLISHED[study]]
    return f"## Published\n\nOf other models and data than ours.\n\n{markdown(lines)}"


def computed_gflops(model: str, router: str, capacity: float, placement: str, data: str) -> float:
    """Our count for one of the paper's models, with a head for the classes of `data`; of a DETR, its transformer."""
    if model == "detr":
        return detr_gflops(router, capacity)
    import amod

    name = paper.ARCHITECTURES[model]
    vit = weightless_vit(name, classes_of(data))
    if router == "isoflop":
        vit = amod.truncate(vit, amod.PAPER_DEPTHS[name][capacity])
    elif router != "none":
        vit = amod.convert(vit, router, capacity, placement)
    return amod.count_flops(vit) / 1e9


@functools.cache
def classes_of(data: str) -> int:
    return compose_config("train", [f"data={data}"]).data.num_classes


@functools.cache
def weightless_vit(name: str, classes: int) -> Any:
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name, num_classes=classes, weight_init="skip")


def detr_gflops(router: str, capacity: float) -> float:
    import torch
    from transformers import DetrConfig, DetrForObjectDetection

    from amod.detection import convert, transformer_flops

    with torch.device("meta"):
        detr = DetrForObjectDetection(DetrConfig())
    return transformer_flops(convert(detr, router, None if router == "none" else capacity), 800, 1066) / 1e9


def runs_section(rows: pd.DataFrame) -> str:
    bad = rows[rows["status"] != "finished"]
    if bad.empty:
        return "All runs are finished: [runs.csv](runs.csv), a line for each, and their [curves.csv](curves.csv)."
    said, waiting = ["## Not complete"], bad[bad["note"] == ""]
    if len(waiting):
        counted = waiting.groupby("seed").size()
        said.append(f"Not run: {', '.join(f'{count} runs of seed {seed}' for seed, count in counted.items())}.")
    if len(told := bad[bad["note"] != ""]):
        lines = [["run", "status", "note"], ["---"] * 3, *told[["run", "status", "note"]].to_numpy().tolist()]
        said.append(markdown(lines))
    return "\n\n".join([*said, "All are in [runs.csv](runs.csv)."])
