"""What a run writes while it trains: one row of metrics per epoch, and checkpoints that are never half written."""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

COLUMNS = ("epoch", "step", "lr", "train/loss", "val/loss", "val/top1", "val/top5")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, then rename: a reader sees the old file or the new, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written by ``write_atomically``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())


class RunRecorder(Checkpoint):
    """Keeps metrics.csv, checkpoints/last.ckpt and checkpoints/best.ckpt of a run folder.

    The rows are part of the checkpoint and the file is written anew from them, so a run that was killed between the
    two repeats no row. It is a ``Checkpoint`` because Lightning calls those last at the end of an epoch, when
    everything is logged.
    """

    def __init__(self, folder: Path, every_steps: int | None, print_rows: bool) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self.print_rows = print_rows
        self.rows: list[dict[str, float]] = []
        self.untrained: dict[str, float] = {}  # val/top1 before training, of a model adapted from a checkpoint
        self.seconds = 0.0  # of training and validation, over all the times the run was resumed
        self._since = time.perf_counter()
        self._validated = False

    @property
    def best(self) -> dict[str, float]:
        """The row of the first epoch with the highest val/top1; the last row of a run without validation."""
        validated = [row for row in self.rows if "val/top1" in row]
        return max(validated, key=lambda row: row["val/top1"]) if validated else self.rows[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "untrained": self.untrained, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.untrained, self.seconds = state["rows"], state["untrained"], state["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self._elapsed()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = self.every_steps and stepped and trainer.global_step % self.every_steps == 0
        if due and not trainer.is_last_batch:  # the end of an epoch saves anyway, after validation
            self._save(trainer, "last")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        for key in COLUMNS[2:] if self._validated else COLUMNS[2:4]:  # validation's numbers may be an older epoch's
            if key in trainer.callback_metrics:
                row[key] = rounded(trainer.callback_metrics[key])
        self._validated = False
        self.rows.append(row)
        if trainer.is_global_zero:
            self._write_rows()
            if self.print_rows:
                print(f"{line_of(row, trainer.max_epochs)}  {self._elapsed():.0f} s", flush=True)
        if self.best is row:
            self._save(trainer, "best")
        self._save(trainer, "last")

    def _elapsed(self) -> float:
        return round(self.seconds + time.perf_counter() - self._since, 3)

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / "checkpoints" / f"{name}.ckpt")

    def _write_rows(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.folder / "metrics.csv", text.getvalue().encode())


def rounded(value: torch.Tensor) -> float:
    """Six significant digits: what a float32 metric holds, without its binary tail."""
    return float(f"{value.item():.6g}")


def line_of(row: dict[str, float], epochs: int | None) -> str:
    line = f"epoch {row['epoch'] + 1:.0f}/{epochs}  lr {row['lr']:.2e}  train loss {row['train/loss']:.4f}"
    if "val/top1" in row:
        line += f"  val loss {row['val/loss']:.4f}  top-1 {row['val/top1']:.2f} %  top-5 {row['val/top5']:.2f} %"
    return line
