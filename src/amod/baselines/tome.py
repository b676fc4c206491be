"""ToMe, token merging (Bolya et al., ICLR 2023): after the attention of every block, r tokens join their likeliest.

The tokens at even positions look for their most similar partner among those at odd positions (cosine of the keys,
averaged over heads); the r most similar pairs become one token each, the average weighted by how many patches
each side already stands for. Attention may count a token as often as it has patches ("proportional attention").

Axes: B batch, N tokens, E = ceil(N / 2) even ones, O = floor(N / 2) odd ones, r merged, D width, H heads, d head width.
The algorithm is the paper's. It moves rows by index rather than by scatter, weighs only what merges, and uses torch's
fused attention, which takes the size bias at no measurable cost: as fast as ToMe can fairly be beside this package.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amod.errors import UserError
from amod.flops import _layers, _patches, _pool, default_input_size
from amod.vit import _add_prefix, _drop_prefix, check_model


class Match(NamedTuple):
    """Who joins whom: ``source`` (B, r) among the even tokens goes into ``target`` (B, r) among the odd ones;
    ``rest`` (B, E - r), ascending, are the even tokens that stay as they are."""

    source: Tensor
    target: Tensor
    rest: Tensor


def merged(tokens: int, r: int, prefix: int) -> int:
    """How many of N tokens a block really merges: r, at most half of those outside the ``prefix``."""
    return max(0, min(r, (tokens - prefix) // 2))


@torch.no_grad()
def match(keys: Tensor, r: int, prefix: int) -> Match:
    """The r most similar (even, odd) pairs; each even token has one candidate, an odd one may take in several.

    Args:
        keys: (B, N, d).
        prefix: the first tokens (class, distillation, registers), which neither merge nor take in others.
    """
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (B, E, O)
    similarity[:, : (prefix + 1) // 2] = -torch.inf
    similarity[:, :, : prefix // 2] = -torch.inf
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=1, descending=True)
    source = order[:, :r]
    return Match(source, partner.gather(1, source), order[:, r:].sort(dim=1).values)


def merge(x: Tensor, size: Tensor | None, pairs: Match, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge: x (B, N, D), size (B, N) or None for all ones -> (B, N - r, D), (B, N - r).

    The even tokens that stay come first, then the odd ones; prefix tokens keep their positions.
    """
    if size is None:
        size = x.new_ones(x.shape[:2])
    even, odd = x[:, ::2], x[:, 1::2]
    even_size, odd_size = size[:, ::2], size[:, 1::2]
    batch, targets = odd_size.shape
    row = torch.arange(batch, device=x.device).unsqueeze(1)
    weight = even_size[row, pairs.source]
    moved = even[row, pairs.source] * weight.unsqueeze(-1)  # (B, r, D)
    flat = (pairs.target + row * targets).flatten()
    total = odd_size.flatten().index_add(0, flat, weight.flatten()).view(batch, targets)
    summed = (odd * odd_size.unsqueeze(-1)).flatten(0, 1).index_add(0, flat, moved.flatten(0, 1)).view(odd.shape)
    x = torch.cat([even[row, pairs.rest], summed / total.unsqueeze(-1)], dim=1)
    size = torch.cat([even_size[row, pairs.rest], total], dim=1)
    if prefix > 1:  # even and odd prefix tokens in turn, as they were
        stay = pairs.rest.shape[1]
        first = [i // 2 + stay * (i % 2) for i in range(prefix)]
        order = first + [i for i in range(x.shape[1]) if i not in first]
        x, size = x[:, order], size[:, order]
    return x, size


def attention_with_keys(attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """timm's ``Attention.forward`` (B, N, D) -> (B, N, D) with log(size) added to the logits, and keys (B, N, d)."""
    b, n, _ = x.shape
    q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if size is None else size.log().to(q.dtype).view(b, 1, 1, n)
    dropout = attn.attn_drop.p if attn.training else 0.0
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    output = attn.norm(output.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        output = output * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(output)), k.mean(dim=1)


def run_block(block: Any, x: Tensor, size: Tensor | None, r: int, prefix: int, proportional: bool):
    """A timm block that merges r tokens between attention and MLP: (B, N, D) -> (B, N - r, D), and their sizes."""
    update, keys = attention_with_keys(block.attn, block.norm1(x), size if proportional else None)
    x = x + block.drop_path1(block.ls1(update))
    if r:
        x, size = merge(x, size, match(keys, r, prefix), prefix)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


class ToMeViT(nn.Module):
    """The model that :func:`tome` returns. ``vit`` is the timm model; state-dict keys are timm's."""

    def __init__(self, vit: VisionTransformer, r: int, prop_attn: bool) -> None:
        super().__init__()
        self.vit = vit
        self.r = r
        self.prop_attn = prop_attn
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> tokens after the final norm, and how many patches each stands for (None: one)."""
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        size: Tensor | None = None
        for block in vit.blocks:
            arguments = (size, merged(x.shape[1], self.r, vit.num_prefix_tokens), vit.num_prefix_tokens, self.prop_attn)
            if vit.grad_checkpointing and torch.is_grad_enabled():
                x, size = checkpoint(run_block, block, x, *arguments, use_reentrant=False)
            else:
                x, size = run_block(block, x, *arguments)
        return vit.norm(x), size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes)."""
        return self.vit.forward_head(self.forward_features(x)[0])


def tome(vit: VisionTransformer, r: int, prop_attn: bool = True) -> ToMeViT:
    """A copy of a timm ViT that merges r tokens in every block; ``vit`` itself is left as it is.

    Args:
        r: tokens merged per block; a block that has fewer than 2 r left outside the prefix merges half of them.
        prop_attn: proportional attention, ToMe's own setting for models trained on labels; its authors leave it
            off for models trained by masked autoencoding and not finetuned.

    Raises:
        UserError: the model cannot be served, or r is not a whole number of at least 0.
    """
    check_model(vit)
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise UserError(f"r={r!r}: must be a whole number of at least 0, the tokens that each block merges, e.g. 13")
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention:
            kind = f"{type(block).__name__} with {type(attn).__name__}"
            raise UserError(f"block {i} ({kind}) cannot merge tokens: ToMe here needs timm's Block and Attention")
    return ToMeViT(copy.deepcopy(vit), r, prop_attn)


def tome_flops(model: ToMeViT, input_size: tuple[int, int, int] | None = None) -> int:
    """Multiply-accumulates of one image in the convention of :mod:`amod.flops`, the matching's product included.

    DeiT-S at 224 pixels: 2.71 G at r = 13, 3.43 G at r = 8.
    """
    return _tome_flops(model.vit, model.r, input_size)


def _tome_flops(vit: Any, r: int, input_size: tuple[int, int, int] | None = None) -> int:
    patches, total = _patches(vit, input_size or default_input_size(vit))
    prefix = vit.num_prefix_tokens
    tokens = patches + prefix
    total += _layers(vit.norm_pre, tokens)
    for block in vit.blocks:
        joined = merged(tokens, r, prefix)
        total += _layers(block.norm1, tokens) + _layers(block.attn, tokens)
        if joined:
            total += (tokens + 1) // 2 * (tokens // 2) * block.attn.head_dim
        tokens -= joined
        total += _layers(block.norm2, tokens) + _layers(block.mlp, tokens)
    total += _layers(vit.norm, tokens) + _pool(vit, tokens - prefix, tokens)
    return total + sum(_layers(getattr(vit, name, nn.Identity()), 1) for name in ("fc_norm", "head", "head_dist"))


def r_for_flops(vit: VisionTransformer, flops: float, input_size: tuple[int, int, int] | None = None) -> int:
    """The r whose FLOPs come closest to ``flops``: ToMe at equal cost."""
    tokens = vit.patch_embed.num_patches
    return min(range(tokens // 2 + 1), key=lambda r: abs(_tome_flops(vit, r, input_size) - flops))
