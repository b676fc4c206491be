"""Attention-routed Mixture-of-Depths for vision transformers.

>>> model = amod.convert(timm.create_model("deit_small_patch16_224"), router="attention", capacity=0.125)
>>> logits, routing = model(images, return_routing=True)

The names below are loaded when they are first used, so that ``import amod`` itself does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors
    from amod.errors import UserError
    from amod.flops import PAPER_DEPTHS, capacity_for_budget, count_flops, isoflop_depth
    from amod.routing import RoutedLayer, Routing
    from amod.vit import RoutedViT, convert, truncate

_HOME = {
    "UserError": "errors",
    "PAPER_DEPTHS": "flops",
    "capacity_for_budget": "flops",
    "count_flops": "flops",
    "isoflop_depth": "flops",
    "RoutedLayer": "routing",
    "Routing": "routing",
    "RoutedViT": "vit",
    "convert": "vit",
    "truncate": "vit",
}
__all__ = [
    "PAPER_DEPTHS",
    "RoutedLayer",
    "RoutedViT",
    "Routing",
    "UserError",
    "capacity_for_budget",
    "convert",
    "count_flops",
    "isoflop_depth",
    "truncate",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'amod' has no attribute {name!r}")
    return getattr(import_module(f"amod.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
