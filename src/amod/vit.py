"""``convert`` and the other verbs: a transformer whose blocks follow a plan, the dense one again, a shorter one.

What a family of models needs for it is in ``timm_models.py``, and for transformers' in ``huggingface.py``, ``text.py``
and ``detection.py``, which have the same functions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from amod import timm_models
from amod.detr_plan import DetrPlan
from amod.dress import of_detection, of_transformers, served_by
from amod.entries import Entry
from amod.errors import UserError
from amod.families import check_model
from amod.flops import Size, check_budget, check_module, count_on_meta, input_size_of, on_meta
from amod.plan import BY_THEMSELVES, MERGING, check_plan, make_plan, read_plan
from amod.routers import ROUTERS
from amod.timm_models import RoutedViT as RoutedViT  # where models that were pickled before look for it

ViT = TypeVar("ViT", bound=nn.Module)

PAPER_DEPTHS: dict[str, dict[float, int]] = {
    "deit_tiny_patch16_224": {0.125: 7, 0.5: 9},
    "deit_small_patch16_224": {0.125: 6, 0.5: 9},
    "vit_base_patch16_224": {0.125: 6, 0.5: 9},
    "vit_large_patch16_224": {0.125: 13, 0.5: 18},
}
"""Depth of the paper's isoFLOP models by timm name and capacity, recovered from the FLOPs of Table 1."""


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
            times the norm of the values), ``random`` and ``reversed`` (controls), ``tome`` (:class:`Merge` in every
            block), ``merge`` (ours, for models without training: in three blocks, tokens in two rounds, norms kept),
            ``evit`` (:class:`Prune` in 3, 6, 9 of 12), ``dynamicvit`` (:class:`Predict` there), ``avit`` (:class:`Halt`
            in every block), or ``none`` (dense). ``docs/methods.md`` tells them apart.
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
            attention counts it; by default False and 1, as its patches (of ``merge`` True and 0.9).
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
    if not isinstance(router, str) or router not in (*ROUTERS, *BY_THEMSELVES, "none"):
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
        check_budget(budget)
        return family.routed(vit, family.plan_for_budget(vit, budget, router, placement, options, input_size))
    options |= {name: own[name] for name in ("r", "keep_rate", "halt_scale", "halt_shift") if own[name] is not None}
    return family.routed(vit, make_plan(depth, router, 0.125 if capacity is None else capacity, placement, **options))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """UserError for the first of the arguments that was given."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name}={value!r}: {why}")


def _served_by(model: Any) -> Any:
    """The file that knows such models."""
    check_module(model)
    if not of_transformers(model):
        return timm_models
    by = served_by(getattr(model.config, "model_type", None), type(model).__name__)
    if of_detection(model):
        return by
    from amod import text

    return text if text.is_served(model) else by


def dense(model: ViT) -> ViT:
    """The timm model that a routed model's weights are, every block whole: a copy; the routers stay behind."""
    plain: ViT = _served_by(model).dense(model)
    return plain


def truncate(vit: ViT, depth: int) -> ViT:
    """The isoFLOP baseline: a copy of ``vit`` with its first ``depth`` blocks, final norm and head kept."""
    check_model(vit)
    blocks: Any = vit.blocks
    if isinstance(depth, bool) or not isinstance(depth, Integral) or not 1 <= int(depth) <= len(blocks):
        raise UserError(f"depth={depth!r}: must be a whole number from 1 to {len(blocks)}, the model's depth")
    depth = int(depth)
    short: Any = copy.copy(vit)  # share everything for a moment, so that the dropped blocks are never copied
    short._modules = {**vit._modules, "blocks": blocks[:depth]}
    short = copy.deepcopy(short)
    short.feature_info = short.feature_info[:depth]
    return short


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
