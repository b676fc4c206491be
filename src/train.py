"""Train a (routed) vision transformer: python src/train.py --help"""

from __future__ import annotations

from omegaconf import DictConfig

from amod.training.settings import check_train, launch


def job(cfg: DictConfig) -> None:
    from amod.training.run import train  # torch, timm and Lightning take seconds: only once the config is checked

    train(cfg)


if __name__ == "__main__":
    launch(job, "train", check_train)
