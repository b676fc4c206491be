"""Runs in processes of their own, forked: they need no second import of torch, and can be killed."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from amod.training.callbacks import RunRecorder
from amod.training.checks import check_train
from amod.training.command import one_line_errors
from amod.training.run import train
from tiny import config

FORK = multiprocessing.get_context("fork")


class Forked:
    """``function()`` in a process of its own, its output in ``output``; ends like a command."""

    def __init__(self, function: Callable[[], object], output: Path, **env: str) -> None:
        self.output = output
        self.process = FORK.Process(target=self._run, args=(function, env))
        self.process.start()

    def _run(self, function: Callable[[], object], env: dict[str, str]) -> None:
        os.environ.update(env)
        rank_zero_only.rank = rank_of(env)
        faulthandler.dump_traceback_later(280, exit=True)
        sys.stdout = sys.stderr = open(self.output, "w", buffering=1)  # noqa: SIM115
        try:
            with one_line_errors():
                function()
        except Exception:
            traceback.print_exc()
            sys.exit(1)

    def wait(self, seconds: float = 300) -> int:
        """Its exit status (-9: killed)."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"did not end:\n{self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.output.read_text()


def rank_of(env: Mapping[str, str]) -> int:
    return int(env.get("SLURM_PROCID", env.get("LOCAL_RANK", 0)))


def run_forked(folder: Path, *overrides: str, **env: str) -> Forked:
    """``python src/train.py OVERRIDES run_dir=FOLDER`` with the tiny model on digits."""

    def job() -> None:
        cfg = config(*overrides, f"run_dir={folder}")
        check_train(cfg)
        train(cfg)

    return Forked(job, Path(f"{folder}.{rank_of(env)}.txt"), **env)


def run_ranks(folder: Path, *overrides: str, world: int = 2) -> list[Forked]:
    """The processes of ``trainer=ddp_cpu trainer.devices=WORLD``, with the environment that Lightning would give."""
    return [
        run_forked(folder, "trainer=ddp_cpu", f"trainer.devices={world}", *overrides, **env) for env in ranks(world)
    ]


def ranks(world: int) -> list[dict[str, str]]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
    return [{**shared, "LOCAL_RANK": str(rank)} for rank in range(world)]


def finish(processes: list[Forked]) -> None:
    for process in processes:
        assert process.wait() == 0, process.text


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def hold_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Runs forked from now on stand still after training step ``step``: to be killed there, or anywhere before."""
    after = RunRecorder.on_train_batch_end

    def held(self: RunRecorder, trainer: Trainer, *arguments: Any) -> None:
        after(self, trainer, *arguments)
        while trainer.global_step >= step:
            time.sleep(1)

    monkeypatch.setattr(RunRecorder, "on_train_batch_end", held)


def step_of(folder: Path) -> int:
    """Optimiser steps in last.ckpt, or in the one before it: a kill may come between their renames; 0 without any."""
    for name in ("last.ckpt", "previous.ckpt"):
        with contextlib.suppress(FileNotFoundError):
            return torch.load(folder / "checkpoints" / name, weights_only=True)["global_step"]
    return 0
