"""Numbers about routing: does a score rank tokens as their importance does, and which tokens do blocks keep?

Axes: R runs (seeds), B images, N tokens, M tokens whose importance was measured, K tokens kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from amod.routing import Routing

MEASURES = {"change": "the change of the loss", "size": "the size of that change, whatever its sign"}
"""What importance may mean: the paper's "change in the loss" leaves the sign open."""
METHODS = {"Spearman": stats.spearmanr, "Pearson": stats.pearsonr}
LEVEL = 0.05
"""p-values below it count as significant; intervals are of 1 - it."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (Student's t), and the p-value of the hypothesis that the true mean is zero.

    ``count`` values; with fewer than two there is no interval and no p-value (nan).
    """

    mean: float
    low: float
    high: float
    p: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.2f}" if math.isnan(self.low) else f"{self.mean:.2f} ± {self.high - self.mean:.2f}"


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """nan is left out: the correlation of a constant, for instance."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) < 2 or np.ptp(known) < 1e-12:  # a constant has no test
        return Estimate(mean, math.nan, math.nan, math.nan, len(known))
    test = stats.ttest_1samp(known, 0.0)
    low, high = test.confidence_interval(1 - LEVEL)
    return Estimate(mean, float(low), float(high), float(test.pvalue), len(known))


@dataclass(frozen=True)
class Correlation:
    """Of a router's scores with importance at one block: computed over an image's tokens, then averaged.

    ``measure`` is a key of :data:`MEASURES`, ``method`` of :data:`METHODS`. ``over`` says what ``value`` averages: the
    images of one run, or the means of several runs, ``each`` of which stands beside it. ``median_p`` and
    ``significant`` (the share below 5 %) are about the single image's correlation: could its tokens have come out so by
    chance?
    """

    router: str
    block: int
    measure: str
    method: str
    value: Estimate
    each: tuple[float, ...]
    over: str
    median_p: float
    significant: float


def correlate(scores: Tensor, importance: Tensor, method: str) -> np.ndarray:
    """(B, M) and (B, M) -> per image the coefficient and scipy's two-sided p-value, (B, 2); nan for a constant row."""
    rows = zip(scores.double().cpu().numpy(), importance.double().cpu().numpy(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return np.array([tuple(METHODS[method](*row)) for row in rows], dtype=float)


def correlation(router: str, block: int, measure: str, method: str, runs: Sequence[np.ndarray]) -> Correlation:
    """One row of the table from what :func:`correlate` gave for each run."""
    means = [float(np.nanmean(run[:, 0])) if not np.isnan(run[:, 0]).all() else math.nan for run in runs]
    value = estimate(runs[0][:, 0] if len(runs) == 1 else means)
    p = np.concatenate([run[:, 1] for run in runs])
    p = p[~np.isnan(p)]
    over = f"{value.count} images" if len(runs) == 1 else f"{value.count} runs"
    median, share = (float(np.median(p)), float((p < LEVEL).mean())) if len(p) else (math.nan, math.nan)
    return Correlation(router, block, measure, method, value, tuple(means), over, median, share)


# --- which tokens are kept ----------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What became of the N tokens that entered the model, in one block.

    ``kept`` (B, N) bool: it is there, by itself or in a token that stands for it, and the block kept that. ``group``
    (B, N) int64: tokens with the same number are one by now; -1: gone. ``scores`` (B, N) is None where none were given
    (merging compares pairs); a token that is gone has the score 0.
    """

    block: int
    kept: Tensor
    group: Tensor
    scores: Tensor | None

    def alone(self) -> Tensor:
        """(B, N) bool: kept, and merged with no other."""
        place = self.group.clamp(min=0)
        size = torch.zeros_like(self.group).scatter_add(1, place, (self.group >= 0).long())
        return self.kept & (size.gather(1, place) == 1)


def seen(routing: Routing) -> list[Seen]:
    """One per entry of the routing, in its order."""
    found, before = [], None
    for layer in routing:
        n = layer.scores.shape[1] if layer.owner is None else layer.owner.shape[1]
        scores: Tensor | None = layer.scores
        if not layer.scores.shape[1]:
            scores = None
        elif before is not None:  # of tokens that stood for several
            scores = layer.scores.gather(1, before.clamp(min=0)).masked_fill(before < 0, 0)
        group = torch.arange(n, device=layer.indices.device).expand(len(layer.indices), n)
        found.append(Seen(layer.layer, layer.tokens(n), group if layer.owner is None else layer.owner, scores))
        before = layer.owner
    return found


AGREEMENT = {
    "kept again": "of the tokens kept, the share that the routed block before kept as well",
    "by chance": "the same for tokens drawn at random, K/N of the block before; none once tokens are gone",
    "class token kept": "share of the images whose class token was kept",
    "entropy": "of the scores as shares of the tokens that are there, 1 where all are equal, 0 where one has all",
    "top score": "the highest score of an image's tokens, as a share of their sum",
    "on one token": "share of the images where one token has more than half of the sum",
    "on a patch": "share of the images whose highest score is a patch's, not a class or register token's",
    "same place": "share of the images whose highest-scored patch is the one that is most often the highest",
    "contrast": "of the kept patches, relative to all patches of their image; below 1 they are the plainer ones",
    "never kept": "share of the tokens that no routed block so far kept",
    "never, by chance": "the same for tokens drawn at random in each block, the product of 1 - K/N; none as above",
}


def agreement(routing: Routing, prefix: int, contrast: Tensor, class_token: bool = True) -> list[dict[str, float]]:
    """One row per block that scored its tokens: its index ``block``, and what :data:`AGREEMENT` explains, as means over
    the images.

    nan where it has no meaning (entropy of scores that may be negative, a model without a class token).

    Args:
        contrast: of the patches, (B, N - prefix), from :func:`patch_contrast`.
        class_token: whether token 0 is one, and not a register or a patch.
    """
    rows: list[dict[str, float]] = []
    before: Tensor | None = None
    missed: Tensor | None = None
    missed_by_chance = 1.0
    for layer, own in zip(seen(routing), routing, strict=True):
        if layer.scores is None:
            continue
        scores = layer.scores.double()
        kept, gone = layer.kept, bool((layer.group < 0).any())  # what is gone cannot be drawn again
        total = own.scores.double().sum(dim=1, keepdim=True)  # a merged token counts once
        share = own.scores.double() / total
        there = (share > 0).sum(dim=1).double()
        distribution = bool((own.scores >= 0).all() and (total > 0).all())
        top_patch = scores[:, prefix:].argmax(dim=1)
        chosen = kept[:, prefix:]
        contrasts = (contrast * chosen).sum(dim=1) / chosen.sum(dim=1) / contrast.mean(dim=1)
        missed = ~kept if missed is None else missed & ~kept
        missed_by_chance *= math.nan if gone else 1 - float(kept.double().mean())
        rows.append(
            {
                "block": layer.block,
                "kept again": float((kept & before).sum() / kept.sum()) if before is not None else math.nan,
                "by chance": math.nan if before is None or gone else float(before.double().mean()),
                "class token kept": float(kept[:, 0].double().mean()) if class_token else math.nan,
                "entropy": float((torch.special.entr(share).sum(dim=1) / there.log()).nanmean())
                if distribution
                else math.nan,
                "top score": float(share.amax(dim=1).mean()) if distribution else math.nan,
                "on one token": float((share.amax(dim=1) > 0.5).double().mean()) if distribution else math.nan,
                "on a patch": float((scores.argmax(dim=1) >= prefix).double().mean()),
                "same place": float(top_patch.bincount().max() / len(scores)),
                "contrast": float(contrasts.nanmean()),  # nan: no patch kept, or none has any
                "never kept": float(missed.double().mean()),
                "never, by chance": missed_by_chance,
            }
        )
        before = kept
    return rows


def patch_contrast(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Standard deviation of the pixels of each patch, (B, 3, H, W) -> (B, rows * columns): a score without a model."""
    grey = images.mean(dim=1)
    height, width = grey.shape[1] // grid[0], grey.shape[2] // grid[1]
    cells = grey[:, : height * grid[0], : width * grid[1]].unfold(1, height, height).unfold(2, width, width)
    return cells.flatten(3).std(dim=3).flatten(1)
