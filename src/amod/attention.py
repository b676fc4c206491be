"""Attention that also leaves the column mean of its map (Eq. 3 and 4), without the map in memory.

R_j = 1/(H N) sum_h sum_i A_h[i, j],  A_h = softmax(Q_h K_h^T / sqrt(d)):   "how much the others look at token j".

Axes: B batch, H heads, N tokens, d head width.  q, k, v (B, H, N, d) -> output (B, H, N, d), scores (B, N) float32.

Four ways to the same numbers. ``attend`` chooses, by what was measured (see ``docs/performance.md``):

- ``explicit``: the N x N map in memory. The reference, and the only one with attention dropout or with a
  gradient through the scores. Also used while exporting, where the graph must consist of plain operators, and
  for training on up to 128 tokens, where a map is smaller than what avoids it.
- ``tiled``: CPU, no gradient. Whole rows of the map, a cache-sized tile at a time: the product QK^T is made once
  and serves both the output and the scores. 1.1 times the time of torch's fused attention, which gives no scores
  (N = 197, 3 to 12 heads, batch 32, two cores; 0.6 at N = 50, 1.5 at 4097); the explicit map takes 1.5 to 3 times.
- torch's fused attention for the output, with its own gradient, and ``column_mean`` for the scores, which
  need none: CPU training. 1.08 to 1.19 times fused attention alone (forward and backward), explicit 1.04 to 1.9.
- the same with a Triton kernel for the scores: CUDA (without Triton, tiles). Tested in Triton's interpreter; never
  timed on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_BYTES, TILE_BYTES = 1 << 20, 2 << 20
"""Sizes of a tile of the map, for each thread: whole samples share a tile up to the first, one sample's heads or rows
up to the second. Chosen on one and two cores for N = 50 to 4097; a tile that leaves a thread idle costs up to 40 %."""
EXPLICIT_TOKENS = 128
"""Up to this many tokens, training on a CPU holds the map (N = 50: 0.91 of fused; N = 197: 1.04 to 1.9)."""


def explicit(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, differentiable: bool = False):
    """The definition: softmax map in memory, its column mean in float32, its product with v."""
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        attention = ((q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)).softmax(dim=-1)
        scores = (attention if differentiable else attention.detach()).mean(dim=(1, 2))
        if dropout:
            attention = F.dropout(attention, dropout)
        return attention.to(dtype) @ v, scores


def _tiled(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    one_map, threads = 4 * n * n, torch.get_num_threads()
    room = TILE_BYTES * threads
    samples = max(1, SAMPLE_BYTES * threads // (h * one_map))
    heads = h if h * one_map <= room else max(1, room // one_map)
    rows = n if one_map <= room else max(16, room // (4 * n))
    output = q.new_empty(0) if v is None else v.new_empty(b, n, h, d).transpose(1, 2)
    scores = q.new_zeros(b, 1, n, dtype=torch.float32)
    buffer = q.new_empty(samples * heads, rows, n, dtype=torch.float32)
    # a product with a constant row sums the columns
    weights = q.new_full((samples, 1, heads * rows), 1 / (h * n), dtype=torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for s, g, i in product(range(0, b, samples), range(0, h, heads), range(0, n, rows)):
            at = (slice(s, s + samples), slice(g, g + heads), slice(i, i + rows))
            q_, k_ = q[at].flatten(0, 1).float(), k[at[:2]].flatten(0, 1).float()
            tile = buffer[: q_.shape[0], : q_.shape[1]]
            torch.baddbmm(tile, q_, k_.transpose(1, 2), beta=0, alpha=d**-0.5, out=tile)
            torch.softmax(tile, dim=-1, out=tile)
            score = scores[at[0]]
            maps = tile.reshape(len(score), -1, n)
            score.baddbmm_(weights[: len(score), :, : maps.shape[1]], maps)
            if v is not None:
                v_ = v[at[:2]].flatten(0, 1)
                if samples == 1:
                    torch.bmm(tile.to(v.dtype), v_, out=output[at][0])
                else:
                    output[at] = torch.bmm(tile.to(v.dtype), v_).view(output[at].shape)
    return output, scores.squeeze(1)


# As operators, the tile loops are one node to torch.compile rather than an unrolled loop.
@torch.library.custom_op("amod::tiled_attention", mutates_args=())
def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, d) and scores (B, N) in one pass over tiles of the map. No gradient."""
    return _tiled(q, k, v)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return v.new_empty(b, n, h, d).transpose(1, 2), q.new_empty(b, n, dtype=torch.float32)


@torch.library.custom_op("amod::column_mean", mutates_args=())
def column_mean(q: Tensor, k: Tensor) -> Tensor:
    """Scores (B, N) alone, in O(N) memory per head. No gradient."""
    if q.is_cuda and find_spec("triton") is not None:
        from amod.kernels import triton_column_mean

        return triton_column_mean(q, k)
    return _tiled(q, k, None)[1]


@column_mean.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, differentiable: bool = False):
    """Attention and the scores of Eq. 4, by the fastest of the ways above.

    Args:
        q, k, v: (B, H, N, d).
        dropout: attention dropout in effect (0 in evaluation); the scores are taken before it.
        differentiable: let the gradient through the scores (A.5's ablation); Eq. 5 has none.
    Returns:
        output (B, H, N, d), scores (B, N) float32.
    """
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    small = gradient and q.device.type == "cpu" and q.shape[2] <= EXPLICIT_TOKENS
    if dropout or (differentiable and gradient) or small or torch.compiler.is_exporting():
        return explicit(q, k, v, dropout, differentiable)
    compiling = torch.compiler.is_compiling()
    if q.device.type == "cpu" and not gradient:
        return tiled_attention(q, k, v) if compiling else _tiled(q, k, v)
    return F.scaled_dot_product_attention(q, k, v), column_mean(q.detach(), k.detach())


def attention_with_scores(attn: Any, x: Tensor, differentiable: bool = False) -> tuple[Tensor, Tensor]:
    """timm's ``Attention.forward`` (B, N, D) -> (B, N, D), with the scores (B, N) of its map beside it.

    Its own projections, q/k norms, gate and dropouts are used; only the product in the middle is ours.
    """
    b, n, _ = x.shape
    q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    output, scores = attend(attn.q_norm(q), attn.k_norm(k), v, dropout, differentiable)
    output = attn.norm(output.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        output = output * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(output)), scores
