"""``convert`` for causal language models of transformers: trained gates in chosen layers (Router-Tuning, MindSkip).

    lm = amod.convert(lm, router="tuning", skip="attention", per="token", layers=[...], target=0.5, cache="kept")

The copy is of the model's own class with its parameter names; a gated layer adds ``<its layer>.router.weight``. How a
layer runs is in ``text_walk.py``. The functions are those of ``vit.py`` and ``huggingface.py``.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from amod.dress import Dressed, dress, undressed
from amod.entries import Gate
from amod.errors import UserError
from amod.huggingface_walk import RoutedModel
from amod.plan import LANGUAGE_MODELS, Plan, as_data
from amod.routers import GateRouter
from amod.text_walk import GatedLayer

FORMAT = 1


def is_served(model: Any) -> bool:
    return any(True for _ in decoders(model))


def decoders(model: Any) -> Any:
    """The modules that own a served decoder's layers."""
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and kind in LANGUAGE_MODELS:
            yield module


def check_model(model: Any) -> None:
    if any(isinstance(module, Dressed) for module in model.modules()):
        raise UserError("the model is routed already: convert the model it was made from, or amod.dense(model)")
    config = next(decoders(model)).config
    both_ways = getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False
    if both_ways or getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"transformers' {type(model).__name__}: its attention is not plain and causal; use another model"
        )


def depth_of(model: Any) -> int:
    return len(next(decoders(model)).layers)


def routed(model: Any, plan: Plan) -> Any:
    """The copy of ``model`` that follows a checked plan."""
    gates: dict[int, Gate] = {}
    for i, entry in plan.items():
        if not isinstance(entry, Gate):
            raise UserError(
                f"plan: block {i}, {entry}: which tokens it keeps depends on later ones, which a causal model does not "
                "know; use router=tuning"
            )
        gates[i] = entry
    model = copy.deepcopy(model)
    decoder = next(decoders(model))
    device = next(model.parameters()).device
    for i, gate in gates.items():
        layer = decoder.layers[i]
        dress(layer, GatedLayer)
        layer.entry = gate
        layer.router = GateRouter(decoder.config.hidden_size, gate.per == "sequence").to(device).train(model.training)
    dress(model, RoutedModel)
    model.plan = dict(plan)
    model.config.amod = {"format": FORMAT, "plan": as_data(plan)}
    return model


def plan_for_budget(model: Any, *_: Any, **__: Any) -> Plan:
    raise UserError(f"budget=: a {type(model).__name__} costs what its gates leave; use router=tuning with target=")


def dense(model: Any) -> Any:
    """The model that a gated one's weights are: a copy; the gates stay behind."""
    return undressed(model)
