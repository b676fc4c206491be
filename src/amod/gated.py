"""A block of timm's under a trained gate: computed whole and multiplied, or only where the gate is open.

Axes: B batch, N tokens, K the most that any sequence of the batch keeps, D width. Both ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amod.blocks import Halves
from amod.gates import hidden, kept_first, put_kept, straight_through
from amod.plan import Gate
from amod.routing import take, weigh_update


class GatedStep:
    """What is done with a block's halves; leaves ``logits`` and ``gate``, (B, N) or (B, 1).

    Args:
        asked: the attention's inputs, for the tokens at ``indices``, with a ``bias`` on the logits, or of other
            ``inputs`` (``Walk.asked``).
        inputs: what timm gives the block.
        masked: compute everything and multiply by the gate, as training does.
    """

    def __init__(
        self,
        entry: Gate,
        router: nn.Module,
        asked: Callable[..., dict[str, Any]],
        inputs: Mapping[str, Any],
        masked: bool,
    ) -> None:
        self.entry, self.router, self.asked, self.inputs, self.masked = entry, router, asked, inputs, masked
        self.logits = self.gate = torch.empty(0)

    def __call__(self, half: Halves, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        skip = self.entry.skip
        if skip == "mlp":
            x = half.attention(x, **self.asked())
        normed = half.norm(x, skip)
        self.logits = self.router(normed)
        self.gate = straight_through(self.logits)
        if self.masked:
            x = self.multiplied(half, x, normed)
        elif self.entry.per == "sequence":
            x = self.some_sequences(half, x, normed, self.gate[:, 0] > 0)
        else:
            x = self.some_tokens(half, x, normed, self.gate > 0)
        return half.mlp(x) if skip == "attention" else x

    def multiplied(self, half: Halves, x: Tensor, normed: Tensor) -> Tensor:
        """All is computed, and the update multiplied by the gate."""
        skip, after = self.entry.skip, x
        if skip != "mlp":
            bias = hidden(self.gate.detach() > 0, x) if self.entry.per == "token" else None
            after = half.attention(x, normed, **self.asked(bias=bias))
        if skip != "attention":
            after = half.mlp(after, normed if skip == "mlp" else None)
        return weigh_update(x, after, self.gate)

    def some_tokens(self, half: Halves, x: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """Only the tokens in ``keep`` (B, N) are computed. An MLP knows no neighbours: it needs no padding."""
        skip = self.entry.skip
        if skip != "mlp":
            indices, among = kept_first(keep)
            if indices.shape[1]:
                inputs = self.asked(indices=indices, bias=hidden(among, x))
                x = put_kept(x, indices, among, half.attention(take(x, indices), take(normed, indices), **inputs))
        if skip == "attention":
            return x
        known = normed[keep].unsqueeze(0) if skip == "mlp" else None
        return x.index_put((keep,), half.mlp(x[keep].unsqueeze(0), known)[0].to(x.dtype))

    def some_sequences(self, half: Halves, x: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """Only the sequences in ``keep`` (B,) are computed."""
        skip, at = self.entry.skip, keep.nonzero()[:, 0]
        if not len(at):
            return x
        after = x[at]
        if skip != "mlp":
            own = {key: of_sequences(value, at, len(x)) for key, value in self.inputs.items()}
            after = half.attention(after, normed[at], **self.asked(inputs=own))
        if skip != "attention":
            after = half.mlp(after, normed[at] if skip == "mlp" else None)
        return x.index_put((at,), after.to(x.dtype))


def of_sequences(value: Any, at: Tensor, batch: int) -> Any:
    """Those rows of a table or mask that has one for each sequence of the batch."""
    return value[at] if isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] == batch > 1 else value
