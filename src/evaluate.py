"""Measure a trained run again from its folder: python src/evaluate.py run=FOLDER"""

from __future__ import annotations

from amod.training.checks import check_evaluate
from amod.training.command import launch
from amod.training.config import EvaluateConfig


def job(cfg: EvaluateConfig) -> None:
    from amod.training.evaluation import evaluate  # torch, timm and Lightning take seconds: once the config is checked

    evaluate(cfg)


if __name__ == "__main__":
    launch(job, "evaluate", check_evaluate)
