"""Measure a model that is adapted to routing without any training: python src/untrained.py --help"""

from __future__ import annotations

from omegaconf import DictConfig

from amod.errors import UserError
from amod.training.settings import Number, check_train, launch


def check(cfg: DictConfig) -> None:
    rule = Number(1, integer=True, optional=True)
    if not rule.allows(cfg.images):
        raise UserError(f"images={cfg.images}: must be {rule}")
    check_train(cfg)


def job(cfg: DictConfig) -> None:
    from amod.studies.untrained import measure  # torch, timm and Lightning take seconds

    measure(cfg)


if __name__ == "__main__":
    launch(job, "untrained", check)
