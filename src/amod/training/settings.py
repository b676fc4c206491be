"""From the command line to a checked config, without importing torch, so that a mistake is answered at once.

``launch`` is what the commands call. It composes the config a first time and checks it, so that every mistake which
the config alone shows is one line, and only then lets Hydra run the job (or the sweep, or print its help).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from amod.errors import UserError, reachable
from amod.placement import PLACEMENTS, routed_blocks

CONF = Path(__file__).parents[3] / "conf"

# Routers that score tokens by the attention map of the block before them.
ATTENTION_ROUTERS = ("attention", "attention_weighted", "reversed")
# Settings that are handed to timm.create_model, timm's create_transform, Lightning's Trainer and Hydra as they are.
OPEN_GROUPS = ("model.kwargs.", "schedule.augment.", "trainer.", "hydra.")
# What asks a run to end: `kill`, a batch system at the time limit, SLURM's earlier warning (--signal=USR1@300), and
# the one that submitit asks SLURM for.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


def adapt(new: Any, old: Any, *, _root_: DictConfig) -> Any:
    """``${adapt:new,old}`` in a config: `old` when model.checkpoint is set (adapting), else `new` (from scratch)."""
    return old if _root_.model.checkpoint else new


def stamp() -> str:
    """``${stamp:}``: the SLURM job's id, so that all its processes and its requeued self agree, else the time."""
    return os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")


def digest(*, _root_: DictConfig) -> str:
    """``${digest:}``: hex digits of the settings that make a run what it is: no two jobs share a folder."""
    keys = [key for key in keys_of(_root_) if key not in FREE_TO_CHANGE and not key.startswith("hydra.")]
    pairs = [(key, OmegaConf.select(_root_, key)) for key in keys]
    text = "\n".join(f"{key}={value}" for key, value in pairs if not isinstance(value, DictConfig))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def amount(*, _root_: DictConfig) -> str:
    """``${amount:}``: what decides the compute: a capacity, a budget, or the depth of an isoFLOP model."""
    if _root_.router.name == "none":
        return "1.0"
    if depth := _root_.router.get("depth"):
        return f"{depth}blocks"
    return str(_root_.capacity) if _root_.budget is None else f"{_root_.budget}GFLOPs"


OmegaConf.register_new_resolver("adapt", adapt, replace=True)
OmegaConf.register_new_resolver("stamp", stamp, use_cache=True, replace=True)
OmegaConf.register_new_resolver("amount", amount, replace=True)
OmegaConf.register_new_resolver("digest", digest, replace=True)


# --- the commands -------------------------------------------------------------------------------------------------


def launch(job: Callable[[DictConfig], None], config_name: str, check: Callable[[DictConfig], None]) -> None:
    """Run `job` with the config of the command line.

    A UserError, of `check` or of `job`, becomes ``error: ...`` and exit status 2. Anything else is a fault of ours and
    keeps its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    parser = get_args_parser()
    parser.error = _argument_error  # type: ignore[method-assign]

    def guarded(cfg: DictConfig) -> None:
        OmegaConf.resolve(cfg)
        expand_paths(cfg)
        with one_line_errors():
            job(cfg)

    with one_line_errors():
        args = parser.parse_args()
        if not (args.hydra_help or args.shell_completion or args.info or args.experimental_rerun):
            jobs = jobs_of(args.overrides, args.multirun)
            folders: set[str] = set()
            for overrides in jobs:
                cfg = compose_config(config_name, overrides)
                if not (args.help or args.cfg):
                    check(cfg)
                    if args.multirun:
                        check_job(cfg, folders)
            if not (args.multirun or args.help or args.cfg) and "run_dir" in cfg:
                pin_run_dir(args.overrides, cfg.run_dir)
            if args.multirun and jobs and not (args.help or args.cfg or chosen(args.overrides, "launcher")):
                sys.exit(run_jobs(jobs))
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()


def pin_run_dir(overrides: list[str], run_dir: str) -> None:
    """Write the default folder, which holds the time, into the command line: Lightning starts the other processes of
    DDP with the same command line, and they must use the same folder.
    """
    if any(override.startswith("run_dir=") for override in overrides):
        return
    quoted = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    at = sys.argv.index(overrides[0]) if overrides else len(sys.argv)
    sys.argv.insert(at, f"run_dir='{quoted}'")


class one_line_errors:
    """Turns a UserError into one line on stderr and exit status 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            print(f"error: {message_of(error)}", file=sys.stderr)
            sys.exit(2)


def message_of(error: UserError) -> str:
    """The error's message on one line, without the traceback that a DataLoader worker or another process adds."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.rpartition("UserError: ")[2]
    return " ".join(text.split())


def _argument_error(message: str) -> NoReturn:
    raise UserError(f"{message}; settings are written key=value, --help lists them")


def jobs_of(overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job: one list, or with --multirun one per combination."""
    if not multirun:
        return [overrides]
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if chosen(overrides, "sweeper"):  # another sweeper's values are its own affair
        return []
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(_explain_syntax(error)) from None
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def chosen(overrides: list[str], plugin: str) -> bool:
    """Whether a plugin of Hydra other than its own is asked for (a launcher: it runs the jobs; a sweeper)."""
    return any(o.startswith(f"hydra/{plugin}=") and not o.endswith("=basic") for o in overrides)


def check_job(cfg: DictConfig, folders: set[str]) -> None:
    """One job of a sweep has a folder of its own (`folders`: those of the jobs before it)."""
    folder = cfg.get("run_dir")
    if folder is not None and folder in folders:
        raise UserError(
            f"-m: two jobs have run_dir={folder}; leave run_dir out, or name what differs in it, as in "
            "run_dir='runs/my-${seed}'"
        )
    folders.add(folder)


def run_jobs(jobs: list[list[str]]) -> int:
    """Run the jobs one after the other, each in a process of its own; the exit status.

    Several devices and W&B then begin afresh in every job, and a job that fails does not keep the others from running.
    A signal is passed on to the job and ends the sweep.
    """
    job: subprocess.Popen[bytes] | None = None
    signals: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        signals.append(number)
        if job is not None:
            job.send_signal(number)

    for known in SIGNALS:
        signal.signal(known, pass_on)
    failed = []
    for number, overrides in enumerate(jobs, start=1):
        line = shlex.join(["python", sys.argv[0], *overrides])
        print(f"[{number}/{len(jobs)}] {line}", flush=True)
        status = 0
        if not signals:
            job = subprocess.Popen([sys.executable, sys.argv[0], *overrides])
            if signals:  # it came before `job` was the new one
                job.send_signal(signals[-1])
            status = job.wait()
        if signals:  # the status of a job that answered; else 128 + number, as a shell has it
            return status if status > 0 else 128 + (-status or signals[-1])
        if status:
            failed.append(f"{line} (exit status {status})")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} jobs failed", file=sys.stderr)
    return 1 if failed else 0


# --- composing, with Hydra's errors on one line -------------------------------------------------------------------


def compose_config(config_name: str, overrides: list[str]) -> DictConfig:
    """The composed config with everything resolved. Hydra's and OmegaConf's own errors become UserErrors."""
    for override in overrides:
        if override.startswith("~"):
            raise UserError(f"{override}: settings cannot be removed; set key=null where null is allowed")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            cfg = compose(config_name, overrides)
            OmegaConf.resolve(cfg)
            expand_paths(cfg)
            check_additions(config_name, overrides)
        except OverrideParseException as error:
            raise UserError(_explain_syntax(error)) from None
        except MissingConfigException as error:
            raise UserError(_explain_choice(error)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain_key(config_name, overrides, error)) from None
        except ValueError as error:
            raise UserError(_explain_group(overrides, error)) from None
    return cfg


def expand_paths(cfg: DictConfig) -> None:
    """``~`` in a path is the home folder. (data.root is expanded where it is read.)"""
    for key in ("run_dir", "run", "model.checkpoint"):
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group) if group else cfg
        if isinstance(node, DictConfig) and isinstance(node.get(name), str):
            node[name] = os.path.expanduser(node[name])


def check_additions(config_name: str, overrides: list[str]) -> None:
    """A key added with + must be in a group that is passed on to a library: elsewhere it would be ignored silently."""
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if not override.startswith("+") or key.startswith(OPEN_GROUPS):
            continue
        if key not in known_keys(config_name, overrides):
            raise UserError(f"{override}: there is no setting {key}; + adds to {', '.join(OPEN_GROUPS)} only")


def known_keys(config_name: str, overrides: list[str]) -> list[str]:
    """The keys of the config with the choices of groups that `overrides` make."""
    choices = [o for o in overrides if "=" in o and (CONF / o.partition("=")[0]).is_dir()]
    return keys_of(compose(config_name, choices))


QUOTING = """; a value with ~ = , or a bracket needs two pairs of quotes, as in 'run_dir="~/my runs, x=1"'"""


def _explain_syntax(error: Exception) -> str:
    override = getattr(error, "override", None) or str(error)
    hint = QUOTING if re.search(r"=.*[~=,(){}\[\]]", override) else ""
    return f"{override!r} cannot be read as a setting; write key=value without spaces, as in capacity=0.125{hint}"


def _explain_group(overrides: list[str], error: ValueError) -> str:
    """Hydra: "Config group override must be a string or a list. Got float", without naming the override."""
    for override in overrides:
        group = CONF / override.partition("=")[0]
        if group.is_dir() and not re.search(r"=[A-Za-z_/]\w*$", override.replace("=null", "=")):
            choices = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
            return f"{override}: choose one of {choices}"
    return " ".join(str(error).split())


def _explain_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or [])
    if not group or not options:
        return " ".join(str(error).split())
    return f"{group}={choice}: no such choice; choose one of {', '.join(options)}{did_you_mean(choice, options)}"


def _explain_key(config_name: str, overrides: list[str], error: Exception) -> str:
    text = str(error)
    if sweep := re.search(r"Ambiguous value for argument '(.+?)'\s", text):
        return f"{sweep.group(1)}: several values; -m runs one job for each, [a,b] is a list{QUOTING}"
    match = re.search(r"Could not (?:override|append[^']*) '([^']+)'", text)
    key = match.group(1) if match else ""
    override = next((o for o in overrides if o.lstrip("+~").partition("=")[0].partition("@")[0] == key), "")
    if not override:
        return " ".join(text.split())
    known = known_keys(config_name, overrides)
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if parent and k.startswith(f"{parent}.")]
    reason = f"{override}: there is no setting {key}"
    if key.startswith(OPEN_GROUPS[:2]):
        return f"{reason} yet; add it as +{override}"
    hint = did_you_mean(key, known)
    if siblings and not hint:
        return f"{reason}; {parent} has {', '.join(k.removeprefix(f'{parent}.') for k in siblings)}"
    return f"{reason}{hint}; `--help` lists all settings"


def keys_of(cfg: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a nested mapping, groups included."""
    keys = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        value = cfg._get_node(key) if isinstance(cfg, DictConfig) else cfg[key]
        if isinstance(value, DictConfig) and not value._is_none():
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# --- checking values ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """What a numeric setting may be."""

    low: float
    high: float = math.inf
    above_low: bool = False  # `low` itself is not allowed
    integer: bool = False
    optional: bool = False  # null is allowed

    def __str__(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        if self.high < math.inf:
            span = f" in {'(' if self.above_low else '['}{self.low:.10g}, {self.high:.10g}]"
        else:
            span = f" above {self.low:g}" if self.above_low else f" of at least {self.low:g}"
        return kind + span + (" or null" if self.optional else "")

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return False
        above = value > self.low if self.above_low else value >= self.low
        return above and value <= self.high and math.isfinite(value)


@dataclass(frozen=True)
class Text:
    """A non-empty string, or null where `optional`."""

    optional: bool = False

    def __str__(self) -> str:
        return "a name or path" + (" or null" if self.optional else "")

    def allows(self, value: Any) -> bool:
        return (value is None and self.optional) or (isinstance(value, str) and bool(value.strip()))


@dataclass(frozen=True)
class Choice:
    """One of some names; true, false and null may be among them."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return ("one of " if len(self.names) > 1 else "") + ", ".join(self.names)

    def allows(self, value: Any) -> bool:
        return _shown(value) in self.names


@dataclass(frozen=True)
class Flag:
    def __str__(self) -> str:
        return "true or false"

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Span:
    """Two ascending numbers, or null."""

    high: float = math.inf

    def __str__(self) -> str:
        return "two ascending numbers above 0" + (f", at most {self.high:g}" if self.high < math.inf else "")

    def allows(self, value: Any) -> bool:
        bound = Number(0, self.high, above_low=True)
        pair = OmegaConf.is_list(value) and len(value) == 2 and all(map(bound.allows, value))
        return value is None or (pair and value[0] <= value[1])


@dataclass(frozen=True)
class Sides:
    """One number of pixels, or [height,width]."""

    def __str__(self) -> str:
        return "a whole number of at least 1, or two of them, [height,width]"

    def allows(self, value: Any) -> bool:
        sides = list(value) if OmegaConf.is_list(value) and len(value) == 2 else [value]
        return all(map(COUNT.allows, sides))


def choices(group: str) -> tuple[str, ...]:
    """The files of a group, which are the names that its ``name`` may have."""
    return tuple(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


POSITIVE = Number(0, above_low=True)
COUNT = Number(1, integer=True)
SHARE = Number(0, 1, optional=True)
RULES: dict[str, Number | Text | Choice | Flag | Span | Sides] = {
    "capacity": Number(0, 1, above_low=True),
    "budget": Number(0, above_low=True, optional=True),
    "seed": Number(0, 2**32 - 1, integer=True),
    "run_dir": Text(),
    "checkpoint_every_steps": Number(1, integer=True, optional=True),
    "model.name": Text(),
    "model.label": Text(),
    "model.pretrained": Flag(),
    "model.checkpoint": Text(optional=True),
    "model.drop_path": Number(0, 1),
    "model.kwargs.depth": COUNT,
    "model.kwargs.embed_dim": COUNT,
    "model.kwargs.num_heads": COUNT,
    "model.kwargs.img_size": Sides(),
    "model.kwargs.patch_size": Sides(),
    "placement.name": Choice(tuple(PLACEMENTS)),
    "logger.name": Choice(choices("logger")),
    "router.name": Choice(choices("router")),
    "router.depth": Number(1, integer=True, optional=True),
    "router.keep_prefix": Flag(),
    "router.activation": Choice(("none", "sigmoid")),
    "logger.project": Text(),
    "logger.run_name": Text(optional=True),
    "data.name": Choice(choices("data")),
    "data.root": Text(),
    "schedule.epochs": COUNT,
    "schedule.batch_size": COUNT,
    "schedule.eval_batch_size": COUNT,
    "schedule.accumulate": COUNT,
    "schedule.optimizer": Text(),
    "schedule.lr": POSITIVE,
    "schedule.lr_reference_batch": Number(1, integer=True, optional=True),
    "schedule.momentum": Number(0, 1),
    "schedule.weight_decay": Number(0),
    "schedule.warmup_epochs": Number(0),
    "schedule.min_lr": Number(0),
    "schedule.clip_grad": Number(0, above_low=True, optional=True),
    "schedule.label_smoothing": Number(0, 1),
    "schedule.mixup": Number(0),
    "schedule.cutmix": Number(0),
    "schedule.ema_decay": Number(0, 1, optional=True),
    "schedule.augment.scale": Span(1),
    "schedule.augment.ratio": Span(),
    "schedule.augment.hflip": SHARE,
    "schedule.augment.re_prob": SHARE,
    "trainer.max_epochs": Number(1, integer=True),
    "trainer.num_nodes": COUNT,
    "trainer.accelerator": Choice(("auto", "cpu", "gpu", "cuda", "mps", "tpu")),
    "trainer.precision": Choice(("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")),
    "trainer.min_epochs": Number(0, integer=True, optional=True),
    "trainer.min_steps": Number(0, integer=True, optional=True),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": Number(0, optional=True),
    "trainer.val_check_interval": Number(0, above_low=True, optional=True),
    "trainer.check_val_every_n_epoch": Number(1, integer=True, optional=True),
    "trainer.num_sanity_val_steps": Number(-1, integer=True, optional=True),
    "trainer.log_every_n_steps": Number(0, integer=True, optional=True),
    "trainer.deterministic": Choice(("true", "false", "warn", "null")),
    "trainer.benchmark": Choice(("true", "false", "null")),
    "trainer.enable_progress_bar": Choice(("true", "false", "null")),
    "trainer.enable_model_summary": Flag(),
    "trainer.inference_mode": Flag(),
    "trainer.detect_anomaly": Flag(),
    "trainer.sync_batchnorm": Flag(),
    "trainer.use_distributed_sampler": Choice(("false",)),  # the data module shares the images among the processes
    "trainer.limit_train_batches": Number(0, above_low=True, optional=True),
    "trainer.limit_val_batches": Number(0, optional=True),
    "trainer.limit_test_batches": Number(0, optional=True),
}
# What the run folder decides.
OURS = ("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins")
GROUPS = ("model", "model.kwargs", "router", "placement", "data", "schedule", "schedule.augment", "trainer", "logger")


def check_train(cfg: DictConfig) -> None:
    """Everything about a training config that is known without building the model or reading the data."""
    for group in GROUPS:
        if not is_group(cfg, group):
            raise UserError(
                f"{group}={OmegaConf.select(cfg, group)}: must stay a group of settings; set its keys one by one"
            )
    check_values(cfg)
    check_names(cfg)
    check_model(cfg.model)
    check_placement(cfg)
    check_depth(cfg)
    check_budget(cfg)
    check_trainer(cfg.trainer)
    check_tokens(cfg)
    if cfg.schedule.min_lr > cfg.schedule.lr:
        raise UserError(f"schedule.min_lr={cfg.schedule.min_lr}: must not exceed schedule.lr={cfg.schedule.lr}")
    if (cfg.schedule.mixup or cfg.schedule.cutmix) and cfg.schedule.batch_size % 2:
        raise UserError(
            f"schedule.batch_size={cfg.schedule.batch_size}: must be even, because mixup and cutmix pair the images; "
            "or set schedule.mixup=0 schedule.cutmix=0"
        )
    check_run_dir(cfg)
    if cfg.model.checkpoint is not None and not any(Path(cfg.run_dir).glob("checkpoints/*.ckpt")):
        check_checkpoint(cfg.model.checkpoint)

    from amod.training.data import check_data

    check_data(cfg.data)


def is_group(cfg: DictConfig, key: str) -> bool:
    return isinstance(OmegaConf.select(cfg, key), DictConfig)


def check_values(cfg: DictConfig) -> None:
    for key, rule in RULES.items():
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group) if group else cfg
        if node is not None and name in node and not rule.allows(node[name]):
            raise UserError(f"{key}={_shown(node[name])}: must be {rule}")


def check_names(cfg: DictConfig) -> None:
    """A name brings its file's other settings only where the file is chosen."""
    for group in ("data", "logger"):
        name = cfg[group].name
        if not set(OmegaConf.load(CONF / group / f"{name}.yaml")) <= set(cfg[group]):
            raise UserError(f"{group}.name={name}: has settings of its own; choose it with {group}={name}")


def check_model(model: DictConfig) -> None:
    if model.kwargs.get("in_chans", 3) != 3:
        raise UserError(
            f"model.kwargs.in_chans={_shown(model.kwargs.in_chans)}: must be 3; grey images are repeated to RGB"
        )
    known = model.label in choices("model")
    meant = OmegaConf.load(CONF / "model" / f"{model.label}.yaml").model.name if known else model.name
    if model.name != meant:
        raise UserError(
            f"model.name={model.name}: the model.kwargs of model={model.label} would overrule it; leave model.name at "
            f"{meant}, or start from another choice, as in model=deit_small model.name={model.name}"
        )


def check_placement(cfg: DictConfig) -> None:
    blocks, router = cfg.placement.blocks, cfg.router
    shown = f"placement={cfg.placement.name}" if blocks is None else f"placement.blocks={_shown(blocks)}"
    if blocks is not None and (not OmegaConf.is_list(blocks) or not blocks):
        raise UserError(f"{shown}: must be a list of 0-based block indices such as [1,4,7], or null for the name's own")
    if blocks is None and router.name in ("none", "isoflop"):
        return
    depth = depth_of(cfg.model) or 1000  # an unknown depth is checked when the model is built
    try:
        routed_blocks(cfg.placement.name if blocks is None else list(blocks), depth, router.name in ATTENTION_ROUTERS)
    except UserError as error:
        raise UserError(f"{shown}: {str(error).partition(': ')[2]}") from None


def check_budget(cfg: DictConfig) -> None:
    if cfg.budget is None:
        return
    if cfg.router.name == "none":
        raise UserError(f"budget={cfg.budget}: router=none is dense and always costs the same; leave budget out")
    if cfg.router.get("depth") is not None:
        raise UserError(f"budget={cfg.budget}: router.depth={cfg.router.depth} says the depth; leave one of them out")


def check_trainer(trainer: DictConfig) -> None:
    for key in OURS:
        if key in trainer:
            raise UserError(f"trainer.{key}={_shown(trainer[key])}: the run folder decides it; leave it out")
    steps, limit = trainer.get("max_steps", -1), trainer.get("max_time")
    if steps != -1:  # Lightning would take every resume for one inside an epoch
        raise UserError(
            f"trainer.max_steps={_shown(steps)}: must stay -1; say how long to train by schedule.epochs and "
            "trainer.limit_train_batches"
        )
    parts = list(limit.values()) if isinstance(limit, DictConfig) else list(map(int, re.findall(r"\d+", str(limit))))
    if limit is not None and not (all(map(Number(0).allows, parts)) and any(parts)):
        raise UserError(f"trainer.max_time={_shown(limit)}: leaves no time; write days:hours:minutes:seconds, or null")


def check_depth(cfg: DictConfig) -> None:
    depth = depth_of(cfg.model)
    wanted = cfg.router.get("depth")
    if wanted is not None and depth is not None and wanted > depth:
        raise UserError(f"router.depth={wanted}: {cfg.model.label} has {depth} blocks; choose 1 to {depth}, or null")


def check_tokens(cfg: DictConfig) -> None:
    """A routed block must keep at least one token. Models whose name does not tell are checked when built."""
    tokens = tokens_of(cfg.model)
    if tokens is None or cfg.router.name in ("none", "isoflop") or cfg.budget is not None:
        return
    if math.floor(round(cfg.capacity * tokens, 9)) < 1:
        raise UserError(
            f"capacity={cfg.capacity}: keeps none of {cfg.model.label}'s {tokens} tokens; the least is "
            f"{math.ceil(10000 / tokens) / 10000:g} (one token)"
        )


def depth_of(model: Mapping[str, Any]) -> int | None:
    """Blocks of a timm ViT as far as its settings or its name tell, else None."""
    if "depth" in model["kwargs"]:
        return model["kwargs"]["depth"]
    sizes = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}
    found = re.search(r"_(tiny|small|base|large|huge)_patch\d+(_\d+)?(\.|$)", model["name"])  # plain names only
    return sizes[found.group(1)] if found else None


def tokens_of(model: Mapping[str, Any]) -> int | None:
    """Tokens of a timm ViT, class token included, as far as its settings or its name tell, else None."""
    match = re.search(r"^(?:vit|deit|deit3)_\w+?_patch(\d+)_(\d+)(?:\.|$)", model["name"])
    patch = model["kwargs"].get("patch_size", match and int(match.group(1)))
    pixels = model["kwargs"].get("img_size", match and int(match.group(2)))
    if not isinstance(patch, int) or not isinstance(pixels, int) or "dist" in model["name"]:
        return None
    return (pixels // patch) ** 2 + 1


def check_checkpoint(path: str) -> None:
    file = Path(path)
    with reachable(f"model.checkpoint={path}"):
        if file.is_dir() and ((file / "weights.safetensors").exists() or (file / "checkpoints").is_dir()):
            return
        found = file.exists()
    if not found:
        raise UserError(f"model.checkpoint={path}: no such file; give {', '.join(CHECKPOINT_SUFFIXES)} or a run folder")
    if file.is_dir():
        raise UserError(f"model.checkpoint={path}: this folder is no run, it has no weights.safetensors; name the file")
    if file.suffix not in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"model.checkpoint={path}: not a kind of checkpoint known here; give {', '.join(CHECKPOINT_SUFFIXES)} "
            "or a run folder"
        )


# --- the run folder -----------------------------------------------------------------------------------------------

# Where a run happens and what it prints: these may change when it is resumed.
FREE_TO_CHANGE = ("run_dir", "data.root", "data.num_workers", "trainer.enable_progress_bar", "checkpoint_every_steps")
# What a run that was killed before it wrote its config leaves.
BEFORE_CONFIG = {".lock", "environment.json", ".environment.json.tmp", ".config.yaml.tmp"}


def check_run_dir(cfg: DictConfig) -> None:
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
    before, now = saved_config(read_config(saved)), saved_config(cfg)
    for key in sorted({*keys_of(before), *keys_of(now)}, key=lambda key: (not key.endswith(".name"), key)):
        old, new = OmegaConf.select(before, key), OmegaConf.select(now, key)
        if key not in FREE_TO_CHANGE and not isinstance(new, DictConfig) and old != new:
            raise UserError(
                f"run_dir={folder}: holds a run with {key}={_shown(old)}, not {_shown(new)}; use the same settings to "
                "resume it, or another run_dir"
            )


def read_config(file: Path) -> DictConfig:
    """A run folder's config.yaml, its paths with the home folder in the place of ``~``."""
    try:
        cfg = OmegaConf.load(file)
    except Exception as error:  # whatever the bytes make the reader raise
        cfg = OmegaConf.create([type(error).__name__])
    if not isinstance(cfg, DictConfig) or not all(is_group(cfg, group) for group in GROUPS):
        raise UserError(f"{file}: is no run's config; put the run's own file back, or name another folder")
    expand_paths(cfg)
    return cfg


def saved_config(cfg: Any) -> DictConfig:
    """The resolved config as the run folder keeps it: without the folder's own name, so that it can be moved, and with
    ``~`` for the home folder, whose name is often a person's.
    """
    home = os.path.expanduser("~").rstrip("/")

    def anonymous(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: anonymous(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [anonymous(inner) for inner in value]
        inside = isinstance(value, str) and home and f"{value}/".startswith(f"{home}/")
        return f"~{value[len(home) :]}" if inside else value

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("run_dir", None)
    return OmegaConf.create(anonymous(plain))


def check_evaluate(cfg: DictConfig) -> None:
    if cfg.run is None:
        raise UserError("run: say which run folder, as in run=runs/digits/some-run")
    with reachable(f"run={cfg.run}"):
        exists = (Path(str(cfg.run)) / "config.yaml").exists()
    if not exists:
        raise UserError(f"run={cfg.run}: no config.yaml there; name the folder of a run that src/train.py made")
    if cfg.split not in ("test", "val"):
        raise UserError(f"split={cfg.split}: choose test or val")
    rule = Number(0, integer=True, optional=True)
    if not rule.allows(cfg.data.num_workers):
        raise UserError(f"data.num_workers={_shown(cfg.data.num_workers)}: must be {rule}")

    from amod.training.data import check_data

    check_data(evaluation_config(cfg).data)


def evaluation_config(cfg: DictConfig) -> DictConfig:
    """The run's own config with the evaluation's non-null settings over it."""
    run = read_config(Path(cfg.run) / "config.yaml")
    for group in ("data", "trainer"):
        for key, value in cfg[group].items():
            if value is not None:
                run[group][key] = value
    return run


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if OmegaConf.is_list(value):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
