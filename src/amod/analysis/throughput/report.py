"""What `src/benchmark.py` writes: report.md, results.json and the pictures, all from the raw seconds of the cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amod.analysis.throughput.figures import (
    Record,
    activations_ratio,
    efficiency,
    flops_ratio,
    images_per_second,
    label,
    memory_ratio,
    milliseconds,
    model_of,
    setting,
    speed_up,
    title,
)
from amod.analysis.throughput.goals import Row, goals
from amod.analysis.throughput.parts import PARTS
from amod.analysis.throughput.pictures import draw
from amod.analysis.throughput.timing import Quartiles
from amod.errors import unreadable
from amod.files import write_atomically


def write(folder: Path, head: Mapping[str, Any], records: Sequence[Record], failed: Sequence[Record]) -> str:
    """Write everything into ``folder``; returns what the command prints."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = goals(records)
    told = rows if any(row.reached is not None for row in rows) else []
    everything = {**head, "goals": [asdict(row) for row in rows], "cells": list(records), "not_run": list(failed)}
    write_atomically(folder / "results.json", (json.dumps(everything, indent=1) + "\n").encode())
    pictures = draw(folder, records)
    text = "\n".join(report(head, records, failed, told, pictures)) + "\n"
    write_atomically(folder / "report.md", text.encode())
    return "\n".join([*goal_table(told), "", str(folder / "report.md")])


def cells_in(folder: Path) -> int:
    """How many measured cells the report there has."""
    file = folder / "results.json"
    try:
        return len(json.loads(file.read_text())["cells"]) if file.exists() else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(file, error) from error


def report(
    head: Mapping[str, Any],
    records: Sequence[Record],
    failed: Sequence[Record],
    rows: Sequence[Row],
    pictures: Sequence[str],
) -> Iterator[str]:
    commits = sorted({str(record["commit"]) for record in records})
    yield "# Benchmark"
    yield ""
    yield f"`{head['command']}`"
    yield ""
    yield (
        f"{head['kind']}; threads: {head['threads']}; {head['system']}; Python {head['python']}, "
        f"torch {head['torch']}, timm {head['timm']}; commit {', '.join(commits)} (+: with uncommitted changes)."
    )
    yield ""
    yield "Figures are medians over rounds that time every variant once, in turns; in brackets the quartiles of the"
    yield "ratios within a round. Speed-up is against dense timm with its fused attention; FLOPs ratio is dense /"
    yield "variant; **efficiency = speed-up / FLOPs ratio**. Weights are random, which does not change the time."
    yield ""
    if table := [*goal_table(rows)]:
        yield from ("## Goals", "", *table, "")
    for name in pictures:
        yield f"![{name}]({name})"
        yield ""
    yield "## Speed"
    settings = list(dict.fromkeys((setting(r["cell"]), r["cell"]["batch"]) for r in records if "seconds" in r))
    for shown, batch in settings:
        yield ""
        yield f"### {shown}, batch {batch}"
        yield ""
        here = [r for r in records if "seconds" in r and (setting(r["cell"]), r["cell"]["batch"]) == (shown, batch)]
        if chosen := {kind for r in here if r["cell"]["precision"] == "default" for kind in r.get("computed_in", ())}:
            yield f"It computes in {' and '.join(sorted(chosen))} here."
            yield ""
        yield "| model | variant | GFLOPs | images/s | speed-up | FLOPs ratio | efficiency | rounds |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|"
        for record in here:
            yield from _speed_lines(record)
    yield from _parts_section([record for record in records if "parts" in record])
    yield from _memory_section([record for record in records if "memory" in record])
    if failed:
        yield ""
        yield "## Not run"
        yield ""
        for failure in failed:
            yield f"- {title(failure['cell'])}: {failure['not_run']}"


def goal_table(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "| goal | | where | measured | reached |"
    yield "|---|---|---|---:|---|"
    for row in rows:
        if row.measured is None:
            measured = "not run"
        elif row.measured.low == row.measured.high:
            measured = f"{row.measured.median:.3f}"
        else:
            measured = _spread(row.measured)
        reached = {True: "yes", False: "no", None: ""}[row.reached]
        remark = f" ({row.remark})" if row.remark else ""
        yield f"| {row.goal} | {row.limit} | {row.where}{remark} | {measured} | {reached} |"


def _spread(q: Quartiles) -> str:
    return f"{q.median:.3f} [{q.low:.3f}, {q.high:.3f}]"


def _speed_lines(record: Record) -> Iterator[str]:
    for variant in record["cell"]["variants"]:
        dense = variant == "dense"
        up = "1" if dense else _spread(speed_up(record, variant))
        efficient = "1" if dense else _spread(efficiency(record, variant))
        yield (
            f"| {model_of(record)} | {label(record, variant)} | {record['flops'][variant] / 1e9:.4g} "
            f"| {images_per_second(record, variant):.1f} | {up} | {flops_ratio(record, variant):.3f} | {efficient} "
            f"| {len(record['seconds'][variant])} |"
        )


def _parts_section(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield ""
    yield "## Where the time of a forward pass goes"
    yield ""
    yield "Milliseconds per image, eager, medians. Attention holds its projections and, for A-MoD, the scores; routing"
    yield "is router, top-k and weighting, or ToMe's matching; movement is take and put, or ToMe's merging; the rest is"
    yield "patch embedding, norms, residual additions and head."
    yield ""
    yield f"| model | batch | variant | {' | '.join(PARTS)} | total |"
    yield f"|---|---:|---|{'---:|' * (len(PARTS) + 1)}"
    for record in records:
        for variant in record["cell"]["variants"]:
            spent = milliseconds(record, variant)
            figures = " | ".join(f"{ms:.3f}" for ms in (*spent, sum(spent)))
            yield f"| {model_of(record)} | {record['cell']['batch']} | {label(record, variant)} | {figures} |"


def _memory_section(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield ""
    yield "## Peak memory"
    yield ""
    yield "Of one eager step, each variant in a fresh process. Tensors: the most bytes of tensors alive at once,"
    yield "weights included (on CUDA `max_memory_allocated`, on a CPU the same sum from the allocator's events)."
    yield "Process: the largest resident size, libraries included. In brackets the ratio to dense."
    yield ""
    yield "| model | batch | step | variant | tensors, MB | without weights, MB | process, MB |"
    yield "|---|---:|---|---|---:|---:|---:|"
    for record in records:
        for variant in record["cell"]["variants"]:
            used = record["memory"][variant]
            alone = (used["tensors"] - used["weights"]) / 1e6
            process = "-"
            if used["process"]:
                process = f"{used['process'] / 1e6:.1f} ({memory_ratio(record, variant, 'process'):.3f})"
            yield (
                f"| {model_of(record)} | {record['cell']['batch']} | {setting(record['cell'])} "
                f"| {label(record, variant)} | {used['tensors'] / 1e6:.1f} ({memory_ratio(record, variant):.3f}) "
                f"| {alone:.1f} ({activations_ratio(record, variant):.3f}) | {process} |"
            )
