"""How a sequence becomes shorter for good, as pure tensor functions that know no model: merging, pruning, halting.

Axes: B batch, N tokens, n tokens that remain, E = ceil(N / 2) even ones, O = floor(N / 2) odd ones, r merged, D width,
T tokens of all images together that have not halted.

``merge`` and ``prune`` make the shorter sequence; ``merge_places`` and ``prune_places`` say which token now stands for
which, for whoever asks. Prefix tokens (class, distillation, registers) stay, and stay in front. DynamicViT's training
masks (``decide``, ``masked_softmax``); A-ViT's tokens halt one by one (``halt``) and are moved together (``pack``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amod.routing import leaving_torch, put, take, top_k


class Reduction(NamedTuple):
    """N tokens become n.

    ``kept`` (B, n) int64: for each remaining token its old position, -1 for one that did not exist before.
    ``owner`` (B, N) int64: for each old token the new position of the one that stands for it, -1 if it is gone.
    """

    kept: Tensor
    owner: Tensor


class Match(NamedTuple):
    """Who joins whom: ``source`` (B, r) among the even tokens goes into ``target`` (B, r) among the odd ones;
    ``rest`` (B, E - r), ascending, are the even tokens that stay as they are."""

    source: Tensor
    target: Tensor
    rest: Tensor


@torch.no_grad()
def match(keys: Tensor, r: int, prefix: int) -> Match:
    """ToMe's matching: the r most similar (even, odd) pairs by the cosine of their keys.

    Each even token has one candidate, an odd one may take in several.

    Args:
        keys: (B, N, d), averaged over heads; or the tokens themselves.
        prefix: the first tokens, which neither merge nor take in others.
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (B, E, O)
    even = torch.arange(similarity.shape[1], device=keys.device).unsqueeze(1) * 2 < prefix
    odd = torch.arange(similarity.shape[2], device=keys.device) * 2 + 1 < prefix
    best, partner = similarity.masked_fill(even | odd, -torch.inf).max(dim=-1)
    order = best.argsort(dim=1, descending=True)
    source = order[:, :r]
    return Match(source, partner.gather(1, source), order[:, r:].sort(dim=1).values)


def merge(x: Tensor, size: Tensor | None, pairs: Match, prefix: int, norm: bool = False) -> tuple[Tensor, Tensor]:
    """Each pair becomes the average of its two tokens, weighted by how many patches each stands for.

    Rows are moved by index rather than by scatter, and only what merges is weighed: as fast as ToMe can fairly be.

    Args:
        x: (B, N, D).
        size: (B, N) patches per token; None: one each.
        norm: the average gets the average of their norms (Token Fusion, arXiv 2312.01026, gives it the larger one).
    Returns:
        (B, N - r, D) and their sizes (B, N - r). The even tokens that stay come first, then the odd ones.
    """
    if norm:
        both, size = merge(torch.cat([x, x.norm(dim=-1, keepdim=True)], dim=-1), size, pairs, prefix)
        return F.normalize(both[..., :-1], dim=-1) * both[..., -1:], size
    if size is None:
        size = x.new_ones(x.shape[:2])
    even, odd = x[:, ::2], x[:, 1::2]
    even_size, odd_size = size[:, ::2], size[:, 1::2]
    batch, targets = odd_size.shape
    row = torch.arange(batch, device=x.device).unsqueeze(1)
    weight = even_size[row, pairs.source]
    moving = even[row, pairs.source] * weight.unsqueeze(-1)  # (B, r, D)
    weighed = odd * odd_size.unsqueeze(-1)
    if leaving_torch():  # OpenVINO does not know index_add
        total = odd_size.scatter_add(1, pairs.target, weight)
        summed = weighed.scatter_add(1, pairs.target.unsqueeze(-1).expand_as(moving), moving)
    else:
        flat = (pairs.target + row * targets).flatten()
        total = odd_size.flatten().index_add(0, flat, weight.flatten()).view(batch, targets)
        summed = weighed.flatten(0, 1).index_add(0, flat, moving.flatten(0, 1)).view(odd.shape)
    x = torch.cat([even[row, pairs.rest], summed / total.unsqueeze(-1)], dim=1)
    size = torch.cat([even_size[row, pairs.rest], total], dim=1)
    order = _prefix_first(pairs, x.shape[1], prefix)
    return (x, size) if order is None else (x[:, order], size[:, order])


def merge_in_rounds(
    x: Tensor, size: Tensor | None, keys: Tensor | None, parts: Sequence[int], prefix: int, norm: bool = False
) -> tuple[Tensor, Tensor | None, list[Match]]:
    """Of ``parts`` tokens each, one matching and merge among what the one before left.

    Args:
        x, size, norm: as for ``merge``.
        keys: what is compared, (B, N, d); None: the tokens themselves.
    Returns:
        The tokens, their sizes, and each round's pairs.
    """
    rounds: list[Match] = []
    before = size
    for r in parts:
        if rounds and keys is not None:
            keys, _ = merge(keys, before, rounds[-1], prefix)
        rounds.append(match(x if keys is None else keys, r, prefix))
        before = size
        x, size = merge(x, size, rounds[-1], prefix, norm)
    return x, size, rounds


def _prefix_first(pairs: Match, remain: int, prefix: int) -> list[int] | None:
    """The order in which even and odd prefix tokens come in turn, as they were; None: they do already."""
    if prefix < 2:
        return None
    first = [i // 2 + pairs.rest.shape[1] * (i % 2) for i in range(prefix)]
    return first + [i for i in range(remain) if i not in first]


def prune(
    x: Tensor, size: Tensor | None, scores: Tensor, keep: int, prefix: int, fuse: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """EViT: the ``keep`` patches of highest score stay, in their order; the others become one token, or are gone.

    Args:
        x: (B, N, D), after the attention's residual.
        size: (B, N) patches per token, or None if nothing was merged before.
        scores: (B, N), the class token's attention; the prefix stays whatever it has.
        fuse: append sum_j scores_j x_j over the dropped patches j, the weights as they are. That is no mean of them,
            and counts as one token.
    Returns:
        (B, n, D), their sizes, and the positions (B, prefix + keep) of those that stay.
    """
    kept = top_k(scores.detach(), prefix + keep, prefix)
    stay, sizes = take(x, kept), None if size is None else take(size, kept)
    if not fuse:
        return stay, sizes, kept
    dropped = put(scores, kept, scores.new_zeros(kept.shape))  # (B, N), no weight for those that stay
    fused = (dropped.unsqueeze(-1).to(x.dtype) * x).sum(dim=1, keepdim=True)
    if sizes is not None:
        sizes = torch.cat([sizes, torch.ones_like(sizes[:, :1])], dim=1)
    return torch.cat([stay, fused], dim=1), sizes, kept


# --- DynamicViT: decisions that are learned ---------------------------------------------------------------------------


def decide(log_probs: Tensor, kept: Tensor) -> Tensor:
    """While it trains, a patch stays by a hard Gumbel softmax, and only one that has stayed until now can stay.

    Args:
        log_probs: (B, N, 2), of staying and of going.
        kept: (B, N), 1 for those that have stayed.
    Returns:
        (B, N) of 0 and 1, with the gradient of the soft decision.
    """
    return F.gumbel_softmax(log_probs, hard=True, dim=-1)[..., 0] * kept


def masked_softmax(logits: Tensor, keep: Tensor, epsilon: float = 1e-6) -> Tensor:
    """(e_j p_j + epsilon / N) / (sum_j e_j p_j + epsilon), e = exp(a - max a): nobody looks at who went, but at itself.

    Args:
        logits: (B, H, R, N) of the first R tokens.
        keep: (B, N), of 0 and 1; it gets a gradient.
    """
    rows, tokens = logits.shape[-2:]
    itself = torch.eye(rows, tokens, dtype=logits.dtype, device=logits.device)
    keep = keep.to(logits.dtype)[:, None, None, :]
    e = (logits - logits.amax(dim=-1, keepdim=True)).exp() * (keep + (1 - keep) * itself)
    return (e + epsilon / tokens) / (e.sum(dim=-1, keepdim=True) + epsilon)


# --- A-ViT: tokens that halt ------------------------------------------------------------------------------------------


def halt(total: Tensor, score: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """One block's step for tokens that have not halted, of any shape.

    A token halts where its sum of halting scores, ``total`` before the block and ``score`` by the block, exceeds
    1 - epsilon. Its output is the mean of its states, weighted by h, where it halts by the remainder 1 - total.

    Returns:
        the weight of this block's state, and whether the token goes on.
    """
    going = total + score <= 1 - epsilon
    return torch.where(going, score, 1 - total), going


class Packed(NamedTuple):
    """T tokens of b images in a row, image after image, and where they stand when images of like length lie under each
    other, the shorter ones filled up.

    ``groups``: of each the T positions image by image (images, longest), and which of them are real, None: all.
    ``back`` (T,): where a token is among the groups' positions, one group behind the other.
    """

    groups: tuple[tuple[Tensor, Tensor | None], ...]
    back: Tensor


GROUP, EVEN, FEW = 4, 0.85, 40_000
"""Images under each other, sorted by length; all in one group where at least that share of its places is filled
(``tools/packed_attention.py``), or where filled up they have so few pairs of tokens that more calls cost more."""


def pack(image: Tensor) -> Packed:
    """From the image (T,) of each token, ascending. Reads the groups' longest images off the device, once."""
    _, place, counts = torch.unique_consecutive(image, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    lengths, order = counts.sort()
    longest = lengths.tolist()
    even = len(image) >= EVEN * len(longest) * longest[-1]
    size = len(longest) if even or len(longest) * longest[-1] ** 2 <= FEW else GROUP
    groups, first, before = [], torch.empty_like(starts), 0
    for at in range(0, len(longest), size):
        images, wide = order[at : at + size], longest[at : at + size][-1]
        columns = torch.arange(wide, device=image.device)
        slots = (starts[images].unsqueeze(1) + columns).clamp(max=len(image) - 1)
        groups.append((slots, None if longest[at] == wide else columns < counts[images].unsqueeze(1)))
        first[images] = before + torch.arange(len(images), device=image.device) * wide
        before += slots.numel()
    return Packed(tuple(groups), (first - starts)[place] + torch.arange(len(image), device=image.device))


# --- who stands for whom ------------------------------------------------------------------------------------------


def merge_places(pairs: Match, count: int, prefix: int) -> Reduction:
    """What ``merge`` did to N = ``count`` tokens."""
    odd = torch.arange(1, count, 2, device=pairs.rest.device).expand(pairs.rest.shape[0], -1)
    kept = torch.cat([pairs.rest * 2, odd], dim=1)
    order = _prefix_first(pairs, kept.shape[1], prefix)
    kept = kept if order is None else kept[:, order]
    owner = _inverse(kept, count)
    return Reduction(kept, put(owner, pairs.source * 2, owner.gather(1, pairs.target * 2 + 1)))


def merged_places(rounds: Sequence[Match], count: int, prefix: int) -> Reduction:
    """What ``merge_in_rounds`` did to N = ``count`` tokens."""
    done = merge_places(rounds[0], count, prefix)
    for pairs in rounds[1:]:
        here = merge_places(pairs, done.kept.shape[1], prefix)
        done = Reduction(moved(done.kept, here.kept), moved(here.owner, done.owner))
    return done


def prune_places(kept: Tensor, count: int, remain: int) -> Reduction:
    """What ``prune`` did to N = ``count`` tokens; one more than ``kept`` remains where it fused."""
    owner = _inverse(kept, count)
    if remain == kept.shape[1]:
        return Reduction(kept, owner)
    return Reduction(
        torch.cat([kept, kept.new_full((kept.shape[0], 1), -1)], dim=1), owner.masked_fill(owner < 0, remain - 1)
    )


def _inverse(kept: Tensor, count: int) -> Tensor:
    """(B, n) old positions -> (B, N) new ones, -1 for those that are not among them."""
    places = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    return put(kept.new_full((kept.shape[0], count), -1), kept, places)


def moved(values: Tensor, at: Tensor) -> Tensor:
    """(B, N) values and (B, M) positions among them -> (B, M); -1 stays -1."""
    return values.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)
