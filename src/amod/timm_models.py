"""timm's transformers by plan: what ``convert`` asks of a family of models.

The copy has timm's modules, parameters and state dict; its class is a subclass of its own class, :class:`RoutedViT`
over it, and so are those of the attentions that must leave scores and of the blocks that drop tokens in the middle.
How a pass runs is in ``walk.py``; the same functions for transformers' encoders are in ``huggingface.py``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from amod.attention import ReadableAttention
from amod.blocks import CutBlock
from amod.dress import Dressed, dress, undressed
from amod.entries import ClassOnly, Gate, Merge, Predict, Route
from amod.errors import UserError
from amod.families import (
    CUT,
    LEARNED,
    READ_CLASS,
    check_blocks,
    check_model,
    class_rows,
    class_tokens,
    default_tokens,
    readers,
    tokens_at,
)
from amod.flops import Size, count_on_meta, input_size_of, on_meta, within_budget
from amod.plan import MERGING, Plan, make_plan
from amod.routers import GateRouter, Predictor, make_router
from amod.walk import MASKS, Walk

ViT = TypeVar("ViT", bound=nn.Module)
__all__ = ["RoutedViT", "check_model", "dense", "depth_of", "plan_for_budget", "routed", "router_of"]


class RoutedViT(Dressed):
    """What :func:`convert` puts over a timm model's class.

    ``plan`` says what each block does. ``routers`` holds one router per routed block; a linear one adds
    ``routers.<block>.weight`` to timm's parameters.
    """

    plan: Plan
    routers: nn.ModuleDict
    mask_name: str
    adds = ("plan", "mask_name", "routers")
    blocks: Any
    num_prefix_tokens: int

    @property
    def blocks_routed(self) -> tuple[int, ...]:
        """The blocks through which only some tokens go."""
        return tuple(sorted(i for i, entry in self.plan.items() if isinstance(entry, Route | Gate)))

    @property
    def proportional(self) -> float:
        """Attention counts a token that stands for s patches as s to this power."""
        return next((entry.proportional for entry in self.plan.values() if isinstance(entry, Merge)), 1.0)

    def forward(self, x: Tensor, return_routing: bool = False, **kwargs: Any) -> Any:
        """Images (B, 3, H, W) -> logits (B, classes), and on request the :class:`Routing` of this batch."""
        if not isinstance(return_routing, bool):
            raise UserError("return_routing: is True or False; timm's own arguments are named, as in attn_mask=mask")
        walk = Walk(self, record=return_routing)
        logits = walk.forward_head(walk.forward_features(x, **kwargs))
        return (logits, walk.routing) if return_routing else logits

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images (B, 3, H, W) -> tokens behind the final norm: (B, N, D), or those that the plan leaves, (B, n, D):
        where tokens halt or the class token is alone, what the head reads. ``forward_intermediates`` gives all N.

        ``forward_head`` of them counts each once. Where a model pools all patches, ``forward`` counts a merged one as
        all that it stands for; for such features call a model without a head (``reset_classifier(0)``).
        """
        return Walk(self).forward_features(x, *args, **kwargs)

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """timm's, of the tokens behind the final norm; UserError if it reads tokens that the plan leaves out."""
        for entry in self.plan.values():
            if isinstance(entry, READ_CLASS):  # it may be another head than at ``convert``
                class_tokens(self, type(entry).__name__)
        return super().forward_head(x, *args, **kwargs)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's, with every option of it, of the routed pass, and always of all N tokens: a merged one stands in for
        each of its patches, a pruned one is as it was when it was dropped."""
        return Walk(self, restore=True).forward_intermediates(x, *args, **kwargs)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """timm's; what the plan says of the blocks that go, and their routers, go with them."""
        indices = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        depth = len(self.blocks)
        self.plan = {i: entry for i, entry in self.plan.items() if i < depth}
        self.routers = nn.ModuleDict({i: router for i, router in self.routers.items() if int(i) < depth})
        return indices

    def tokens_kept(self, tokens: int) -> dict[int, int]:
        """How many tokens each block with an entry keeps (its MLP's), by block, if ``tokens`` enter the model; where
        tokens halt, the most that may be there. A gate's number is up to the images, and it has none here."""
        prefix, whole, kept = self.num_prefix_tokens, tokens, {}
        for i, entry in sorted(self.plan.items()):
            if isinstance(entry, Gate):
                continue
            if isinstance(entry, Route):
                kept[i] = entry.kept(tokens, prefix)
                continue
            if isinstance(entry, ClassOnly):
                tokens = class_rows(self)
            else:
                asked = (tokens, prefix, whole) if isinstance(entry, Predict) else (tokens, prefix)
                tokens = entry.remain(*asked)
            kept[i] = tokens
        return kept

    def extra_repr(self) -> str:
        return "\n".join(f"plan {i}: {entry}" for i, entry in sorted(self.plan.items()))


def depth_of(vit: Any) -> int:
    return len(vit.blocks)


def routed(vit: ViT, plan: Plan) -> ViT:
    """The copy of ``vit`` that follows a checked plan."""
    model: Any = copy.deepcopy(vit)
    check_blocks(model, plan)
    parameters = inspect.signature(type(model.blocks[0]).forward).parameters
    mask_name = next((name for name in MASKS if name in parameters), MASKS[0])
    for i in readers(model, plan):
        dress(model.blocks[i].attn, ReadableAttention)
    for i, entry in plan.items():
        if isinstance(entry, (*CUT, Gate)) or (isinstance(entry, Route) and entry.skip != "block"):
            dress(model.blocks[i], CutBlock)
    dress(model, RoutedViT)
    model.plan = dict(plan)
    model.mask_name = mask_name
    reference, learned = next(vit.parameters()), {i: entry for i, entry in plan.items() if isinstance(entry, LEARNED)}
    routers = {str(i): router_of(entry, model.embed_dim, reference) for i, entry in learned.items()}
    model.routers = nn.ModuleDict(routers)
    model.routers.to(reference.device).train(vit.training)
    model.tokens_kept(default_tokens(model))  # refuse a capacity that keeps nothing now rather than in training
    return model


def router_of(entry: Route | Gate | Predict, dim: int, like: Tensor) -> nn.Module:
    if isinstance(entry, Predict):
        return Predictor(dim).to(like.dtype)  # a part of the network, and not a score in float32 as the routers' are
    if isinstance(entry, Gate):
        return GateRouter(dim, entry.per == "sequence")
    return make_router(entry.router, dim, entry.activation)


def dense(model: Any) -> Any:
    return undressed(model)


def plan_for_budget(
    vit: Any,
    budget: float,
    router: str,
    placement: str | Sequence[int] | None,
    options: Mapping[str, Any],
    input_size: Size | None = None,
) -> Plan:
    """The plan of a method, of that capacity, r or keep rate which costs most without exceeding ``budget`` MACs."""
    size = input_size_of(vit, input_size)
    tokens = tokens_at(vit, size)
    patches = tokens - vit.num_prefix_tokens
    if router in MERGING:
        most = Merge(patches, rounds=options.get("rounds") or MERGING[router].rounds)
        amounts: list[dict[str, Any]] = [{"r": r} for r in range(most.merged(patches, 0), -1, -1)]
    elif router == "evit":
        amounts = [{"keep_rate": kept / patches} for kept in range(1, patches + 1)]
    elif router == "dynamicvit":
        amounts = [{"keep_rate": rate / 1000} for rate in range(1, 1001)]
    elif router == "avit":
        raise UserError(
            f"budget of {budget / 1e9:.6g} GFLOPs: router=avit decides image by image what it computes; train it with "
            "another weight of the ponder loss, and measure amod.count_flops(model, images)"
        )
    else:
        amounts = [{"capacity": kept / tokens} for kept in range(1, tokens + 1)]
        if options.get("keep_prefix"):
            amounts = amounts[vit.num_prefix_tokens :]

    def plan_of(amount: dict[str, Any]) -> Plan:
        return make_plan(len(vit.blocks), router, placement=placement, **amount, **options)  # type: ignore[arg-type]

    dearest = plan_of(amounts[-1])
    model: Any = routed(on_meta(vit), dearest)  # type: ignore[arg-type]

    def seen(amount: dict[str, Any]) -> tuple[int, ...]:
        model.plan, here, through = plan_of(amount), tokens, []
        kept = model.tokens_kept(tokens)
        for i in range(len(vit.blocks)):
            through.append(kept.get(i, here))
            here = here if isinstance(model.plan.get(i), Route) else through[-1]
        return tuple(through)

    def cost(amount: dict[str, Any]) -> int:
        model.plan = plan_of(amount)
        return count_on_meta(model, size)

    if router == "dynamicvit":  # many rates keep the same tokens, and the smallest keep none
        different = {}
        for amount in amounts:
            with suppress(UserError):
                different[seen(amount)] = amount
        amounts = [*different.values()]
    what = f"router={router} in blocks {[*dearest]} of this model at {size[1]} x {size[2]} pixels"
    return plan_of(within_budget(amounts, cost, budget, what, lambda amount: sum(seen(amount))))
