"""Read this first: what routing does to tokens, as pure tensor functions that know no model.

Axes: B batch, N tokens (class, distillation and register tokens included), K tokens kept, D width.

A routed block is   scores (B, N) -> indices (B, K) -> take (B, K, D) -> the block -> put back (B, N, D).
The block sees the K kept tokens only; the other N - K tokens leave it bit for bit as they came.
Equations are those of A-MoD (arXiv 2412.20875) and are restated where they are used.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from amod.errors import UserError


class RoutedLayer(NamedTuple):
    """What one routed block decided for a batch.

    ``scores`` (B, N) float32, what the router thought of each token; ``indices`` (B, K) int64, the kept
    tokens in ascending position. ``layer`` is the 0-based block index.
    """

    layer: int
    scores: Tensor
    indices: Tensor


Routing = list[RoutedLayer]
"""One :class:`RoutedLayer` per routed block, in depth order."""


def tokens_kept(capacity: float, tokens: int) -> int:
    """K = floor(C * N), with N counting the class token: 24 of 197 at C = 0.125, 98 at C = 0.5.

    The product is rounded to nine decimals first, so that C = 0.29 keeps 29 of 100 tokens and not 28.

    Raises:
        UserError: C is outside (0, 1], or so small that no token would be kept.
    """
    if isinstance(capacity, bool) or not isinstance(capacity, Real) or not 0 < capacity <= 1:
        raise UserError(f"capacity={capacity!r}: must be a number in (0, 1], e.g. 0.125")
    kept = math.floor(round(float(capacity) * tokens, 9))
    if kept < 1:
        raise UserError(
            f"capacity={capacity!r} keeps no token of {tokens}: use at least {math.ceil(1e4 / tokens) / 1e4:g}"
        )
    return kept


def top_k(scores: Tensor, k: int, prefix: int = 0) -> Tensor:
    """Positions of the K highest scores, ascending; equal scores keep the earlier token.

    Exactly K are kept whatever the ties (a strict ``>`` at the percentile of Eq. 2 keeps K - 1). The first
    ``prefix`` tokens are kept regardless of their score and count among the K.

    Args:
        scores: (B, N).
    Returns:
        (B, K) int64.
    """
    if prefix:
        scores = scores.clone()
        scores[:, :prefix] = math.inf
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _rows(indices: Tensor) -> Tensor:
    return torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """The kept tokens: (B, N, ...) and (B, K) -> (B, K, ...)."""
    return x[_rows(indices), indices]


def put(x: Tensor, indices: Tensor, kept: Tensor) -> Tensor:
    """A copy of ``x`` with the kept tokens replaced: (B, N, ...), (B, K), (B, K, ...) -> (B, N, ...)."""
    return x.index_put((_rows(indices), indices), kept.to(x.dtype))


def weigh_update(before: Tensor, after: Tensor, r: Tensor) -> Tensor:
    """x' = x + r f(x) for the kept tokens (Eq. 2), from ``after`` = x + f(x).

    r multiplies the block's update, never the residual.

    Args:
        before, after: (B, K, D).
        r: (B, K), of the kept tokens.
    """
    return before + r.unsqueeze(-1).to(after.dtype) * (after - before)


def refine(scores: Tensor, indices: Tensor, column_mean: Tensor) -> Tensor:
    """Scores for the next block when this block saw only the K kept tokens.

    Eq. 4 scores all N tokens by the map of the previous block. A block that was itself routed has a map of the
    kept tokens alone, so it can only say how their share is divided: the kept tokens keep their total score and
    redistribute it by the column mean of that K x K map; a token that was skipped keeps the score it had.
    Scores still sum to one, and with K = N this is Eq. 4.

    Args:
        scores: (B, N), those that chose the kept tokens (of the last block that left any).
        column_mean: (B, K), summing to one over K.
    """
    share = take(scores, indices).sum(dim=1, keepdim=True)
    return put(scores, indices, share * column_mean)
