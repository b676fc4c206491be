"""SIGKILL a small training run at random moments until it is finished, and compare it with one never killed.

    python tools/kill_test.py --kills 20 --seed 0

Every attempt runs what `python src/train.py` runs, in a process forked from this one, so that the kills fall into the
run and not into seconds of importing torch. Digits, a tiny model with a linear router, two loader workers,
augmentation, Mixup, CutMix, drop path, a moving average, a checkpoint after every optimiser step. Every second kill
takes the loader workers along. Exit status 1 if a byte of the weights or a row of the metrics differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from amod.training.compose import train_config
from amod.training.run import train

RUN = [
    "model=vit_pico",
    "model.kwargs.img_size=10",
    "model.kwargs.patch_size=2",
    "model.kwargs.embed_dim=32",
    "model.kwargs.depth=4",
    "model.kwargs.num_heads=2",
    "model.kwargs.pretrained_cfg_overlay.input_size=[3,10,10]",
    "model.drop_path=0.2",
    "router=linear",
    "capacity=0.5",
    "data=digits",
    "data.num_workers=2",
    "schedule.batch_size=64",
    "schedule.epochs=3",
    "schedule.lr=0.01",
    "schedule.mixup=0.5",
    "schedule.cutmix=0.5",
    "schedule.ema_decay=0.5",
    "schedule.accumulate=2",
    "trainer.limit_train_batches=8",
    "trainer.accelerator=cpu",
    "checkpoint_every_steps=1",
]


def attempt(folder: Path) -> None:
    os.setsid()
    with open(f"{folder}.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    train(train_config([*RUN, f"run_dir={folder}"]))


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(folder,))
    process.start()
    return process


def state(folder: Path) -> str:
    """What a kill left: the step of last.ckpt, and a file that was half written."""
    if (folder / "weights.safetensors").exists():
        return "weights written"
    if not (folder / "config.yaml").exists():
        return "not begun"
    last = folder / "checkpoints/last.ckpt"
    done = f"checkpoint of step {torch.load(last, weights_only=True)['global_step']}" if last.exists() else "begun"
    half = sorted(file.name for file in folder.rglob("*.tmp"))
    return f"{done}, half written: {', '.join(half)}" if half else done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(arguments.seed)
    place = Path(tempfile.mkdtemp(prefix="kill_test-"))

    began = time.monotonic()
    whole = start(place / "never_killed")
    whole.join()
    seconds = time.monotonic() - began
    assert whole.exitcode == 0, (place / "never_killed.txt").read_text()
    print(f"never killed: {seconds:.1f} s, 12 steps in 3 epochs; in {place}", flush=True)

    kills, runs = 0, 0
    while kills < arguments.kills:
        folder = place / f"run{runs}"
        while True:
            began = time.monotonic()
            process = start(folder)
            wait = rng.uniform(0, seconds)
            process.join(wait if kills < arguments.kills else None)
            if process.exitcode is not None:
                seconds = min(seconds, time.monotonic() - began)
                break
            group = kills % 2 == 1 and os.getpgid(process.pid) == process.pid
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            who = "process and workers" if group else "process alone"
            print(f"kill {kills:2} after {wait:5.2f} s, {who:19}: {state(folder)}", flush=True)
        if process.exitcode != 0:
            sys.exit(f"run {runs} failed:\n{Path(f'{folder}.txt').read_text()}")
        for name in ("weights.safetensors", "metrics.csv"):
            if (folder / name).read_bytes() != (place / "never_killed" / name).read_bytes():
                sys.exit(f"{folder / name} differs from the run that was never killed")
        runs += 1
        print(f"run {runs} is finished: weights.safetensors and metrics.csv are the same, byte for byte", flush=True)
    print(f"{kills} kills, {runs} runs, no difference")


if __name__ == "__main__":
    main()
