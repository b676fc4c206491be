"""What src/untrained.py does: a run folder with the test accuracy of an adapted model, and no weights of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lightning import seed_everything
from omegaconf import OmegaConf

from amod.errors import UserError
from amod.files import make_folder, write_atomically
from amod.training.classification import Classifier, cost, measured
from amod.training.config import UntrainedConfig
from amod.training.folder import RunLock, environment, read_summary, saved_config
from amod.training.loaders import DataModule, build_datamodule
from amod.training.run import make_trainer, say_measured
from amod.training.tasks import CLASSIFICATION
from amod.training.terminal import quiet, say, show
from amod.training.weights import build, input_config


def measure(cfg: UntrainedConfig) -> None:
    """Write config.yaml, environment.json and summary.json (``test_top1_untrained``) into ``cfg.run_dir``."""
    quiet()
    folder = Path(cfg.run_dir)
    if (folder / "summary.json").exists():
        say(f"{folder} is finished and is not repeated; another run_dir starts a new run")
        show(read_summary(folder))
        return
    lock = RunLock(folder)
    try:
        _measure(cfg, folder, lock)
    finally:
        lock.release()


def _measure(cfg: UntrainedConfig, folder: Path, lock: RunLock) -> None:
    since = time.monotonic()
    trainer = make_trainer(cfg.trainer, enable_progress_bar=sys.stdout.isatty())
    seed_everything(cfg.seed, verbose=False)
    inputs = input_config(cfg.model)
    batch = cfg.schedule.eval_batch_size
    data = build_datamodule(cfg.data, inputs, {}, batch, batch, cfg.seed)
    thin_out(data, cfg.images)
    built = build(cfg, data.num_classes, data.class_names)
    if not built.adapted:
        raise UserError(
            f"model={cfg.model.label}: its weights have no head for the {data.num_classes} classes of "
            f"data={cfg.data.name}, so there is nothing to measure; give a trained run as model.checkpoint="
        )
    module = Classifier(built.model, cfg.schedule, data.num_classes, cfg.seed)
    make_folder(folder, f"run_dir={folder}")
    lock.take()
    write_atomically(folder / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(saved_config(cfg))).encode())
    trainer.test(module, datamodule=data, verbose=False)
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    summary = {
        "model": cfg.model.label,
        "data": cfg.data.name,
        **cost(built.model, cfg),
        **measured(built.model, data),
        "seed": cfg.seed,
        "images": int(found["test/images"]),
        "test_top1_untrained": float(f"{found['test/top1']:.6g}"),
        "test_top5_untrained": float(f"{found['test/top5']:.6g}"),
        "seconds": round(time.monotonic() - since, 3),
    }
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    show(summary)
    say_measured("test", found, CLASSIFICATION)


def thin_out(data: DataModule, images: int | None) -> None:
    """Leave so many test images, drawn once for all seeds, of each class its share to within one."""
    if images is None:
        return
    whole = data.splits["test"]
    if images > len(whole):
        raise UserError(f"images={images}: there are {len(whole)} test images; choose at most that, or null for all")
    data.splits = {**data.splits, "test": whole.cut(images / len(whole), 0)[1]}
