"""A block of timm's under a trained gate: computed whole and multiplied, or only where the gate is open.

Axes: B batch, N tokens, T kept tokens of all sequences, one behind the other, K the most that any sequence keeps, D
width. All ways give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amod.blocks import Halves
from amod.entries import Gate
from amod.gates import hidden, kept_first, put_kept, straight_through
from amod.reduce import pack
from amod.routing import take, weigh_update


class GatedStep:
    """What is done with a block's halves; leaves ``logits`` and ``gate``, (B, N) or (B, 1).

    Args:
        asked: the attention's inputs, for the tokens at ``indices``, with a ``bias`` on the logits, or of other
            ``inputs`` (``Walk.asked``).
        inputs: what timm gives the block.
        masked: compute everything and multiply by the gate, as training does.
        packs: the attention knows tokens of several sequences in a row apart.
    """

    def __init__(
        self,
        entry: Gate,
        router: nn.Module,
        asked: Callable[..., dict[str, Any]],
        inputs: Mapping[str, Any],
        masked: bool,
        packs: bool,
    ) -> None:
        self.entry, self.router, self.asked, self.inputs = entry, router, asked, inputs
        self.masked, self.packs = masked, packs
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
        """Only the tokens in ``keep`` (B, N) are computed, in one row (1, T, D); an MLP knows no neighbours anyway."""
        skip = self.entry.skip
        if skip != "mlp" and not self.packs:
            x = self.filled_up(half, x, normed, keep)
            if skip == "attention":
                return x
        sequence, place = keep.nonzero(as_tuple=True)
        if not len(place):
            return x
        after, known = x[keep].unsqueeze(0), normed[keep].unsqueeze(0)
        if skip != "mlp" and self.packs:
            inputs = self.asked(indices=place.unsqueeze(0), packed=pack(sequence))
            after = half.attention(after, known, **inputs)
        if skip != "attention":
            after = half.mlp(after, known if skip == "mlp" else None)
        return x.index_put((keep,), after[0].to(x.dtype))

    def filled_up(self, half: Halves, x: Tensor, normed: Tensor, keep: Tensor) -> Tensor:
        """The attention of the tokens in ``keep``, for blocks that cannot take them in a row: (B, K, D)."""
        indices, among = kept_first(keep)
        if not indices.shape[1]:
            return x
        inputs = self.asked(indices=indices, bias=hidden(among, x))
        return put_kept(x, indices, among, half.attention(take(x, indices), take(normed, indices), **inputs))

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
