"""The entries of a plan: what one block may do with its tokens. Pure data and no torch.

Each checks its own fields, and says how many of N tokens go through its block or leave it. Which of them can stand
together, and the plans that methods' names stand for, are in ``plan.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from amod.errors import UserError

MERGE_BY = ("keys", "tokens")
SKIPS = ("block", "attention", "mlp")
ACTIVATIONS = ("none", "sigmoid")
READS_ATTENTION = {
    "attention": "column_mean",
    "attention_weighted": "column_mean",
    "class_attention": "class_attention",
    "class_attention_value": "class_attention_value",
    "reversed": "column_mean",
}
"""The routers that score tokens by the attention of the block before, and what of it they read."""


@dataclass(frozen=True)
class Route:
    """K = floor(capacity N) tokens go through the block, the others pass it unchanged (MoD, Eq. 2; A-MoD, Eq. 5)."""

    capacity: float = 0.125
    router: str = "attention"
    """A name in ``amod.routers.ROUTERS``."""
    keep_prefix: bool = False
    """Class, distillation and register tokens are always kept, among the K. The paper's are not."""
    activation: str = "none"
    """Of the linear router: ``none`` as in the paper, or ``sigmoid``."""
    memory: float = 0.0
    """Of routers that read attention: share of the routed block before in the scores, an exponential mean over depth.
    The first routed block has nothing to remember."""
    skip: str = "block"
    """What the others pass: the block, or its ``attention`` or ``mlp`` alone; the other half is for all tokens."""

    def __post_init__(self) -> None:
        _as_python(self)
        _check_one_of("skip", self.skip, SKIPS)
        _check_bool("keep_prefix", self.keep_prefix)
        if not _is_number(self.capacity) or not 0 < self.capacity <= 1:
            raise UserError(f"capacity={self.capacity!r}: must be a number in (0, 1], e.g. 0.125")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: choose none (as in the paper) or sigmoid")
        if self.activation != "none" and self.router != "linear":
            raise UserError(f"activation={self.activation!r}: is of router=linear; leave it out")
        if (
            not _is_number(self.memory)
            or not 0 <= self.memory < 1
            or (self.memory and self.router not in READS_ATTENTION)
        ):
            readers = ", ".join(READS_ATTENTION)
            raise UserError(f"memory={self.memory!r}: must be a number in [0, 1), above 0 with router={readers} only")

    def kept(self, tokens: int, prefix: int = 0) -> int:
        """K for N tokens, N counting the ``prefix`` (class, register) tokens: 24 of 197 at C = 0.125.

        C is taken as the fraction that it stands for, so that C = 0.29 keeps 29 of 100 tokens and not 28, and in whole
        numbers, which a graph of any image size can compute.
        """
        part, whole = fraction(self.capacity)
        kept = tokens * part // whole
        if kept < 1:
            least = math.ceil(1e4 / tokens) / 1e4
            raise UserError(f"capacity={self.capacity!r} keeps no token of {tokens}: use at least {least:g}")
        if self.keep_prefix and kept <= prefix:
            raise UserError(
                f"capacity={self.capacity!r} keeps {kept} of {tokens} tokens and keep_prefix takes {prefix} of them: "
                "raise capacity or set keep_prefix=false"
            )
        return kept


@dataclass(frozen=True)
class Merge:
    """Between attention and MLP, r tokens join the ones that they are most similar to (ToMe)."""

    r: int
    proportional: float = 1.0
    """Later attention counts a token that merged from s patches as s ** proportional tokens: by default as all of them,
    ToMe's setting for models trained on labels; 0: as one. True and False are 1 and 0."""
    by: str = "keys"
    """Which of them are similar: their ``keys``, the mean over heads (ToMe), or the ``tokens`` behind the attention."""
    rounds: int = 1
    """In how many matchings one after the other, each among those that the one before left: every other token is a
    partner only, so that of many that merge at once some have no good one."""
    norm: bool = False
    """Give a merged token the mean length of those in it; the average alone is shorter, the less they are alike."""

    def __post_init__(self) -> None:
        _as_python(self)
        if isinstance(self.r, bool) or not isinstance(self.r, Integral) or self.r < 0:
            raise UserError(f"r={self.r!r}: must be a whole number of at least 0, the tokens that a block merges")
        _check_one_of("by", self.by, MERGE_BY)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, Integral) or self.rounds < 1:
            raise UserError(f"rounds={self.rounds!r}: must be a whole number of at least 1, the matchings of a block")
        counted = isinstance(self.proportional, bool) or _is_number(self.proportional)
        if not counted or not 0 <= self.proportional <= 1:
            raise UserError(f"proportional={self.proportional!r}: must be a number in [0, 1], or true or false")
        object.__setattr__(self, "proportional", float(self.proportional))
        _check_bool("norm", self.norm)

    def merged(self, tokens: int, prefix: int) -> int:
        """How many of N tokens really merge: r, at most half of those outside the ``prefix`` in each round."""
        return sum(self.parts(tokens, prefix))

    def parts(self, tokens: int, prefix: int) -> list[int]:
        """How many merge in each round; the first ones have one more where r does not divide."""
        parts = []
        for i in range(self.rounds):
            wanted = self.r // self.rounds + (i < self.r % self.rounds)
            parts.append(max(0, min(wanted, (tokens - prefix) // 2)))
            tokens -= parts[-1]
        return [part for part in parts if part]

    def remain(self, tokens: int, prefix: int) -> int:
        """How many tokens leave the block when N enter it."""
        return tokens - self.merged(tokens, prefix)


@dataclass(frozen=True)
class Prune:
    """Between attention and MLP, only the patches that the class token looks at most go on (EViT)."""

    keep: float
    """Share of the patches that stay: ceil(keep (N - prefix)) of them."""
    fuse: bool = True
    """The others become one token, their sum weighted by the class token's attention; else they are gone."""

    def __post_init__(self) -> None:
        _as_python(self)
        if not _is_number(self.keep) or not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep!r}: must be a number in (0, 1], the share of patches that stay, e.g. 0.7")
        _check_bool("fuse", self.fuse)

    def kept(self, tokens: int, prefix: int) -> int:
        """How many of the N - ``prefix`` patches stay."""
        part, whole = fraction(self.keep)
        return -((prefix - tokens) * part // whole)

    def remain(self, tokens: int, prefix: int) -> int:
        """How many tokens leave the block when N enter it, the fused one among them."""
        return min(tokens, prefix + self.kept(tokens, prefix) + self.fuse)


@dataclass(frozen=True)
class Gate:
    """A trained router decides for each token, or each sequence, whether it is skipped (Router-Tuning, MindSkip): how
    many go through is up to the data. What skipping means is in ``gates.py``."""

    skip: str = "attention"
    """``attention`` (MindSkip), ``mlp`` or ``block``."""
    per: str = "token"
    """``token`` or ``sequence``."""
    target: float | None = None
    """Of training: the share of the batch's gates that may be open for free."""
    scale: float = 0.0
    """Of training: the weight of scale relu(mean gate - target) in the loss; without a target of scale mean gate."""
    cache: str = "kept"
    """Of language models, when attention is skipped: ``kept`` tokens alone have keys and values, or ``all`` have."""

    def __post_init__(self) -> None:
        _as_python(self)
        _check_one_of("skip", self.skip, SKIPS)
        _check_one_of("per", self.per, ("token", "sequence"))
        _check_one_of("cache", self.cache, ("kept", "all"))
        if self.target is not None and (not _is_number(self.target) or not 0 <= self.target <= 1):
            raise UserError(f"target={self.target!r}: must be a share in [0, 1] of the gates, e.g. 0.5, or null")
        if not _is_number(self.scale) or not 0 <= self.scale < math.inf:
            raise UserError(f"scale={self.scale!r}: must be a number of at least 0, the weight of the gates' loss")
        if self.target is not None and not self.scale:
            raise UserError(f"target={self.target!r}: does nothing with scale=0; raise scale or leave it out")


@dataclass(frozen=True)
class Predict:
    """Before the block, only the patches that a trained predictor ranks highest go on (DynamicViT)."""

    keep: float
    """Share of the *model's* patches that are there from this block on: floor(keep (N - prefix)) of them."""

    def __post_init__(self) -> None:
        _as_python(self)
        if not _is_number(self.keep) or not 0 < self.keep <= 1:
            raise UserError(f"keep={self.keep!r}: must be a number in (0, 1], the share of patches that stay, e.g. 0.7")

    def kept(self, patches: int) -> int:
        """How many of the model's patches are there from this block on: 137 of 196 at 0.7."""
        part, whole = fraction(self.keep)
        kept = patches * part // whole
        if kept < 1:
            least = f"use at least {1 / patches:.4g} (dynamicvit's keep_rate has the stage as its power)"
            raise UserError(f"keep={self.keep!r} keeps no patch of {patches}: {least}")
        return kept

    def remain(self, tokens: int, prefix: int, whole: int | None = None) -> int:
        """How many tokens go through the block when N come to it, of ``whole`` (by default N) of the model."""
        return min(tokens, prefix + self.kept((whole or tokens) - prefix))


@dataclass(frozen=True)
class Halt:
    """Behind the block, tokens that have seen enough leave, each image's own (A-ViT).

    A token's halting score is h = sigmoid(scale t[0] - shift) of its first channel; it halts where its sum of h exceeds
    1 - epsilon, in the last block at the latest.
    """

    scale: float = 10.0
    shift: float = 75.0
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        _as_python(self)
        for name in ("scale", "shift", "epsilon"):
            if not _is_number(value := getattr(self, name)) or not math.isfinite(value):
                raise UserError(f"{name}={value!r}: must be a number")
        if not 0 < self.epsilon < 1:
            raise UserError(f"epsilon={self.epsilon!r}: must be a number between 0 and 1, e.g. 0.01")

    def remain(self, tokens: int, prefix: int) -> int:
        """How many tokens leave the block at most; it depends on the image."""
        return tokens


@dataclass(frozen=True)
class ClassOnly:
    """The class token's query against all keys, and nothing else: the same logits, for the last block of a model that
    reads its class token alone."""


Entry = Route | Merge | Prune | Predict | Halt | ClassOnly | Gate
ENTRIES: dict[str, type[Entry]] = {e.__name__: e for e in (Route, Merge, Prune, Predict, Halt, ClassOnly, Gate)}


def fraction(share: float) -> tuple[int, int]:
    """The simplest fraction that a float stands for: 29/100 for 0.29, whose float is a little less."""
    return Fraction(float(share)).limit_denominator(10**9).as_integer_ratio()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _as_python(entry: Any) -> None:
    """Numbers of numpy's become Python's, which YAML and JSON can write; what is a name must be one."""
    for field in fields(entry):
        if isinstance(field.default, str) and not isinstance(getattr(entry, field.name), str):
            raise UserError(f"{field.name}={getattr(entry, field.name)!r}: must be a name, e.g. {field.default}")
        if _is_number(value := getattr(entry, field.name)):
            short = hasattr(value, "dtype")  # numpy's float32 of 0.29 stands for 0.29, as it is printed
            number = int(value) if isinstance(value, Integral) else float(str(value) if short else value)
            object.__setattr__(entry, field.name, number)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: must be true or false")


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(known)}")
