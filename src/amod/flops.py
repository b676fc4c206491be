"""One counter of FLOPs, in the convention that gives every FLOPs figure of the paper's Tables 1, 4 and 5.

FLOPs are multiply-accumulates (MACs) of one image, as fvcore counts them: one per MAC of a convolution, linear
layer or matrix product, five per element of a norm, N * D per linear router; softmax, activations, additions,
LayerScale, position embeddings and the column mean of A-MoD are free.
"""

from __future__ import annotations

import copy
from math import prod
from numbers import Real
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from amod.errors import UserError
from amod.placement import routed_blocks
from amod.routers import LinearRouter
from amod.vit import RoutedViT, check_model

PAPER_DEPTHS: dict[str, dict[float, int]] = {
    "deit_tiny_patch16_224": {0.125: 7, 0.5: 9},
    "deit_small_patch16_224": {0.125: 6, 0.5: 9},
    "vit_base_patch16_224": {0.125: 6, 0.5: 9},
    "vit_large_patch16_224": {0.125: 13, 0.5: 18},
}
"""Depth of the paper's isoFLOP models by timm name and capacity, recovered from the FLOPs of Table 1."""


def _is_norm(module: Any) -> bool:
    return isinstance(getattr(module, "normalized_shape", None), tuple | list)


def _layers(module: Any, tokens: int) -> int:
    """Linear layers and norms under ``module``, each applied to ``tokens`` tokens."""
    total = 0
    layer: Any
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            total += tokens * layer.in_features * layer.out_features
        elif _is_norm(layer):
            total += 5 * tokens * prod(layer.normalized_shape)
        elif isinstance(layer, Attention | ParallelScalingBlock):
            # q/k norms act on each head: counted once above, H - 1 times here
            for norm in (layer.q_norm, layer.k_norm):
                total += 5 * tokens * sum(map(prod, _shapes(norm))) * (layer.num_heads - 1)
            total += 2 * tokens**2 * layer.num_heads * layer.head_dim  # Q K^T and A V
        elif "Attention" in type(layer).__name__ or "DiffParallel" in type(layer).__name__:
            raise UserError(f"count_flops: attention of type {type(layer).__name__} has no rule in amod.flops")
    return total


def _shapes(norm: Any) -> list[Any]:
    return [norm.normalized_shape] if _is_norm(norm) else []


def count_flops(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-accumulates of one image of ``input_size`` (channels, height, width), in the convention above.

    Args:
        model: a :class:`RoutedViT` or a timm ``VisionTransformer``; on any device, meta included.
    """
    routed = model if isinstance(model, RoutedViT) else None
    vit: Any = routed.vit if routed else model
    check_model(vit)
    patches, total = _patches(vit, input_size)
    tokens = patches + vit.num_prefix_tokens
    total += _layers(vit.norm_pre, tokens) + _layers(vit.norm, tokens) + _pool(vit, patches, tokens)
    for name in ("fc_norm", "head", "head_dist"):
        total += _layers(getattr(vit, name, nn.Identity()), 1)
    for i, block in enumerate(vit.blocks):
        if routed and i in routed.blocks_routed:
            total += _layers(block, routed.tokens_kept(tokens))
            if isinstance(routed.routers[str(i)], LinearRouter):
                total += tokens * vit.embed_dim
        else:
            total += _layers(block, tokens)
    return total


def _patches(vit: Any, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Number of patches, and the MACs that make them: one pass of the embedding (hybrids have a CNN) without data."""
    macs = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * prod(module.weight.shape[1:])
        elif _is_norm(module) or isinstance(module, nn.GroupNorm):
            macs += 5 * output.numel()

    if input_size[0] != vit.in_chans:
        raise UserError(f"input_size={tuple(input_size)}: this model takes {vit.in_chans} channels")
    embed = copy.deepcopy(vit.patch_embed).to("meta")
    for module in embed.modules():
        module._forward_pre_hooks.clear()  # the user's hooks came along with the copy; this pass is not theirs to see
        module._forward_hooks.clear()
        module.register_forward_hook(count)
    try:
        patches = embed(torch.empty(1, *input_size, device="meta"))
    except AssertionError as error:
        raise UserError(f"input_size={tuple(input_size)}: this model refuses the image: {error}") from None
    return prod(patches.shape[1:-1]), macs


def _pool(vit: VisionTransformer, patches: int, tokens: int) -> int:
    """Attention pooling (SigLIP and others): one latent reads every token; other poolings are free."""
    pool = getattr(vit, "attn_pool", None)
    if pool is None:
        return 0
    if not isinstance(pool, AttentionPoolLatent):
        raise UserError(f"count_flops: pooling of type {type(pool).__name__} has no rule in amod.flops")
    keys = tokens if vit.pool_include_prefix else patches
    latents = pool.latent_len
    per_latent = [pool.q, pool.q_norm, pool.proj, pool.norm, pool.mlp]
    macs = sum(_layers(layer, latents) for layer in per_latent) + _layers(pool.kv, keys) + _layers(pool.k_norm, keys)
    return macs + 2 * latents * keys * pool.num_heads * pool.head_dim


def default_input_size(vit: VisionTransformer) -> tuple[int, int, int]:
    return (vit.in_chans, *vit.patch_embed.img_size)


def _routed_flops(vit: Any, dense: int, kept: int, tokens: int, router: str, blocks: Any) -> int:
    """FLOPs of ``vit``, which has ``dense``, with ``blocks`` at K = ``kept`` tokens, without building that model."""
    change = sum(_layers(vit.blocks[i], kept) - _layers(vit.blocks[i], tokens) for i in blocks)
    return dense + change + (tokens * vit.embed_dim * len(blocks) if router == "linear" else 0)


def capacity_for_budget(
    vit: VisionTransformer,
    budget: float,
    router: str,
    blocks: Any,
    input_size: tuple[int, int, int] | None = None,
) -> float:
    """The capacity K / N whose FLOPs come closest to ``budget`` (MACs of one image) without exceeding it.

    Raises:
        UserError: the budget is below one kept token or above all of them; the message gives the range.
    """
    size = input_size or default_input_size(vit)
    tokens = _patches(vit, size)[0] + vit.num_prefix_tokens
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise UserError(f"budget={budget!r}: must be a number of multiply-accumulates of one image, e.g. 2.6e9")
    dense = count_flops(vit, size)
    flops = [_routed_flops(vit, dense, kept, tokens, router, blocks) for kept in range(1, tokens + 1)]
    if not blocks or not flops[0] <= budget <= flops[-1]:
        raise UserError(
            f"budget of {budget / 1e9:.6g} GFLOPs: router={router} with blocks {list(blocks)} of this model at "
            f"{size[1]} x {size[2]} pixels reaches {flops[0] / 1e9:.4f} to {flops[-1] / 1e9:.4f} GFLOPs"
        )
    return sum(f <= budget for f in flops) / tokens


def isoflop_depth(
    vit: VisionTransformer,
    capacity: float,
    placement: Any = "alternate",
    input_size: tuple[int, int, int] | None = None,
) -> int:
    """Depth of the deepest truncation whose FLOPs do not exceed those of MoD at this capacity and placement.

    The paper's own depths (``PAPER_DEPTHS``) follow no single rule and are pinned where its tables are made.
    """
    from amod.routing import tokens_kept

    size = input_size or default_input_size(vit)
    tokens = _patches(vit, size)[0] + vit.num_prefix_tokens
    blocks = routed_blocks(placement, len(vit.blocks), reads_attention=False)
    total, depth = count_flops(vit, size), len(vit.blocks)
    limit = _routed_flops(vit, total, tokens_kept(capacity, tokens), tokens, "linear", blocks)
    while depth > 1 and total > limit:
        depth -= 1
        total -= _layers(vit.blocks[depth], tokens)
    return depth
