"""Attention-routed Mixture-of-Depths for vision transformers.

>>> model = amod.convert(timm.create_model("deit_small_patch16_224"), router="attention", capacity=0.125)
>>> logits, routing = model(images, return_routing=True)

The names below are loaded when they are first used, so that ``import amod`` itself does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors
    from amod.detr_plan import DetrPlan
    from amod.entries import ClassOnly, Gate, Halt, Merge, Predict, Prune, Route
    from amod.errors import UserError
    from amod.exporting import export
    from amod.flops import count_flops, image_flops
    from amod.hub import from_pretrained, push_to_hub, save_pretrained
    from amod.plan import read_plan
    from amod.refit import fit_head
    from amod.routing import RoutedLayer, Routing
    from amod.searching import Found, search
    from amod.timm_models import RoutedViT
    from amod.vit import PAPER_DEPTHS, convert, dense, isoflop_depth, truncate

_HOME = {
    "DetrPlan": "detr_plan",
    "ClassOnly": "entries",
    "Gate": "entries",
    "Halt": "entries",
    "Merge": "entries",
    "Predict": "entries",
    "Prune": "entries",
    "Route": "entries",
    "UserError": "errors",
    "export": "exporting",
    "count_flops": "flops",
    "image_flops": "flops",
    "from_pretrained": "hub",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
    "read_plan": "plan",
    "fit_head": "refit",
    "RoutedLayer": "routing",
    "Routing": "routing",
    "Found": "searching",
    "search": "searching",
    "RoutedViT": "timm_models",
    "PAPER_DEPTHS": "vit",
    "convert": "vit",
    "dense": "vit",
    "isoflop_depth": "vit",
    "truncate": "vit",
}
__all__ = [
    "PAPER_DEPTHS",
    "ClassOnly",
    "DetrPlan",
    "Found",
    "Gate",
    "Halt",
    "Merge",
    "Predict",
    "Prune",
    "Route",
    "RoutedLayer",
    "RoutedViT",
    "Routing",
    "UserError",
    "convert",
    "count_flops",
    "dense",
    "export",
    "fit_head",
    "from_pretrained",
    "image_flops",
    "isoflop_depth",
    "push_to_hub",
    "read_plan",
    "save_pretrained",
    "search",
    "truncate",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'amod' has no attribute {name!r}")
    return getattr(import_module(f"amod.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
