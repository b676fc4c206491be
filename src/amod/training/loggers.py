"""What logger= asks for besides metrics.csv: Weights & Biases, TensorBoard."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amod.errors import UserError, one_line
from amod.files import write_atomically
from amod.training.config import Logger as LoggerConfig
from amod.training.config import TrainConfig
from amod.training.folder import saved_config


class WandbRows(WandbLogger):
    """One row per epoch, numbered by its optimiser step. W&B ignores a row that is not newer than its last one."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """An epoch's validation waits for its training loss, which completes the row."""
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step, commit="train/loss" in metrics)

    def send_again(self, rows: Sequence[Mapping[str, float]]) -> None:
        """The rows of a resumed run: W&B's client sends every 15 seconds, and what was waiting died with the process;
        offline it begins a new file, and what of the old one was written to disk is not known."""
        for row in rows:
            self.log_metrics({key: row[key] for key in row if key != "step"}, int(row["step"]) - 1)


@rank_zero_only
def check_logger(logger: LoggerConfig) -> None:
    """W&B: logged in, asked for the key on a terminal, or offline; nothing is sent."""
    if logger.name != "wandb":
        return
    import wandb

    try:
        wandb.Settings(project=logger.project, run_name=logger.run_name)
    except Exception as error:  # pydantic's too
        raise UserError(
            f"logger.project={logger.project} logger.run_name={logger.run_name}: refused by W&B ({one_line(error)}); "
            "choose other names"
        ) from error
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return
    try:
        wandb.login(verify=False)
    except (wandb.Error, ValueError) as error:
        raise UserError(
            f"logger=wandb: {one_line(error)}; run `wandb login`, or set WANDB_MODE=offline to log without an account"
        ) from error


def wandb_id(folder: Path) -> str:
    """The run's id at W&B: the one that a sweep's agent gives, else the folder's own. A resumed run finds it again."""
    kept = folder / "wandb-id.txt"
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    if given or not kept.exists():
        write_atomically(kept, f"{given or uuid.uuid4().hex[:8]}\n".encode())
    return kept.read_text().strip()


@rank_zero_only
def loggers(cfg: TrainConfig, folder: Path) -> list[Logger]:
    """What logger= asks for besides metrics.csv."""
    if cfg.logger.name == "csv":
        return []
    if cfg.logger.name == "tensorboard":
        from tensorboard.summary.writer import event_file_writer

        event_file_writer.socket = SimpleNamespace(gethostname=lambda: "host")  # it is part of the files' names
        return [TensorBoardLogger(folder, name="", version="tensorboard")]
    import wandb

    logging.getLogger("wandb").setLevel(logging.WARNING)  # its notes, in the run folder, would name the path to it
    if wandb.run is not None:  # a job before this one, in the same process, failed
        wandb.finish(exit_code=1)
    logger = WandbRows(
        project=cfg.logger.project,
        name=cfg.logger.run_name,
        id=wandb_id(folder),
        resume="allow",
        save_dir=folder,
        config={"amod": saved_config(cfg)},
        # no host, user or path of this machine leaves it, or enters the run folder
        settings=wandb.Settings(
            host="", x_disable_meta=True, x_disable_machine_info=True, disable_git=True, silent=True
        ),
    )
    try:
        _ = logger.experiment
    except wandb.Error as error:
        raise UserError(
            f"logger=wandb: {one_line(error)}; run `wandb login`, or set WANDB_MODE=offline to log without an account"
        ) from error
    return [logger]
