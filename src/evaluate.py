"""Measure a trained run again from its folder: python src/evaluate.py run=FOLDER"""

from __future__ import annotations

from omegaconf import DictConfig

from amod.training.settings import check_evaluate, launch


def job(cfg: DictConfig) -> None:
    from amod.training.run import evaluate  # torch, timm and Lightning take seconds: only once the config is checked

    evaluate(cfg)


if __name__ == "__main__":
    launch(job, "evaluate", check_evaluate)
