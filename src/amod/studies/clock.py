"""What a study's models and their training cost: those of its first seed in turns with the dense one, in this process.

Written to results/STUDY/SCALE behind the study, because its runs train two at a time, and what they say of their own
speed is no measurement: speed.csv, a line for each finished run, and halting.csv, a line for each image of a model
whose tokens halt, which costs each image something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from amod.errors import unreadable
from amod.plan import halts
from amod.studies.plan import Run
from amod.studies.rows import markdown, read_as, write
from amod.studies.runner import finished

if TYPE_CHECKING:
    from torch import Tensor

BATCH, ROUNDS = 32, 15
TRAINING_ROUNDS = 7
ALONE, ALONE_ROUNDS = 64, 5  # images one by one, of models whose tokens halt
SPEEDS = ("speedup", "low", "high", "training_speedup", "training_low", "training_high", "training_mib")
COLUMNS = {"run": "str", **dict.fromkeys(SPEEDS, "float64")}
HALTING = {"run": "str", "image": "int64", "flops": "float64", "time": "float64"}


def measure(runs: Sequence[Run], root: Path, output: Path) -> None:
    """Time the finished runs of the least seed that is here, unless that is done: medians and quartiles of dense /
    variant within a round, of the forward pass of ``BATCH`` test images and of a training step with them, eager, one
    thread. Times of runs that are not here stay, and then these get none: they would be of another day."""
    here = [run for run in runs if finished(run, root)]
    first = min((int(run.settings["seed"]) for run in here), default=0)
    timed = [run for run in here if int(run.settings["seed"]) == first]
    dense = next((run for run in timed if run.settings["router"] == "none"), None)
    names, before = {run.name for run in timed}, {*read(output)["run"]}
    if dense is None or names <= before:
        return
    if before - names:
        print(f"{output / 'speed.csv'}: has times of runs that are not here and stays; delete it to time those here")
        return
    import torch

    from amod.analysis.throughput import timing
    from amod.training.finished import load_model, load_run
    from amod.training.folder import read_config

    _, model, data = load_run(root / dense.name)
    models, configs = {dense.name: model}, {run.name: read_config(root / run.name / "config.yaml") for run in timed}
    for name in (run.name for run in timed if run is not dense):  # the data are read once
        models[name] = load_model(root / name, configs[name], data.num_classes)
    variant = next((configs[name] for name in models if name != dense.name), configs[dense.name])
    configs[dense.name].schedule = variant.schedule.model_copy(update={"train": "all", "lora": None})  # as the others
    samples = data.samples("test", train=False)
    images, labels = samples.stacked(samples.drawn(max(BATCH, ALONE), 0))
    batch = images[:BATCH], labels[:BATCH], torch.arange(BATCH)
    print(f"timing {len(models)} models in turns, {ROUNDS} rounds, and training, {TRAINING_ROUNDS} rounds", flush=True)
    with timing.one_thread(), torch.inference_mode():
        steps = {name: lambda model=model: model(batch[0]) for name, model in models.items()}
        forward, _ = timing.alternate(steps, ROUNDS, fill=0.2)
        alone = [image_by_image(name, model, models[dense.name], images[:ALONE]) for name, model in halting(models)]
    trained = {name: TrainingStep(model, configs[name], data, batch) for name, model in models.items()}
    with timing.one_thread():
        training, _ = timing.alternate(trained, TRAINING_ROUNDS, fill=0.2)
    rows = []
    for name, step in trained.items():
        found = [timing.paired(seconds[dense.name], seconds[name]) for seconds in (forward, training)]
        rows.append((name, *(v for q in found for v in (q.median, q.low, q.high)), step.mebibytes()))
    output.mkdir(parents=True, exist_ok=True)
    if alone:
        write(pd.concat(alone).round(4), output / "halting.csv")
    else:
        (output / "halting.csv").unlink(missing_ok=True)
    write(pd.DataFrame(rows, columns=list(COLUMNS)).round(4), output / "speed.csv")


class TrainingStep:
    """One step of a run's own training, from its finished weights, at a learning rate of 0, which leaves them as they
    are: with its losses, its teacher and its frozen weights, on images as they are."""

    def __init__(self, model: Any, cfg: Any, data: Any, batch: tuple[Tensor, ...]) -> None:
        from amod.training.module import freeze
        from amod.training.tasks import TASKS

        freeze(model, cfg.schedule)
        self.module = TASKS[cfg.model.task].parts().module(model, cfg, data)
        self.module.epoch = float(cfg.schedule.epochs)  # its warm-ups are over
        self.optimizer = self.module.make_optimizer(0.0)
        self.batch = batch

    def __call__(self) -> None:
        self.module.train()
        self.optimizer.zero_grad()
        self.module.loss(self.batch).backward()
        self.optimizer.step()

    def mebibytes(self) -> float:
        """The most bytes of tensors alive during a step, once one has been made: weights, the teacher's and what the
        optimiser keeps included."""
        from amod.analysis.throughput.memory import allocated_peak

        self.optimizer.zero_grad()
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        held = sum(tensor.nbytes for tensor in (*self.module.state_dict().values(), *kept) if hasattr(tensor, "nbytes"))
        return (held + allocated_peak(self)) / 2**20


def halting(models: dict[str, Any]) -> list[tuple[str, Any]]:
    """Those in whose plan tokens halt."""
    return [(n, m) for n, m in models.items() if halts(m)]


def image_by_image(name: str, model: Any, dense: Any, images: Tensor) -> pd.DataFrame:
    """Each image alone through both, in turns: its cost, and its time as a share of the dense model's."""
    from amod.analysis.throughput import timing
    from amod.flops import count_flops, image_flops

    whole, rows = count_flops(dense, images[:1]), []
    for i, flops in enumerate(image_flops(model, images).tolist()):
        steps = {"dense": lambda i=i: dense(images[i : i + 1]), "halting": lambda i=i: model(images[i : i + 1])}
        seconds, _ = timing.alternate(steps, ALONE_ROUNDS)
        rows.append((name, i, flops / whole, timing.paired(seconds["halting"], seconds["dense"]).median))
    return pd.DataFrame(rows, columns=list(HALTING))


def halting_section(rows: pd.DataFrame, folder: Path) -> str:
    """Mean and spread over images of what a model whose tokens halt costs each of them; nothing where none does."""
    file = folder / "halting.csv"
    if not file.exists():
        return ""
    lines = [["run", "FLOPs of dense (%)", "least to most", "time of dense (%)", "least to most", "rank correlation"]]
    lines.append(["---"] + ["---:"] * 5)
    settings = rows.set_index("run")["setting"]
    for name, found in read_as(file, HALTING).groupby("run", sort=False):
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
    found = read_as(folder / "speed.csv", COLUMNS)
    if found["run"].duplicated().any():
        raise unreadable(folder / "speed.csv", "it has a run twice")
    return found


def with_speeds(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows with the speeds and memory of those that were timed: in one process, so of no other day."""
    found = read(folder).set_index("run")
    columns = ("speedup", "training_speedup", "training_mib") if len(found) else ()
    return rows.assign(**{name: rows["run"].map(found[name]).astype("Float64") for name in columns})
