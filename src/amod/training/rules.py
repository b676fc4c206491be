"""The rules of a config's values, and what is wrong with one on one line.

A field's annotation in ``config.py`` is its rule, and the error line is read from it (``in_words``).
"""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from amod.errors import UserError, did_you_mean, shown

# Lightning's arguments that are not for the config: why.
OURS = dict.fromkeys(
    ("callbacks", "default_root_dir", "enable_checkpointing", "logger", "plugins"), "the run folder decides it"
)
OURS["fast_dev_run"] = "such a run would pass for a finished one; set trainer.limit_train_batches=1 schedule.epochs=1"


class Rule:
    """A check of a value that has the right type; ``words`` complete "must be ..."."""

    words: str

    def allows(self, value: Any) -> bool:
        raise NotImplementedError

    def __call__(self, value: Any) -> Any:
        if not self.allows(value):
            raise ValueError(self.words)
        return value


class OneOf(Rule):
    def __init__(self, *names: str) -> None:
        self.names = names
        self.words = ("one of " if len(names) > 1 else "") + ", ".join(names)

    def allows(self, value: Any) -> bool:
        return value in self.names


class Ascending(Rule):
    """Two numbers."""

    def __init__(self, high: float | None = None) -> None:
        self.high = high
        self.words = "two ascending numbers above 0" + (f", at most {high:g}" if high else "")

    def allows(self, value: Any) -> bool:
        return len(value) == 2 and 0 < value[0] <= value[1] <= (self.high or value[1])


class Rising(Rule):
    """When something begins and when it has ended."""

    words = "two rising numbers of at least 0"

    def allows(self, value: Any) -> bool:
        return len(value) == 2 and 0 <= value[0] < value[1]


class Sides(Rule):
    """One number of pixels, or [height,width]."""

    words = "a whole number of at least 1, or two of them, [height,width]"

    def allows(self, value: Any) -> bool:
        sides = value if isinstance(value, list) else [value, value]
        return len(sides) == 2 and min(sides) >= 1


class Compute(Rule):
    """GFLOPs, or a share of the dense model's."""

    words = "a number of GFLOPs above 0, or a share of the dense model's such as 75%"

    def allows(self, value: Any) -> bool:
        if isinstance(value, str):
            return bool(re.fullmatch(r"\d+(\.\d+)?%", value)) and 0 < float(value[:-1]) <= 100
        return value > 0


def one_of(*names: str) -> Any:
    """As an annotation, for values that are checked one by one."""
    return Annotated[str, AfterValidator(OneOf(*names))]


Count = Annotated[int, Field(ge=1)]
WholeNumber = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(gt=0, le=0.99)]  # of a split, whose rest must not be empty
Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Text = Annotated[str, Field(pattern=r"\S")]
Pixels = Annotated[int | list[int], AfterValidator(Sides())]
# A number of batches (int) or a share of them (float): which of the two it is matters to Lightning.
Batches = Annotated[int | float, Field(ge=0)]
Limit = Annotated[int | float, Field(gt=0)]


# --- from a composed config to these, and what is wrong with it on one line -----------------------------------------

Kind = TypeVar("Kind", bound=BaseModel)


def parse(kind: type[Kind], cfg: Any) -> Kind:
    """``cfg``, composed or read from a file, as `kind`. Raises UserError for the first field that is wrong."""
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(_line(kind, plain, error)) from None


def _line(kind: type[BaseModel], value: Any, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if isinstance(own := first.get("ctx", {}).get("error"), UserError):  # a line already, of a file that was read
        return str(own)
    path: list[str] = []
    annotation: Any = kind
    field: FieldInfo | None = None
    for part in first["loc"]:
        fields = getattr(annotation, "model_fields", {})
        if not fields or (first["type"] == "extra_forbidden" and part not in fields):
            break
        path.append(str(part))
        field, value = fields[part], value.get(part) if isinstance(value, dict) else value
        annotation = field.annotation
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        name, known = str(first["loc"][-1]), [*annotation.model_fields]
        full = ".".join([*path, name])
        if key == "trainer" and name in OURS:
            return f"{full}={shown(first['input'])}: {OURS[name]}; leave it out"
        hint = did_you_mean(name, known) or f"; {key or 'the config'} has {', '.join(known)}"
        return f"{full}={shown(first['input'])}: there is no setting {full}{hint}"
    if first["type"] == "missing":
        return f"{key}: is missing; give it, as in {key}=VALUE"
    if hasattr(annotation, "model_fields"):
        return f"{key}={shown(value)}: must stay a group of settings; set its keys one by one"
    assert field is not None
    return f"{key}={shown(value)}: must be {in_words(annotation, field.metadata)}"


def in_words(kind: Any, metadata: Any = ()) -> str:
    """What a value of this annotation must be."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return in_words(kind, [*metadata, *(m for extra in more for m in getattr(extra, "metadata", [extra]))])
    for extra in metadata:
        if isinstance(extra, AfterValidator) and isinstance(extra.func, Rule):
            return extra.func.words
    if get_origin(kind) in (Union, types.UnionType):
        arms = [arm for arm in get_args(kind) if arm is not type(None)]
        words = in_words(arms[0] if len(arms) == 1 else float, metadata) if int in arms or len(arms) == 1 else "text"
        separator = ", " if get_origin(arms[0]) is Literal else " or "
        return words + (f"{separator}null" if len(arms) < len(get_args(kind)) else "")
    if get_origin(kind) is list:
        return f"a list, each {in_words(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        names = [shown(value) for value in get_args(kind)]
        return ("one of " if len(names) > 1 else "") + ", ".join(names)
    if kind in (int, float):
        bound = {
            type(extra): getattr(extra, name)
            for extra in metadata
            for name in ("ge", "gt", "le")
            if hasattr(extra, name)
        }
        low, high, open_ = bound.get(Ge, bound.get(Gt)), bound.get(Le), Gt in bound
        span = f" above {low:g}" if open_ else f" of at least {low:g}" if low is not None else ""
        if high is not None:
            span = f" in {'(' if open_ else '['}{low:.10g}, {high:.10g}]"
        return ("a whole number" if kind is int else "a number") + span
    if get_origin(kind) is dict:
        return "a mapping such as {1:{Route:{capacity:0.5}}}"
    return {bool: "true or false", str: "a name or path"}.get(kind, "a list")


def allows(kind: Any, value: Any) -> bool:
    """Whether a single value is what an annotation says."""
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError:
        return False
    return True
