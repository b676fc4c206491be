"""One run, one folder: train, resume, test at the end, and measure again from the folder alone.

A run folder holds config.yaml (resolved), environment.json, metrics.csv (a row per epoch), checkpoints/last.ckpt, the
one before it (previous.ckpt) and best.ckpt, and once the run is finished weights.safetensors (the best epoch's),
curves.png and summary.json.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
import platform
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from timm.models import load_state_dict
from torch import nn

from amod.errors import UserError, one_line
from amod.flops import count_flops
from amod.plan import Route
from amod.training.callbacks import (
    AtomicCheckpoints,
    RunRecorder,
    best_checkpoint,
    newest_checkpoint,
    restored_signals,
    rounded,
    write_atomically,
)
from amod.training.data import build_datamodule
from amod.training.loaders import DataModule
from amod.training.module import Classifier, check_optimizer, global_batch, limited, peak_lr
from amod.training.settings import CONF, check_run_dir, evaluation_config, read_config, saved_config
from amod.training.wandb_rows import WandbRows
from amod.training.weights import build, input_config
from amod.vit import RoutedViT, default_tokens

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Train, or go on with, the run of ``cfg.run_dir``; test its best epoch once; write the summary."""
    quiet()
    rank_zero_only(check_run_dir)(cfg)  # a sweep's jobs before this one may have used the folder
    folder = Path(cfg.run_dir)
    finished = folder / "summary.json"
    if finished.exists():
        say(f"{folder} is finished and is not repeated; another run_dir starts a new run")
        show(json.loads(finished.read_text()))
        return
    lock = RunLock(folder)
    try:
        with restored_signals():
            _train(cfg, folder, lock)
    finally:
        lock.release()


def _train(cfg: DictConfig, folder: Path, lock: RunLock) -> None:
    if cfg.logger.name == "wandb":
        check_wandb(cfg.logger)
    interactive = sys.stdout.isatty() if cfg.trainer.enable_progress_bar is None else cfg.trainer.enable_progress_bar
    recorder = RunRecorder(folder, cfg.checkpoint_every_steps, print_rows=not interactive)
    recorder.listen()
    trainer = make_trainer(
        cfg.trainer,
        callbacks=[recorder, *([RichProgressBar()] if interactive else [])],
        enable_progress_bar=interactive,
        plugins=[AtomicCheckpoints()],
    )
    recorder.launcher = trainer.strategy.launcher
    seed_everything(cfg.seed, verbose=False)
    inputs = input_config(cfg.model)
    data = build_datamodule(
        cfg.data, inputs, cfg.schedule.augment, cfg.schedule.batch_size, cfg.schedule.eval_batch_size, cfg.seed
    )
    check_batches(trainer, data, cfg.schedule)
    newest = newest_checkpoint(folder)  # where there is one, the weights are there, and their source may be gone
    weightless = {"model": {"checkpoint": None, "pretrained": False}}
    built = build(OmegaConf.merge(cfg, weightless) if newest else cfg, data.num_classes)  # type: ignore[arg-type]
    module = Classifier(built.model, cfg.schedule, data.num_classes, cfg.seed)
    compute = compute_of(built.model, cfg, inputs["input_size"])
    say(f"{cfg.data.name}: {data.sizes['train']} train, {data.sizes['val']} val, {data.sizes['test']} test images")
    costs = f"{compute['gflops']:.4f} GFLOPs, {compute['params']:,} parameters"
    say(f"{cfg.model.label}, router {cfg.router.name}: {costs}")
    if compute["blocks_routed"]:
        own = {"tome": "r", "evit": "keep_rate", "plan": "file"}.get(cfg.router.name)
        asked = f"router.{own}={cfg.router[own]} asked" if own else f"capacity={cfg.capacity} asked"
        asked = asked if cfg.budget is None else f"budget={cfg.budget} GFLOPs asked"
        kept = list(dict.fromkeys(compute["tokens_kept"].values()))
        share = f" ({compute['capacity_granted']:.4f})" if len(kept) == 1 else ""
        blocks = shown(compute["blocks_routed"])
        say(f"{asked}: {', '.join(map(str, kept))} of {compute['tokens']} tokens{share} in blocks {blocks}")

    batch = global_batch(trainer, cfg.schedule)
    lr, reference = peak_lr(cfg.schedule, batch), cfg.schedule.lr_reference_batch
    scaled = f", schedule.lr={cfg.schedule.lr:g} x {batch} / lr_reference_batch {reference}" if reference else ""
    say(f"global batch {batch}, lr {lr:g}{scaled}")
    gpu = torch.cuda.is_available()  # the Trainer's own device may be the CPU all the same
    check_optimizer(cfg.schedule, lr, trainer.strategy.root_device if gpu else torch.device("cpu"))

    start_folder(cfg, folder, lock, newest)
    trainer.loggers = loggers(cfg, folder) or []

    with one_voice(trainer):
        if newest:
            say(f"resuming {folder}")
        elif built.adapted:
            for measure in (trainer.validate, trainer.test):  # nothing is chosen by the latter
                measure(module, datamodule=data, verbose=False)
                recorder.untrained |= {key: rounded(value) for key, value in trainer.callback_metrics.items()}
            before = " %, ".join(
                f"{split} top-1 {recorder.untrained.get(f'{split}/top1')}" for split in ("val", "test")
            )
            say(f"before training: {before} %")
        trainer.fit(module, datamodule=data, ckpt_path=newest)
        if not recorder.rows:
            raise UserError(f"trainer.max_time={cfg.trainer.max_time}: ended before the first epoch; allow more time")

        best = best_checkpoint(folder, int(recorder.best["step"]))
        module.check_weights(best["state_dict"], folder / "checkpoints/best.ckpt")
        module.load_state_dict(best["state_dict"])
        trainer.test(module, datamodule=data, verbose=False)
    tested = {key: rounded(value) for key, value in trainer.callback_metrics.items()}
    summary = {
        "model": cfg.model.label,
        "data": cfg.data.name,
        **compute,
        "seed": cfg.seed,
        "global_batch": batch,
        "lr": lr,
        "val_top1_untrained": recorder.untrained.get("val/top1"),
        "test_top1_untrained": recorder.untrained.get("test/top1"),
        "val_top1": recorder.best.get("val/top1"),
        "test_top1": tested.get("test/top1"),
        "test_top5": tested.get("test/top5"),
        "best_epoch": recorder.best["epoch"],
        "epochs": len(recorder.rows),
        "seconds": recorder.seconds,
    }
    if trainer.is_global_zero:
        weights = {key: value.contiguous() for key, value in module.evaluated.state_dict().items()}
        write_atomically(folder / "weights.safetensors", save(weights))
        write_atomically(folder / "curves.png", plot_curves(recorder))
        write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        for logger in trainer.loggers:
            logger.experiment.summary.update(summary)  # type: ignore[attr-defined]
            logger.experiment.finish()  # type: ignore[attr-defined]  # W&B's: the next job of a sweep starts a run of its own
    show(summary)
    say(f"run folder: {folder}")


def evaluate(cfg: DictConfig) -> Mapping[str, float]:
    """Measure the weights of the finished run in ``cfg.run`` on ``cfg.split``, from the folder alone."""
    quiet()
    run, model, data = load_run(Path(cfg.run), evaluation_config(cfg))
    run.schedule.ema_decay = None  # the weights are the average already
    module = Classifier(model, run.schedule, data.num_classes, run.seed)
    trainer = make_trainer(run.trainer, enable_progress_bar=sys.stdout.isatty())
    measure = trainer.test if cfg.split == "test" else trainer.validate
    (values,) = measure(module, datamodule=data, verbose=False)
    for key in ("top1", "top5"):
        say(f"{cfg.split} {key.replace('top', 'top-')} {values[f'{cfg.split}/{key}']:.4f} %")
    return values


def load_run(folder: Path, cfg: DictConfig | None = None) -> tuple[DictConfig, nn.Module, DataModule]:
    """(config, model, data) of a finished run: the best epoch's weights in evaluation mode, the data unaugmented.

    ``cfg`` replaces the config that the folder holds, to read the data from another place for instance.
    """
    weights = folder / "weights.safetensors"
    if not weights.exists():
        raise UserError(f"run={folder}: is not finished, it has no weights.safetensors; resume it with its own command")
    run = read_config(folder / "config.yaml") if cfg is None else cfg
    run.model.checkpoint, run.model.pretrained = None, False
    inputs = input_config(run.model)
    data = build_datamodule(run.data, inputs, {}, run.schedule.batch_size, run.schedule.eval_batch_size, run.seed)
    model = build(run, data.num_classes).model
    try:
        model.load_state_dict(load_state_dict(str(weights)))
    except Exception as error:  # whatever the bytes make the readers raise
        raise UserError(f"{weights}: cannot be read as this run's weights ({one_line(error)})") from error
    return run, model.eval(), data


def make_trainer(arguments: DictConfig, **ours: Any) -> Trainer:
    """Lightning's Trainer with the arguments of the config and ours; what it refuses is a UserError."""
    given = {**OmegaConf.to_container(arguments), "logger": False, **ours}  # type: ignore[dict-item]
    try:
        return Trainer(**given)
    except (MisconfigurationException, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"trainer: Lightning refuses these arguments ({one_line(error)})") from error


def check_batches(trainer: Trainer, data: DataModule, schedule: DictConfig) -> None:
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
    images = min(len(train.keys), schedule.batch_size)
    if (schedule.mixup or schedule.cutmix) and images % 2:
        raise UserError(
            f"schedule.batch_size={schedule.batch_size}: the only batch has {images} images, but mixup and cutmix pair "
            f"them; choose an even size below {images}, or set schedule.mixup=0 schedule.cutmix=0"
        )


def compute_of(model: nn.Module, cfg: DictConfig, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """What the model costs, and which blocks keep how many tokens."""
    vit: Any = model
    tokens = default_tokens(vit)
    kept: dict[int, int] = model.tokens_kept(tokens) if isinstance(model, RoutedViT) else {}
    routed = [entry for entry in vit.plan.values() if isinstance(entry, Route)] if kept else []
    capacity: float | None = routed[0].capacity if routed else 1.0
    if cfg.router.name == "isoflop":  # a budget or a depth leaves the capacity unused
        capacity = cfg.capacity if cfg.budget is None and cfg.router.get("depth") is None else None
    return {
        "router": cfg.router.name,
        "budget": cfg.budget,
        "capacity": capacity,
        "capacity_granted": min(kept.values(), default=tokens) / tokens,
        "tokens": tokens,
        "tokens_kept": {str(block): count for block, count in kept.items()},
        "blocks_routed": list(kept),
        "depth": len(vit.blocks),
        "gflops": count_flops(model, input_size) / 1e9,
        "params": sum(p.numel() for p in model.parameters()),
    }


# --- the folder ---------------------------------------------------------------------------------------------------


class RunLock:
    """Held by the first process of a run while it writes in the folder; a second run there is refused.

    A POSIX record lock ends with the process that took it, however that ends, and is not shared with loader workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun = (folder / "config.yaml").exists()
        self._file: IO[bytes] | None = None
        if self.begun:
            self.take()

    @rank_zero_only
    def take(self) -> None:
        if self._file is not None:
            return
        try:
            self._file = open(self.folder / ".lock", "ab")  # noqa: SIM115
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and self._file is not None:
                raise self.refusal() from None
            log.warning("warning: %s cannot be locked (%s): see to it that no two runs write there", self.folder, error)

    def refusal(self) -> UserError:
        return UserError(
            f"run_dir={self.folder}: another process is writing this run; wait until it ends, or name another run_dir"
        )

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


@rank_zero_only
def start_folder(cfg: DictConfig, folder: Path, lock: RunLock, newest: Path | None) -> None:
    """Make the folder with the config and the environment, unless a run to resume has made it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        if not lock.begun:
            if (folder / "config.yaml").exists():
                raise lock.refusal()  # it began at the same moment
            write_atomically(folder / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
            write_atomically(folder / "config.yaml", OmegaConf.to_yaml(saved_config(cfg)).encode())
        (folder / "checkpoints").mkdir(exist_ok=True)
        if newest is None or newest.name != "last.ckpt":
            (folder / "checkpoints/last.ckpt").unlink(missing_ok=True)  # damaged: it must not become the previous one
    except OSError as error:
        raise UserError(f"run_dir={folder}: cannot be written ({one_line(error)}); choose another folder") from error


@contextmanager
def one_voice(trainer: Trainer) -> Iterator[None]:
    """Where one of the processes that Lightning started stops with an error line, the others end without a word."""
    try:
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


def environment() -> dict[str, Any]:
    """The code's commit and the versions it ran with; nothing that names a person or a machine."""
    packages = ("torch", "torchvision", "timm", "lightning", "hydra-core", "torchmetrics", "numpy")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed": bool(git("status", "--porcelain", "--", ".", "../src")),  # untracked files too
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: version(name) for name in packages},
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(CONF), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@rank_zero_only
def check_wandb(logger: DictConfig) -> None:
    """Logged in, asked for the key on a terminal, or offline; nothing is sent."""
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
def loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """What logger= asks for besides metrics.csv."""
    if cfg.logger.name == "csv":
        return []
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
        config={"amod": OmegaConf.to_container(saved_config(cfg))},
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


def plot_curves(recorder: RunRecorder) -> bytes:
    """Loss and accuracy by epoch, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, keys in ((loss, ("train/loss", "val/loss")), (accuracy, ("val/top1", "val/top5"))):
        for key in keys:
            points = [(row["epoch"] + 1, row[key]) for row in recorder.rows if key in row]
            if key in recorder.untrained:
                points.insert(0, (0, recorder.untrained[key]))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
        axis.set_xlabel("epoch (0: before training)" if recorder.untrained else "epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    loss.set_ylabel("loss")
    accuracy.set_ylabel("accuracy (%)")
    best = recorder.best
    if "val/top1" in best:
        accuracy.set_title(f"best: {best['val/top1']:.2f} % after epoch {best['epoch'] + 1:.0f}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture.getvalue()


# --- the terminal -------------------------------------------------------------------------------------------------


@rank_zero_only
def say(text: str) -> None:
    print(text, flush=True)


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values))


@rank_zero_only
def show(summary: dict[str, Any]) -> None:
    """The summary as a table."""
    table = Table(show_header=False)
    for key, value in summary.items():
        if isinstance(value, float):
            value = f"{value:.4f}".rstrip("0").rstrip(".")
        elif isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = shown(value)
        table.add_row(key, "" if value is None else str(value))
    Console().print(table)


def quiet() -> None:
    """Our own notes on stdout; Lightning's banners and advice off."""
    main_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    logging.getLogger("amod").setLevel(logging.INFO if main_process else logging.ERROR)
    logging.getLogger("amod").handlers = [logging.StreamHandler(sys.stdout)]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torchmetrics")
