"""A timm VisionTransformer in which chosen blocks process only their top-K tokens.

``convert`` wraps the model: timm's own modules do the work, under timm's own state-dict keys, so a checkpoint
goes from timm to a routed model and back. ``truncate`` is the isoFLOP baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amod.attention import attention_with_scores
from amod.errors import UserError
from amod.placement import routed_blocks
from amod.routers import ACTIVATIONS, ROUTERS, LinearRouter, Router
from amod.routing import RoutedLayer, Routing, put, refine, take, tokens_kept, top_k, weigh_update


def run_block(block: Any, x: Tensor, scored: bool, differentiable: bool = False):
    """A timm block, (B, N, D) -> (B, N, D); if ``scored``, also the column mean (B, N) of its attention map.

    Any block can be run; one that is to be scored must pass :func:`check_scorable`.
    """
    if not scored:
        return block(x), None
    if isinstance(block, ResPostBlock):
        update, scores = attention_with_scores(block.attn, x, differentiable)
        x = x + block.drop_path1(block.norm1(update))
        return x + block.drop_path2(block.norm2(block.mlp(x))), scores
    update, scores = attention_with_scores(block.attn, block.norm1(x), differentiable)
    x = x + block.drop_path1(block.ls1(update))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), scores


def check_scorable(block: Any, index: int) -> None:
    """Refuse a block whose attention map :func:`run_block` cannot read."""
    if type(block) not in (Block, ResPostBlock) or type(block.attn) is not Attention:
        kind = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
        raise UserError(
            f"block {index} ({kind}) leaves no attention map for the next block's router: attention routing needs "
            "timm's Block or ResPostBlock with timm's Attention; use router=linear or random, or another placement"
        )


class RoutedViT(nn.Module):
    """The model that :func:`convert` returns. ``vit`` is the timm model, ``routers`` one router per routed block.

    State-dict keys are timm's (``blocks.0.attn.qkv.weight``, ...); a linear router adds ``routers.<block>.*``.
    timm's ``set_grad_checkpointing``, ``no_weight_decay`` and ``group_matcher`` work as on the timm model.
    """

    def __init__(self, vit: VisionTransformer, routers: dict[int, Router], capacity: float, keep_prefix: bool) -> None:
        super().__init__()
        self.vit = vit
        self.routers = nn.ModuleDict({str(i): router for i, router in routers.items()})
        self.blocks_routed = tuple(routers)
        self.capacity = capacity
        self.keep_prefix = keep_prefix
        self._scored = frozenset(i - 1 for i, router in routers.items() if router.reads_attention)
        self._differentiable = any(router.differentiable for router in routers.values())
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def tokens_kept(self, tokens: int) -> int:
        """K of a routed block for N tokens (with ``keep_prefix``, the prefix tokens among them)."""
        kept = tokens_kept(self.capacity, tokens)
        if self.keep_prefix and kept <= self.vit.num_prefix_tokens:
            raise UserError(
                f"capacity={self.capacity!r} keeps {kept} of {tokens} tokens and keep_prefix takes "
                f"{self.vit.num_prefix_tokens} of them: raise capacity or set keep_prefix=false"
            )
        return kept

    def forward_features(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Images (B, 3, H, W) -> tokens (B, N, D) after the final norm, and what each routed block decided."""
        vit = self.vit
        routing: Routing = []
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
        kept = self.tokens_kept(x.shape[1]) if self.blocks_routed else 0
        prefix = vit.num_prefix_tokens if self.keep_prefix else 0
        attention: Tensor | None = None  # scores (B, N) left by the block before, for a router that reads them
        for i, block in enumerate(vit.blocks):
            if i in self.blocks_routed:
                x, attention, layer = self._run_routed(i, block, x, attention, kept, prefix)
                routing.append(layer)
            else:
                x, attention = self._run(i, block, x)
        return vit.norm(x), routing

    def _run_routed(self, i: int, block: nn.Module, x: Tensor, attention: Tensor | None, kept: int, prefix: int):
        router: Any = self.routers[str(i)]
        scores = router(x, attention)
        indices = top_k(scores.detach(), kept, prefix)
        before = take(x, indices)
        after, column_mean = self._run(i, block, before)
        r = router.multiplier(scores)
        if r is not None:
            after = weigh_update(before, after, take(r, indices))
        if column_mean is not None:  # the next router reads attention, and so did this one: all are of one kind
            assert attention is not None
            attention = refine(attention, indices, column_mean)
        return put(x, indices, after), attention, RoutedLayer(i, scores.detach(), indices)

    def _run(self, i: int, block: nn.Module, x: Tensor):
        """The block, and its column mean where the next block's router reads it."""
        scored = i in self._scored
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run_block, block, x, scored, self._differentiable, use_reentrant=False)
        return run_block(block, x, scored, self._differentiable)

    @overload
    def forward(self, x: Tensor, return_routing: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_routing: Literal[True]) -> tuple[Tensor, Routing]: ...
    def forward(self, x: Tensor, return_routing: bool = False):
        """Images (B, 3, H, W) -> logits (B, classes), and on request the routing of this batch."""
        x, routing = self.forward_features(x)
        logits = self.vit.forward_head(x)
        return (logits, routing) if return_routing else logits

    # timm's helpers (resolve_model_data_config, create_optimizer_v2, ...) ask the model itself for these

    @property
    def pretrained_cfg(self) -> Any:
        return self.vit.pretrained_cfg

    @property
    def num_classes(self) -> int:
        return self.vit.num_classes

    def get_classifier(self) -> nn.Module:
        return self.vit.get_classifier()

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        self.vit.reset_classifier(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.vit.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        def prefixed(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return "|".join(p.replace("^", r"^vit\.", 1) for p in pattern.split("|"))
            return [(prefixed(p), order) for p, order in pattern]

        return {group: prefixed(pattern) for group, pattern in self.vit.group_matcher(coarse).items()}


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}vit.")]:
        state[prefix + key[len(prefix) + 4 :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}routers.")]:
        state[f"{prefix}vit.{key[len(prefix) :]}"] = state.pop(key)


def convert(
    vit: VisionTransformer,
    router: str = "attention",
    capacity: float = 0.125,
    placement: str | Sequence[int] = "alternate",
    *,
    keep_prefix: bool = False,
    activation: str = "none",
    budget: float | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> RoutedViT:
    """A routed copy of a timm ViT; ``vit`` itself is left as it is.

    Args:
        vit: a timm ``VisionTransformer`` (ViT, DeiT, distilled DeiT, DINOv2, CLIP, ...), its weights loaded.
        router: ``attention`` (A-MoD, Eq. 4-5), ``linear`` (MoD, Eq. 1-2), ``attention_weighted`` (A.5),
            ``random`` (control), or ``none`` (dense).
        capacity: C in (0, 1]; a routed block keeps K = floor(C * N) tokens, the class token counted in N.
        placement: ``alternate`` (blocks 1, 3, 5, ... as in the paper), ``last8`` (Sec. 4.5), or 0-based indices.
        keep_prefix: class, distillation and register tokens are always kept, among the K. The paper's are not.
        activation: of the linear router, ``none`` (the paper) or ``sigmoid``.
        budget: multiply-accumulates of one image at ``input_size``; replaces ``capacity`` by the largest one
            that does not exceed it.
        input_size: (channels, height, width) of the budget's image; default is the model's own.

    Raises:
        UserError: the model, router, capacity, placement or budget cannot be served; the message says why.
    """
    check_model(vit)
    names = [*ROUTERS, "none"]
    if router not in names:
        hint = "; for isoflop use amod.truncate(vit, depth)" if router == "isoflop" else ""
        raise UserError(f"router={router!r}: choose one of {', '.join(names)}{hint}")
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation!r}: choose none (as in the paper) or sigmoid")
    reads = router != "none" and ROUTERS[router].reads_attention
    blocks = routed_blocks(placement, len(vit.blocks), reads) if router != "none" else ()
    if reads:
        for i in blocks:
            check_scorable(vit.blocks[i - 1], i - 1)
    if budget is not None:
        from amod.flops import capacity_for_budget

        capacity = capacity_for_budget(vit, budget, router, blocks, input_size)
    vit = copy.deepcopy(vit)
    linear = {"dim": vit.embed_dim, "activation": activation}
    routers = {i: ROUTERS[router](**(linear if ROUTERS[router] is LinearRouter else {})) for i in blocks}
    model = RoutedViT(vit, routers, capacity, keep_prefix)
    reference = next(vit.parameters())
    model.to(reference.device).train(vit.training)
    model.tokens_kept(default_tokens(vit))  # refuse a capacity that keeps nothing now rather than in training
    return model


def check_model(vit: Any) -> None:
    if isinstance(vit, RoutedViT):
        raise UserError("the model is routed already: convert the timm model it was made from (model.vit)")
    if not isinstance(vit, VisionTransformer):
        raise UserError(
            f"{type(vit).__name__} cannot be routed: only timm's VisionTransformer families (vit_*, deit_*, dinov2, "
            "CLIP image towers, ...) pass one fixed sequence of tokens through like blocks"
        )


def default_tokens(vit: VisionTransformer) -> int:
    """N at the model's own image size, prefix tokens included."""
    return vit.patch_embed.num_patches + vit.num_prefix_tokens


def truncate(vit: VisionTransformer, depth: int) -> VisionTransformer:
    """The isoFLOP baseline: a copy of ``vit`` with its first ``depth`` blocks, final norm and head kept."""
    check_model(vit)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= len(vit.blocks):
        raise UserError(f"depth={depth!r}: must be a whole number from 1 to {len(vit.blocks)}, the model's depth")
    short = copy.copy(vit)  # share everything for a moment, so that the dropped blocks are never copied
    short._modules = {**vit._modules, "blocks": vit.blocks[:depth]}
    short = copy.deepcopy(short)
    short.feature_info = short.feature_info[:depth]
    return short
