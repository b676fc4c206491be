"""What a run writes while it trains (a row of metrics per epoch, checkpoints), and how it ends when it is told to."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amod.errors import UserError
from amod.files import write_table
from amod.training.command import SIGNALS, terminated
from amod.training.loggers import WandbRows
from amod.training.tasks import CLASSIFICATION, Task, said

STOPPED = 143  # exit status of a run that was asked to end: 128 + SIGTERM, as a shell has it; Ctrl-C: 130
TWICE = 0.5  # seconds between two Ctrl-C that are two


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

    def __init__(
        self, folder: Path, every_steps: int | None, print_rows: bool, settings: Any = None, task: Task = CLASSIFICATION
    ) -> None:
        self.folder = folder
        self.task = task
        self.settings = settings  # all processes must have been given the same
        self.every_steps = every_steps
        self.print_rows = print_rows
        self.rows: list[dict[str, float]] = []
        self.kept: dict[str, float] = {}  # the row of the weights that are kept, once that is known
        self.untrained: dict[str, float] = {}  # of a model adapted from a checkpoint, before training
        self.seconds = 0.0  # of training and validation, over all the times the run was resumed
        self._since = time.perf_counter()
        self._validated = False
        self._process = os.getpid()
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._signal: signal.Signals | None = None
        self._signal_time = 0.0
        self.cut_short = False  # by trainer.max_time, inside an epoch
        self.launcher: Any = None  # Lightning's, of the processes that it starts
        self._trainer: Trainer | None = None  # while it trains

    @property
    def best(self) -> dict[str, float]:
        return self.kept or self.task.best_of(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "untrained": self.untrained, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.untrained, self.seconds = state["rows"], state["untrained"], state["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mine = (str(self.folder), self.settings)
        if trainer.world_size == 1:
            return
        if not trainer.strategy.reduce_boolean_decision(mine == trainer.strategy.broadcast(mine), all=True):
            raise UserError(
                f"run_dir={self.folder}: the processes of this run have been given different settings, as by the time "
                "in run_dir; leave that out, or name the job, as in run_dir='runs/${oc.env:SLURM_JOB_ID}'"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbRows):
                logger.send_again(self.rows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()
        self._trainer = trainer
        if self.stopped_early(trainer):
            trainer.should_stop = True  # it had stopped the run, which was killed before the end
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
        if not stepped and trainer.should_stop:
            trainer.should_stop = False  # max_time: its Timer says it again after the next batch
        if not stepped or trainer.is_last_batch:  # the end of an epoch saves anyway, after validation
            return
        if trainer.should_stop and _may_stop(trainer):
            self._save(trainer, "last")
            self.cut_short = True
            raise StopIteration  # ends Lightning's epoch here; a part of one is not validated and has no row
        asked = self._asked_to_stop(trainer)
        if asked or (self.every_steps and trainer.global_step % self.every_steps == 0):
            self._save(trainer, "last")
        if asked:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.cut_short:
            return
        row: dict[str, float] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        columns = self.task.columns
        for key in columns[2:] if self._validated else columns[2:4]:  # validation's numbers may be an older epoch's
            if key in trainer.callback_metrics:
                row[key] = rounded(trainer.callback_metrics[key])
        self._validated = False
        self.rows.append(row)
        if trainer.is_global_zero:
            self._write_rows()
        if self.best is row:
            self._save(trainer, "best")
        self._save(trainer, "last")
        if trainer.is_global_zero and self.print_rows:  # when all is saved: nobody may be there to read it
            print(f"{line_of(row, trainer.max_epochs, self.task)}  {self._elapsed():.0f} s", flush=True)
        if self._asked_to_stop(trainer):
            self._stop(trainer)

    def stopped_early(self, trainer: Trainer) -> bool:
        stoppers = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        return any(callback.wait_count >= callback.patience for callback in stoppers)

    # --- being asked to end

    def listen(self) -> None:
        """Let SIGNALS end the run: with a checkpoint after the step under way, at once outside training."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
                    signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a loader's worker that has just been forked
            return
        now = time.monotonic()
        # a terminal and the process above may both pass one Ctrl-C on
        again = number == self._signal == signal.SIGINT and now - self._signal_time > TWICE
        self._signal, self._signal_time = signal.Signals(number), now
        if self.launcher is not None:
            self.launcher.kill(signal.SIGKILL if again else number)  # on to the processes that Lightning has started
        if again:
            hint = f"the same command and run_dir={self.folder} go on from the last checkpoint"
            _say_at_once(f"stopped by a second Ctrl-C, at once; {hint}")
            os._exit(128 + number)
        if number == signal.SIGINT and self._trainer is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            _say_at_once("Ctrl-C: the step under way is finished and saved; a second one ends at once")
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
        if callable(handler) and handler not in (signal.default_int_handler, terminated):
            handler(self._signal, None)  # type: ignore[arg-type]  # submitit's puts the job back into the queue
        sys.exit(128 + signal.SIGINT if self._signal == signal.SIGINT else STOPPED)

    # --- files

    def _elapsed(self) -> float:
        return round(self.seconds + time.perf_counter() - self._since, 3)

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / "checkpoints" / f"{name}.ckpt")

    def _write_rows(self) -> None:
        columns = self.task.columns
        write_table(self.folder / "metrics.csv", columns, ([row.get(name) for name in columns] for row in self.rows))


def _say_at_once(line: str) -> None:
    """Past Python's buffers, in which the signal may have come."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _may_stop(trainer: Trainer) -> bool:
    """Whether min_epochs and min_steps are done."""
    return trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)


def rounded(value: torch.Tensor) -> float:
    """Six significant digits: what a float32 metric holds, without its binary tail."""
    return float(f"{value.item():.6g}")


def line_of(row: dict[str, float], epochs: int | None, task: Task) -> str:
    line = f"epoch {row['epoch'] + 1:.0f}/{epochs}  lr {row['lr']:.2e}  train loss {row['train/loss']:.4f}"
    if "val/loss" in row:
        others = [said(task, name, row[f"val/{name}"], 2) for name in task.shown if name != "loss"]
        line += "  ".join(["", f"val loss {row['val/loss']:.4f}", *others])
    return line
