"""A module of another's making gets a subclass of its own class: the same object and parameters, more behaviour."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

from torch import nn

from amod.errors import UserError, one_line


class Dressed(nn.Module):
    """Base of the classes that ``dress`` puts over a module's own; ``undressed`` is that class.

    Such a class is made on the fly, so a pickle and a copy name its two parts instead of it.
    """

    undressed: type[nn.Module]
    over: type[Dressed]
    adds: tuple[str, ...] = ()
    """The names of what a dressed module has beside its own: attributes and modules."""
    named_alike = False
    """Whether the made class is also called what ``undressed`` is called, for libraries that go by a class's name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.over, self.undressed), self.__getstate__()  # torch's: without what compile() left


_MADE: dict[tuple[Any, Any], Any] = {}


def dressed(over: Any, own: Any) -> type[nn.Module]:
    """The subclass of both, called after both: ``RoutedViT`` over ``Eva`` is ``RoutedEva``."""
    if (over, own) not in _MADE:
        name = over.__name__.removesuffix("ViT").removesuffix("Attention").removesuffix("Block") + own.__name__
        members = {"undressed": own, "over": over, "__module__": over.__module__}
        if over.named_alike:
            name, members["__module__"] = own.__name__, own.__module__
        _MADE[over, own] = type(name, (over, own), members)
    return _MADE[over, own]


def dress(module: nn.Module, over: type[Dressed]) -> None:
    """Put ``over`` over the module's class, once. UserError where that would not act."""
    check_own_forward(module)
    if not isinstance(module, over):
        module.__class__ = dressed(over, type(module))


def check_own_forward(module: nn.Module, name: str = "forward") -> None:
    """UserError for a forward that was set on the object, which goes before that of any class."""
    if name in vars(module):
        raise UserError(
            f"{type(module).__name__}: its {name} was replaced on this object (by hooks of accelerate's, for one), "
            "and a routed model would not run it; convert first"
        )


def undressed(model: Any) -> Any:
    """A copy whose modules are of their own classes again and have what is their own; a config has no plan."""
    plain = copy.deepcopy(model)
    for module in [*plain.modules()]:
        while isinstance(module, Dressed):
            for name in module.adds:
                module._modules.pop(name, None)
                module.__dict__.pop(name, None)
            module.__class__ = module.undressed  # type: ignore[assignment]
        if "amod" in vars(getattr(module, "config", None) or object):
            del module.config.amod
    return plain


def _blank(over: type[Dressed], own: type[nn.Module]) -> nn.Module:
    made = dressed(over, own)
    return made.__new__(made)


DETECTORS = ("detr",)
"""``config.model_type`` of transformers' detectors that are served by ``detection.py``."""


def of_transformers(model: Any) -> bool:
    """Whether it is a model of transformers', which this does not import."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(model).__mro__)


def of_detection(model: Any) -> bool:
    """Whether it is one of transformers' detectors that ``detection.py`` knows."""
    return of_transformers(model) and getattr(getattr(model, "config", None), "model_type", None) in DETECTORS


def served_by(model_type: str | None, what: object) -> Any:
    """The file that converts, saves and loads transformers' models of this ``config.model_type``.

    Args:
        what: in the UserError if transformers cannot be used.
    """
    try:
        return import_module("amod.detection" if model_type in DETECTORS else "amod.huggingface")
    except ImportError as error:  # an older one has no attention interface
        raise UserError(
            f"{what}: is of transformers', which cannot be used ({one_line(error)}); pip install 'amod[transformers]'"
        ) from error
