"""What training takes: time of a step, memory; and what images cost a model whose tokens halt."""

from __future__ import annotations

import resource
import sys
import time
from statistics import median
from typing import Any

import torch
from lightning import Callback

from amod.flops import image_flops
from amod.plan import halts


class Costs(Callback):
    """The time of each training step, loading its batch left out, and the most memory that the process has had."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append(time.perf_counter() - self.since)

    def summary(self) -> dict[str, float | None]:
        """``step_seconds``: the median; ``peak_mib``: of a GPU what torch allocated, else of the whole process."""
        if torch.cuda.is_available():
            most = torch.cuda.max_memory_allocated() / 2**20
        else:
            kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            most = kib / 2**20 if sys.platform == "darwin" else kib / 2**10
        return {"step_seconds": round(median(self.steps), 5) if self.steps else None, "peak_mib": round(most, 1)}


def halting_cost(model: Any, loader: Any, images: int = 512) -> dict[str, float]:
    """Of a model whose tokens halt, the GFLOPs of the first test images, each by itself: mean, spread, and of how many.

    Of any other nothing: its images all cost the same.
    """
    if not halts(model):
        return {}
    like = next(model.parameters())  # trainer.precision=bf16-true has made it half
    found: list[torch.Tensor] = []
    for batch in loader:
        found.append(image_flops(model, batch[0][: images - sum(map(len, found))].to(like)) / 1e9)
        if sum(map(len, found)) >= images:
            break
    costs = torch.cat(found).double()
    spread = float(costs.std()) if len(costs) > 1 else 0.0
    return {"gflops": float(costs.mean()), "gflops_spread": spread, "gflops_images": len(costs)}
