"""See what routing does, as pictures and numbers: python src/explain.py --help"""

from __future__ import annotations

import shlex
import sys

from amod.analysis.explain_checks import check_explain, decided, is_detection, is_saved_model
from amod.training.command import launch
from amod.training.config import ExplainConfig


def job(cfg: ExplainConfig) -> None:
    if cfg.text is not None:
        from amod.analysis.words import explain_text

        return explain_text(cfg)
    if is_saved_model(cfg.run):
        from amod.analysis.saved_models import explain_saved

        return explain_saved(cfg)
    if is_detection(cfg):
        from amod.analysis.detections import explain_detections

        return explain_detections(cfg)
    from amod.analysis.explain import explain  # torch, timm and Lightning take seconds: only once the config is checked

    return explain(cfg, f"python src/explain.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    launch(job, "explain", check_explain, decided, idle=("schedule",))
