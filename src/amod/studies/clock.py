"""How fast a study's models are: those of its first seed in turns with their dense model, in this process.

Written to results/STUDY/SCALE/speed.csv, a line for each run that is finished, behind the study: its runs train two at
a time, so what they say of their own speed is no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from amod.studies.plan import Run
from amod.studies.runner import finished

BATCH, ROUNDS = 32, 15
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

    from amod.analysis.throughput.timing import alternate, paired
    from amod.training.finished import load_model, load_run
    from amod.training.folder import read_config

    _, model, data = load_run(root / dense.name)
    models = {dense.name: model}
    for folder in (root / run.name for run in timed if run is not dense):  # the data are read once
        models[folder.name] = load_model(folder, read_config(folder / "config.yaml"), data.num_classes)
    samples = data.samples("test", train=False)
    images, _ = samples.stacked(samples.drawn(BATCH, 0))
    print(f"timing {len(models)} models in turns, {ROUNDS} rounds", flush=True)
    with torch.inference_mode():
        steps = {name: lambda model=model: model(images) for name, model in models.items()}
        seconds, _ = alternate(steps, ROUNDS, fill=0.2)
    found = {name: paired(seconds[dense.name], spent) for name, spent in seconds.items()}
    rows = [(name, quartiles.median, quartiles.low, quartiles.high) for name, quartiles in found.items()]
    output.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).round(4).to_csv(output / "speed.csv", index=False, lineterminator="\n")


def read(folder: Path) -> pd.DataFrame:
    """The rows of a speed.csv; none where there is no such file."""
    file = folder / "speed.csv"
    return (pd.read_csv(file) if file.exists() else pd.DataFrame(columns=list(COLUMNS))).astype(COLUMNS)


def with_speeds(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows with the ``speedup`` of those that were timed."""
    found = read(folder).set_index("run")["speedup"]
    return rows.assign(speedup=rows["run"].map(found).astype("Float64").fillna(rows["speedup"]))
