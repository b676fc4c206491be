"""Train a (routed) vision transformer: python src/train.py --help"""

from __future__ import annotations

from amod.training.checks import check_train
from amod.training.command import launch
from amod.training.config import TrainConfig


def job(cfg: TrainConfig) -> float | None:
    from amod.training.run import train  # torch, timm and Lightning take seconds: only once the config is checked

    return train(cfg)


if __name__ == "__main__":
    launch(job, "train", check_train)
