"""Read this first: what routing does to tokens, as pure tensor functions that know no model.

Axes: B batch, N tokens (class, distillation and register tokens included), K tokens kept, D width.

A routed block is   scores (B, N) -> indices (B, K) -> take (B, K, D) -> the block -> put back (B, N, D).
The block sees the K kept tokens only; the other N - K tokens leave it bit for bit as they came.
Equations are those of A-MoD (arXiv 2412.20875) and are restated where they are used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RoutedLayer(NamedTuple):
    """What one block with an entry in the plan did with the tokens of a batch.

    ``layer`` is the 0-based block index. ``scores`` (B, N) float32 is what it thought of each token that entered,
    (B, 0) where nothing was scored (a merge compares pairs). ``indices`` (B, K) int64, ascending, are the tokens that
    it kept, as positions in the sequence that leaves it: what a routed block skips leaves it too, a fused token is not
    among the kept. ``owner`` (B, tokens of the model) int64 is None as long as no block has merged or pruned; then it
    is, for every token that entered the model, the position of the one that stands for it, or -1.

    Of a trained gate (``gates.py``) ``scores`` are its logits, and ``gate`` (B, N), or (B, 1) per sequence, is 1 for
    what goes through and 0 for what is skipped, with the gradient that training needs; ``indices`` is (B, 0), since
    how many are kept differs. ``real`` (B, N) bool is False for padding, None where there is none.
    """

    layer: int
    scores: Tensor
    indices: Tensor
    owner: Tensor | None = None
    gate: Tensor | None = None
    real: Tensor | None = None

    def tokens(self, count: int) -> Tensor:
        """(B, count) bool: which of the ``count`` tokens that entered the model are kept here, or stood for."""
        if self.gate is not None:
            return (self.gate > 0).expand(-1, count)
        if not self.indices.numel():
            return self.indices.new_zeros(self.indices.shape[0], count, dtype=torch.bool)
        leaving = count if self.owner is None else int(max(self.owner.max(), self.indices.max())) + 1
        kept = self.indices.new_zeros(self.indices.shape[0], leaving, dtype=torch.bool)
        kept = put(kept, self.indices, torch.ones_like(self.indices, dtype=torch.bool))
        return kept if self.owner is None else kept.gather(1, self.owner.clamp(min=0)) & (self.owner >= 0)


Routing = list[RoutedLayer]
"""One :class:`RoutedLayer` per block with an entry in the plan, in depth order."""


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
        scores = torch.cat([scores.new_full((scores.shape[0], prefix), math.inf), scores[:, prefix:]], dim=1)
    if leaving_torch():  # which of equal scores is kept is then up to the runtime
        return scores.topk(k, dim=1).indices.sort(dim=1).values
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def _rows(indices: Tensor) -> Tensor:
    return torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """The kept tokens: (B, N, ...) and (B, K) -> (B, K, ...)."""
    if x.dim() == 2:  # where the batch is known, OpenVINO cannot index it by rows
        return x.gather(1, indices)
    return x[_rows(indices), indices]


def put(x: Tensor, indices: Tensor, kept: Tensor) -> Tensor:
    """A copy of ``x`` with the kept tokens replaced: (B, N, ...), (B, K), (B, K, ...) -> (B, N, ...)."""
    if x.dim() == 2:
        return x.scatter(1, indices, kept.to(x.dtype))
    return x.index_put((_rows(indices), indices), kept.to(x.dtype))


def weigh_update(before: Tensor, after: Tensor, r: Tensor) -> Tensor:
    """x' = x + r f(x) for the kept tokens (Eq. 2), from ``after`` = x + f(x).

    r multiplies the block's update, never the residual.

    Args:
        before, after: (B, K, D).
        r: (B, K), of the kept tokens.
    """
    return before + r.unsqueeze(-1).to(after.dtype) * (after - before)


def refine(scores: Tensor, indices: Tensor, left: Tensor, row: Tensor | int | None = None) -> Tensor:
    """Scores for the next block when this block saw only the K kept tokens.

    Eq. 4 scores all N tokens by the map of the previous block. A block that was itself routed has a map of the
    kept tokens alone, so it can only say how their share is divided: the kept tokens keep their total score and
    redistribute it by the column mean of that K x K map; a token that was skipped keeps the score it had.
    Scores still sum to one, and with K = N this is Eq. 4. A row of the map in its place, the class token's, is there
    only where that token was kept; elsewhere all scores stay as they were.

    Args:
        scores: (B, N), those that chose the kept tokens (of the last block that left any).
        left: (B, K), what the block left of its map, summing to one over K.
        row: (B, 1) or a number, the position of the token whose row that is; None: it is the mean of all rows.
    """
    refined = put(scores, indices, take(scores, indices).sum(dim=1, keepdim=True) * left)
    return refined if row is None else torch.where((indices == row).any(dim=1, keepdim=True), refined, scores)


def leaving_torch() -> bool:
    """While a model is exported or traced: its graph must consist of operators that other runtimes have."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def tokens_in(x: Tensor) -> int:
    """N of (B, N, ...): a number while tracing, too, where a shape is a tensor; while exporting it may be a symbol."""
    return int(x.shape[1]) if torch.jit.is_tracing() else x.shape[1]


def no_autocast(device: str) -> torch.autocast:
    """Scores are computed in float32 whatever autocast says; the meta device has no autocast."""
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.float() if t.element_size() < 4 else t
