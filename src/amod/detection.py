"""``convert`` for transformers' DETR: attention-routed layers in encoder and decoder (A-MoD, Table 9).

The copy is of the model's own class with its parameter names; linear routers add ``<layer>.router.weight`` and, for the
memory that a decoder layer looks at, ``<layer>.memory_router.weight``. The plan (``detr_plan.py``) is also in its
config. How a pass runs is in ``detr_walk.py``. This file is imported when such a model is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DetrForObjectDetection

from amod.detr_plan import PARTS, DetrPlan, check_detr_plan, detr_plan_from, make_detr_plan
from amod.detr_walk import DecoderStep, DetrWalk, RoutedDecoder, RoutedDecoderLayer, RoutedDetr, device_of, reads
from amod.dress import Dressed, dress, undressed
from amod.entries import Route
from amod.errors import UserError, one_line
from amod.flops import count_on_meta, input_size_of, on_meta
from amod.huggingface import routers_expected
from amod.huggingface_walk import IMPLEMENTATION, RoutedEncoder, RoutedLayer, Step
from amod.routers import make_router

FORMAT = 1
"""Of the entry ``amod`` in config.json; ``hub.py`` checks it."""


def convert(
    model: Any,
    router: str | None = None,
    capacity: float | None = None,
    placement: str | Sequence[int] | None = None,
    *,
    plan: DetrPlan | Mapping[str, Any] | None = None,
    activation: str = "none",
    parts: Sequence[str] | None = None,
    memory_from: str | None = None,
) -> Any:
    """A copy of a DETR that follows a plan; :func:`amod.convert`, which hands a DETR on, says what the arguments are.

    ``router="none"`` changes one thing: with ``config.auxiliary_loss`` a decoder layer gets the state that the one
    before it left, as in the original, and not its norm, as in transformers.
    """
    check_model(model)
    layers = layers_of(model)
    if plan is None:
        choices = {"parts": parts, "memory_from": memory_from}
        given: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
        plan = make_detr_plan(
            layers, "attention" if router is None else router, 0.125 if capacity is None else capacity, placement,
            activation, **given,
        )  # fmt: skip
    else:
        plan = detr_plan_from(plan)
        check_detr_plan(plan, layers)
    return routed(model, plan)


def convert_as_asked(model: Any, plan: Any, given: Mapping[str, Any]) -> Any:
    """:func:`convert` with the arguments of :func:`amod.convert` that were ``given``; UserError for those of others."""
    served = inspect.signature(convert).parameters
    for name, value in given.items():
        if name not in served:
            raise UserError(f"{name}={value!r}: a DETR does not have it; leave it out")
        if plan is not None:
            raise UserError(f"{name}={value!r}: plan= says it already; leave one of them out")
    return convert(model, plan=plan, **given)


def check_model(model: Any) -> None:
    """UserError unless it is a DETR that can be routed."""
    if any(isinstance(module, Dressed) for module in model.modules()):
        raise UserError("the model is routed already: convert the model it was made from, or amod.dense(model)")
    if not isinstance(model, DetrForObjectDetection):
        raise UserError(f"transformers' {type(model).__name__} cannot be routed: of DETR, DetrForObjectDetection is")


def layers_of(model: Any) -> tuple[int, int]:
    return len(model.model.encoder.layers), len(model.model.decoder.layers)


def routed(model: Any, plan: DetrPlan) -> Any:
    """The copy of ``model`` that follows a checked plan."""
    model = copy.deepcopy(model)
    before, width = model.config._attn_implementation, model.config.d_model
    routes: Any = {part: plan.part(part) for part in PARTS}

    def router_for(entry: Route) -> nn.Module:
        return make_router(entry.router, width, entry.activation).to(device_of(model)).train(model.training)

    encoder, decoder = model.model.encoder, model.model.decoder
    for i, layer in enumerate(encoder.layers):
        dress(layer, RoutedLayer)
        last = i == len(encoder.layers) - 1 and plan.memory_from == "encoder"
        read = reads(routes["encoder"], i) or (last and any(reads(routes["memory"], at - 1) for at in plan.memory))
        layer.step = Step(i, routes["encoder"].get(i), 0, False, "column_mean" if read else None)
        if i in plan.encoder:
            layer.router = router_for(routes["encoder"][i])
    for i, layer in enumerate(decoder.layers):
        dress(layer, RoutedDecoderLayer)
        queries, memory = (routes[part].get(i) for part in ("queries", "memory"))
        cross = plan.memory_from == "cross" and reads(routes["memory"], i)
        layer.step = DecoderStep(i, queries, memory, plan.memory_from, reads(routes["queries"], i), cross)
        if queries is not None:
            layer.router = router_for(queries)
            queries.kept(model.config.num_queries)  # refuse a capacity that keeps nothing now rather than in training
        if memory is not None:
            layer.memory_router = router_for(memory)
    dress(encoder, RoutedEncoder)
    dress(decoder, RoutedDecoder)
    dress(model, RoutedDetr)
    model.plan, model.attention_before = plan, before
    model.config.amod = {"format": FORMAT, "plan": plan.as_data()}
    model.config._attn_implementation = IMPLEMENTATION
    return model


def dense(model: Any) -> Any:
    """The DETR that a routed one's weights are, every layer whole: a copy; the routers stay behind."""
    before, plain = getattr(model, "attention_before", "sdpa"), undressed(model)
    plain.config._attn_implementation = before
    return plain


# --- cost ---------------------------------------------------------------------------------------------------------


class TransformerAlone(nn.Module):
    """Encoder and decoder of a DETR on the tokens of images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Any:
        """(B, D, H / 32, W / 32), all of it image."""
        base, tokens = self.model.model, features.flatten(2).transpose(1, 2)
        queries = base.query_position_embeddings.weight.expand(len(tokens), -1, -1)
        walk = {"walk": DetrWalk()} if isinstance(self.model, RoutedDetr) else {}
        encoded = base.encoder(inputs_embeds=tokens, spatial_position_embeddings=tokens, **walk)
        return base.decoder(
            inputs_embeds=queries,
            spatial_position_embeddings=tokens,
            object_queries_position_embeddings=queries,
            encoder_hidden_states=encoded.last_hidden_state,
            **walk,
        )


def transformer_flops(model: Any, height: int, width: int) -> int:
    """Multiply-accumulates of encoder and decoder for one image, as the paper's Table 9 has them.

    The decoder's final norm is counted behind every layer, where the original applies it whether or not it trains.
    """
    if not isinstance(model, DetrForObjectDetection):
        raise UserError(f"model: is a {type(model).__name__}; this counts a DetrForObjectDetection, routed or not")
    input_size_of(model, (model.config.num_channels, height, width))
    bare: Any = on_meta(model)
    bare.config.auxiliary_loss = True
    pixels = torch.empty(1, bare.config.num_channels, height, width, device="meta")
    with torch.no_grad():
        shape = bare.model.backbone(pixels, pixels[:, 0])[-1][0].shape[-2:]
    return count_on_meta(TransformerAlone(bare), (bare.config.d_model, *shape))


# --- files --------------------------------------------------------------------------------------------------------


def save_pretrained(model: Any, folder: str | Path) -> None:
    """transformers' own; the plan is in the config."""
    model.save_pretrained(folder)


def from_pretrained(source: str | Path, config: Mapping[str, Any]) -> Any:
    """The DETR of a folder whose ``config.json`` is given, routed by the plan that it holds, if any."""
    try:
        with routers_expected(DetrForObjectDetection):
            model = DetrForObjectDetection.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(f"{source}: transformers cannot load its DETR ({one_line(error)})") from error
    ours = config.get("amod") or {}
    if not ours:
        return model.eval()
    if "amod" in vars(model.config):
        del model.config.amod
    model = convert(model, plan=ours.get("plan") or {})
    saved: dict[str, Tensor] = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            saved |= {key: weights.get_tensor(key) for key in weights.keys() if "router." in key}  # noqa: SIM118
    for key, value in model.named_parameters():
        if "router." in key:
            if key not in saved or saved[key].shape != value.shape:
                raise UserError(f"{source}: has no weights of {key} that its plan needs; save the model again")
            value.data.copy_(saved[key])
    return model.eval()
