"""One pass of a routed model: timm's own forward, in which the blocks are the steps of the plan.

timm's ``forward_features`` or ``forward_intermediates`` is called with a stand-in for ``self``, the :class:`Walk`. It
answers everything from the model except ``blocks``: these are its own steps, one per block, which choose the tokens,
call the model's block on them as a module, and put them back. Nothing of a forward is written again here, so every
family whose forward loops over ``blocks`` is served by the same lines, and hooks, adapters and wrappers see what they
see in timm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from amod import leaving
from amod.attention import Request
from amod.blocks import Halves, Steps
from amod.entries import READS_ATTENTION, ClassOnly, Gate, Halt, Merge, Predict, Prune, Route
from amod.errors import UserError
from amod.families import POOLS_EACH, RELATIVE, check_readable, class_rows, is_readable
from amod.gated import GatedStep
from amod.reduce import Reduction, merge_in_rounds, merged_places, moved, prune, prune_places
from amod.routing import RoutedLayer, Routing, leaving_torch, put, refine, take, tokens_in, top_k, weigh_update
from amod.tables import additive, rotary_rows, rows_and_columns

CARRIED = ("scores", "remembered", "size", "positions", "owner", "keep", "whole")
"""The tensors of a ``Walk`` that go from block to block beside the tokens."""
Inputs = dict[str, Any]
"""What timm gives a block beside its tokens."""
MASKS = ("attn_mask", "shared_rel_pos_bias", "shared_rel_pos")
"""What the families call the tensor that a block hands on to its attention, to be added to the logits."""


class Walk:
    """timm's ``self`` for one pass, and what travels with the tokens.

    Axes: B batch, N tokens of the model, n of them here (N until a block merges or prunes), K kept by a routed block.

    Args:
        record: say in ``routing`` what blocks that merge or prune did, too.
        restore: hand timm all N tokens behind every block.
        masks: DynamicViT and A-ViT mask tokens instead of removing them; by default while the model trains.
    """

    grad_checkpointing = False  # timm would put the step under it; the step puts the block

    def __init__(self, model: Any, record: bool = False, restore: bool = False, masks: bool | None = None) -> None:
        self.model = model
        self.blocks = Steps([partial(self.step, i, block) for i, block in enumerate(model.blocks)], model.blocks)
        self.record, self.restore = record, restore
        self.masks = model.training if masks is None else masks
        self.placed = not isinstance(model, VisionTransformer)
        """Whether the blocks read where a token stands: rotary rows, relative positions."""
        self.masked = False
        """Whether the blocks were given a mask of pairs of tokens."""
        self.routing: Routing = []
        self.x: Tensor | None = None  # with restore: the tokens that really are here (B, n, D)
        self.whole: Tensor | None = None  # with restore: all N, dropped ones as they were when they went
        self.scores: Tensor | None = None  # (B, n) what the block before left for this block's router
        self.remembered: Tensor | None = None  # (B, n) the scores that the last block with a memory went by
        self.size: Tensor | None = None  # (B, n) how many patches each token stands for; None: one
        self.positions: Tensor | None = None  # (B, n) where each stood among the N, -1 for a fused one; None: in place
        self.tokens: int | None = None  # N
        self.keep: Tensor | None = None  # (B, N) of 0 and 1: whom the others look at, while DynamicViT trains
        self.decisions: list[Tensor] = []  # (B, patches) of 0 and 1, of each of its predictors then
        self.going: leaving.Going | None = None  # how far A-ViT's tokens are
        self.owner: Tensor | None = None  # (B, N) which of the n stands for each, -1 for none; None: itself

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.jit.is_tracing() and getattr(self.model, "dynamic_img_size", False):
            raise UserError(
                "torch.jit.trace: would bake in how many tokens an image of this size keeps; use amod.export, or a "
                "model without dynamic_img_size"
            )
        return self.model.undressed.forward_features(self, x, *args, **kwargs)

    def forward_head(self, x: Tensor) -> Tensor:
        """timm's on the tokens of ``forward_features``. Where it pools all patches, a merged one counts as each of
        those that it stands for (ToMe's, of models with such a head)."""
        if self.size is None or not self.merges:
            return self.model.forward_head(x)
        if self.model.global_pool in POOLS_EACH:
            assert self.owner is not None  # by follows
            x = take(x, self.owner)
        if self.model.global_pool == "avg":
            first = 0 if getattr(self.model, "pool_include_prefix", False) else self.model.num_prefix_tokens
            counted = self.size[:, first:].to(x.dtype)
            weight = counted / counted.mean(dim=1, keepdim=True)
            x = torch.cat([x[:, :first], x[:, first:] * weight.unsqueeze(-1)], dim=1)
        return self.model.forward_head(x)

    @property
    def merges(self) -> bool:
        return any(isinstance(entry, Merge) for entry in self.model.plan.values())

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.model.undressed.forward_intermediates(self, x, *args, **kwargs)
        if self.owner is None:
            return found
        if isinstance(found, tuple):  # the features of forward_features, of the tokens that really are here
            return (self.model.norm(self.x), *found[1:])
        if isinstance(found, dict) and "image_features" in found:
            found["image_features"] = self.model.norm(self.x)
        return found

    # --- a block's entry in the plan

    def step(self, i: int, block: nn.Module, x: Tensor, **inputs: Any) -> Tensor:
        """What timm calls for its block i: (B, n, D) -> (B, n or fewer, D)."""
        if inputs.pop("is_causal", False):
            raise UserError("is_causal: a routed model has no causal pass; leave it out")
        if self.x is not None:
            x = self.x
        here = next((p.device for p in block.parameters() if not p.is_meta), x.device)
        if x.device != here:  # the blocks live on several devices
            x = x.to(here)
            inputs = {name: value.to(here) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        for name in CARRIED:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(here))
        self.tokens = self.tokens or tokens_in(x)
        self.masked = self.masked or inputs.get(self.model.mask_name) is not None
        entry = self.model.plan.get(i)
        if isinstance(entry, Predict):
            x = leaving.predicted(self, i, entry, x)
        if entry is None or isinstance(entry, Predict):
            x = self.run(i, block, x, inputs)
        elif isinstance(entry, Halt):
            x = leaving.halting(self, i, block, entry, x, inputs, class_rows(self.model))
        elif isinstance(entry, Route):
            x = self.route(i, block, entry, x, inputs)
        elif isinstance(entry, Gate):
            x = self.gate(i, block, entry, x, inputs)
        else:
            x = self.cut(i, block, entry, x, inputs)
        return self.restored(x) if self.restore else x

    def route(self, i: int, block: nn.Module, entry: Route, x: Tensor, inputs: Inputs) -> Tensor:
        """K tokens go through the block, the others stay as they are."""
        router = self.model.routers[str(i)]
        if entry.memory and self.scores is not None:
            if self.remembered is not None:
                self.scores = entry.memory * self.remembered + (1 - entry.memory) * self.scores
            self.remembered = self.scores
        scores = router(x, self.scores)
        prefix = self.model.num_prefix_tokens
        indices = top_k(scores.detach(), entry.kept(tokens_in(x), prefix), prefix if entry.keep_prefix else 0)
        earlier, r = self.scores, router.multiplier(scores)
        factor = None if r is None else take(r, indices)
        if entry.skip == "block":
            before = take(x, indices)
            after = self.run(i, block, before, inputs, indices)
            x = put(x, indices, after if factor is None else weigh_update(before, after, factor))
        else:
            x = self.route_half(i, block, entry.skip, x, inputs, indices, factor)
        if self.scores is not None and entry.router in READS_ATTENTION and entry.skip != "mlp":
            assert earlier is not None  # the attention saw the kept tokens alone
            by_class = self.read_of(i) != "column_mean" and getattr(self.model, "cls_token", None) is not None
            self.scores = refine(earlier, indices, self.scores, 0 if by_class else None)
        self.routing.append(RoutedLayer(i, scores.detach(), indices, self.owner))
        return x

    def route_half(
        self, i: int, block: nn.Module, skip: str, x: Tensor, inputs: Inputs, indices: Tensor, factor: Tensor | None
    ) -> Tensor:
        """The kept tokens (B, K) go through attention or MLP, all through the other."""
        request, inputs = self.asked(i, block, inputs, indices if skip == "attention" else None)

        def work(half: Halves, x: Tensor) -> Tensor:
            if skip == "mlp":
                x = half.attention(x, **inputs)
            before = take(x, indices)
            after = half.attention(before, **inputs) if skip == "attention" else half.mlp(before)
            x = put(x, indices, after if factor is None else weigh_update(before, after, factor))
            return half.mlp(x) if skip == "attention" else x

        x = self.in_halves(i, block, x, work)
        self.answered(i, request)
        return x

    def gate(self, i: int, block: nn.Module, entry: Gate, x: Tensor, inputs: Inputs) -> Tensor:
        """What the gate is open for goes through; the others pass."""
        if x.is_meta:
            raise UserError("count_flops: what a trained gate costs depends on the images; give images (B, 3, H, W)")
        step = GatedStep(
            entry,
            self.model.routers[str(i)],
            lambda **given: self.asked(i, block, **{"inputs": inputs, **given})[1],
            inputs,
            masked=self.model.training or leaving_torch(),
            packs=self.packs(block, inputs),
        )
        x = self.in_halves(i, block, x, step)
        self.scores = None
        scores, none = step.logits.detach().expand(x.shape[:2]), x.new_zeros(x.shape[0], 0, dtype=torch.long)
        self.routing.append(RoutedLayer(i, scores, none, self.owner, step.gate))
        return x

    def packs(self, block: nn.Module, inputs: Inputs) -> bool:
        """Whether the block's attention can take tokens of several sequences in a row."""
        plain = self.size is None and self.keep is None and inputs.get(self.model.mask_name) is None
        return plain and not isinstance(self.model, RELATIVE) and is_readable(block)

    def cut(self, i: int, block: nn.Module, entry: Merge | Prune | ClassOnly, x: Tensor, inputs: Inputs) -> Tensor:
        """Fewer tokens leave the block than enter it: between its attention and its MLP, or as its only queries."""
        prefix, count, size = self.model.num_prefix_tokens, tokens_in(x), self.size
        if isinstance(entry, Merge) and not entry.merged(count, prefix):
            return self.run(i, block, x, inputs)
        done: dict[str, Any] = {}  # written again, the same, when gradient checkpointing runs the block again

        def reduce(y: Tensor, left: dict[str, Tensor]) -> Tensor:
            done["tokens"] = y
            if isinstance(entry, Merge):
                parts = entry.parts(count, prefix)
                y, done["size"], done["pairs"] = merge_in_rounds(y, size, left.get("keys"), parts, prefix, entry.norm)
                return y
            done["scores"], keep = left["class_attention"], entry.kept(count, prefix)  # type: ignore[union-attr]
            fuse = entry.fuse and prefix + keep < count  # type: ignore[union-attr]
            y, done["size"], done["kept"] = prune(y, size, done["scores"], keep, prefix, fuse)
            return y

        if isinstance(entry, ClassOnly):
            rows = class_rows(self.model)
            first = torch.arange(rows, device=x.device).expand(x.shape[0], rows)
            done |= {"tokens": x, "size": None, "kept": first}
            x = self.run(i, block, x, inputs, rows=rows)
        else:
            want: tuple[str, ...] = ("class_attention",)
            if isinstance(entry, Merge):
                want = ("keys",) if entry.by == "keys" else ()
            weighs = isinstance(entry, Prune) and entry.fuse  # the fused token's weights are the scores themselves
            x = self.run(i, block, x, inputs, want=want, reduce=reduce, differentiable=weighs)
        if not done:
            raise UserError(f"block {i}: {type(block).__name__} was put there after convert and cannot do {entry}")
        self.size = done["size"]
        if self.follows:
            self.follow(i, done, count, x.shape[1])
        return x

    @property
    def follows(self) -> bool:
        """Whether anybody asks who stands for whom; once it was followed it goes on being so."""
        pooled = self.merges and self.model.global_pool in POOLS_EACH
        asked = self.record or self.restore or self.placed or self.masked or pooled or self.owner is not None
        return asked or self.scores is not None or self.remembered is not None

    def follow(self, i: int, done: dict[str, Any], count: int, remain: int) -> None:
        """Who stands for whom now: for the record, for restoring, for the scores and positions of later blocks."""
        if self.restore:
            self.restored(done["tokens"])
        prefix = self.model.num_prefix_tokens
        here: Reduction = (
            merged_places(done["pairs"], count, prefix)
            if "pairs" in done
            else prune_places(done["kept"], count, remain)
        )
        for name in ("scores", "remembered"):  # a token has the scores of all that it stands for
            if (scores := getattr(self, name)) is not None:
                scores = scores.masked_fill(here.owner < 0, 0)
                summed = scores.new_zeros(scores.shape[0], remain).scatter_add(1, here.owner.clamp(min=0), scores)
                setattr(self, name, summed)
        self.positions = here.kept if self.positions is None else moved(self.positions, here.kept)
        self.owner = here.owner if self.owner is None else moved(here.owner, self.owner)
        own = done["kept"].shape[1] if "kept" in done else remain  # a fused token is the last, and nobody's own
        indices = torch.arange(own, device=self.owner.device).expand(self.owner.shape[0], own)
        judged = done["scores"].detach() if "scores" in done else self.owner.new_zeros(self.owner.shape[0], 0).float()
        self.routing.append(RoutedLayer(i, judged, indices, self.owner))

    def restored(self, x: Tensor) -> Tensor:
        """All N tokens from those that are here; one that is gone is as it was when it went."""
        self.x = x
        if self.going is not None and not self.masks:
            assert self.whole is not None  # by leaving.py
            return self.whole
        if self.owner is not None:
            assert self.whole is not None
            x = torch.where((self.owner < 0).unsqueeze(-1), self.whole, take(x, self.owner.clamp(min=0)))
        self.whole = x
        return x

    # --- a block as a module

    def run(
        self,
        i: int,
        block: nn.Module,
        x: Tensor,
        inputs: Inputs,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        want: tuple[str, ...] = (),
        differentiable: bool = False,
        **asked: Any,
    ) -> Tensor:
        """The block on x, and ``self.scores`` from what its attention left for the next block's router.

        Args:
            x: (B, n, D), or the kept ones (B, K, D) at ``indices`` (B, K) of those that are here.
            inputs: what timm gave the step: rotary table, mask.
            mask: to be added to the logits of the tokens that are here.
            want, differentiable, asked: of a :class:`Request`.
        """
        request, inputs = self.asked(i, block, inputs, indices, mask, want, differentiable, **asked)
        x = self.called(block, x, inputs)
        self.answered(i, request)
        return x

    def asked(
        self,
        i: int,
        block: nn.Module,
        inputs: Inputs,
        indices: Tensor | None = None,
        bias: Tensor | None = None,
        want: tuple[str, ...] = (),
        differentiable: bool = False,
        **asked: Any,
    ) -> tuple[Request | None, dict[str, Any]]:
        """What the block's attention is asked for, and its inputs with that in the place of its mask.

        Args:
            bias: (B or 1, 1, 1, n or K), added to the logits.
        """
        model, inputs = self.model, dict(inputs)
        read = self.read_of(i)
        positions, size = self.positions, self.size
        if indices is not None:
            positions = indices if positions is None else take(positions, indices)
            size = None if size is None else take(size, indices)
        if size is not None and model.proportional:
            weight = model.proportional * size.log()[:, None, None, :]
            bias = weight if bias is None else bias + weight
        table = additive(inputs.get(model.mask_name))
        if positions is not None and inputs.get("rope") is not None:
            inputs["rope"] = rotary_rows(inputs["rope"], positions, model.num_prefix_tokens)
        request = None
        if self.keep is not None:
            asked["keep"] = self.keep
        unread = bias is not None and isinstance(model, RELATIVE)  # a block with positions of its own reads no mask
        if want or asked or read or unread or (self.placed and positions is not None):
            check_readable(i, block)
            request = Request(
                want=(*want, read) if read else want,
                differentiable=differentiable or (read is not None and model.routers[str(i + 1)].differentiable),
                class_token=getattr(model, "cls_token", None) is not None,
                bias=bias,
                table=table,
                positions=positions,
                **asked,
            )
            inputs[model.mask_name] = request
        elif bias is not None or table is not None:
            if table is not None and positions is not None:
                table = rows_and_columns(table, positions)
            inputs[model.mask_name] = table if bias is None else bias if table is None else table + bias
        return request, inputs

    def read_of(self, i: int) -> str | None:
        """What the next block's router reads of this one's attention."""
        following = self.model.plan.get(i + 1)
        return READS_ATTENTION.get(following.router) if isinstance(following, Route) else None

    def called(self, block: nn.Module, x: Tensor, inputs: Inputs) -> Tensor:
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **inputs)
        return block(x, **inputs)

    def answered(self, i: int, request: Request | None) -> None:
        """``self.scores`` from what an attention left for the next block's router."""
        self.scores = None
        if request is not None:
            if missing := {*request.want} - {*request.left}:
                raise UserError(f"block {i}: its attention was not called with its mask and left no {missing.pop()}")
            if read := self.read_of(i):
                left = request.left[read]
                self.scores = left if self.model.routers[str(i + 1)].differentiable else left.detach()

    def in_halves(self, i: int, block: nn.Module, x: Tensor, work: Callable[[Halves, Tensor], Tensor]) -> Tensor:
        """The block called with its tokens, of which ``work`` makes what leaves it by the block's halves."""
        done = []

        def noted(halves: Halves, x: Tensor) -> Tensor:
            done.append(True)
            return work(halves, x)

        x = self.called(block, x, {self.model.mask_name: Request(halves=noted)})
        if not done:
            raise UserError(f"block {i}: {type(block).__name__} was put there after convert and has no halves")
        return x
