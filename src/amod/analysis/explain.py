"""From a config of src/explain.py to its report: measure the subjects on the pictures, draw, write."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any, cast

from rich.progress import Progress, TimeRemainingColumn

from amod.analysis.explain_checks import folders, saved
from amod.analysis.importance import cost
from amod.analysis.measurement import blocks_of, grid_of, head_scores, measure
from amod.analysis.routing_report import About, write_report
from amod.analysis.subjects import data_pictures, device_of, output_of, own_pictures, subjects
from amod.entries import Route
from amod.errors import UserError
from amod.flops import count_flops
from amod.plan import Plan
from amod.training.config import WITHOUT_CAPACITY, ExplainConfig
from amod.training.folder import environment
from amod.training.record import classes_of
from amod.training.terminal import quiet, say


def explain(cfg: ExplainConfig, command: str) -> None:
    """What ``src/explain.py`` does; ``command`` is named in the report."""
    quiet()
    device_of(cfg)  # before pictures are read
    runs = folders(cfg, "run")
    output = output_of(cfg, runs[0].resolve().name if runs else cfg.model.label)
    first = saved(runs[0]) if runs else cfg
    classes: int | None
    if cfg.images is None:
        pictures, classes = data_pictures(cfg, first, classes_of(runs[0]) if runs else None)
    else:
        pictures, classes = own_pictures(cfg, first), cfg.data.num_classes
    found = subjects(cfg, classes)

    dense, count = found[0].dense, len(pictures.images)
    grid, blocks, depth = grid_of(dense, pictures.images), blocks_of(found[0].models), len(dense.blocks)
    removed = min(grid[0] * grid[1], cfg.tokens or sys.maxsize)
    work = len(found) * cost(depth, blocks, count, removed)
    flops = work / depth * count_flops(dense, cast(Any, tuple(pictures.images.shape[1:]))) / 1e9
    runs_said = "1 run" if len(found) == 1 else f"{len(found)} runs"
    say(
        f"importance: {runs_said} x {count} images x {removed} patches x {len(blocks)} blocks cost as much as "
        f"{work / depth:,.0f} images through {first.model.label} ({flops:,.0f} GFLOPs); images_max=, tokens= bound it"
    )
    measured = []
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn()) as progress:
        bar = progress.add_task("leaving tokens out", total=work)
        for subject in found:
            measured.append(
                measure(
                    subject.dense,
                    subject.models,
                    pictures.images,
                    pictures.labels,
                    tokens=cfg.tokens,
                    seed=cfg.seed,
                    draws=subject.config.seed,
                    done=lambda ran: progress.advance(bar, ran),
                )
            )
    config, run = found[0].config, measured[0]
    tokens = run.prefix + grid[0] * grid[1]
    left = found[0].models[config.router.name].tokens_kept(tokens)
    if config.router.name in WITHOUT_CAPACITY:
        amount = f"of {tokens} tokens {', '.join(map(str, dict.fromkeys(left.values())))} left"
    else:
        granted = config.capacity if config.budget is None else capacity_of(found[0].models[config.router.name].plan)
        amount = f"capacity {granted:g} ({left[min(left)]} of {tokens} tokens kept in a routed block)"
    about = About(
        subject=f"{config.model.label}, {'own pictures' if cfg.images else f'{config.data.name}, {cfg.split} images'}",
        amount=amount,
        seeds=[subject.config.seed for subject in found],
        dense="; ".join(dict.fromkeys(subject.origin for subject in found)),
        labelled=pictures.labels is not None,
        command=command,
        provenance=provenance(),
    )
    shown = min(cfg.shown, count)
    heads = {}
    for router, model in found[0].models.items():
        with suppress(UserError):  # a block whose map cannot be read, which only attention routing needs
            heads[router] = head_scores(model, pictures.images[:shown].to(next(dense.parameters()).device))
    write_report(output, about, measured, pictures.shown[:shown], pictures.names(run.predicted, shown), heads)
    say(f"{output}/report.md")


def capacity_of(plan: Plan) -> float:
    """What a budget has picked."""
    return next(entry.capacity for entry in plan.values() if isinstance(entry, Route))


def provenance() -> str:
    e = environment()
    changed = " with changes" if e["git_changed"] else ""
    return (
        f"Commit {(e['git_commit'] or 'unknown')[:12]}{changed}, torch {e['torch']}, timm {e['timm']}, {e['device']}."
    )
