"""One run, one folder: train, go on after a stop, test the best epoch once, write the summary."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch import profilers
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichModelSummary, RichProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save

from amod.errors import UserError, one_line, shown
from amod.files import write_atomically
from amod.training.callbacks import RunRecorder, restored_signals, rounded
from amod.training.checkpoints import AtomicCheckpoints, best_checkpoint, newest_checkpoint
from amod.training.config import Schedule, TrainConfig, TrainerArguments
from amod.training.costs import Costs
from amod.training.curves import plot_curves
from amod.training.folder import (
    RunLock,
    check_run_dir,
    flat,
    read_config,
    read_summary,
    saved_config,
    start_folder,
    unfinished_twin,
)
from amod.training.loaders import DataModule
from amod.training.loggers import check_logger, loggers
from amod.training.lora import merged
from amod.training.module import TaskModule, check_optimizer, freeze, global_batch, limited, peak_lr
from amod.training.record import check_same, read_record
from amod.training.tasks import TASKS, Task
from amod.training.terminal import quiet, say, show
from amod.training.troubles import known_troubles
from amod.training.weights import shortened, weightless

# What decides the compute of a method in the place of a capacity.
OWN = {"tome": "r", "merge": "r", "evit": "keep_rate", "dynamicvit": "keep_rate", "avit": "ponder", "plan": "file"}
PROFILERS = {
    "simple": profilers.SimpleProfiler,
    "advanced": profilers.AdvancedProfiler,
    "pytorch": profilers.PyTorchProfiler,
}


def train(cfg: TrainConfig) -> float | None:
    """Train, or go on with, the run of ``cfg.run_dir``; the best validation (of ``Task.best``), if there is one."""
    quiet()
    rank_zero_only(check_run_dir)(cfg)  # a sweep's jobs before this one may have used the folder
    folder = Path(cfg.run_dir)
    if summary := finished(cfg, folder):
        check_data_is_the_same(cfg, folder)
        say(f"{folder} is finished and is not repeated; another run_dir starts a new run")
        if summary.get("ended_by") == "trainer.max_time":
            say(f"trainer.max_time ended it after {summary['epochs']} epochs; with a longer one it goes on")
        show(summary)
        return summary[f"val_{TASKS[cfg.model.task].best}"]
    lock = RunLock(folder) if rank_zero_only.rank == 0 else None  # type: ignore[attr-defined]
    try:
        with restored_signals(), known_troubles(go_on(folder)):
            return _train(cfg, folder, lock)
    finally:
        if lock is not None:
            lock.release()


def go_on(folder: Path) -> str:
    return f"the same command and run_dir={folder} go on from the last checkpoint"


def finished(cfg: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The summary of a run of which no more is asked."""
    if not (folder / "summary.json").exists():
        return None
    summary = read_summary(folder)
    before = read_config(folder / "config.yaml")
    if summary.get("ended_by") == "trainer.max_time":
        more = seconds_of(cfg.trainer.max_time) > seconds_of(before.trainer.max_time)
    else:
        more = cfg.schedule.epochs > before.schedule.epochs
    return None if more else summary


def check_data_is_the_same(cfg: TrainConfig, folder: Path) -> None:
    """A finished run says nothing of other data, which are looked at where data.root is another one."""
    if cfg.data.root != read_config(folder / "config.yaml").data.root:
        found = TASKS[cfg.model.task].parts().read(cfg)
        check_same(read_record(folder), found.record(), folder, cfg.data.root)


def seconds_of(limit: Any) -> float:
    """Of a trainer.max_time."""
    if limit is None:
        return math.inf
    if isinstance(limit, dict):
        return timedelta(**limit).total_seconds()
    days, hours, minutes, seconds = map(int, str(limit).split(":"))
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()


def _train(cfg: TrainConfig, folder: Path, lock: RunLock | None) -> float | None:
    check_logger(cfg.logger)
    task = TASKS[cfg.model.task]
    parts = task.parts()
    bar = sys.stdout.isatty() if cfg.trainer.enable_progress_bar is None else cfg.trainer.enable_progress_bar
    recorder = RunRecorder(folder, cfg.checkpoint_every_steps, not bar, flat(saved_config(cfg, whole=True)), task)
    recorder.listen()
    costs = Costs()
    trainer = make_trainer(
        cfg.trainer,
        folder,
        callbacks=[recorder, costs, *callbacks(cfg, task), *([RichProgressBar()] if bar else [])],
        enable_progress_bar=bar,
        plugins=[AtomicCheckpoints()],
    )
    recorder.launcher = trainer.strategy.launcher
    seed_everything(cfg.seed, verbose=False)
    schedule = cfg.schedule
    data = parts.read(cfg)
    check_batches(trainer, data, schedule)
    newest = newest_checkpoint(folder)  # where there is one, the weights are there, and their source may be gone
    source = weightless(cfg) if newest else cfg
    built = parts.build(source, data)
    compute = parts.cost(built.model, cfg)
    if schedule.train == "routers" and not (newest or built.adapted):
        raise UserError(
            f"schedule.train=routers: all other weights stay as they are, and of {cfg.model.label} for these data the "
            "head at least would be random; give model.checkpoint=RUN_FOLDER of a run on the same classes"
        )
    if schedule.train == "head" and built.fresh and not newest:
        raise UserError(
            f"schedule.train=head: all other weights stay as they are, and those of router={cfg.router.name} would be "
            f"random ({shortened(built.fresh)}); give a model.checkpoint= that has them, or choose schedule.train=all"
        )
    trainable = freeze(built.model, schedule)
    module = parts.module(built.model, source, data)
    batch = global_batch(trainer, schedule)
    lr = peak_lr(schedule, batch)
    gpu = torch.cuda.is_available()  # the Trainer's own device may be the CPU all the same
    check_optimizer(schedule, lr, trainer.strategy.root_device if gpu else torch.device("cpu"))

    begin(cfg, folder, lock, newest, data)
    rank_zero_only(parts.keep)(cfg, folder)
    announce(cfg, data, compute, batch, lr)
    if schedule.train != "all":
        lora = "" if schedule.lora is None else f", and a LoRA of rank {schedule.lora}"
        say(f"{trainable:,} of {compute['params']:,} parameters are trained: the {schedule.train}{lora}")
    trainer.loggers = loggers(cfg, folder) or []
    with one_voice(trainer, go_on(folder)):
        if newest:
            say(f"resuming {folder}")
        elif built.adapted:
            measure_untrained(trainer, module, data, recorder)
        module.model.train()  # transformers hands out models in evaluation mode, and Lightning leaves them in it
        trainer.fit(module, datamodule=data, ckpt_path=newest)
        if not recorder.rows:
            raise UserError(
                f"trainer.max_time={shown(cfg.trainer.max_time)}: ended inside the first epoch, with a checkpoint; the "
                f"same command with a longer one and run_dir={folder} goes on"
            )
        kept = best_checkpoint(folder, int(recorder.best["step"]), {int(row["step"]) for row in recorder.rows})
        recorder.kept = next(row for row in recorder.rows if row["step"] == kept["global_step"])
        module.check_weights(kept["state_dict"], folder / "checkpoints/best.ckpt")
        module.load_state_dict(kept["state_dict"])
        trainer.test(module, datamodule=data, verbose=False)
    ended_by = None
    if len(recorder.rows) < schedule.epochs:
        ended_by = "callbacks=early_stopping" if recorder.stopped_early(trainer) else "trainer.max_time"
    tested = {key: rounded(value) for key, value in trainer.callback_metrics.items()}
    best = task.best
    final = module.evaluated if schedule.lora is None else merged(module.evaluated)
    compute |= parts.measured(final, data) or {}
    target, share = cfg.router.target, compute.get("share_kept", 0.0)
    if target is not None and abs(share - target) > 0.05:
        advice = "longer or with a larger router.scale comes nearer"
        if share < target:
            advice = "a target shuts gates and opens none; a smaller router.scale or schedule.lr shuts fewer"
        where = "above" if share > target else "below"
        say(f"share kept {share:g}, {where} router.target={target:g}; {advice}")
    if schedule.train != "all":
        compute["params_trained"] = trainable
    summary = {
        "model": cfg.model.label,
        "data": cfg.data.name,
        **compute,
        "seed": cfg.seed,
        "global_batch": batch,
        "lr": lr,
        f"val_{best}_untrained": recorder.untrained.get(f"val/{best}"),
        f"test_{best}_untrained": recorder.untrained.get(f"test/{best}"),
        f"val_{best}": recorder.best.get(f"val/{best}"),
        **{f"test_{name}": tested.get(f"test/{name}") for name in task.tested},
        f"test_{task.samples}": int(tested.get(f"test/{task.samples}", 0)),
        f"test_{task.samples}_unreadable": int(tested.get("test/unreadable", 0)),
        "best_epoch": recorder.best["epoch"],
        "epochs": len(recorder.rows),
        "ended_by": ended_by,
        "seconds": recorder.seconds,
        **costs.summary(),
    }
    if trainer.is_global_zero:
        state = final.state_dict()
        tied = {value.data_ptr(): key for key, value in state.items()}  # a file of safetensors has no two names for one
        weights = {
            key: value.contiguous() if tied[value.data_ptr()] == key else value.clone() for key, value in state.items()
        }
        names = {"classes": json.dumps(data.class_names)}
        write_atomically(folder / "weights.safetensors", save(weights, names))
        write_atomically(folder / "curves.png", plot_curves(recorder))
        write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        for logger in trainer.loggers:
            if cfg.logger.name == "wandb":
                logger.experiment.summary.update(summary)  # type: ignore[attr-defined]
                logger.experiment.finish()  # type: ignore[attr-defined]  # the next job of a sweep starts its own
    show(summary)
    say_measured("test", tested, task)
    say(f"run folder: {folder}")
    return recorder.best.get(f"val/{best}")


@rank_zero_only
def begin(cfg: TrainConfig, folder: Path, lock: RunLock | None, newest: Path | None, data: DataModule) -> None:
    """Say which folder it is, and make it; a run goes on only with the data that it began with."""
    assert lock is not None
    if twin := unfinished_twin(cfg):
        say(f"an unfinished run of these settings is in {twin}; to go on with it, add run_dir={twin}")
    say(f"run folder: {folder}")
    record, now = read_record(folder), data.record()
    if newest is not None:
        check_same(record, now, folder, cfg.data.root)
    start_folder(cfg, folder, lock, newest, now)


def announce(cfg: TrainConfig, data: DataModule, compute: Mapping[str, Any], batch: int, lr: float) -> None:
    say(f"{cfg.data.name}: {data.sizes['train']} train, {data.sizes['val']} val, {data.sizes['test']} test {data.unit}")
    costs = f"{compute['gflops']:.4f} GFLOPs, {compute['params']:,} parameters"
    say(f"{cfg.model.label}, router {cfg.router.name}: {costs}")
    if counts := compute.get("tokens_kept"):
        own = OWN.get(cfg.router.name)
        asked = f"router.{own}={getattr(cfg.router, own)}" if own else f"capacity={cfg.capacity:g}"
        if cfg.budget is not None:
            asked = f"budget={cfg.budget}" if isinstance(cfg.budget, str) else f"budget={cfg.budget:g} GFLOPs"
        kept: dict[int, list[str]] = {}
        for block, count in counts.items():
            kept.setdefault(count, []).append(block)
        tokens = compute["tokens"]
        share = f" ({next(iter(kept)) / tokens:.4f})" if len(kept) == 1 else ""
        found = [f"{count} of {tokens} tokens{share} in blocks {', '.join(at)}" for count, at in kept.items()]
        say(f"{asked} asked: {'; '.join(found)}")
    reference = cfg.schedule.lr_reference_batch
    scaled = f", schedule.lr={cfg.schedule.lr:g} x {batch} / lr_reference_batch {reference}" if reference else ""
    say(f"global batch {batch}, lr {lr:g}{scaled}")


def measure_untrained(trainer: Trainer, module: TaskModule, data: DataModule, recorder: RunRecorder) -> None:
    for measure in (trainer.validate, trainer.test):  # nothing is chosen by the latter
        measure(module, datamodule=data, verbose=False)
        recorder.untrained |= {key: rounded(value) for key, value in trainer.callback_metrics.items()}
    key, (words, unit) = module.task.best, module.task.shown[module.task.best]
    values = {split: recorder.untrained.get(f"{split}/{key}") for split in ("val", "test")}
    found = [f"{split} {words} {value}{unit}" for split, value in values.items() if value is not None]
    if found:
        say(f"before training: {', '.join(found)}")


def say_measured(split: str, values: Mapping[str, Any], task: Task) -> None:
    """What a measurement leaves out, if anything, and where it is of no numbers."""
    if not math.isfinite(values.get(f"{split}/loss", 0.0)):
        say(f"warning: the {split} loss is not finite: the model gives no numbers for some {task.samples}")
    if left := int(values.get(f"{split}/unreadable", 0)):
        read = int(values[f"{split}/{task.samples}"])
        of = f"{left} of {read + left} {split} {task.samples}"
        words = "accuracy" if task.best == "top1" else task.shown[task.best][0]
        say(f"warning: {of} could not be read; the {words} is of the other {read}")


# --- Lightning's Trainer ------------------------------------------------------------------------------------------


def make_trainer(arguments: TrainerArguments, folder: Path | None = None, **ours: Any) -> Trainer:
    """Lightning's Trainer with the arguments of the config and ours; what it refuses is a UserError."""
    given = {**arguments.model_dump(), "profiler": None, "logger": False, **ours}
    if arguments.profiler is not None and folder is not None:
        given["profiler"] = PROFILERS[arguments.profiler](dirpath=folder, filename="profile")
    srun = "; start trainer.devices processes on each of trainer.num_nodes nodes, with srun --ntasks-per-node"
    srun = srun if "SLURM_NTASKS" in os.environ else ""
    try:
        trainer = Trainer(**given)
        environment = trainer._accelerator_connector.cluster_environment
        if environment is not None and environment.creates_processes_externally:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except (MisconfigurationException, ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: Lightning refuses these arguments ({one_line(error)}){srun}") from error
    wanted = given["precision"]
    if wanted.startswith("16-") and trainer.precision != wanted:
        raise UserError(
            f"trainer.precision={wanted}: needs a GPU, here it would be {trainer.precision}; choose that, or 32-true"
        )
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: nothing says where the first node is, and this one would wait for "
            "the others; start the command by torchrun or srun on each, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    if trainer.world_size > 1 and isinstance(environment, SLURMEnvironment) and "SLURM_STEP_ID" not in os.environ:
        raise UserError(
            f"trainer.devices: one process of {trainer.world_size} is here, and would wait for the others{srun}"
        )
    return trainer


def callbacks(cfg: TrainConfig, task: Task) -> list[Callback]:
    found: list[Callback] = [RichModelSummary()] if cfg.trainer.enable_model_summary else []
    chosen = cfg.callbacks
    if chosen.name == "early_stopping":
        low = task.is_low(chosen.monitor.removeprefix("val/"))
        stop = EarlyStopping(
            chosen.monitor,
            chosen.min_delta,
            chosen.patience,
            mode="min" if low else "max",
            check_on_train_epoch_end=False,
        )
        found.append(stop)
    return found


def check_batches(trainer: Trainer, data: DataModule, schedule: Schedule) -> None:
    """What Lightning and timm would find wrong with the batches only once the training has begun."""
    data.trainer = trainer  # its processes share the batches
    train = data.train_dataloader()
    loaders = {"train": lambda: train, "val": data.val_dataloader, "test": data.test_dataloader}
    for split, loader in loaders.items():
        limit = getattr(trainer, f"limit_{split}_batches")
        if limit and not limited(batches := len(loader()), limit):
            raise UserError(f"trainer.limit_{split}_batches={limit}: leaves none of {batches} batches; raise it")
    batches, interval = limited(len(train), trainer.limit_train_batches), trainer.val_check_interval
    every = max(1, int(batches * interval)) if isinstance(interval, float) else interval
    if trainer.limit_val_batches and batches % every:
        raise UserError(  # a run resumed inside an epoch would miss the only validation of it
            f"trainer.val_check_interval={interval}: an epoch has {batches} batches and must end with a validation; "
            "choose a divisor of that, or null to validate only then"
        )
    if (window := schedule.accumulate) > batches:  # Lightning steps at the epoch's end, and divides by what was asked
        raise UserError(f"schedule.accumulate={window}: an epoch has {batches} batches; choose at most that")
    if (least := trainer.min_steps or 0) > (steps := math.ceil(batches / window) * schedule.epochs):
        raise UserError(f"trainer.min_steps={least}: schedule.epochs={schedule.epochs} are {steps} steps; raise them")
    images = min(len(train.keys), schedule.batch_size)
    if schedule.lr_reference_batch is not None and images < schedule.batch_size:
        raise UserError(
            f"schedule.batch_size={schedule.batch_size}: the only batch has {images} images, and "
            "schedule.lr_reference_batch scales the rate by what it has; choose at most that"
        )
    if (schedule.mixup or schedule.cutmix) and images % 2:
        raise UserError(
            f"schedule.batch_size={schedule.batch_size}: the only batch has {images} images, but mixup and cutmix pair "
            f"them; choose an even size below {images}, or set schedule.mixup=0 schedule.cutmix=0"
        )


@contextmanager
def one_voice(trainer: Trainer, go_on: str) -> Iterator[None]:
    """Where one of the processes that Lightning started stops with an error line, the others end without a word."""
    try:
        with known_troubles(go_on):
            yield
    except Exception as error:
        others = getattr(trainer.strategy.launcher, "procs", [])
        if isinstance(error, UserError):
            if trainer.global_rank:
                time.sleep(1)  # the first process, if it stops for the same, says it and ends this one
            for process in others:
                process.kill()
        elif any(ended_with(process, 2) for process in others):
            sys.exit(2)
        raise


def ended_with(process: subprocess.Popen[bytes], status: int) -> bool:
    try:
        return process.wait(timeout=5) == status
    except subprocess.TimeoutExpired:
        return False
