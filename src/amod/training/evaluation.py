"""What a finished run is worth on its own data, or on another folder's, by the names of the classes."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from amod.files import make_folder, write_atomically, write_table
from amod.training.checks import evaluation_config
from amod.training.config import EvaluateConfig
from amod.training.run import make_trainer, say_measured
from amod.training.splits import Split
from amod.training.tasks import TASKS, said
from amod.training.terminal import quiet, say
from amod.training.troubles import known_troubles


def evaluate(cfg: EvaluateConfig) -> Mapping[str, float]:
    """Measure the weights of the finished run in ``cfg.run`` on ``cfg.split``, from the folder alone."""
    quiet()
    folder, run = Path(cfg.run or ""), evaluation_config(cfg)
    task = TASKS[run.model.task]
    parts = task.parts()
    model, data = parts.load_measured(folder, run, cfg.split)
    run.schedule.ema_decay = None  # the weights are the average already
    run.distil = run.router.distil_tokens = 0.0  # nothing is taught, so no teacher is needed
    run.trainer.max_time = run.trainer.profiler = None
    module = parts.module(model, run, data)
    predictions = Predictions()
    trainer = make_trainer(
        run.trainer, callbacks=[predictions] if cfg.output else [], enable_progress_bar=sys.stdout.isatty()
    )
    if cfg.output:
        make_folder(Path(cfg.output), f"output={cfg.output}")  # before the minutes of a measurement
    with known_troubles("run the same command again"):
        trainer.test(module, datamodule=data, verbose=False)
    found = trainer.callback_metrics.items()  # what test() returns leaves out what no logger gets
    values = {key.replace("test/", f"{cfg.split}/"): value.item() for key, value in found}
    measured = int(values[f"{cfg.split}/{task.samples}"])
    for key in task.tested:
        say(f"{cfg.split} {said(task, key, values[f'{cfg.split}/{key}'], 4)}")
    say(f"measured on {measured} {task.samples if measured != 1 else task.samples.removesuffix('s')}")
    say_measured(cfg.split, values, task)
    if cfg.output and trainer.is_global_zero:
        write_details(Path(cfg.output), predictions.rows, data.splits["test"], data.class_names)
        say(f"per class, confusion matrix and predictions: {cfg.output}")
    return values


# --- in detail ----------------------------------------------------------------------------------------------------


class Predictions(Callback):
    """``rows`` (N, 4) of all processes, in the order of the images: index, label, predicted class, its probability."""

    rows: Tensor

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # by default it leaves NaN out, and the rest would shift
        self.metric = CatMetric(nan_strategy="disable").to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probability, predicted = outputs.float().softmax(1).max(1)
        self.metric.update(torch.stack([batch[2], batch[1], predicted, probability], 1))  # whole up to 2^24 images

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self.metric.compute().reshape(-1, 4).cpu()
        self.rows = rows[rows[:, 0].argsort()]


def write_details(output: Path, rows: Tensor, split: Split, classes: Sequence[str]) -> None:
    """predictions.csv, per_class.csv, confusion.csv and confusion.png."""
    labels, predicted = rows[:, 1].long(), rows[:, 2].long()
    matrix = MulticlassConfusionMatrix(len(classes), sync_on_compute=False)  # the rows are of all processes
    matrix.update(predicted, labels)
    counts = matrix.compute()
    write_table(
        output / "predictions.csv",
        ["image", "class", "predicted", "probability"],
        (
            [split.source.name(int(index)), classes[int(label)], classes[int(guess)], f"{probability:.6f}"]
            for index, label, guess, probability in rows.tolist()
        ),
    )
    write_table(
        output / "per_class.csv",
        ["class", "images", "correct", "top1"],
        (
            [name, int(row.sum()), int(row[i]), f"{100 * row[i] / row.sum():.2f}" if row.sum() else ""]
            for i, (name, row) in enumerate(zip(classes, counts, strict=True))
        ),
    )
    rows_of = ([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    write_table(output / "confusion.csv", ["class, read as", *classes], rows_of)
    write_atomically(output / "confusion.png", picture(matrix, classes))


def picture(matrix: MulticlassConfusionMatrix, classes: Sequence[str]) -> bytes:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    few = len(classes) <= 40
    figure, axis = plt.subplots(figsize=(max(4, min(14, 0.5 * len(classes) + 2)),) * 2, layout="constrained")
    known = [name.encode(errors="surrogateescape").decode(errors="replace") for name in classes]
    names = [name.replace("$", r"\$") for name in known]  # no formula
    matrix.plot(ax=axis, add_text=few, labels=names if few else None, cmap="Blues")
    if not few:
        axis.set_xticks([])
        axis.set_yticks([])
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png.getvalue()
