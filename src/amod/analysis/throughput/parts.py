"""Where the time of a forward pass goes: the parts of a model, timed from within."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from amod import reduce, walk
from amod.routers import Router

PARTS = ("attention", "mlp", "routing", "movement", "rest")
"""Of a forward pass: the attention modules with their projections (and, for A-MoD, the column means), the MLPs, what
decides which tokens go where (router, top-k, matching), what moves tokens (take, put, merge), and everything else
(patch embedding, norms, residual additions, head)."""

FUNCTIONS = {
    **{(walk, name): "routing" for name in ("top_k", "refine", "weigh_update")},
    **{(walk, name): "movement" for name in ("take", "put", "rotary_rows", "prune")},
    (reduce, "match"): "routing",
    (reduce, "merge"): "movement",
}
"""What is called on tokens, by the module that calls it, and the part that it counts to."""


class Stopwatch:
    """Adds up the seconds spent inside wrapped functions; a wrapped function within another counts to the outer.

    On CUDA it notes events, so that no part waits for the device and the time is the device's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []
        self.inside = False

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            start = self.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks.append((part, start, self.mark()))
                self.inside = False

        return watched

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self.marks:
            totals[part] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.marks.clear()
        return totals


@contextlib.contextmanager
def watching(model: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """While it lasts, the parts of ``model`` are timed: its own forwards and this package's functions are wrapped."""
    modules: list[tuple[nn.Module, str]] = [(m, "routing") for m in model.modules() if isinstance(m, Router)]
    for block in model.blocks:  # type: ignore[union-attr]
        modules += [(block.attn, "attention"), (block.mlp, "mlp")]
    functions = {where: getattr(*where) for where in FUNCTIONS}
    try:
        for module, part in modules:
            module.forward = watch.wrap(part, module.forward)  # type: ignore[method-assign]
        for where, part in FUNCTIONS.items():
            setattr(*where, watch.wrap(part, functions[where]))
        yield
    finally:
        for module, _ in modules:
            module.__dict__.pop("forward", None)
        for where, function in functions.items():
            setattr(*where, function)
