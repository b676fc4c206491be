"""Agreement, accuracy and time of plans without training, at equal FLOPs: python src/frontier.py --help"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from amod.errors import UserError
from amod.training.command import launch
from amod.training.config import FrontierConfig
from amod.training.rules import parse

METHODS = ("amod", "late", "evit", "tome", "tome_above", "few_merges", "few_tokens", "merge", "searched", "as_tome")


def check(composed: DictConfig) -> FrontierConfig:
    """Everything that is known without reading weights or images."""
    cfg = parse(FrontierConfig, composed)
    if cfg.run is None:
        raise UserError("run: say which run of src/train.py, as in run=runs/imagenette/some-run")
    if not (Path(cfg.run) / "config.yaml").is_file():
        raise UserError(f"run={cfg.run}: no config.yaml there; name the folder of a run that src/train.py made")
    if odd := [name for name in cfg.timed if name not in METHODS]:
        raise UserError(f"timed: {odd[0]} is not one of {', '.join(METHODS)}")
    if not cfg.shares:
        raise UserError("shares=[]: name at least one, as in shares=[0.74]")
    if Path(cfg.output).is_file():
        raise UserError(f"output={cfg.output}: is a file; name a folder")
    return cfg


def job(cfg: FrontierConfig) -> None:
    from amod.studies.frontier import frontier  # torch, timm and Lightning take seconds

    frontier(cfg)


if __name__ == "__main__":
    launch(job, "frontier", check)
