"""Variants in turns, and what their times say of each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

Step = Callable[[], Any]


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: two wait for each other where another process has a core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles by linear interpolation; of one value, that value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired(baseline: Sequence[float], other: Sequence[float], scale: float = 1.0) -> Quartiles:
    """Quartiles of baseline / other within each round, times ``scale``: how many times faster ``other`` was."""
    return quartiles([scale * b / o for b, o in zip(baseline, other, strict=True)])


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    min_rounds: int = 1,
    seconds: float = float("inf"),
    fill: float = 0.0,
    settle: bool = False,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time the steps in turns, after one untimed call of each (two with ``settle``: the first one compiles).

    Args:
        rounds: at most so many; fewer, but not fewer than ``min_rounds``, once ``seconds`` have passed.
        fill: a step shorter than so many seconds is repeated to fill them, and its mean is what one round notes.
    Returns:
        Seconds per call of every round, and how many calls each of them is the mean of, by name.
    """
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(2 if settle else 1):
            synchronise()
            start = clock()
            step()
            synchronise()
            last = clock() - start
        if last < fill:  # the first call is slow; a second one tells how often the step fits
            start = clock()
            step()
            synchronise()
            last = clock() - start
        repeats[name] = max(1, round(fill / max(last, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = clock()
    for done in range(rounds):
        if done >= min_rounds and clock() - begin > seconds:
            break
        turn = done % len(steps)  # each round starts one further: a step's place behind another is no advantage
        for name in [*steps][turn:] + [*steps][:turn]:
            start = clock()
            for _ in range(repeats[name]):
                steps[name]()
            synchronise()
            times[name].append((clock() - start) / repeats[name])
    return times, repeats
