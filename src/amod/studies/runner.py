"""Runs of a study, each its own process, several at a time; finished ones are found and not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from amod.errors import UserError
from amod.files import check_place
from amod.studies.plan import Run
from amod.training.compose import compose_config
from amod.training.config import CONF
from amod.training.folder import read_summary

SCRIPTS = Path(__file__).parents[2]
QUIET = 300.0  # seconds without news, after which the progress line is shown again
# Settings that are about the machine, and may be given to the runs of a study that is there already.
HOW = ("data.root", "data.download", "data.num_workers", "trainer", "trainer.devices", "trainer.num_nodes", "logger")


@dataclass
class Job:
    run: Run
    process: subprocess.Popen[bytes]
    since: float


def how_to_run(launcher: str | None, extra: Mapping[str, Any] | None = None) -> list[str]:
    """What is said of every run over its own arguments, and does not change what it finds.

    UserError for a launcher that is not installed, and for an extra that might change more.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise UserError(f"extra={extra}: must be like {{data.root:/data,trainer:slurm}}")
    how = ["-m", f"hydra/launcher={launcher}"] if launcher else []
    for key, value in (extra or {}).items():
        how.append(f"{key}={value}")
        if key not in HOW and not key.startswith("hydra.launcher."):
            raise UserError(
                f"extra={{{key}:{value}}}: might change what the runs find; extra takes {', '.join(HOW)} and "
                "hydra.launcher.*; other settings belong into a file of conf/scale or conf/study"
            )
    compose_config("train", how[1:] if launcher else how)
    return how


def arguments(run: Run, root: Path, how: Sequence[str]) -> list[str]:
    """A run's overrides, those of ``how`` in the place of its own; what it has no use for is left out."""
    named = run.settings.get("data") or compose_config("train", []).data.name  # a sweep may leave it to its default
    data = OmegaConf.load(CONF / "data" / f"{named}.yaml")
    said = {}
    for override in how:
        key = override.partition("=")[0]
        of_other_data = key.startswith("data.") and key.removeprefix("data.") not in data
        if override != "-m" and not of_other_data and not (key == "logger" and run.script != "train.py"):
            said[key] = override
    own = [override for override in run.arguments(root) if override.partition("=")[0] not in said]
    return [*said.values(), *own]


def command(run: Run, root: Path, how: Sequence[str]) -> list[str]:
    """The command line of a run, to be typed at the top of the repository."""
    return ["python", f"src/{run.script}", *how[: "-m" in how], *arguments(run, root, how)]


def finished(run: Run, root: Path) -> bool:
    return (root / run.name / "summary.json").exists()


def to_run(runs: Sequence[Run], root: Path, known: Container[str]) -> list[Run]:
    """The runs that are neither finished here nor ``known`` by name from a report, each after those it starts from."""
    wanted: dict[str, Run] = {}

    def want(run: Run) -> None:
        if not finished(run, root) and run.name not in wanted:
            if run.start:
                want(run.start)
            wanted[run.name] = run

    for run in runs:
        if run.name not in known:
            want(run)
    return list(wanted.values())


def log_of(run: Run, root: Path) -> Path:
    return root / f"{run.name}.log"


def last_line(run: Run, root: Path) -> str:
    """The last line that a run printed: of a failed one, what went wrong; without where the runs are."""
    log = log_of(run, root)
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip().replace(f"{root}/", "") if lines else ""


def execute(runs: Sequence[Run], root: Path, jobs: int, how: Sequence[str], failed: dict[str, str]) -> None:
    """Run what is not finished, `jobs` at a time; what fails is put into `failed`: {run's name: its last line}.

    A run whose start failed is not run. An interrupt or SIGTERM stops the running ones, which leave a checkpoint if
    they can; the same command goes on.
    """
    check_place(root)
    root.mkdir(exist_ok=True)
    waiting = [run for run in runs if not finished(run, root)]
    done, total = len(runs) - len(waiting), len(runs)
    running: list[Job] = []
    seconds: dict[str, list[float]] = {}  # of the runs of a stage, by what their summaries say
    for run in runs:
        if finished(run, root):
            spent = read_summary(root / run.name).get("seconds", 0.0)
            seconds.setdefault(run.stage, []).append(spent)

    said = 0.0

    def say(event: str) -> None:
        nonlocal said
        said = time.monotonic()
        left = total - done - len(failed) - len(running)
        print(
            f"[{time.strftime('%H:%M:%S')}] {done} done, {len(running)} running, {left} left, {len(failed)} failed"
            f"{_expected(waiting, running, seconds, jobs)}: {event}",
            flush=True,
        )

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            for run in [run for run in waiting if run.start and run.start.name in failed]:
                waiting.remove(run)
                failed[run.name] = f"not run: {run.start.name} failed"  # type: ignore[union-attr]
                say(f"{run.name} cannot start")
            ready = [run for run in waiting if run.start is None or finished(run.start, root)]
            for run in ready[: max(0, jobs - len(running))]:
                waiting.remove(run)
                running.append(_start(run, root, jobs, how))
                say(f"started {run.name}")
            ended = [job for job in running if job.process.poll() is not None]
            for job in ended:
                running.remove(job)
                if finished(job.run, root):
                    done += 1
                    seconds.setdefault(job.run.stage, []).append(time.monotonic() - job.since)
                    say(f"finished {job.run.name}")
                else:
                    failed[job.run.name] = last_line(job.run, root) or f"exit status {job.process.returncode}"
                    say(f"FAILED {job.run.name}: {failed[job.run.name]}")
            if running and not ended:
                time.sleep(0.2)
            if running and time.monotonic() - said > QUIET:
                say(f"still running {', '.join(job.run.name for job in running)}")
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            try:
                job.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                job.process.kill()
        signal.signal(signal.SIGTERM, before)


def _start(run: Run, root: Path, jobs: int, how: Sequence[str]) -> Job:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if jobs > 1 else dict(os.environ)
    line = [sys.executable, str(SCRIPTS / run.script), *command(run, root, how)[2:]]
    with open(log_of(run, root), "ab") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return Job(run, process, time.monotonic())


def _expected(waiting: list[Run], running: list[Job], seconds: dict[str, list[float]], jobs: int) -> str:
    """When it will be over, by the mean time of a stage's runs so far."""
    if not {run.stage for run in [*waiting, *(job.run for job in running)]} <= seconds.keys():
        return ", expected end not known yet"
    mean = {stage: sum(spent) / len(spent) for stage, spent in seconds.items()}
    now = time.monotonic()
    left = sum(mean[run.stage] for run in waiting)
    left += sum(max(0.0, mean[job.run.stage] - (now - job.since)) for job in running)
    return f", expected end {time.strftime('%H:%M', time.localtime(time.time() + left / jobs))}"
