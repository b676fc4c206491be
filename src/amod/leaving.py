"""Two methods whose training masks tokens and whose inference removes them, as parts of a ``walk.Walk``.

DynamicViT: ``predicted``, before a block. A-ViT: ``halting``, the block and what halts behind it. Axes: B batch,
N tokens of the model, T tokens of all images together that have not halted, R class tokens (2 with a distillation one).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amod.entries import Halt, Predict
from amod.errors import UserError
from amod.reduce import decide, halt, pack
from amod.routing import RoutedLayer, leaving_torch, take, top_k, wide

NEVER = -1000.0
"""Added to the logits of tokens that have halted: exp of it is 0 in every precision, and a row of them is no NaN."""


def predicted(walk: Any, i: int, entry: Predict, x: Tensor) -> Tensor:
    """The tokens that go on: (B, n, D) -> (B, kept, D); while it trains all of them, and ``walk.keep`` says which."""
    model, prefix, count = walk.model, walk.model.num_prefix_tokens, x.shape[1]
    predictor, patches = model.routers[str(i)], x[:, prefix:]
    if walk.masks:
        kept = patches.new_ones(patches.shape[:2]) if walk.keep is None else walk.keep[:, prefix:]
        kept = decide(predictor(patches, kept), kept)
        walk.decisions.append(kept)
        walk.keep = F.pad(kept, (prefix, 0), value=1.0)
        return x
    scores = F.pad(wide(predictor(patches)[..., 0]), (prefix, 0))  # log-probabilities; 0 is certainty
    kept = top_k(scores.detach(), entry.remain(count, prefix, walk.tokens), prefix)
    if walk.follows:
        walk.follow(i, {"tokens": x, "scores": scores, "kept": kept}, count, kept.shape[1])
    return take(x, kept)


class Going(NamedTuple):
    """Where every token of a batch is on its way.

    ``at`` (T,): the places of those that go on among the B N; None: while tokens are masked, or all of them.
    ``alive`` (B, N): which go on. ``total`` (B, N): their sums of halting scores. ``output`` (B, N or R, D): the
    weighted means so far. ``ponder`` (B, N): blocks run, and the remainder of those that have halted. ``means``: of the
    halting scores, one for each block, halted tokens counting 0.
    """

    at: Tensor | None
    alive: Tensor
    total: Tensor
    output: Tensor
    ponder: Tensor
    means: list[Tensor]


def halting(walk: Any, i: int, block: nn.Module, entry: Halt, x: Tensor, inputs: dict[str, Any], rows: int) -> Tensor:
    """The block on the tokens that have not halted: the first (B, N, D), then (1, T, D), from the last one (B, R, D).

    An image whose class tokens have all halted leaves with all of its tokens: nobody reads them. While tokens are
    masked it is (B, N, D) throughout, as in the published code.
    """
    if inputs.get(walk.model.mask_name) is not None:
        raise UserError(f"{walk.model.mask_name}: a model whose tokens halt takes no mask; leave it out")
    walk.masks = walk.masks or x.is_meta or leaving_torch()
    going = walk.going or _begin(x, None if walk.masks else rows)
    last = i == len(walk.model.blocks) - 1
    step = _masked if walk.masks else _removed
    x, walk.going = step(walk, i, block, entry, x, inputs, going, last)
    if walk.record:
        batch, tokens = going.alive.shape
        seats = torch.arange(tokens, device=x.device).expand(batch, tokens)
        scores = (walk.going.total - going.total).detach()
        walk.routing.append(RoutedLayer(i, scores, seats, seats.masked_fill(~going.alive, -1)))
    return walk.going.output if last else x


def _begin(x: Tensor, rows: int | None) -> Going:
    batch, tokens, width = x.shape
    alive = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
    zero = x.new_zeros(batch, tokens, dtype=torch.promote_types(x.dtype, torch.float32))
    return Going(None, alive, zero, x.new_zeros(batch, rows or tokens, width), zero, [])


def _score(entry: Halt, x: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """h by the first channel, and as it is used: in the last block everything halts."""
    score = (entry.scale * wide(x[..., 0]) - entry.shift).sigmoid()
    return score, torch.ones_like(score) if last else score


def _masked(
    walk: Any, i: int, block: nn.Module, entry: Halt, x: Tensor, inputs: dict[str, Any], going: Going, last: bool
) -> tuple[Tensor, Going]:
    mask = None
    if walk.going is not None:
        mask = torch.where(going.alive, 0.0, NEVER).to(x.dtype)[:, None, None, :]
    x = walk.run(i, block, x, inputs, mask=mask)
    own, score = _score(entry, x, last)
    weight, goes_on = halt(going.total, score, entry.epsilon)
    alive = going.alive & goes_on
    weight = weight * going.alive
    remainder = (1 - going.total) * (going.alive & ~goes_on)
    return x, Going(
        None,
        alive,
        going.total + score * going.alive,
        going.output + weight.unsqueeze(-1).to(x.dtype) * x,
        going.ponder + going.alive + remainder,
        [*going.means, (own * going.alive).mean()],
    )


def _removed(
    walk: Any, i: int, block: nn.Module, entry: Halt, x: Tensor, inputs: dict[str, Any], going: Going, last: bool
) -> tuple[Tensor, Going]:
    batch, tokens = going.alive.shape
    rows = going.output.shape[1]
    at = torch.arange(batch * tokens, device=x.device) if going.at is None else going.at
    image, place = at // tokens, at % tokens
    whole = len(at) == batch * tokens
    if whole:  # nothing has halted yet
        x = walk.run(i, block, x.reshape(batch, tokens, x.shape[-1]), inputs).flatten(0, 1)
    elif len(at):
        walk.positions = place.unsqueeze(0)
        x = walk.run(i, block, x, inputs, packed=pack(image))[0]
    else:
        x = x[0]
    _, score = _score(entry, x, last)
    before = going.total.flatten()[at]
    weight, goes_on = halt(before, score, entry.epsilon)
    classes = place < rows
    output = going.output.index_put(
        (image[classes], place[classes]), (weight[classes].unsqueeze(-1) * x[classes]).to(x.dtype), accumulate=True
    )
    alive = going.alive.flatten().index_put((at,), goes_on).view(batch, tokens)
    wanted = alive[:, :rows].any(dim=1)
    alive = alive & wanted.unsqueeze(1)
    total = going.total.flatten().index_put((at,), before + score).view(batch, tokens)
    more = torch.where(goes_on, 1.0, 2 - before)
    ponder = going.ponder.flatten().index_put((at,), more, accumulate=True).view(batch, tokens)
    if walk.restore:  # a token that has halted stays as it was
        states = x if walk.whole is None else walk.whole.flatten(0, 1).index_put((at,), x)
        walk.whole = states.view(batch, tokens, -1)
        if last:
            walk.whole = torch.cat([output, walk.whole[:, rows:]], dim=1)
    stay = goes_on & wanted[image]
    return x[stay].unsqueeze(0), Going(at[stay], alive, total, output, ponder, going.means)
