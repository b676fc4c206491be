"""Measure a model that is adapted to routing without any training: python src/untrained.py --help"""

from __future__ import annotations

from amod.training.checks import check_train
from amod.training.command import launch
from amod.training.config import UntrainedConfig


def job(cfg: UntrainedConfig) -> None:
    from amod.studies.untrained import measure  # torch, timm and Lightning take seconds

    measure(cfg)


IDLE = ("logger", "trainer.max_time", "trainer.limit_train_batches", "trainer.limit_val_batches")
"""``schedule`` stays: a study gives one to all its runs."""

if __name__ == "__main__":
    launch(job, "untrained", check_train, idle=IDLE)
