"""The command line: check everything that the config alone shows, then run the job, or a job for each combination.

``launch`` is what the commands call. Mistakes and interrupts are one line; torch is not loaded for them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from amod.errors import UserError
from amod.training.compose import compose_config, expand_paths, explain_syntax, help_text, key_of
from amod.training.config import CONF, UNROUTED, WITHOUT_CAPACITY

# What asks a run to end: `kill`, a batch system at the time limit, SLURM's earlier warning (--signal=USR1@300), and
# the one that submitit asks SLURM for; Ctrl-C, and a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
# Hydra's own settings that act here, as prefixes.
HYDRAS = ("hydra.launcher.", "hydra.sweeper.", "hydra.sweep.", "hydra.searchpath", "hydra.job.env_", "hydra.callbacks")


def launch(
    job: Callable[[Any], Any],
    config_name: str,
    check: Callable[[DictConfig], Any],
    of_run: Sequence[str] | Callable[[Any], Sequence[str]] = (),
    idle: Sequence[str] = (),
) -> None:
    """Run ``job(check(config of the command line))``; what the job returns is for Hydra's sweepers. A `check` that
    returns nothing leaves the config as it is.

    A UserError, of `check` or of `job`, becomes ``error: ...`` and exit status 2. Anything else is a fault of ours and
    keeps its traceback. ``of_run``: groups and keys that a finished run says where ``run=`` names one,
    or what gives them by the config. ``idle``: groups that the command has for its models' sake and does not use.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)
    forgive_output()
    parser = get_args_parser()
    parser.error = _argument_error  # type: ignore[method-assign]
    checked: list[Any] = []

    def guarded(cfg: DictConfig) -> Any:
        if checked:
            with one_line_errors():
                return job(checked[0])
        try:  # of a launcher or sweeper of Hydra's, whose affair the other jobs are
            OmegaConf.resolve(cfg)
            expand_paths(cfg)
            config = check(cfg)
            return job(cfg if config is None else config)
        except UserError as error:
            print(f"error: {message_of(error)}", file=sys.stderr)
            raise

    with one_line_errors():
        args = parser.parse_args()
        if not (args.hydra_help or args.shell_completion or args.info or args.experimental_rerun):
            if args.multirun and args.cfg:
                raise UserError("--cfg: shows the config of one job; leave -m out")
            own = own_configs(args)
            check_hydra(args.overrides, args.multirun)
            jobs = jobs_of(args.overrides, args.multirun)
            folders: set[str] = set()
            for overrides in jobs:
                cfg = compose_config(config_name, overrides, own)
                if args.help or args.cfg:
                    continue
                if cfg.get("run") is not None:
                    check_beside_run(cfg, overrides, of_run(cfg) if callable(of_run) else of_run)
                check_acts(cfg, overrides)
                for override in overrides:
                    if is_among(key_of(override), idle):
                        raise UserError(f"{override}: src/{config_name}.py trains nothing; leave it out")
                config = check(cfg)
                if args.multirun:
                    check_job(cfg, folders, any(key_of(override) == "run_dir" for override in overrides))
                else:
                    checked.append(cfg if config is None else config)
                    pin_run_dir(args.overrides, cfg.get("run_dir"))
            if args.help:
                print(help_text(config_name, jobs[0] if jobs else [], own))
                return
            if args.multirun and jobs and not (args.cfg or chosen(args.overrides, "launcher")):
                sys.exit(run_jobs(jobs, own))
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()


def check_beside_run(cfg: DictConfig, overrides: list[str], of_run: Sequence[str]) -> None:
    """UserError for a setting that the run has already: it would be ignored."""
    for override in overrides:
        if is_among(key_of(override), of_run):
            raise UserError(f"{override}: run={cfg.run} decides it; leave it out, or give the run as model.checkpoint=")


def is_among(key: str, groups: Sequence[str]) -> bool:
    """Whether a dotted key is one of these groups and keys, or in one; "not data.root" takes a key out of its group."""
    return not {key, key.partition(".")[0]}.isdisjoint(groups) and f"not {key}" not in groups


def check_acts(cfg: DictConfig, overrides: list[str]) -> None:
    """UserError for a capacity that the router does not have, or that a budget picks. (The dense model, and what is as
    long as one of a capacity, may stand beside others in a sweep.)"""
    typed = {key_of(override): override for override in overrides}
    router = OmegaConf.select(cfg, "router.name")
    if router is None or router == "none":
        return
    if "capacity" in typed and router in WITHOUT_CAPACITY and router not in UNROUTED:
        raise UserError(f"{typed['capacity']}: router={router} has no capacity; leave it out")
    for override in typed.values() if cfg.router.get("depth") is not None else ():
        if is_among(key_of(override), ("capacity", "placement")):
            raise UserError(f"{override}: router.depth={cfg.router.depth} says the depth; leave one of them out")
    for key in ("capacity", "router.r", "router.keep_rate"):
        if key in typed and cfg.get("budget") is not None:
            raise UserError(f"{typed[key]}: budget={cfg.budget} picks it; leave one of them out")


def own_configs(args: Any) -> Path | None:
    """The folder of --config-dir."""
    if args.config_name or args.config_path:
        raise UserError(
            "--config-name, --config-path: this command has one config; put settings of your own into "
            "DIR/experiment/mine.yaml and say --config-dir DIR +experiment=mine"
        )
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: no such folder")
    return Path(args.config_dir) if args.config_dir else None


def check_hydra(overrides: list[str], multirun: bool) -> None:
    """What Hydra would take, and nothing would come of, is refused."""
    if "LOCAL_RANK" in os.environ:
        return  # Lightning starts DDP's other processes, with settings of Hydra's of its own
    plugin = chosen(overrides, "launcher") or chosen(overrides, "sweeper")
    for override in overrides:
        key = key_of(override)
        if key.startswith("hydra.") and not key.startswith(HYDRAS):
            raise UserError(f"{override}: has no effect here; the run folder is run_dir=FOLDER, and -m runs several")
        if key.startswith("hydra.sweep.") and not plugin:
            raise UserError(f"{override}: acts with hydra/launcher= or hydra/sweeper= only; leave it out")
        if not multirun and (key in ("hydra/launcher", "hydra/sweeper") or key.startswith(HYDRAS[:3])):
            raise UserError(f"{override}: acts with -m only; add -m, or leave it out")


def pin_run_dir(overrides: list[str], run_dir: str | None) -> None:
    """Write the folder, whose name may hold the time, into the command line: Lightning starts the other processes of
    DDP with the same command line, and they must use the same folder.
    """
    if run_dir is None:
        return
    quoted = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    pinned = f"run_dir='{quoted}'"
    given = [override for override in overrides if override.startswith("run_dir=")]
    if given:
        sys.argv[:] = [pinned if argument in given else argument for argument in sys.argv]
    else:
        sys.argv.insert(sys.argv.index(overrides[0]) if overrides else len(sys.argv), pinned)


def terminated(number: int, frame: Any) -> NoReturn:
    """Until a job has an answer of its own: ends it as an error does, so that half written folders are removed."""
    os.write(2, b"stopped by SIGTERM; the same command starts again\n")
    sys.exit(128 + number)


class one_line_errors:
    """Turns a UserError into one line on stderr and exit status 2, and Ctrl-C into one and 130."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            print(f"error: {message_of(error)}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, KeyboardInterrupt):
            print("stopped by Ctrl-C; the same command starts again", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def message_of(error: UserError) -> str:
    """The error's message on one line, without the traceback that a DataLoader worker or another process adds."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.rpartition("UserError: ")[2]
    return " ".join(text.split())


def _argument_error(message: str) -> NoReturn:
    raise UserError(f"{message}; settings are written key=value, --help lists them")


# --- output -------------------------------------------------------------------------------------------------------


class Forgiving:
    """A stream whose reader may go away (`| head`, a closed terminal, a full disk behind `> log`): it falls silent."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """What is buffered and all that follows goes nowhere; the interpreter's last flush succeeds."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive_output() -> None:
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)  # type: ignore[assignment]


# --- several jobs -------------------------------------------------------------------------------------------------


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
        raise UserError(explain_syntax(error)) from None
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def chosen(overrides: list[str], plugin: str) -> bool:
    """Whether a plugin of Hydra other than its own is asked for (a launcher: it runs the jobs; a sweeper)."""
    return any(o.startswith(f"hydra/{plugin}=") and not o.endswith("=basic") for o in overrides)


def check_job(cfg: DictConfig, folders: set[str], typed: bool) -> None:
    """One job of a sweep has a folder of its own (`folders`: those of the jobs before it). Where it is not `typed`, the
    time is in its name, unless a batch system's number is."""
    folder = cfg.get("run_dir")
    if (typed or "SLURM_JOB_ID" in os.environ) and folder is not None and folder in folders:
        raise UserError(
            f"-m: two jobs have run_dir={folder}; leave run_dir out, or name what differs in it, as in "
            "run_dir='runs/my-${seed}'"
        )
    folders.add(folder)


def run_jobs(jobs: list[list[str]], own: Path | None = None) -> int:
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
        if signal.getsignal(known) is not signal.SIG_IGN:
            signal.signal(known, pass_on)
    failed = []
    for number, overrides in enumerate(jobs, start=1):
        arguments = [*(["--config-dir", str(own)] if own else []), *overrides]
        line = shlex.join(["python", sys.argv[0], *arguments])
        print(f"[{number}/{len(jobs)}] {line}", flush=True)
        status = 0
        if not signals:
            job = subprocess.Popen([sys.executable, sys.argv[0], *arguments])
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
