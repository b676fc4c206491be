"""How much each token matters to the dense model, and what its attention says of each (the paper's Sec. 4.4).

The importance of token j at block l is the change of the dense model's cross-entropy loss when token j is removed from
the input of block l:

    importance(l, j) = loss(blocks l..L of the other N - 1 tokens) - loss(blocks l..L of all N tokens).

Blocks 0..l-1 are computed with all tokens, block l and all later ones, the pooling and the head without token j.
Positive: the model does worse without the token. The paper says "change in the loss" and no more; the sign is ours.

Only patches are removed. Class, distillation and register tokens stay: without its class token a model that reads its
answer there has none to give, and its importance would be that of the answer, not of a part of the image.

Axes: B images, N tokens, M removed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from amod.attention import READABLE, ReadableAttention
from amod.entries import Route
from amod.errors import UserError
from amod.families import FAMILIES
from amod.vit import convert

CHUNK_ELEMENTS = 1 << 20
"""Shortened sequences run together up to so many values of their tokens (4 MiB; with the MLP's and attention's
temporaries about ten times that), and at least one."""


class DenseWalk(NamedTuple):
    """What a dense model leaves behind: ``inputs[l]`` (B, N, D) of block l, ``scores[l]`` (B, N) that A-MoD would route
    block l by (Eq. 4: the column mean of block l-1's attention map, float32), and ``logits`` (B, classes).
    """

    inputs: dict[int, Tensor]
    scores: dict[int, Tensor]
    logits: Tensor


@torch.no_grad()
def dense_walk(vit: VisionTransformer, images: Tensor, blocks: Iterable[int]) -> DenseWalk:
    """One dense forward pass of images (B, 3, H, W), kept at the given 0-based blocks.

    Block 0 has no score, nor has a block behind one whose attention map cannot be read.
    """
    blocks = set(blocks)
    # routed by a capacity of 1 a block keeps all tokens, and says what it was given to choose by
    scored = convert(vit, plan={i: Route(1.0) for i in blocks if i and is_scorable(vit.blocks[i - 1])})
    inputs: dict[int, Tensor] = {}
    for i in blocks:
        scored.blocks[i].register_forward_pre_hook(lambda block, args, i=i: inputs.update({i: args[0]}))
    logits, routing = scored(images, return_routing=True)
    return DenseWalk(inputs, {layer.layer: layer.scores for layer in routing}, logits)


def is_scorable(block: Any) -> bool:
    """Whether the attention map of this block can be read."""
    attn = getattr(block, "attn", None)
    return isinstance(attn, ReadableAttention) or type(attn) in READABLE


@torch.no_grad()
def leave_one_out(
    vit: VisionTransformer,
    x: Tensor,
    labels: Tensor,
    block: int,
    removed: Tensor,
    done: Callable[[int], object] = lambda blocks: None,
) -> Tensor:
    """The importance (B, M) of the tokens ``removed`` at ``block``; see the module's text.

    All B * M shortened sequences are independent rows: they run in chunks of :data:`CHUNK_ELEMENTS`.

    Args:
        vit: the dense model, in evaluation mode.
        x: (B, N, D), the tokens that enter the block.
        labels: (B,), the classes whose loss is meant.
        removed: (B, M) int64, positions in 0..N-1, each removed alone.
        done: called after each chunk with the number of blocks it ran, each sequence counted.
    """
    if isinstance(vit, FAMILIES) and not isinstance(vit, VisionTransformer):
        raise UserError(
            f"{type(vit).__name__}: its blocks read where a token stands, so importance cannot leave one out; "
            "it is measured on timm's VisionTransformer (explain.py draws what a folder of save_pretrained keeps)"
        )
    b, n, d = x.shape
    others = torch.arange(n - 1, device=x.device)
    rows = torch.arange(b, device=x.device).repeat_interleave(removed.shape[1])
    chunk = max(1, CHUNK_ELEMENTS // (n * d))
    losses = []
    for row, token in zip(rows.split(chunk), removed.flatten().split(chunk), strict=True):
        kept = others + (others >= token.unsqueeze(1))  # 0..N-1 without the token: (chunk, N-1)
        losses.append(_loss(vit, x[row.unsqueeze(1), kept], labels[row], block))
        done(len(row) * (len(vit.blocks) - block))
    return torch.cat(losses).view(removed.shape) - _loss(vit, x, labels, block).unsqueeze(1)


def _loss(vit: VisionTransformer, x: Tensor, labels: Tensor, block: int) -> Tensor:
    """Cross-entropy (B,) of the blocks from ``block`` on."""
    for later in vit.blocks[block:]:
        x = later(x)
    return F.cross_entropy(vit.forward_head(vit.norm(x)).float(), labels, reduction="none")


def patches_to_remove(images: int, tokens: int, prefix: int, limit: int | None, generator: torch.Generator) -> Tensor:
    """Positions (B, M), ascending: all patches of each image, or ``limit`` of them drawn without replacement."""
    patches = tokens - prefix
    count = patches if limit is None else min(limit, patches)
    drawn = torch.rand(images, patches, generator=generator).argsort(dim=1)[:, :count]
    return prefix + drawn.sort(dim=1).values


def cost(depth: int, blocks: Iterable[int], images: int, removed: int) -> int:
    """Blocks that leave-one-out runs, each sequence counted: L - l of them for a token removed at block l of L."""
    return images * removed * sum(depth - block for block in blocks)
