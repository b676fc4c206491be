"""One pass of a routed transformers model: transformers' own forwards, whose layers follow the plan.

transformers hands the options that a forward does not know (``**kwargs``) on to every layer, and a layer's mask on to
the function that computes attention. That is how a pass runs here, without a line of any model's own:

- the module that owns the layers (:class:`RoutedEncoder`) gives each of them the same new :class:`Walk`, which holds
  what one layer leaves for the next; nothing of a pass is kept on a module, so threads and gradient checkpointing have
  their own;
- a layer (:class:`RoutedLayer`) takes its K tokens with their rows of masks and rotary tables, calls its own class's
  forward on them and puts them back: whoever looks at a layer sees all N tokens, as ``output_hidden_states`` does;
- its attention is handed a :class:`HubRequest` in the place of its mask and answers it, because the model's attention
  implementation is :func:`attention`, below.

Axes: B batch, N tokens, K tokens kept, D width. Of texts of different lengths: ``padding.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from amod import padding, routing
from amod.attention import Request, attend, class_scores
from amod.dress import Dressed
from amod.entries import Route, fraction
from amod.errors import UserError
from amod.gates import is_gated
from amod.plan import Plan
from amod.routers import Router
from amod.routing import put, take, weigh_update
from amod.tables import rows_and_columns

IMPLEMENTATION = "amod"
"""The name of :func:`attention` among transformers' attention implementations."""


class HubRequest(Request):
    """A request to an attention of transformers', in the place of its mask.

    ``mask`` is that mask, (B or 1, H or 1, N, N); ``first`` (B,) is where each text begins, None: at 0.
    """

    mask: Tensor | None = None
    first: Tensor | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | HubRequest | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, which also answers a request. q, k, v (B, H, N, d) -> (B, N, H, d).

    Args:
        attention_mask: (B or 1, H or 1, N, N), True where row may look at column, or added to the logits; or a request.
    """
    if not isinstance(attention_mask, HubRequest):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    request = attention_mask
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    bias = request.mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=query.dtype, device=bias.device).masked_fill(~bias, -torch.inf)
    drop = nn.Dropout(dropout) if dropout else nn.Identity()
    out, request.left = attend(query, key, value, bias, request, drop)
    if request.first is not None and "class_attention" in request.want:  # padding stands before some class tokens
        rows = torch.arange(query.shape[0], device=query.device), slice(None), request.first
        seen = None if bias is None else bias.expand(query.shape[0], *bias.shape[1:])[rows].unsqueeze(2)
        request.left |= class_scores(query[rows].unsqueeze(2), key, value, seen, request)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # without one, padding would be looked at


# --- the modules of a routed model --------------------------------------------------------------------------------


class Walk:
    """What one pass leaves behind its layers, by their index. No mapping: accelerate's hooks hand on a copy of one."""

    def __init__(self) -> None:
        self.left: dict[int, Tensor] = {}
        """(B, N) for the next layer's router."""
        self.met = False
        """Whether it came to any layer."""
        self.routing: dict[int, routing.RoutedLayer] = {}


@dataclass(frozen=True)
class Step:
    """A layer's part in the plan."""

    index: int
    entry: Route | None
    prefix: int
    """How many class and register tokens are in front."""
    class_token: bool
    read: str | None = None
    """What the next layer's router reads of this one's attention; a name of ``Request.want``."""
    differentiable: bool = False
    """Whether a gradient flows back through that."""

    @property
    def prefix_kept(self) -> int:
        """How many tokens are kept whatever their score."""
        return self.prefix if self.entry is not None and self.entry.keep_prefix else 0


class RoutedLayer(Dressed):
    """Over the class of a layer. One that is routed has a ``router``."""

    named_alike = True
    adds = ("step", "router")
    step: Step
    router: Router

    def forward(self, hidden_states: Tensor, *args: Any, walk: Walk | None = None, **kwargs: Any) -> Any:
        """(B, N, D) -> (B, N, D); without a walk, where somebody calls the layer by itself, its own forward."""
        if walk is None:
            return super().forward(hidden_states, *args, **kwargs)
        walk.met = True
        mask = args[0] if args else kwargs.get("attention_mask")
        if mask is not None:  # (B, 1, 1, N) says of every row the same
            mask = mask.expand(*mask.shape[:2], hidden_states.shape[1], -1)
        if self.step.differentiable and reentrant(self):
            raise UserError(
                "gradient_checkpointing_enable: use_reentrant=True loses the gradient of the scores by which the next "
                "layer is multiplied; leave it out"
            )
        inputs = args[1:], {name: value for name, value in kwargs.items() if name != "attention_mask"}
        real = None if mask is None else padding.real_tokens(mask, hidden_states.shape[0])
        if self.step.entry is not None:
            return self.route(self.step.entry, hidden_states, mask, real, walk, *inputs)
        if self.step.read and mask is not None and real is not None:
            mask = padding.mask_among(mask, real)
        out, left = self.run(hidden_states, mask, real, *inputs)
        if left is not None:
            walk.left[self.step.index] = left
        return out

    def route(
        self, entry: Route, x: Tensor, mask: Tensor | None, real: Tensor | None, walk: Walk, args: Any, kwargs: Any
    ) -> Tensor:
        """K tokens go through the layer, the others stay as they are.

        Args:
            mask: (B or 1, H or 1, N, N).
            real: (B, N), which tokens are no padding; None: all.
        """
        step = self.step
        earlier = walk.left.get(step.index - 1)
        earlier = None if earlier is None else earlier.to(x.device)
        scores = self.router(x, earlier)
        indices, among = pick(scores, real, entry.capacity, step.prefix_kept)
        if mask is not None and among is not None:
            mask = padding.mask_among(rows_and_columns(mask, indices), among)
        before = take(x, indices)
        after, left = self.run(before, mask, among, args, rows_of(indices, kwargs, x.shape[1]))
        if left is not None and earlier is not None:  # the layer saw the kept tokens alone
            first = None
            if step.class_token and step.read == "class_attention":
                first = indices.new_zeros(1, 1) if real is None else padding.first_of(real).unsqueeze(1)
            walk.left[step.index] = (
                routing.refine(earlier, indices, left, first)
                if among is None
                else padding.refine_among(earlier, indices, left, among, first)
            )
        r = self.router.multiplier(scores)
        if r is not None:
            after = weigh_update(before, after, take(r, indices))
        if among is not None:
            after = torch.where(among.unsqueeze(-1), after, before)
        shown = indices if among is None else padding.without_fillers(indices, among)
        walk.routing[step.index] = routing.RoutedLayer(step.index, scores.detach(), shown)
        return put(x, indices, after)

    def run(
        self, x: Tensor, mask: Tensor | None, real: Tensor | None, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's own forward on (B, n, D), and what its attention left for the next layer's router (B, n)."""
        step = self.step
        if not step.read:
            return super().forward(x, mask, *args, **kwargs), None
        request = HubRequest(
            want=(step.read,),
            differentiable=step.differentiable,
            class_token=step.class_token,
            mask=mask,
            first=None if real is None else padding.first_of(real),
        )
        out = super().forward(x, request, *args, **kwargs)
        if step.read not in request.left:
            raise UserError(f"layer {step.index}: its attention was not called with its mask and left no scores")
        left = request.left[step.read]
        return out, left if real is None or step.read != "column_mean" else padding.mean_of_real_rows(left, real)


def pick(scores: Tensor, real: Tensor | None, capacity: float, prefix: int = 0) -> tuple[Tensor, Tensor | None]:
    """The kept of each sample, (B, K) ascending, and which of them are no fillers; None: all, there is no padding.

    K = floor(C N), as ``Route.kept``; but of a short text at least one is kept, beside the prefix.

    Args:
        scores, real: (B, N).
        prefix: the first so many real tokens are kept whatever their score.
    """
    (part, whole), tokens = fraction(capacity), scores.shape[1]
    k = min(max(tokens * part // whole, prefix + 1), tokens)
    if real is None:
        return routing.top_k(scores.detach(), k, prefix), None
    return padding.choose(scores.detach(), real, k, padding.counts(real, capacity, prefix + 1), prefix)


def rows_of(indices: Tensor, kwargs: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """What transformers gives a layer, for the kept tokens (B, K) of N."""
    taken = dict(kwargs)
    if kwargs.get("position_embeddings") is not None:
        cos, sin = kwargs["position_embeddings"]
        taken["position_embeddings"] = rotary_rows(cos, indices, tokens, 1), rotary_rows(sin, indices, tokens, 0)
    if kwargs.get("spatial_position_embeddings") is not None:  # of a DETR
        taken["spatial_position_embeddings"] = take(kwargs["spatial_position_embeddings"], indices)
    if kwargs.get("position_ids") is not None:
        taken["position_ids"] = take(kwargs["position_ids"].expand(indices.shape[0], -1), indices)
    return taken


def rotary_rows(table: Tensor, indices: Tensor, tokens: int, still: int) -> Tensor:
    """The rows of kept tokens: (B or 1, N, d) -> (B, K, d); images' (patches, d) -> (B, 1, K, d).

    Args:
        still: what turns nothing, 1 in a table of cosines and 0 in one of sines: for tokens in front of the patches.
    """
    if table.dim() == 3:
        return take(table.expand(indices.shape[0], -1, -1), indices)
    front = table.new_full((tokens - table.shape[0], table.shape[1]), still)
    return torch.cat([front, table])[indices].unsqueeze(1)


def reentrant(layer: Any) -> bool:
    """Whether gradient checkpointing runs the layer first without gradients."""
    again = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
    return bool(again and layer.training and getattr(layer, "gradient_checkpointing", False))


def refuse_attentions(config: Any, kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UserError(
            "output_attentions: a routed layer has no map of all tokens; ask for return_routing=True, or use "
            "amod.dense(model) with attn_implementation='eager'"
        )


def refuse_part(part: Any, kwargs: Mapping[str, Any]) -> None:
    """A part of a converted model has no routing to return, and transformers hands on what it does not know."""
    if kwargs.get("return_routing"):
        raise UserError(f"return_routing: ask the model that was converted, not what holds this {type(part).__name__}")


class RoutedEncoder(Dressed):
    """Over the class of whatever owns the layers: every pass has a walk of its own."""

    named_alike = True
    config: Any

    def forward(self, *args: Any, walk: Walk | None = None, **kwargs: Any) -> Any:
        refuse_attentions(self.config, kwargs)
        refuse_part(self, kwargs)
        if self.config._attn_implementation != IMPLEMENTATION:
            raise UserError(
                f"attn_implementation={self.config._attn_implementation!r}: leaves no scores; a routed model runs with "
                f"set_attn_implementation({IMPLEMENTATION!r})"
            )
        walk = Walk() if walk is None else walk
        out = super().forward(*args, walk=walk, **kwargs)
        if not walk.met:
            raise UserError(
                f"{type(self).__name__}: hands no options on to its layers, so they cannot be routed; install a newer "
                "transformers: pip install 'amod[transformers]'"
            )
        return out


class RoutedModel(Dressed):
    """What ``convert`` puts over a transformers model's class. ``plan`` says what each layer does."""

    named_alike = True
    adds = ("plan", "attention_before")
    plan: Plan
    attention_before: str
    """The attention implementation of the model that was converted."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Trainer and pipelines read a forward's arguments: they are those of the model's own."""
        super().__init_subclass__(**kwargs)
        if "undressed" in vars(cls):
            forward = cls.forward

            @wraps(cls.undressed.forward)
            def with_its_arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
                return forward(self, *args, **kwargs)

            cls.forward = with_its_arguments  # type: ignore[method-assign]

    @property
    def blocks_routed(self) -> tuple[int, ...]:
        """The layers through which only some tokens go."""
        return tuple(sorted(self.plan))

    def forward(self, *args: Any, return_routing: bool = False, **kwargs: Any) -> Any:
        """transformers' own, or with ``return_routing`` the pair of its output and the :class:`Routing`."""
        if is_gated(self):
            refuse_attentions(self.config, kwargs)
        if not return_routing:
            return super().forward(*args, **kwargs)
        walk = Walk()
        out = super().forward(*args, walk=walk, **kwargs)
        if self.plan and not walk.routing:
            raise UserError(
                f"return_routing: {type(self).__name__} hands no options on to its encoder; ask its base model"
            )
        return out, [walk.routing[i] for i in sorted(walk.routing)]

    def extra_repr(self) -> str:
        return "\n".join(f"plan {i}: {entry}" for i, entry in sorted(self.plan.items()))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which gives the dense model; :func:`amod.from_pretrained` gives the routed one."""
        own: Any = cls.undressed
        return own.from_pretrained(*args, **kwargs)


class RoutedBaseModel(RoutedModel, RoutedEncoder):
    """Both, for a model that owns its layers."""
