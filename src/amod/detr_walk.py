"""One pass of a routed DETR: transformers' own forwards, whose layers take the tokens that the plan gives them.

The encoder's layers are routed like those of any encoder of transformers' (``huggingface_walk.py``). A decoder layer
has two sequences: it takes some of its queries (B, Q, D), with their positions, and lets them look at some of the
memory (B, M, D), with its positions and mask. Queries that are not taken leave the layer bit for bit as they came.

A linear router's weight needs a gradient. On queries it multiplies the layer's update (Eq. 2); the memory has no update
in the decoder, so the layer sees the kept memory multiplied by its scores.

Axes: B batch, Q queries, M tokens of the memory, K kept of either, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amod import padding
from amod.dress import Dressed
from amod.entries import READS_ATTENTION, Route
from amod.errors import UserError
from amod.huggingface_walk import HubRequest, RoutedEncoder, RoutedModel, Walk, pick
from amod.routers import Router
from amod.routing import RoutedLayer, Routing, put, refine, take, weigh_update


class DetrRouting(NamedTuple):
    """What the routed layers of a pass did with each of the three sequences, in depth order."""

    encoder: Routing
    queries: Routing
    memory: Routing


class DetrWalk(Walk):
    """What one pass leaves behind the layers, by their index: ``left`` is the encoder's (B, M)."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Tensor] = {}
        """(B, Q, D) behind each decoder layer, before the norm that auxiliary losses read it through."""
        self.of_queries: dict[int, Tensor] = {}
        """(B, Q), column means of self-attention, for the next layer's router."""
        self.of_memory: dict[int, Tensor] = {}
        """(B, M), of cross-attention; at -1 those of the last encoder layer."""
        self.queries: dict[int, RoutedLayer] = {}
        self.memory: dict[int, RoutedLayer] = {}

    def record(self) -> DetrRouting:
        return DetrRouting(*([d[i] for i in sorted(d)] for d in (self.routing, self.queries, self.memory)))


@dataclass(frozen=True)
class DecoderStep:
    """A decoder layer's part in the plan."""

    index: int
    queries: Route | None
    memory: Route | None
    memory_from: str
    reads_self: bool
    """Whether the next layer's router reads this one's self-attention."""
    reads_cross: bool


class RoutedDecoderLayer(Dressed):
    """Over transformers' decoder layer. A routed one has a ``router`` of queries, a ``memory_router``, or both."""

    named_alike = True
    adds = ("step", "router", "memory_router")
    step: DecoderStep
    router: Router
    memory_router: Router

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        object_queries_position_embeddings: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        walk: DetrWalk | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, Q, D) -> (B, Q, D); without a walk, where somebody calls the layer by itself, its own forward.

        With auxiliary losses, transformers hands the normalised state on to the next layer, which the original does
        not: a layer takes the state that the one before it left.

        Args:
            spatial_position_embeddings, encoder_hidden_states: (B, M, D), the memory's.
            object_queries_position_embeddings: (B, Q, D).
            encoder_attention_mask: (B, 1, Q, M), True where the memory is no padding; None: nowhere.
        """
        if walk is None:
            return super().forward(
                hidden_states, attention_mask, spatial_position_embeddings, object_queries_position_embeddings,
                encoder_hidden_states, encoder_attention_mask, **kwargs,
            )  # fmt: skip
        step, i = self.step, self.step.index
        x = before = walk.states.get(i - 1, hidden_states)
        at, memory, places = object_queries_position_embeddings, encoder_hidden_states, spatial_position_embeddings
        mask = None if encoder_attention_mask is None else encoder_attention_mask[:, :, :1]
        seen = among = indices = scores = None
        if step.memory is not None:
            assert memory is not None
            from_before = step.memory_from == "cross"
            earlier = walk.of_memory.get(i - 1 if from_before else -1)
            scored = self.memory_router(memory, earlier)
            real = None if mask is None else mask[:, 0, 0]
            seen, among = pick(scored, real, step.memory.capacity)
            memory, places = take(memory, seen), places if places is None else take(places, seen)
            mask = None if among is None else among[:, None, None]
            if (r := self.memory_router.multiplier(scored)) is not None:
                memory = memory * take(r, seen).unsqueeze(-1).to(memory.dtype)
            shown = seen if among is None else padding.without_fillers(seen, among)
            walk.memory[i] = RoutedLayer(i, scored.detach(), shown)
        if step.queries is not None:
            scores = self.router(x, walk.of_queries.get(i - 1))
            indices, _ = pick(scores, None, step.queries.capacity)
            before, at = take(x, indices), at if at is None else take(at, indices)
            walk.queries[i] = RoutedLayer(i, scores.detach(), indices)
        ask_self = self.request(step.reads_self, None)
        ask_cross = self.request(step.reads_cross, mask)
        after = super().forward(before, ask_self, places, at, memory, ask_cross, **kwargs)
        if isinstance(ask_self, HubRequest):
            walk.of_queries[i] = spread(ask_self.left["column_mean"], walk.of_queries.get(i - 1), indices, None)
        if isinstance(ask_cross, HubRequest):
            left = ask_cross.left["column_mean"]
            walk.of_memory[i] = spread(left, walk.of_memory.get(i - 1), seen, among)
        if indices is not None:
            assert scores is not None
            if (r := self.router.multiplier(scores)) is not None:
                after = weigh_update(before, after, take(r, indices))
            after = put(x, indices, after)
        walk.states[i] = after
        return after

    @staticmethod
    def request(wanted: bool, mask: Tensor | None) -> HubRequest | Tensor | None:
        """What an attention is handed in the place of its mask."""
        return HubRequest(want=("column_mean",), class_token=False, mask=mask) if wanted else mask


def spread(left: Tensor, earlier: Tensor | None, kept: Tensor | None, among: Tensor | None) -> Tensor:
    """Scores of the whole sequence (B, N) from the column mean (B, K) of those that a layer kept."""
    if kept is None:
        return left
    assert earlier is not None
    return refine(earlier, kept, left) if among is None else padding.refine_among(earlier, kept, left, among)


class RoutedDecoder(RoutedEncoder):
    """Over transformers' decoder."""

    def forward(self, *args: Any, walk: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("attention_mask") is not None:
            raise UserError("decoder_attention_mask: a routed DETR has all its queries; leave it out")
        walk = DetrWalk() if walk is None else walk
        walk.met = True
        if walk.left:
            walk.of_memory[-1] = walk.left[max(walk.left)]
        out = super().forward(*args, walk=walk, **kwargs)
        if out.intermediate_hidden_states is not None:  # the norm has been applied twice to the last one
            out.last_hidden_state = out.intermediate_hidden_states[-1]
        return out


class RoutedDetr(RoutedModel):
    """What ``convert`` puts over ``DetrForObjectDetection``. ``plan`` is a :class:`amod.detr_plan.DetrPlan`."""

    plan: Any

    @property
    def blocks_routed(self) -> tuple[int, ...]:
        """The encoder's layers through which only some tokens go."""
        return tuple(sorted(self.plan.encoder))

    def forward(self, *args: Any, return_routing: bool = False, **kwargs: Any) -> Any:
        """transformers' own, or with ``return_routing`` the pair of its output and the :class:`DetrRouting`."""
        walk = DetrWalk()
        out = super(RoutedModel, self).forward(*args, walk=walk, **kwargs)
        return (out, walk.record()) if return_routing else out

    def extra_repr(self) -> str:
        return "\n".join(
            f"plan {part} {i}: {entry}" for part in ("encoder", "queries", "memory")
            for i, entry in sorted(self.plan.part(part).items())
        )  # fmt: skip


def reads(plan: dict[int, Route], i: int) -> bool:
    """Whether the layer after layer i reads its attention."""
    return i + 1 in plan and plan[i + 1].router in READS_ATTENTION


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
