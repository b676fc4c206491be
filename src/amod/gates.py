"""Trained gates (Router-Tuning, MindSkip), as pure tensor functions that know no model.

    g = 1[sigmoid(w . norm(x)) >= 1/2]        per token, or per sequence: of the mean of norm(x) over its tokens
    x' = x + g f(x)                           f: attention (MindSkip), MLP, or the block

In the backward pass the step's derivative is taken as 1, that of the sigmoid stays. In training everything is computed
and multiplied by g; in inference what has g = 0 is not computed. Both are the same function: a token that is skipped is
not seen by the others' attention either, as in MoD.

Axes: B batch, N tokens, K the most that any sequence of the batch keeps, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amod.entries import Gate
from amod.plan import entries_of
from amod.routing import RoutedLayer, put, take


def straight_through(logits: Tensor) -> Tensor:
    """1 where sigmoid(logits) >= 1/2, else 0, exactly; its gradient is the sigmoid's."""
    soft = logits.sigmoid()
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


def kept_first(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept tokens of each sequence, padded to the most that one keeps.

    Args:
        keep: (B, N) bool.
    Returns:
        positions (B, K) int64, all different, the kept ones first and ascending, and which of them are kept (B, K).
        The others are fillers, whose results are to be thrown away.
    """
    counts = keep.sum(dim=1)
    most = int(counts.max()) if len(counts) else 0  # the one number that a pass must know before it goes on
    indices = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return indices, torch.arange(most, device=keep.device) < counts.unsqueeze(1)


def hidden(among: Tensor, like: Tensor) -> Tensor:
    """(B, K) bool -> (B, 1, 1, K), to be added to logits: what is not among them is not seen. Finite, so that a row
    that sees nothing is no row of nan."""
    bias = torch.zeros(among.shape, dtype=like.dtype, device=among.device)
    return bias.masked_fill(~among, torch.finfo(like.dtype).min)[:, None, None, :]


def put_kept(x: Tensor, indices: Tensor, among: Tensor, after: Tensor) -> Tensor:
    """``x`` (B, N, D) with the kept ones among (B, K) replaced by ``after`` (B, K, D); fillers stay as they were."""
    return put(x, indices, torch.where(among.unsqueeze(-1), after.to(x.dtype), take(x, indices)))


def is_gated(model: Any) -> bool:
    """Whether a plan of the model has gates, so that what it costs is up to the data."""
    return any(isinstance(entry, Gate) for entry in entries_of(model))


def share_kept(passes: list[list[RoutedLayer]]) -> dict[str, Any]:
    """Over the passes: the share of gates that were open, in all gated layers and in each."""
    shares = {}
    for i, one in enumerate(passes[0]):
        opened, of = (float(sum(counts)) for counts in zip(*(opened_of(routing[i]) for routing in passes), strict=True))
        shares[str(one.layer)] = round(opened / max(of, 1), 4)
    return {"share_kept": round(sum(shares.values()) / len(shares), 4), "share_kept_by_block": shares}


def opened_of(layer: RoutedLayer) -> tuple[Tensor, Tensor]:
    """(the sum of the gates, of how many), without those of padding."""
    gate: Any = layer.gate
    real = gate.new_ones(gate.shape) if layer.real is None or gate.shape[1] == 1 else layer.real.to(gate.dtype)
    return (gate * real).sum(), real.sum()


def penalty(routing: list[RoutedLayer], plan: Mapping[int, Any]) -> Tensor | float:
    """What the loss of a training has on top: the sum over gated layers of scale relu(mean g - target), and without a
    target of scale mean g; padding is not counted. ``routing`` is that of ``model(..., return_routing=True)``, ``plan``
    ``model.plan``."""
    total: Tensor | float = 0.0
    for layer in routing:
        entry = plan.get(layer.layer)
        if isinstance(entry, Gate) and entry.scale and layer.gate is not None:
            opened, of = opened_of(layer)
            share = opened / of.clamp(min=1)
            total = total + entry.scale * (share if entry.target is None else F.relu(share - entry.target))
    return total
