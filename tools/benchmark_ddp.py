"""Images per second in training: two processes of one thread (gloo) against one process of one thread.

    make benchmark-ddp

Each measurement is a fresh start of this file that trains on random images, the same number in every process, and
times the steps after a warm-up. One process, two processes under DDP, and two processes that do not talk to each other
take turns; the last is what the machine itself allows. Medians, their ratios, and the goal of 1.85 are printed, and
written to --out. Use an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL = 1.85
KINDS = {
    "one process": (1, 1),
    "two processes, DDP": (2, 1),
    "two processes apart": (1, 2),
}  # devices, at once


def measure(devices: int, arguments: argparse.Namespace) -> None:
    """Train and print the images per second of all the processes together."""
    import torch
    from lightning import Callback
    from torch.utils.data import DataLoader

    from amod.training.classification import Classifier
    from amod.training.compose import train_config
    from amod.training.loaders import DataModule
    from amod.training.run import make_trainer
    from amod.training.terminal import quiet
    from amod.training.weights import build, input_config

    quiet()
    torch.set_num_threads(1)
    steps = arguments.warmup + arguments.steps
    overrides = [f"model={arguments.model}", "model.pretrained=false", f"router={arguments.router}", "capacity=0.5"]
    schedule = ["schedule.epochs=1", f"schedule.batch_size={arguments.batch}", "schedule.mixup=0", "schedule.cutmix=0"]
    trainer = ["trainer=ddp_cpu" if devices > 1 else "trainer.accelerator=cpu"]
    cfg = train_config(["data=digits", *overrides, *schedule, *trainer, "trainer.limit_val_batches=0"])
    shape = input_config(cfg.model)["input_size"]
    images = torch.randn(arguments.batch, *shape)
    labels = torch.randint(10, (arguments.batch,))

    class Batches(DataModule):
        def __init__(self) -> None:  # the same batch again and again: the loader is not what is timed
            super(DataModule, self).__init__()

        def train_dataloader(self) -> DataLoader:  # type: ignore[override]
            return DataLoader([(images, labels, labels)] * steps, batch_size=None)  # type: ignore[arg-type]

        def val_dataloader(self) -> DataLoader:  # type: ignore[override]
            return DataLoader([])  # type: ignore[arg-type]

    class Clock(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == arguments.warmup:
                trainer.strategy.barrier()
                self.start = time.perf_counter()

        def on_train_end(self, trainer, *_) -> None:
            trainer.strategy.barrier()
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    lightning = make_trainer(cfg.trainer, callbacks=[clock], enable_checkpointing=False, enable_progress_bar=False)
    lightning.fit(Classifier(build(cfg, 10).model, cfg.schedule, 10, seed=0), datamodule=Batches())
    if lightning.is_global_zero:
        print(json.dumps(devices * arguments.batch * arguments.steps / clock.seconds))


def once(kind: str, given: list[str]) -> float:
    devices, count = KINDS[kind]
    command = [sys.executable, __file__, *given, "--measure", str(devices)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{kind}: a process failed")
    return sum(float(output.splitlines()[-1]) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="vit_pico")
    parser.add_argument("--router", default="attention")
    parser.add_argument("--batch", type=int, default=512, help="images per process and step")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a JSON file for the measurements")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments)
        return
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        for kind in [*KINDS][number % 3 :] + [*KINDS][: number % 3]:  # nobody always follows the same one
            found[kind].append(once(kind, sys.argv[1:]))
            print(f"round {number + 1}  {kind:20} {found[kind][-1]:8.1f} images/s", flush=True)
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    alone, ddp, apart = medians.values()
    print(f"\n{arguments.model}, router {arguments.router}, {arguments.batch} images per process, medians:")
    for kind, value in medians.items():
        print(f"{kind:20} {value:8.1f} images/s  {value / alone:.3f}x")
    print(f"DDP: {ddp / alone:.3f}x, goal {GOAL}x {'reached' if ddp / alone >= GOAL else 'missed'};")
    print(f"two processes that do not talk reach {apart / alone:.3f}x here, and DDP has {ddp / apart:.1%} of that")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "measure")}
        arguments.out.write_text(json.dumps({"settings": settings, "images_per_s": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
