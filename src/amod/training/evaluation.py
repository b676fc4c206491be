"""A finished run's model, and what it is worth on images: its own, or another folder's, by the names of the classes."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from safetensors import safe_open
from timm.models import load_state_dict
from torch import Tensor, nn
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from amod.errors import UserError, one_line
from amod.training.checks import evaluation_config
from amod.training.config import EvaluateConfig, TrainConfig
from amod.training.folder import read_config, write_atomically
from amod.training.loaders import DataModule, build_datamodule
from amod.training.module import Classifier
from amod.training.record import about, classes_of, fingerprint, read_record
from amod.training.run import make_trainer, say_measured, weightless
from amod.training.sources import load_one
from amod.training.splits import Split
from amod.training.terminal import quiet, say
from amod.training.troubles import known_troubles
from amod.training.weights import build, input_config


def evaluate(cfg: EvaluateConfig) -> Mapping[str, float]:
    """Measure the weights of the finished run in ``cfg.run`` on ``cfg.split``, from the folder alone."""
    quiet()
    folder, run = Path(cfg.run or ""), evaluation_config(cfg)
    model, data = load_measured(folder, run, cfg.split)
    run.schedule.ema_decay = None  # the weights are the average already
    run.trainer.max_time = run.trainer.profiler = None
    module = Classifier(model, run.schedule, data.num_classes, run.seed)
    predictions = Predictions()
    trainer = make_trainer(
        run.trainer, callbacks=[predictions] if cfg.output else [], enable_progress_bar=sys.stdout.isatty()
    )
    with known_troubles("run the same command again"):
        trainer.test(module, datamodule=data, verbose=False)
    found = trainer.callback_metrics.items()  # what test() returns leaves out what no logger gets
    values = {key.replace("test/", f"{cfg.split}/"): value.item() for key, value in found}
    images = int(values[f"{cfg.split}/images"])
    for key in ("top1", "top5"):
        say(f"{cfg.split} {key.replace('top', 'top-')} {values[f'{cfg.split}/{key}']:.4f} %")
    say(f"measured on {images} image{'s' if images != 1 else ''}")
    say_measured(cfg.split, values)
    if cfg.output and trainer.is_global_zero:
        write_details(Path(cfg.output), predictions.rows, data.splits["test"], data.class_names)
        say(f"per class, confusion matrix and predictions: {cfg.output}")
    return values


def load_run(folder: Path, cfg: TrainConfig | None = None) -> tuple[TrainConfig, nn.Module, DataModule]:
    """(config, model, data) of a finished run: the best epoch's weights in evaluation mode, the data unaugmented.

    ``cfg`` replaces the config that the folder holds, to read the data from another place for instance.
    """
    run = read_config(folder / "config.yaml") if cfg is None else cfg
    inputs = input_config(run.model)
    sizes = run.schedule.batch_size, run.schedule.eval_batch_size
    data = build_datamodule(run.data, inputs, {}, *sizes, run.seed, classes_of(folder))
    return run, load_model(folder, run, data.num_classes), data


def load_measured(folder: Path, run: TrainConfig, split: str) -> tuple[nn.Module, DataModule]:
    """The model, and the images of ``split`` as the test images of a data module; what is odd about them is said."""
    count = classes_in(weights_of(folder))
    record = read_record(folder)
    classes = None if record is None else record["classes"]
    images, of = load_one(run.data, split, classes)
    known = len(images.source.classes)
    if known != count:
        raise UserError(
            f"data.root={run.data.root}: has {known} classes, the model of run={folder} {count}; name the data that it "
            "was trained on"
        )
    if record is None and run.data.name == "folder":
        say("the run folder does not name its classes (it is of before data.json); labels are taken in their order")
    place = "" if run.data.name == "digits" else f" in {run.data.root}"
    part = "" if split == "all" or len(images) == of else f" of the {of}{place}; split=all measures all"
    say(f"{split}: {len(images)} images{part}")
    if record is not None:
        say_origin(images, split, record, run)
    inputs = input_config(run.model)
    sizes = run.schedule.batch_size, run.schedule.eval_batch_size
    return load_model(folder, run, count), DataModule(run.data, {"test": images}, inputs, {}, *sizes, run.seed)


def say_origin(images: Split, split: str, record: Mapping[str, Any], run: TrainConfig) -> None:
    """Whether they are the run's own images."""
    if split == "all":
        try:
            seen, _ = load_one(run.data, "train", record["classes"])
        except UserError:  # no training images there
            return
        if fingerprint(seen) == record["splits"]["train"]["fingerprint"]:
            say(f"warning: it was trained on {len(seen)} of these images")
    elif about(images) != record["splits"][split]:
        by_order = run.data.split_by == "order" and len(images) < len(images.source.labels)
        trained = ", and it may have been trained on some of them" if by_order else ""
        say(f"they are not the run's own {split} images (it had {record['splits'][split]['images']}){trained}")


def load_model(folder: Path, run: TrainConfig, num_classes: int) -> nn.Module:
    weights = weights_of(folder)
    model = build(weightless(run), num_classes).model
    try:
        model.load_state_dict(load_state_dict(str(weights)))
    except Exception as error:  # whatever the bytes make the readers raise
        raise UserError(f"{weights}: cannot be read as this run's weights ({one_line(error)})") from error
    return model.eval()


def weights_of(folder: Path) -> Path:
    weights = folder / "weights.safetensors"
    if not weights.exists():
        raise UserError(f"run={folder}: is not finished, it has no weights.safetensors; resume it with its own command")
    return weights


def classes_in(weights: Path) -> int:
    """How many classes a model's head has."""
    try:
        with safe_open(weights, "pt") as file:
            return file.get_slice("head.weight").get_shape()[0]
    except Exception as error:  # whatever the bytes make the reader raise
        raise UserError(f"{weights}: cannot be read as this run's weights ({one_line(error)})") from error


# --- in detail ----------------------------------------------------------------------------------------------------


class Predictions(Callback):
    """``rows`` (N, 4) of all processes, in the order of the images: index, label, predicted class, its probability."""

    rows: Tensor

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metric = CatMetric().set_dtype(torch.float64).to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probability, predicted = outputs.double().softmax(1).max(1)
        self.metric.update(torch.stack([batch[2].double(), batch[1].double(), predicted.double(), probability], 1))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self.metric.compute().reshape(-1, 4).cpu()
        self.rows = rows[rows[:, 0].argsort()]


def write_details(output: Path, rows: Tensor, split: Split, classes: Sequence[str]) -> None:
    """predictions.csv, per_class.csv, confusion.csv and confusion.png."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror}); name another folder") from error
    labels, predicted = rows[:, 1].long(), rows[:, 2].long()
    matrix = MulticlassConfusionMatrix(len(classes), sync_on_compute=False)  # the rows are of all processes
    matrix.update(predicted, labels)
    counts = matrix.compute()
    table(
        output / "predictions.csv",
        ["image", "class", "predicted", "probability"],
        (
            [split.source.name(int(index)), classes[int(label)], classes[int(guess)], f"{probability:.6f}"]
            for index, label, guess, probability in rows.tolist()
        ),
    )
    table(
        output / "per_class.csv",
        ["class", "images", "correct", "top1"],
        (
            [name, int(row.sum()), int(row[i]), f"{100 * row[i] / row.sum():.2f}" if row.sum() else ""]
            for i, (name, row) in enumerate(zip(classes, counts, strict=True))
        ),
    )
    rows_of = ([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    table(output / "confusion.csv", ["class, read as", *classes], rows_of)
    write_atomically(output / "confusion.png", picture(matrix, classes))


def table(file: Path, header: Sequence[str], rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


def picture(matrix: MulticlassConfusionMatrix, classes: Sequence[str]) -> bytes:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    few = len(classes) <= 40
    figure, axis = plt.subplots(figsize=(max(4, min(14, 0.5 * len(classes) + 2)),) * 2, layout="constrained")
    matrix.plot(ax=axis, add_text=few, labels=list(classes) if few else None, cmap="Blues")
    if not few:
        axis.set_xticks([])
        axis.set_yticks([])
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png.getvalue()
