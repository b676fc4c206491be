"""What each layer of a DETR does with its tokens: three plans, one for each sequence that its layers can shorten.

Like ``plan.py`` pure data and no torch. The encoder's layers take some of the image's tokens; the decoder's take some
of the queries, and look at some of the memory, which is what the encoder made of the image's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from amod.entries import READS_ATTENTION, Route
from amod.errors import UserError
from amod.plan import Plan, as_data, check_plan, from_data, make_plan

PARTS = ("encoder", "queries", "memory")
"""The sequences: image tokens in the encoder, queries and memory in the decoder."""
ROUTERS = ("attention", "linear", "random", "reversed")
"""A.5's weighted scores and a class token's attention mean nothing to a DETR."""
MEMORY_FROM = ("cross", "encoder")


@dataclass(frozen=True)
class DetrPlan:
    """Layer by layer (0-based), who goes through; a layer that a part does not name takes all of that sequence.

    What routers that read attention read: an encoder layer the map of the encoder layer before it; queries the
    self-attention of the decoder layer before; the memory by ``memory_from`` either the ``cross`` attention of the
    decoder layer before, that is what the queries have just looked at, or the map of the last ``encoder`` layer.
    """

    encoder: Plan = field(default_factory=dict)
    queries: Plan = field(default_factory=dict)
    memory: Plan = field(default_factory=dict)
    memory_from: str = "cross"

    def part(self, name: str) -> Plan:
        plan: Plan = getattr(self, name)
        return plan

    def as_data(self) -> dict[str, Any]:
        """As plain dicts, for JSON and YAML."""
        return {part: as_data(self.part(part)) for part in PARTS} | {"memory_from": self.memory_from}


def make_detr_plan(
    layers: tuple[int, int],
    router: str = "attention",
    capacity: float = 0.125,
    placement: str | Sequence[int] | None = None,
    activation: str = "none",
    parts: Sequence[str] = PARTS,
    memory_from: str = "cross",
) -> DetrPlan:
    """The plan that a method's name and its arguments stand for; ``layers`` are the encoder's and the decoder's."""
    if router not in (*ROUTERS, "none"):
        raise UserError(f"router={router!r}: a DETR is served by {', '.join(ROUTERS)} and none (dense)")
    if isinstance(parts, str) or not isinstance(parts, Iterable) or not parts or not {*parts} <= {*PARTS}:
        raise UserError(f"parts={parts!r}: must be a list with some of {', '.join(PARTS)}")
    depth = dict(zip(PARTS, (layers[0], layers[1], layers[1]), strict=True))
    plans = {}
    for part in parts:
        try:
            plans[part] = make_plan(depth[part], router, capacity, placement, activation=activation)
        except UserError as error:
            raise UserError(f"{part}: {error}") from None
    plan = DetrPlan(memory_from=memory_from, **plans)
    check_detr_plan(plan, layers)
    return plan


def check_detr_plan(plan: Any, layers: tuple[int, int]) -> None:
    """UserError unless it is a plan for a DETR of so many encoder and decoder layers."""
    if not isinstance(plan, DetrPlan):
        raise UserError(f"plan={plan!r}: of a DETR it is an amod.DetrPlan, with plans for {', '.join(PARTS)}")
    if plan.memory_from not in MEMORY_FROM:
        raise UserError(f"memory_from={plan.memory_from!r}: choose one of {', '.join(MEMORY_FROM)}")
    for part, depth in zip(PARTS, (layers[0], layers[1], layers[1]), strict=True):
        given = plan.part(part)
        if not isinstance(given, Mapping):
            raise UserError(f"plan: {part} is {given!r}; write {{layer: amod.Route(0.5)}}")
        for i, entry in given.items():
            if not isinstance(entry, Route):
                raise UserError(f"plan: {part} {i}, {entry}: a DETR's layers are served by Route alone")
            if entry.router not in ROUTERS:
                raise UserError(f"plan: {part} {i} has router={entry.router!r}; choose one of {', '.join(ROUTERS)}")
            if entry.memory or entry.keep_prefix or entry.skip != "block":
                name = "memory" if entry.memory else "keep_prefix" if entry.keep_prefix else f"skip={entry.skip!r}"
                raise UserError(f"plan: {part} {i} has {name}, which a DETR does not have; leave it out")
        if part == "memory" and plan.memory_from == "encoder":
            check_scored_by_encoder(plan, layers)
            continue
        try:
            check_plan(given, depth)
        except UserError as error:
            raise UserError(f"{part}: {error}") from None


def check_scored_by_encoder(plan: DetrPlan, layers: tuple[int, int]) -> None:
    """Every layer of the decoder has the scores that the last encoder layer leaves, its first one too."""
    last = layers[0] - 1
    if odd := [i for i in plan.memory if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < layers[1]]:
        raise UserError(f"memory: plan: layer {odd[0]!r} is not one of 0 to {layers[1] - 1}")
    reading = {i: e.router for i, e in plan.memory.items() if isinstance(e, Route) and e.router in READS_ATTENTION}
    before = plan.encoder.get(last)
    if reading and isinstance(before, Route) and before.router not in READS_ATTENTION:
        first = min(reading)
        raise UserError(
            f"memory: layer {first} (router={reading[first]}) has its scores of encoder layer {last}, where "
            f"router={before.router} leaves none; choose memory_from='cross', or leave that layer dense"
        )


def detr_plan_from(data: Any) -> DetrPlan:
    """The plan of :meth:`DetrPlan.as_data`."""
    if isinstance(data, DetrPlan):
        return data
    if not isinstance(data, Mapping) or not {*data} <= {*PARTS, "memory_from"}:
        raise UserError(f"plan={data!r}: of a DETR it has {', '.join(PARTS)}, each with its layers, and memory_from")
    plans = {part: from_data(data[part]) for part in PARTS if data.get(part)}
    return DetrPlan(memory_from=data.get("memory_from", "cross"), **plans)
