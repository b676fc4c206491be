"""Tables of all tokens of a model, masks, relative positions and rotary rows, for the tokens that are here."""

from __future__ import annotations

import torch
from torch import Tensor


def additive(mask: Tensor | None) -> Tensor | None:
    """A mask of timm's, boolean or not, as (B or 1, H or 1, N, N) to be added to the logits."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.view(*[1] * (4 - mask.dim()), *mask.shape)


def rotary_rows(rope: Tensor, positions: Tensor, prefix: int) -> Tensor:
    """The rows of a rotary table for the tokens that are here; a prefix token's and a fused token's turn nothing.

    Args:
        rope: (N - prefix, 2 d), (H, N - prefix, 2 d), or with a batch (B, 1 or H, N - prefix, 2 d); sine, then cosine.
        positions: (B, n) among the N tokens, -1 for a fused one.
    Returns:
        (B, 1 or H, n, 2 d).
    """
    half = rope.new_zeros(rope.shape[-1] // 2)
    still = torch.cat([half, half + 1])
    shape = (*rope.shape[:-2], 1, rope.shape[-1])
    table = torch.cat([still.expand(*shape[:-2], prefix, -1), rope, still.expand(shape)], dim=-2)  # -1 is the last
    if rope.dim() == 4:
        batch = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
        return table.transpose(1, 2)[batch, positions].transpose(1, 2)
    if rope.dim() == 3:
        return table[:, positions].transpose(0, 1)
    return table[positions].unsqueeze(1)


def rows_and_columns(table: Tensor, positions: Tensor) -> Tensor:
    """(B or 1, H or 1, T or 1, T) and (B, N) -> (B, H or 1, N or 1, N): what those that are here say of each other."""
    rows, columns = positions[:, :, None], positions[:, None, :]
    if table.shape[-2] == 1:  # says the same to all, as padding does
        rows = torch.zeros_like(rows[:, :1])
    if table.shape[0] == 1:
        return table[0][:, rows, columns].transpose(0, 1)
    batch = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
    return table[batch, :, rows, columns].permute(0, 3, 1, 2)
