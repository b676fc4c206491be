"""Runs so small that a test can train them."""

from __future__ import annotations

import json
from pathlib import Path

from amod.training.checks import check_train
from amod.training.compose import compose_config, train_config
from amod.training.config import TrainConfig
from amod.training.run import train

# 5 x 5 patches and the class token: 26 tokens, 4 blocks, width 32.
MODEL = [
    "model=vit_pico",
    "model.kwargs.img_size=10",
    "model.kwargs.patch_size=2",
    "model.kwargs.embed_dim=32",
    "model.kwargs.depth=4",
    "model.kwargs.num_heads=2",
    "model.kwargs.pretrained_cfg_overlay.input_size=[3,10,10]",
]
DIGITS = [*MODEL, "data=digits", "schedule.batch_size=64", "schedule.epochs=2", "trainer.accelerator=cpu"]


def config(*overrides: str) -> TrainConfig:
    """The training config of a tiny model on digits."""
    return train_config([*DIGITS, *overrides])


def run(folder: Path, *overrides: str) -> dict:
    """Check and train as the command does; the summary."""
    train(check_train(compose_config("train", [*DIGITS, *overrides, f"run_dir={folder}"])))
    return json.loads((folder / "summary.json").read_text())
