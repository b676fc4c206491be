"""timm's attention that also leaves what the next decision reads, without the map in memory where that can be avoided.

    A_h = softmax(Q_h K_h^T / sqrt(d) + bias)                                  Eq. 3
    column mean      R_j = 1/(H N) sum_h sum_i A_h[i, j]                       Eq. 4: "how much the others look at j"
    class attention  R_j = 1/H sum_h A_h[c, j]                                 c the class token, if it is here
    ... with values  R_j = sum_h A_h[c, j] |v_hj|, divided by its sum over j   what the class token really takes from j

Axes: B batch, H heads, N tokens, R query rows (N, or the class token's alone), d head width.
q (B, H, R, d), k, v (B, H, N, d) -> output (B, H, R, d); scores (B, N) are float32 or wider.

The column mean has four ways to the same numbers. ``attend`` chooses, by what was measured (``docs/performance.md``):

- ``explicit``: the map in memory. The reference, and the only one with attention dropout, with a gradient through the
  scores, under ``torch.func``, or where timm's fused attention is switched off. Also used while exporting, where the
  graph must consist of plain operators, on the meta device, where FLOPs are counted, and for training on up to 128
  tokens, where a map is smaller than what avoids it.
- ``tiled``: CPU, no gradient. Whole rows of the map, a cache-sized tile at a time: the product QK^T is made once
  and serves both the output and the scores. 1.1 times the time of torch's fused attention, which gives no scores
  (N = 197, 3 to 12 heads, batch 32, two cores; 0.6 at N = 50, 1.5 at 4097); the explicit map takes 1.5 to 3 times.
- torch's fused attention for the output, with its own gradient, and ``column_mean`` for the scores, which
  need none: CPU training. 1.08 to 1.19 times fused attention alone (forward and backward), explicit 1.04 to 1.9.
- the same with a Triton kernel for the scores: CUDA (without Triton, or with a bias, tiles). Tested in Triton's
  interpreter; never timed on a GPU.

Class attention is one row of the map: any fused attention gives the output, and the row costs N d more per head.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer_relpos
from torch import Tensor, nn
from torch.autograd import forward_ad

from amod.dress import Dressed
from amod.reduce import Packed, masked_softmax
from amod.routing import no_autocast, wide
from amod.tables import rows_and_columns

SAMPLE_BYTES, TILE_BYTES = 1 << 20, 2 << 20
"""Sizes of a tile of the map, for each thread: whole samples share a tile up to the first, one sample's heads or rows
up to the second. Chosen on one and two cores for N = 50 to 4097; a tile that leaves a thread idle costs up to 40 %."""
EXPLICIT_TOKENS = 128
"""Up to this many tokens, training on a CPU holds the map (N = 50: 0.91 of fused; N = 197: 1.04 to 1.9)."""
READABLE = (Attention, AttentionRope, eva.EvaAttention, beit.Attention, vision_transformer_relpos.RelPosAttention)
"""The kinds of attention whose arithmetic ``project`` and ``finish`` know."""


class Request:
    """What one call of a block's attention is asked for, and what it leaves.

    It is handed to the block as its mask (``attn_mask=`` or what the family calls it), which every block of timm's
    passes on to its attention. So nothing is kept on a module: threads, hooks, wrappers around the block, and the
    recomputation under gradient checkpointing all have the request of their own call.
    """

    def __init__(self, **given: Any) -> None:
        self.want: tuple[str, ...] = ()
        """What is put into ``left``: ``column_mean``, ``class_attention``, ``class_attention_value``, ``keys``
        (head-averaged, (B, N, d))."""
        self.differentiable = False
        """Whether a gradient flows back through the scores."""
        self.class_token = True
        """Whether token 0 is a class token; the mean query stands in for it where there is none."""
        self.bias: Tensor | None = None
        """(B or 1, H or 1, N or 1, N), added to the logits of the tokens that are here."""
        self.table: Tensor | None = None
        """The same over all tokens of the model, for the block to take the rows and columns of those that are here."""
        self.positions: Tensor | None = None
        """(B, N): where the tokens that are here stood in the model's sequence; None: all are here, in place."""
        self.keep: Tensor | None = None
        """(B, N) of 0 and 1: whom the others may look at (DynamicViT's training)."""
        self.packed: Packed | None = None
        """The batch is one row of the tokens of many images, (1, T, D), each of which looks at its own (A-ViT)."""
        self.rows: int | None = None
        """Only so many of the first tokens ask."""
        self.reduce: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None
        """Between attention and MLP: tokens (B, N, D) and what attention left -> (B, n, D)."""
        self.halves: Callable[[Any, Tensor], Tensor] | None = None
        """Called with the block's two halves (``blocks.Halves``) and its tokens, in the place of its forward."""
        self.left: dict[str, Tensor] = {}
        for name, value in given.items():
            setattr(self, name, value)


def request_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Request):
            return value
    return None


class ReadableAttention(Dressed):
    """Over one of ``READABLE``: answers a :class:`Request`; without one it is timm's own forward."""

    attn_drop: nn.Module
    fused_attn: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, R, D)."""
        request = request_in(args, kwargs)
        if request is None:
            return super().forward(x, *args, **kwargs)
        q, k, v = project(self, x, kwargs.get("rope"), request.rows)
        if request.packed is not None:
            return finish(self, x, attend_packed(q, k, v, request.packed))
        out, request.left = attend(q, k, v, logit_bias(self, request, q), request, self.attn_drop, self.fused_attn)
        return finish(self, x if request.rows is None else x[:, : request.rows], out)


def project(attn: Any, x: Tensor, rope: Tensor | None = None, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, R, d), k, v (B, H, N, d) of x (B, N, D), as timm makes them: normed, rotated, grouped heads repeated.

    Args:
        rope: (..., N or fewer, 2 d), for the last tokens; those before them are not rotated.
        rows: R; only the first so many tokens become queries.
    """
    asking = x if rows is None else x[:, :rows]
    if attn.qkv is None:
        q, k, v = attn.q_proj(asking), attn.k_proj(x), attn.v_proj(x)
    else:
        weight, bias = attn.qkv.weight, attn.qkv.bias
        apart = getattr(attn, "q_bias", None) is not None
        if apart:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        added = apart and not attn.qkv_bias_separate  # timm takes the weight as it is then
        if rows is not None and (added or _is_plain(attn.qkv)):
            width = attn.proj.in_features
            parts = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(asking, weight[:width], parts[0])
            k, v = F.linear(x, weight[width:], parts[1]).chunk(2, dim=-1)
        else:
            qkv = F.linear(x, weight, bias) if added else attn.qkv(x)
            if apart and attn.qkv_bias_separate:
                qkv = qkv + bias
            q, k, v = qkv.unflatten(2, (3, -1)).unbind(2)
            q = q if rows is None else q[:, :rows]
    groups = getattr(attn, "num_kv_groups", 1)
    q, k, v = (
        t.unflatten(2, (heads, -1)).transpose(1, 2)
        for t, heads in zip((q, k, v), (attn.num_heads, *2 * (attn.num_heads // groups,)), strict=True)
    )
    if getattr(attn, "q_norm", None) is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (_rotate(t, rope, x.shape[1], attn.rotate_half).type_as(v) for t in (q, k))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _is_plain(layer: nn.Module) -> bool:
    """Whether only its weights matter; an adapter, or a layer that somebody watches, is called as it is."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and not watched


def _rotate(t: Tensor, rope: Tensor, tokens: int, half: bool) -> Tensor:
    plain = tokens - rope.shape[-2]  # the first tokens have no row
    rows = t.shape[2] - plain
    if rows <= 0:
        return t
    return torch.cat([t[:, :, :plain], apply_rot_embed_cat(t[:, :, plain:], rope[..., :rows, :], half=half)], dim=2)


def finish(attn: Any, x: Tensor, out: Tensor) -> Tensor:
    """What timm does behind the product: x (B, R, D) that the attention was given, out (B, H, R, d) -> (B, R, D)."""
    out = out.transpose(1, 2).flatten(2)
    if getattr(attn, "norm", None) is not None:
        out = attn.norm(out)
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def logit_bias(attn: Any, request: Request, q: Tensor) -> Tensor | None:
    """What is added to the logits: the model's relative positions, for the tokens that are here, and the request's."""
    table, bias = request.table, request.bias
    own = None
    if getattr(attn, "relative_position_bias_table", None) is not None:
        own = attn._get_rel_pos_bias()
    elif getattr(attn, "rel_pos", None) is not None:
        own, table = attn.rel_pos.get_bias(), None  # timm's own order: a block's table is instead of a shared one
    if own is not None:
        table = own if table is None else own + table
    if table is not None:
        if request.positions is not None:
            table = rows_and_columns(table, request.positions)
        table = table[..., : request.rows, :] if table.shape[-2] > 1 else table
        bias = table if bias is None else table + bias
    return None if bias is None else bias.to(q)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, request: Request, drop: nn.Module, fused: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention and what the request wants, by the fastest of the ways above.

    Args:
        drop: attention dropout; the scores are taken before it.
        fused: timm's switch; off, the map is made and goes through ``drop``, where hooks can see it.
    Returns:
        output (B, H, R, d), and what is left for the next decision.
    """
    left: dict[str, Tensor] = {}
    if "keys" in request.want:
        left["keys"] = k.detach().mean(dim=1)
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    column = "column_mean" in request.want
    small = column and gradient and q.device.type == "cpu" and q.shape[2] <= EXPLICIT_TOKENS
    dropout = isinstance(drop, nn.Dropout) and drop.training and drop.p > 0
    masked = request.keep is not None
    if masked or not fused or dropout or small or (request.differentiable and gradient) or _needs_plain_operators(q):
        out, maps = explicit(q, k, v, bias, drop, request.keep)
        maps = maps if request.differentiable else maps.detach()
        if column:
            left["column_mean"] = columns_of(maps)
        return out, left | class_scores(q, k, v, bias, request, maps[:, :, 0] if request.class_token else None)
    left |= class_scores(q, k, v, bias, request)
    if not column:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), left
    if q.device.type == "cpu" and not gradient:
        tiles = tiled_attention if torch.compiler.is_compiling() else _tiled
        out, left["column_mean"] = tiles(q, k, v, bias)
        return out, left
    left["column_mean"] = column_mean(q.detach(), k.detach(), None if bias is None else bias.detach())
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias), left


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Each image's tokens look at each other: q, k, v (1, H, T, d) -> (1, H, T, d). Images of like length are computed
    together, filled up to the longest of them for this product alone."""
    rows, done = [t[0].transpose(0, 1) for t in (q, k, v)], []
    for slots, filled in packed.groups:
        mask = None if filled is None else filled[:, None, None, :]
        q, k, v = (t[slots].transpose(1, 2) for t in rows)  # (images, H, longest, d)
        done.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1))
    return torch.cat(done)[packed.back].transpose(0, 1).unsqueeze(0)


def _needs_plain_operators(q: Tensor) -> bool:
    """Exporting and tracing, counting (the meta device, or a mode that looks at operators), and torch.func."""
    if torch.compiler.is_exporting() or q.is_meta:
        return True
    if torch.compiler.is_compiling():
        return False
    watched = torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return watched or torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: output (B, H, R, d), and the softmax map (B, H, R, N) before ``drop``, in float32 or wider."""
    with no_autocast(q.device.type):
        logits = (wide(q) * q.shape[-1] ** -0.5) @ wide(k).transpose(-2, -1)
        logits = logits if bias is None else logits + wide(bias)
        maps = logits.softmax(dim=-1) if keep is None else masked_softmax(logits, keep)
        return (maps if drop is None else drop(maps)).to(v.dtype) @ v, maps


def columns_of(maps: Tensor) -> Tensor:
    """(B, H, R, N) -> (B, N), the mean over heads and rows (Eq. 4)."""
    if torch.compiler.is_exporting():  # to runtimes a product is cheap, and a mean over two axes is not
        row = maps.new_full((1, 1, 1, maps.shape[2]), 1.0) / maps.shape[2]
        return (row @ maps).squeeze(2).mean(dim=1)
    return maps.mean(dim=(1, 2))


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None, request: Request) -> Tensor:
    """(B, H, N) float32: the class token's row of the map, or the mean query's."""
    if not request.differentiable:
        q, k = q.detach(), k.detach()
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[:, :, :1] if request.class_token else bias.mean(dim=2, keepdim=True)
    with no_autocast(q.device.type):
        query = q[:, :, :1] if request.class_token else q.mean(dim=2, keepdim=True)
        logits = (wide(query) * q.shape[-1] ** -0.5) @ wide(k).transpose(-2, -1)
        return (logits if bias is None else logits + wide(bias)).softmax(dim=-1).squeeze(2)


def class_scores(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, request: Request, row: Tensor | None = None
) -> dict[str, Tensor]:
    """Those of the scores by the class token that the request wants, (B, N) float32, each summing to one.

    Args:
        row: (B, H, N), the class token's row of the map, where it is there already.
    """
    wanted = [name for name in ("class_attention", "class_attention_value") if name in request.want]
    if not wanted:
        return {}
    row = class_attention(q, k, bias, request) if row is None else row
    left = {"class_attention": row.mean(dim=1)}
    if "class_attention_value" in wanted:
        v = v if request.differentiable else v.detach()
        taken = (row * wide(v).norm(dim=-1)).sum(dim=1)
        left["class_attention_value"] = taken / taken.sum(dim=1, keepdim=True)
    return {name: left[name] for name in wanted}


def _tiled(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (b, h, r, d), n = q.shape, k.shape[2]
    one_map, threads = 4 * r * n, torch.get_num_threads()
    room = TILE_BYTES * threads
    samples = max(1, SAMPLE_BYTES * threads // max(1, h * one_map))
    heads = h if h * one_map <= room else max(1, room // one_map)
    rows = r if one_map <= room else max(16, room // (4 * n))
    output = q.new_empty(0) if v is None else v.new_empty(b, r, h, d).transpose(1, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.new_zeros(b, 1, n, dtype=dtype)
    buffer = q.new_empty(samples * heads, rows, n, dtype=dtype)
    # a product with a constant row sums the columns
    weights = q.new_full((samples, 1, heads * rows), 1 / (h * r), dtype=dtype)
    bias = None if bias is None else bias.to(dtype).expand(b, h, r, n)
    with torch.no_grad(), no_autocast(q.device.type):
        for s, g, i in product(range(0, b, samples), range(0, h, heads), range(0, r, rows)):
            at = (slice(s, s + samples), slice(g, g + heads), slice(i, i + rows))
            q_, k_ = q[at].flatten(0, 1).to(dtype), k[at[:2]].flatten(0, 1).to(dtype)
            tile = buffer[: q_.shape[0], : q_.shape[1]]
            torch.baddbmm(tile, q_, k_.transpose(1, 2), beta=0, alpha=d**-0.5, out=tile)
            if bias is not None:
                tile.view(bias[at].shape).add_(bias[at])
            torch.softmax(tile, dim=-1, out=tile)
            score = scores[at[0]]
            maps = tile.reshape(score.shape[0], -1, n)
            score.baddbmm_(weights[: score.shape[0], :, : maps.shape[1]], maps)
            if v is not None:
                v_ = v[at[:2]].flatten(0, 1)
                if samples == 1:
                    torch.bmm(tile.to(v.dtype), v_, out=output[at][0])
                else:
                    output[at] = torch.bmm(tile.to(v.dtype), v_).view(output[at].shape)
    return output, scores.squeeze(1)


# As operators, the tile loops are one node to torch.compile rather than an unrolled loop.
@torch.library.custom_op("amod::tiled_attention", mutates_args=())
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
    """Output (B, H, R, d) and column mean (B, N) in one pass over tiles of the map. No gradient."""
    return _tiled(q, k, v, bias)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    b, h, r, d = q.shape
    return v.new_empty(b, r, h, d).transpose(1, 2), q.new_empty(
        b, k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32)
    )


@torch.library.custom_op("amod::column_mean", mutates_args=())
def column_mean(q: Tensor, k: Tensor, bias: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
    """Column mean (B, N) alone, in O(N) memory per head. No gradient."""
    if q.is_cuda and bias is None and q.shape == k.shape and find_spec("triton") is not None:
        from amod.kernels import triton_column_mean

        return triton_column_mean(q, k)
    return _tiled(q, k, None, bias)[1]


@column_mean.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
