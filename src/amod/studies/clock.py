"""How fast a study's models are: those of its first seed in turns with their dense model, in this process.

Written to results/STUDY/SCALE behind the study, because its runs train two at a time, and what they say of their own
speed is no measurement: speed.csv, a line for each finished run, and halting.csv, a line for each image of a model
whose tokens halt, which costs each image something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from amod.plan import Halt, entries_of
from amod.studies.plan import Run
from amod.studies.rows import markdown
from amod.studies.runner import finished

if TYPE_CHECKING:
    from torch import Tensor

BATCH, ROUNDS = 32, 15
ALONE, ALONE_ROUNDS = 64, 5  # images one by one, of models whose tokens halt
COLUMNS = {"run": "str", "speedup": "float64", "low": "float64", "high": "float64"}


def measure(runs: Sequence[Run], root: Path, output: Path) -> None:
    """Time the finished runs of the least seed, unless that is done: medians and quartiles of dense / variant within a
    round, on ``BATCH`` test images, forward and eager."""
    first = min(int(run.settings["seed"]) for run in runs)
    timed = [run for run in runs if int(run.settings["seed"]) == first and finished(run, root)]
    dense = next((run for run in timed if run.settings["router"] == "none"), None)
    if dense is None or {run.name for run in timed} <= {*read(output)["run"]}:
        return
    import torch

    from amod.analysis.throughput import timing
    from amod.training.finished import load_model, load_run
    from amod.training.folder import read_config

    _, model, data = load_run(root / dense.name)
    models = {dense.name: model}
    for folder in (root / run.name for run in timed if run is not dense):  # the data are read once
        models[folder.name] = load_model(folder, read_config(folder / "config.yaml"), data.num_classes)
    samples = data.samples("test", train=False)
    images, _ = samples.stacked(samples.drawn(max(BATCH, ALONE), 0))
    batch = images[:BATCH]
    print(f"timing {len(models)} models in turns, {ROUNDS} rounds", flush=True)
    with torch.inference_mode():
        steps = {name: lambda model=model: model(batch) for name, model in models.items()}
        seconds, _ = timing.alternate(steps, ROUNDS, fill=0.2)
        alone = [image_by_image(name, model, models[dense.name], images[:ALONE]) for name, model in halting(models)]
    found = {name: timing.paired(seconds[dense.name], spent) for name, spent in seconds.items()}
    rows = [(name, quartiles.median, quartiles.low, quartiles.high) for name, quartiles in found.items()]
    output.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).round(4).to_csv(output / "speed.csv", index=False, lineterminator="\n")
    if alone:
        pd.concat(alone).round(4).to_csv(output / "halting.csv", index=False, lineterminator="\n")


def halting(models: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those in whose plan tokens halt."""
    return [(n, m) for n, m in models.items() if any(isinstance(entry, Halt) for entry in entries_of(m))]


def image_by_image(name: str, model: Any, dense: Any, images: Tensor) -> pd.DataFrame:
    """Each image alone through both, in turns: its cost, and its time as a share of the dense model's."""
    from amod.analysis.throughput import timing
    from amod.flops import count_flops, image_flops

    whole, rows = count_flops(dense, images[:1]), []
    for i, flops in enumerate(image_flops(model, images).tolist()):
        steps = {"dense": lambda i=i: dense(images[i : i + 1]), "halting": lambda i=i: model(images[i : i + 1])}
        seconds, _ = timing.alternate(steps, ALONE_ROUNDS)
        rows.append((name, i, flops / whole, timing.paired(seconds["halting"], seconds["dense"]).median))
    return pd.DataFrame(rows, columns=["run", "image", "flops", "time"])


def halting_section(rows: pd.DataFrame, folder: Path) -> str:
    """Mean and spread over images of what a model whose tokens halt costs each of them; nothing where none does."""
    file = folder / "halting.csv"
    if not file.exists():
        return ""
    lines = [["run", "FLOPs of dense (%)", "least to most", "time of dense (%)", "least to most", "rank correlation"]]
    lines.append(["---"] + ["---:"] * 5)
    settings = rows.set_index("run")["setting"]
    for name, found in pd.read_csv(file).groupby("run", sort=False):
        line = [str(settings.get(name, name))]
        for column in ("flops", "time"):
            share = 100 * found[column]
            line += [f"{share.mean():.1f} ± {share.std():.1f}", f"{share.min():.1f} to {share.max():.1f}"]
        lines.append([*line, f"{found['flops'].corr(found['time'], method='spearman'):.2f}"])
    return (
        f"## Image by image\n\nOf models whose tokens halt, each of {ALONE} test images alone in turns with the dense "
        f"model, median of {ALONE_ROUNDS} rounds: mean ± standard deviation over images.\n\n{markdown(lines)}"
    )


def read(folder: Path) -> pd.DataFrame:
    """The rows of a speed.csv; none where there is no such file."""
    file = folder / "speed.csv"
    return (pd.read_csv(file) if file.exists() else pd.DataFrame(columns=list(COLUMNS))).astype(COLUMNS)


def with_speeds(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows with the ``speedup`` of those that were timed."""
    found = read(folder).set_index("run")["speedup"]
    return rows.assign(speedup=rows["run"].map(found).astype("Float64").fillna(rows["speedup"]))
