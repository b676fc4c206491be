"""Routing where a batch holds texts of different lengths, as pure tensor functions that know no model.

Axes: B batch, H heads, N tokens, K tokens kept, n_b <= N real tokens of text b; the others are padding.

Text b keeps K_b of its n_b tokens. So that shapes stand before the numbers are known, each text takes K = K(N) >= K_b
along: its K_b, and K - K_b *fillers*, whom nobody sees and whose results are thrown away. So a text in a batch is
treated as if it were alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amod.entries import fraction
from amod.routing import put, refine, take

NEVER = -torch.inf
HIDDEN = -5e3
"""Less than this, added to a logit, hides a token: people write -1e4, -1e9, a type's least number or -inf."""


def real_tokens(mask: Tensor, batch: int) -> Tensor:
    """(B, N) bool: padding is what does not see itself.

    Args:
        mask: (B or 1, H or 1, N, N), True where row may look at column, or added to the logits, where whoever is not
            to be seen has -1e4 or less.
    """
    itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    real = itself if mask.dtype == torch.bool else itself > HIDDEN
    return real.expand(batch, -1)


def counts(real: Tensor, capacity: float, least: int) -> Tensor:
    """K_b = floor(C n_b) of each text (B,), as ``Route.kept`` rounds it; at least ``least``, at most what there is."""
    there = real.sum(dim=1)
    part, whole = fraction(capacity)
    return (there * part // whole).clamp(min=least).minimum(there)


def choose(scores: Tensor, real: Tensor, k: int, kept: Tensor, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Each text's tokens of highest score, ascending; equal scores keep the earlier token.

    Args:
        scores, real: (B, N).
        k: K, not less than any of ``kept`` (B,), the K_b.
        prefix: the first real tokens are kept whatever their score, and count among the K_b.
    Returns:
        positions (B, K) int64, all different, and which of them are kept rather than fillers (B, K).
    """
    if prefix:
        scores = scores.masked_fill(real & (real.cumsum(dim=1) <= prefix), torch.inf)
    best = scores.masked_fill(~real, NEVER).sort(dim=1, descending=True, stable=True).indices[:, :k]
    within = torch.arange(k, device=best.device) < kept.unsqueeze(1)
    indices, order = best.sort(dim=1)
    return indices, within.gather(1, order)


def without_fillers(indices: Tensor, among: Tensor) -> Tensor:
    """For a record: (B, K) ascending, in which a text that keeps fewer than K repeats its last one."""
    last = indices.masked_fill(~among, -1).amax(dim=1, keepdim=True).clamp(min=0)
    return torch.where(among, indices, last).sort(dim=1).values


def mask_among(mask: Tensor, real: Tensor) -> Tensor:
    """The mask (B or 1, H or 1, N, N) in which real tokens (B, N) look at real ones, and any other at itself alone.

    So a column mean over all rows is one over the real rows, up to a factor, and no row is empty.
    """
    both = real[:, None, :, None] & real[:, None, None, :]
    itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device) & ~real[:, None, :, None]
    if mask.dtype == torch.bool:
        return mask & both | itself
    return mask.masked_fill(~both, torch.finfo(mask.dtype).min).masked_fill(itself, 0)


def mean_of_real_rows(column_mean: Tensor, real: Tensor) -> Tensor:
    """(B, N) over all N rows of a map under :func:`mask_among` -> over the n_b real ones; 0 for the others."""
    there = real.sum(dim=1, keepdim=True).clamp(min=1)
    return (column_mean * (real.shape[1] / there)).masked_fill(~real, 0)


def refine_among(scores: Tensor, indices: Tensor, left: Tensor, among: Tensor, row: Tensor | None = None) -> Tensor:
    """:func:`amod.routing.refine` for the kept of (B, K); fillers, like those who were skipped, have what they had."""
    had = take(scores, indices)
    new = take(refine(put(scores, indices, had.masked_fill(~among, 0)), indices, left), indices)
    if row is not None:
        among = among & (among & (indices == row)).any(dim=1, keepdim=True)
    return put(scores, indices, torch.where(among, new, had))


def first_of(real: Tensor) -> Tensor:
    """(B, N) -> (B,): where each text begins."""
    return real.int().argmax(dim=1)
