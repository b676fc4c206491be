"""What a run writes while it trains (a row of metrics per epoch, checkpoints that are never half written), and how it
ends when it is told to.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amod.errors import UserError
from amod.training.settings import SIGNALS

log = logging.getLogger(__name__)

COLUMNS = ("epoch", "step", "lr", "train/loss", "val/loss", "val/top1", "val/top5")
STOPPED = 143  # exit status of a run that was asked to end: 128 + SIGTERM, as a shell has it


# --- files --------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write to a temporary name in the same folder, then rename: a reader sees the old file or the new, whole.

    The old file becomes ``keep``. The temporary name is always the same (one process writes in a run folder), so that
    kills leave no pile of them. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room or make it writable, and run the same command "
            "again; what was written before is intact"
        ) from error


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written by ``write_atomically`` and read by ``read_checkpoint``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        write_atomically(path, buffer.getvalue(), path.with_name("previous.ckpt") if path.name == "last.ckpt" else None)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path)


# What the checkpoint of a run holds: Lightning's part, and the module's train_loss.
CONTENTS = ("state_dict", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "train_loss")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run, on the CPU. Code that is pickled in it is refused and not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the reader raise
        reason = "it holds pickled code, which is not run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path}: refused ({reason}); put the run's own file back, or delete the folder") from error
    if lacks := [key for key in CONTENTS if not isinstance(checkpoint, dict) or key not in checkpoint]:
        raise UserError(
            f"{path}: is no checkpoint of this version, it lacks {', '.join(lacks)}; put the run's own file back, "
            "resume the run with the version that wrote it, or name another run_dir"
        )
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written: torch.save's archives carry check sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever the bytes make the reader raise
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: last.ckpt, or the one before it where that is torn; None to begin anew."""
    found = [path for name in ("last", "previous") if (path := folder / f"checkpoints/{name}.ckpt").exists()]
    for path in found:
        if is_whole(path):
            return path
        log.warning("warning: %s is damaged; the run goes on from before it", path)
    return None


def best_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint after optimiser step ``step``: best.ckpt, or where that is damaged another of that step."""
    best, *others = [folder / f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")]
    for path in (best, *others):
        if is_whole(path) and (checkpoint := read_checkpoint(path))["global_step"] == step:
            if path is not best:
                log.warning("warning: %s is damaged; %s has the same weights", best, path)
            return checkpoint
    raise UserError(
        f"{best}: is damaged, and no other checkpoint has the best epoch's weights; delete the folder and run the same "
        "command again"
    )


@contextmanager
def restored_signals() -> Iterator[None]:
    """Put the handlers of SIGNALS back in the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


# --- the run ------------------------------------------------------------------------------------------------------


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
        self.untrained: dict[str, float] = {}  # of a model adapted from a checkpoint, before training
        self.seconds = 0.0  # of training and validation, over all the times the run was resumed
        self._since = time.perf_counter()
        self._validated = False
        self._process = os.getpid()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._signal: signal.Signals | None = None
        self.launcher: Any = None  # Lightning's, of the processes that it starts
        self._trainer: Trainer | None = None  # while it trains

    @property
    def best(self) -> dict[str, float]:
        """The row of the first epoch with the highest val/top1; the last row of a run without validation."""
        validated = [row for row in self.rows if "val/top1" in row]
        return max(validated, key=lambda row: row["val/top1"]) if validated else self.rows[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "untrained": self.untrained, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.untrained, self.seconds = state["rows"], state["untrained"], state["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.send_again(self.rows)  # type: ignore[attr-defined]  # a WandbRows

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        self._trainer = trainer
        self.listen()  # Lightning's handlers save inside a step, and talk to other processes inside their collectives

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self._elapsed()
        self._trainer = None
        if self._asked_to_stop(trainer):  # since the last epoch's end
            self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.is_last_batch:  # the end of an epoch saves anyway, after validation
            return
        asked = self._asked_to_stop(trainer)
        if asked or (self.every_steps and trainer.global_step % self.every_steps == 0):
            self._save(trainer, "last")
        if asked:
            self._stop(trainer)

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
        if self._asked_to_stop(trainer):
            self._stop(trainer)

    # --- being asked to end

    def listen(self) -> None:
        """Let SIGNALS end the run: with a checkpoint after the step under way, at once outside training."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a loader's worker that has just been forked
            return
        self._signal = signal.Signals(number)
        if self.launcher is not None:
            self.launcher.kill(number)  # on to the processes that Lightning has started
        if self._trainer is None:
            self._stop(None)

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was; all must leave after the same step."""
        asked = self._signal is not None
        return asked if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _stop(self, trainer: Trainer | None) -> NoReturn:
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            sys.exit(0)  # Lightning kills the first process when another ends with an error
        by = f"stopped by {(self._signal or signal.SIGTERM).name}"
        where = "outside training" if trainer is None else f"after step {trainer.global_step}, with a checkpoint"
        hint = f"resume with the same command and run_dir={self.folder}"
        print(f"{by} {where}; {hint}", file=sys.stderr, flush=True)
        handler = self._handlers.get(self._signal) if self._signal else None
        if callable(handler):
            handler(self._signal, None)  # type: ignore[arg-type]  # submitit's puts the job back into the queue
        sys.exit(STOPPED)

    # --- files

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
