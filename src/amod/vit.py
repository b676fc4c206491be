"""``convert``: a timm transformer whose blocks follow a plan, still a model of its own class with its own names.

Models of transformers' go to ``huggingface.py``, by the same verb.

The copy has timm's modules, parameters and state dict; its class is a subclass of its own class, :class:`RoutedViT`
over it, and so are those of the attentions that must leave scores and of the blocks that drop tokens in the middle.
How a pass runs is in ``walk.py``.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from amod.attention import ReadableAttention
from amod.blocks import CutBlock
from amod.detr_plan import DetrPlan
from amod.dress import Dressed, dress, of_detection, of_transformers, served_by, undressed
from amod.errors import UserError
from amod.families import CUT, LEARNED, check_blocks, check_model, default_tokens, readers, tokens_at
from amod.flops import Size, count_on_meta, input_size_of, on_meta, within_budget
from amod.plan import (
    BY_THEMSELVES,
    MERGING,
    ClassOnly,
    Entry,
    Gate,
    Merge,
    Plan,
    Predict,
    Route,
    check_plan,
    make_plan,
    read_plan,
)
from amod.routers import ROUTERS, GateRouter, Predictor, make_router
from amod.walk import MASKS, Walk, class_rows

ViT = TypeVar("ViT", bound=nn.Module)

PAPER_DEPTHS: dict[str, dict[float, int]] = {
    "deit_tiny_patch16_224": {0.125: 7, 0.5: 9},
    "deit_small_patch16_224": {0.125: 6, 0.5: 9},
    "vit_base_patch16_224": {0.125: 6, 0.5: 9},
    "vit_large_patch16_224": {0.125: 13, 0.5: 18},
}
"""Depth of the paper's isoFLOP models by timm name and capacity, recovered from the FLOPs of Table 1."""


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
    forward_head: Any

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
        """Images (B, 3, H, W) -> tokens behind the final norm: (B, N, D), or where the plan merges or prunes, those
        that remain (B, n, D); ``forward_intermediates`` gives all N in either case.

        timm's ``forward_head`` of them counts each once. Where a model averages over patches, ``forward`` counts a
        merged one as all that it stands for; for such features call a model without a head (``reset_classifier(0)``).
        """
        return Walk(self).forward_features(x, *args, **kwargs)

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


def convert(
    vit: ViT,
    router: str | None = None,
    capacity: float | None = None,
    placement: str | Sequence[int] | None = None,
    *,
    plan: Mapping[int, Entry] | DetrPlan | str | Path | None = None,
    keep_prefix: bool = False,
    activation: str = "none",
    memory: float = 0.0,
    r: int | None = None,
    keep_rate: float | None = None,
    fuse: bool = True,
    by: str | None = None,
    rounds: int | None = None,
    norm: bool | None = None,
    proportional: float | None = None,
    halt_scale: float | None = None,
    halt_shift: float | None = None,
    last: str | None = None,
    budget: float | None = None,
    input_size: Size | int | None = None,
    skip: str | None = None,
    layers: Sequence[int] | None = None,
    per: str | None = None,
    target: float | None = None,
    scale: float | None = None,
    cache: str | None = None,
    parts: Sequence[str] | None = None,
    memory_from: str | None = None,
) -> ViT:
    """A copy of a transformer of timm's or transformers' that follows a plan; ``vit`` itself is left as it is.

    The copy is of ``vit``'s class with ``vit``'s parameter names. The arguments other than ``plan`` are ways to say a
    plan: ``convert(vit, "attention", 0.5)`` is ``convert(vit, plan={1: Route(0.5), 3: Route(0.5), ...})``.

    Args:
        vit: timm's ``VisionTransformer`` (ViT, DeiT, DINOv2, CLIP, SigLIP, ...), ``Eva`` (EVA-02, DINOv3, Perception
            Encoder), ``Beit`` or ``VisionTransformerRelPos``, its weights loaded; or an encoder of transformers', with
            any head (``docs/transformers.md``).
        router: ``attention`` (A-MoD, Eq. 4-5; the default), ``linear`` (MoD, Eq. 1-2), ``attention_weighted`` (A.5),
            ``tuning`` (gates that are trained: Router-Tuning),
            ``class_attention`` (the class token's row in the place of Eq. 4), ``class_attention_value`` (that row
            times the norm of the values), ``random`` (control), ``tome`` (:class:`Merge` in every block), ``merge``
            (ours, for models without training: in three blocks, tokens in two rounds, norms kept), ``evit``
            (:class:`Prune` in 3, 6, 9 of 12), ``dynamicvit`` (:class:`Predict` there), ``avit`` (:class:`Halt` in every
            block), or ``none`` (dense). ``docs/methods.md`` tells them apart.
        capacity: C in (0, 1], by default 0.125; a routed block keeps K = floor(C * N) tokens, the class token counted.
        placement: ``alternate`` (blocks 1, 3, 5, ... as in the paper; the default of routers), ``last8`` (Sec. 4.5),
            ``late`` (the second half), ``few`` (2, 5, 8 of 12), or 0-based indices.
        plan: what each block does, block by block; or the YAML file that says it, of :func:`amod.search` for one.
        keep_prefix: class, distillation and register tokens are always kept, among the K. The paper's are not.
        activation: of the linear router, ``none`` (the paper) or ``sigmoid``.
        memory: of routers that read attention, in [0, 1): share of the scores of the routed block before.
        r: of ``tome`` and ``merge``, tokens merged per block, of ``tome`` by default 13.
        keep_rate: of ``evit`` and ``dynamicvit``, the share of the patches that stay each time, by default 0.7.
        fuse: of ``evit``, the others become one token.
        by, rounds: of ``tome`` and ``merge``, what is compared, ``keys`` or ``tokens``, and in how many matchings one
            after the other; by default ``keys`` in 1, of ``merge`` ``tokens`` in 2 (:class:`Merge`).
        norm, proportional: of both, whether a merged token has the mean norm of those in it, and how much later
            attention counts it; by default False (of ``merge`` True) and 1, as its patches.
        halt_scale, halt_shift: of ``avit``, by default 10 and 75: a halting score is sigmoid(scale t[0] - shift).
        last: ``class``: the class token alone in the last block (:class:`ClassOnly`).
        budget: multiply-accumulates of one image at ``input_size``; capacity, r or keep rate becomes the one that
            costs most without exceeding it.
        input_size: (channels, height, width) of the budget's image, by default the model's own; of text, how many
            tokens.
        skip: what the tokens that are not kept pass: the ``block`` (the default), or its ``attention`` or ``mlp``
            alone; of ``tuning`` by default ``attention`` (MindSkip).
        layers: of ``tuning``, 0-based blocks with a gate, by default those of Router-Tuning: 5 to 10 of 12.
        per: of ``tuning``, a gate for each ``token`` (the default) or each ``sequence``.
        target, scale: of ``tuning``'s training by ``src/train.py``, which adds scale relu(mean gate - target) to the
            loss; in a loop of your own add ``amod.gates.penalty(routing, model.plan)`` (:class:`Gate`).
        cache: of ``tuning`` in a language model (``docs/router-tuning.md``): ``kept`` or ``all``; with ``skip="mlp"``
            every token has keys and values, and it decides nothing.
        parts, memory_from: of a DETR, as in ``docs/detection.md``; its ``plan`` is a :class:`DetrPlan`.

    Raises:
        UserError: the model, the plan or the budget cannot be served; the message says why.
    """
    own = {
        "capacity": capacity,
        "keep_prefix": None if keep_prefix is False else keep_prefix,
        "activation": None if activation == "none" else activation,
        "memory": memory or None,
        "r": r,
        "keep_rate": keep_rate,
        "fuse": None if fuse is True else fuse,
        "by": by,
        "rounds": rounds,
        "norm": norm,
        "proportional": proportional,
        "skip": skip,
        "layers": layers,
        "per": per,
        "target": target,
        "scale": scale,
        "cache": cache,
        "halt_scale": halt_scale,
        "halt_shift": halt_shift,
    }
    family, of_detr = _served_by(vit), {"parts": parts, "memory_from": memory_from}
    if of_detection(vit):
        given = {"router": router, "placement": placement, "last": last, "budget": budget} | own | of_detr
        return family.convert_as_asked(vit, plan, {name: value for name, value in given.items() if value is not None})
    _refuse(of_detr, "is of a DETR alone; leave it out")
    family.check_model(vit)
    depth = family.depth_of(vit)
    if budget is None:
        _refuse({"input_size": input_size}, "says at which size budget= is counted; leave it out without one")
    if plan is not None:
        if isinstance(plan, DetrPlan):
            raise UserError("plan: a DetrPlan is of a DETR alone; write {block: entry}")
        said = {"router": router, "placement": placement, "last": last, "budget": budget} | own
        _refuse(said, "plan= says it already; leave one of them out")
        plan = read_plan(plan) if isinstance(plan, str | Path) else plan
        check_plan(plan, depth)
        plan = {int(i): plan[i] for i in sorted(plan)}
        return family.routed(vit, plan)
    router = "attention" if router is None else router
    if router not in ROUTERS and router not in (*BY_THEMSELVES, "none"):
        hint = "; for isoflop use amod.truncate(vit, depth)" if router == "isoflop" else ""
        raise UserError(f"router={router!r}: choose one of {', '.join([*ROUTERS, *BY_THEMSELVES])}, none{hint}")
    gates = ("layers", "skip", "per", "target", "scale", "cache")
    merges = ("r", "by", "rounds", "norm", "proportional")
    takes = {
        **dict.fromkeys(MERGING, merges),
        "evit": ("keep_rate", "fuse"),
        "dynamicvit": ("keep_rate",),
        "avit": ("halt_scale", "halt_shift"),
        "tuning": gates,
    }.get(router, ("capacity", "keep_prefix", "activation", "memory", "skip"))  # none, too: in a loop over routers
    if router == "tuning":
        for name, value in (("placement", placement), ("budget", budget)):
            if value is not None:
                raise UserError(f"{name}={value!r}: router=tuning has layers= and target= in its place; leave it out")
        placement = layers
    if router == "none":
        _refuse({"budget": budget}, "router=none is the dense model; leave it out")
    for name, value in own.items():
        if value is not None and name not in takes:
            raise UserError(f"{name}={value!r}: router={router} has no {name}; leave it out")
        if value is not None and budget is not None and name == takes[0]:
            raise UserError(f"{name}={value!r}: budget= picks it; leave one of them out")
    options: dict[str, Any] = {"keep_prefix": keep_prefix, "activation": activation, "memory": memory}
    options |= {"fuse": fuse, "last": last, "skip": skip}
    options |= {name: own[name] for name in (*gates[2:], *merges[1:]) if own[name] is not None}
    if router == "merge" and r is None and budget is None:
        raise UserError("router=merge: say what it may cost, budget=, or how many tokens each of its blocks merges, r=")
    if budget is not None:
        return family.routed(vit, family.plan_for_budget(vit, budget, router, placement, options, input_size))
    options |= {name: own[name] for name in ("r", "keep_rate", "halt_scale", "halt_shift") if own[name] is not None}
    return family.routed(vit, make_plan(depth, router, 0.125 if capacity is None else capacity, placement, **options))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """UserError for the first of the arguments that was given."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name}={value!r}: {why}")


def _served_by(model: Any) -> Any:
    """The file that knows such models: this one, or one of transformers' that has the same functions."""
    if not of_transformers(model):
        return sys.modules[__name__]
    by = served_by(getattr(model.config, "model_type", None), type(model).__name__)
    if of_detection(model):
        return by
    from amod import text

    return text if text.is_served(model) else by


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


def dense(model: ViT) -> ViT:
    """The timm model that a routed model's weights are, every block whole: a copy; the routers stay behind."""
    if of_transformers(model):
        return _served_by(model).dense(model)
    return undressed(model)


# --- shorter models, and plans by cost ----------------------------------------------------------------------------


def truncate(vit: ViT, depth: int) -> ViT:
    """The isoFLOP baseline: a copy of ``vit`` with its first ``depth`` blocks, final norm and head kept."""
    check_model(vit)
    blocks: Any = vit.blocks
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= len(blocks):
        raise UserError(f"depth={depth!r}: must be a whole number from 1 to {len(blocks)}, the model's depth")
    short: Any = copy.copy(vit)  # share everything for a moment, so that the dropped blocks are never copied
    short._modules = {**vit._modules, "blocks": blocks[:depth]}
    short = copy.deepcopy(short)
    short.feature_info = short.feature_info[:depth]
    return short


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


def isoflop_depth(vit: nn.Module, capacity: float, placement: Any = "alternate", input_size: Size | None = None) -> int:
    """Depth of the deepest truncation whose FLOPs do not exceed those of MoD at this capacity and placement.

    The paper's own depths (``PAPER_DEPTHS``) follow no single rule and are pinned where its tables are made.
    """
    check_model(vit)
    size, bare = input_size_of(vit, input_size), on_meta(vit)
    limit = count_on_meta(convert(bare, "linear", capacity, placement), size)
    depth = len(vit.blocks)  # type: ignore[arg-type]
    while depth > 1 and count_on_meta(truncate(bare, depth), size) > limit:
        depth -= 1
    return depth
