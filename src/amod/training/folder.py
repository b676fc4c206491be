"""The run folder: which run it holds, who may write in it, and how a file in it is written; without torch.

config.yaml (resolved), environment.json, data.json (the classes and images), metrics.csv (a row per epoch),
checkpoints/last.ckpt, the one before it (previous.ckpt) and best.ckpt, and once the run is finished weights.safetensors
(the best epoch's), curves.png and summary.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf

from amod.entries import Predict
from amod.errors import UserError, one_line, reachable, shown
from amod.files import write_atomically
from amod.training.compose import FREE_TO_CHANGE, expand_paths
from amod.training.config import CONF, TrainConfig, UntrainedConfig
from amod.training.rules import parse

log = logging.getLogger(__name__)

# What a run that was killed before it wrote its config leaves.
BEFORE_CONFIG = {
    ".lock",
    "environment.json",
    ".environment.json.tmp",
    "data.json",
    ".data.json.tmp",
    ".config.yaml.tmp",
}
GROUPS = ("model", "router", "placement", "data", "schedule", "trainer", "logger")


# --- the config ---------------------------------------------------------------------------------------------------


def read_config(file: Path) -> TrainConfig:
    """A run folder's config.yaml, its paths with the home folder in the place of ``~``."""
    try:
        cfg = OmegaConf.load(file)
        assert isinstance(cfg, DictConfig)
        assert all(isinstance(cfg.get(group), DictConfig) for group in GROUPS)
    except Exception:  # whatever the bytes make the reader raise
        raise UserError(f"{file}: is no run's config; put the run's own file back, or name another folder") from None
    expand_paths(cfg)
    try:
        return parse(UntrainedConfig if "images" in cfg else TrainConfig, cfg)
    except UserError as error:
        raise UserError(f"{file}: {error}; put the run's own file back, or name another folder") from None


def read_summary(folder: Path, what: str = "summary") -> dict[str, Any]:
    """What a finished run found; or its ``environment``."""
    file = folder / f"{what}.json"
    try:
        found = json.loads(file.read_text())
        assert isinstance(found, dict)
        return found
    except Exception:  # whatever the bytes make the reader raise
        raise UserError(f"{file}: is no run's {what}; put the run's own file back, or name another folder") from None


def saved_config(cfg: TrainConfig, whole: bool = False) -> dict[str, Any]:
    """The config as the run folder keeps it: without the folder's own name, so that it can be moved, and with ``~`` for
    the home folder, whose name is often a person's. ``whole``: with the defaults of what it does not say.
    """
    home = os.path.expanduser("~").rstrip("/")

    def anonymous(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: anonymous(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [anonymous(inner) for inner in value]
        inside = isinstance(value, str) and home and f"{value}/".startswith(f"{home}/")
        return f"~{value[len(home) :]}" if inside else value

    return anonymous(cfg.model_dump(exclude_unset=not whole, exclude={"run_dir"}))


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of the settings that are no groups."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def check_run_dir(cfg: TrainConfig) -> None:
    """The folder must be new, empty, or hold a run of this very config."""
    folder = Path(cfg.run_dir)
    saved = folder / "config.yaml"
    with reachable(f"run_dir={folder}"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run_dir={folder}: is a file; name a folder")
        if not saved.exists():
            if folder.is_dir() and not {file.name for file in folder.iterdir()} <= BEFORE_CONFIG:
                raise UserError(f"run_dir={folder}: holds other files and no run; name a new folder")
            return
    run = read_config(saved)
    if type(run) is not type(cfg):
        made = "untrained" if isinstance(run, UntrainedConfig) else "train"
        raise UserError(f"run_dir={folder}: holds a run of src/{made}.py; name another folder")
    before, now = (flat(saved_config(config, whole=True)) for config in (run, cfg))
    for key in sorted({*before, *now}, key=lambda key: (not key.endswith(".name"), key)):
        old, new = before.get(key), now.get(key)
        if (
            key in FREE_TO_CHANGE
            or old == new
            or (key in ("schedule.epochs", "trainer.max_epochs") and grows(run, cfg))
        ):
            continue
        remedy = "use the same settings to resume it, or another run_dir"
        if key == "schedule.epochs" and cfg.schedule.epochs > run.schedule.epochs:
            remedy = (
                "its learning rate has followed a schedule that ends there; to train on from its weights, start a new "
                f"run with model.checkpoint={folder} and another run_dir"
            )
        raise UserError(f"run_dir={folder}: holds a run with {key}={shown(old)}, not {shown(new)}; {remedy}")


def grows(run: TrainConfig, cfg: TrainConfig) -> bool:
    """Whether more epochs leave the learning rate of the steps until now as it was: constant after the warm-up."""
    schedule = run.schedule
    constant = schedule.min_lr == schedule.lr and schedule.warmup_epochs <= schedule.epochs / 2
    constant = constant and not (run.router.has(Predict) and run.router.frozen)  # a share of the training
    return constant and cfg.schedule.epochs > schedule.epochs


def unfinished_twin(cfg: TrainConfig) -> Path | None:
    """Another folder with a stopped run of these very settings, where run_dir has its default name."""
    folder = Path(cfg.run_dir)
    found = re.search(r"-([0-9a-f]{8})$", folder.name)
    if not found or (folder / "config.yaml").exists():
        return None
    twins = [twin for twin in folder.parent.glob(f"*-{found.group(1)}") if any(twin.glob("checkpoints/*.ckpt"))]
    for twin in sorted(twins, key=lambda twin: twin.stat().st_mtime, reverse=True):
        if (twin / "summary.json").exists() or RunLock.held(twin):
            continue
        with contextlib.suppress(UserError):
            check_run_dir(cfg.model_copy(update={"run_dir": str(twin)}))
            return twin
    return None


# --- who writes in it ---------------------------------------------------------------------------------------------


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

    @staticmethod
    def held(folder: Path) -> bool:
        """Whether a run is being written there now."""
        try:
            with open(folder / ".lock", "r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)

    def refusal(self) -> UserError:
        return UserError(
            f"run_dir={self.folder}: another process is writing this run; wait until it ends, or name another run_dir"
        )

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def start_folder(cfg: TrainConfig, folder: Path, lock: RunLock, newest: Path | None, data: dict[str, Any]) -> None:
    """Make the folder with the config, the environment and the record of the data, or find it as it must be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        if not lock.begun:
            if (folder / "config.yaml").exists():
                raise lock.refusal()  # it began at the same moment
            write_atomically(folder / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
        if not (folder / "data.json").exists():
            write_atomically(folder / "data.json", (json.dumps(data, indent=1) + "\n").encode())
        text = OmegaConf.to_yaml(OmegaConf.create(saved_config(cfg))).encode()
        if not lock.begun or flat(saved_config(read_config(folder / "config.yaml"), True)) != flat(
            saved_config(cfg, True)
        ):
            write_atomically(folder / "config.yaml", text)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)  # of a run that is to train longer
        if newest is None or newest.name != "last.ckpt":
            (folder / "checkpoints/last.ckpt").unlink(missing_ok=True)  # damaged: it must not become the previous one
    except OSError as error:
        raise UserError(f"run_dir={folder}: cannot be written ({one_line(error)}); choose another folder") from error


# --- what it was made with ----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The code's commit and the versions it ran with; nothing that names a person or a machine."""
    import torch

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
