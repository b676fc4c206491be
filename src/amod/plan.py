"""A plan: what each block does with its tokens. Pure data and no torch, so that a command can check it at once.

A plan is a dict from 0-based block index to one entry; a block without an entry processes every token. All methods
are such dicts, and any mixture of them is one too:

    dense                       {}
    MoD, A-MoD                  {1: Route(0.5), 3: Route(0.5), ...}
    ToMe                        {0: Merge(13), 1: Merge(13), ...}
    EViT                        {3: Prune(0.7), 6: Prune(0.7), 9: Prune(0.7)}
    DynamicViT                  {3: Predict(0.7), 6: Predict(0.49), 9: Predict(0.343)}
    A-ViT                       {0: Halt(), 1: Halt(), ...}
    a few large merges          {2: Merge(46), 5: Merge(46), 8: Merge(46), 11: ClassOnly()}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from amod.errors import UserError, shown

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
"""``config.model_type`` of transformers' causal language models whose layers take a :class:`Gate` (``text.py``)."""


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
    """Later attention counts a token that stands for s patches as s ** proportional tokens: by default as all of them,
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
            raise UserError(f"keep={self.keep!r} keeps no patch of {patches}: use at least {1 / patches:.4g}")
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


def fraction(share: float) -> tuple[int, int]:
    """The simplest fraction that a float stands for: 29/100 for 0.29, whose float is a little less."""
    return Fraction(float(share)).limit_denominator(10**9).as_integer_ratio()


Entry = Route | Merge | Prune | Predict | Halt | ClassOnly | Gate
Plan = dict[int, Entry]
ENTRIES: dict[str, type[Entry]] = {e.__name__: e for e in (Route, Merge, Prune, Predict, Halt, ClassOnly, Gate)}
BY_THEMSELVES = ("tome", "merge", "evit", "dynamicvit", "avit", "tuning")
"""The methods that are no router of ``Route``, and have blocks of their own."""
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
PLACEMENTS = {
    "alternate": "every second block, the first one dense: 1, 3, 5, ... (the paper)",
    "last8": "every second of the last eight blocks: 4, 6, 8, 10 of 12, the first four dense (Sec. 4.5)",
    "few": "three blocks, the last ones of the first three quarters: 2, 5, 8 of 12 (for merging)",
    "late": "the second half of the blocks, one after the other: 6 to 11 of 12",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _as_python(entry: Any) -> None:
    """Numbers of numpy's become Python's, which YAML and JSON can write; what is a name must be one."""
    for field in fields(entry):
        if isinstance(field.default, str) and not isinstance(getattr(entry, field.name), str):
            raise UserError(f"{field.name}={getattr(entry, field.name)!r}: must be a name, e.g. {field.default}")
        if _is_number(value := getattr(entry, field.name)):
            object.__setattr__(entry, field.name, int(value) if isinstance(value, Integral) else float(value))


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r}: must be true or false")


def _check_one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(known)}")


def gated_blocks(depth: int) -> tuple[int, ...]:
    """Router-Tuning's: L - n - 1 to L - 2 with n = L / 2, which is 15 to 30 of 32 and 5 to 10 of 12."""
    return tuple(range(max(depth - depth // 2 - 1, 0), depth - 1)) or (0,)


def routed_blocks(placement: str | Sequence[int], depth: int, argument: str = "placement") -> tuple[int, ...]:
    """Ascending 0-based block indices of a named placement, or of a list of them, in a model of ``depth`` blocks.

    ``argument`` is its name in errors.
    """
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise UserError(
                f"{argument}={placement!r}: choose one of {', '.join(PLACEMENTS)}, or a list of block indices"
            )
        named: dict[str, Sequence[int]] = {"alternate": range(1, depth, 2), "last8": range(max(depth - 8, 0), depth, 2)}
        named |= {
            "few": sorted({max(depth * part // 4 - 1, 0) for part in (1, 2, 3)}),
            "late": range(depth // 2, depth),
        }
        blocks = named[placement]
    elif isinstance(placement, Iterable):
        blocks = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in placement]
    else:
        names = "" if argument == "layers" else f"one of {', '.join(PLACEMENTS)}, or "
        raise UserError(f"{argument}={placement!r}: must be {names}a list of block indices")
    if not blocks:
        raise UserError(f"{argument}={placement!r}: routes none of this model's {depth} blocks; router=none is dense")
    for i in blocks:
        _check_index(i, depth, argument)
    if len(set(blocks)) != len(blocks):
        raise UserError(f"{argument}: a block is listed twice in {list(blocks)}; list each block once")
    return tuple(sorted(blocks))


def _check_index(i: Any, depth: int, argument: str = "plan") -> None:
    if isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= int(i) < depth:
        raise UserError(f"{argument}: block {i!r} is not one of 0 to {depth - 1}, the blocks of this model")


MERGING = {"tome": Merge(13), "merge": Merge(0, 0.9, "tokens", 2, True)}
"""What is merged where nothing else is said: ToMe's, and ours for models that are not trained afterwards."""


def make_plan(
    depth: int,
    router: str = "attention",
    capacity: float = 0.125,
    placement: str | Sequence[int] | None = None,
    *,
    keep_prefix: bool = False,
    activation: str = "none",
    memory: float = 0.0,
    r: int = 13,
    keep_rate: float = 0.7,
    fuse: bool = True,
    by: str | None = None,
    rounds: int | None = None,
    norm: bool | None = None,
    proportional: float | None = None,
    halt_scale: float = 10.0,
    halt_shift: float = 75.0,
    last: str | None = None,
    skip: str | None = None,
    per: str = "token",
    target: float | None = None,
    scale: float | None = None,
    cache: str = "kept",
) -> Plan:
    """The plan that a method's name and its arguments stand for; :func:`amod.convert` says what they are."""
    if last not in (None, "class"):
        raise UserError(f"last={last!r}: choose class (the class token alone in the last block) or null")
    argument = "layers" if router == "tuning" else "placement"
    blocks = () if placement is None else routed_blocks(placement, depth, argument)
    if last and depth - 1 in blocks and not isinstance(placement, str):
        listed = f"{argument}={shown([*blocks])}"
        raise UserError(f"{listed}: block {depth - 1} has the class token alone (last=class); drop one")
    quarters = tuple(depth * part // 4 for part in (1, 2, 3))
    plan: Plan
    if router in MERGING:
        said: dict[str, Any] = {"r": r, "proportional": proportional, "by": by, "rounds": rounds, "norm": norm}
        entry = replace(MERGING[router], **{name: value for name, value in said.items() if value is not None})
        own = range(depth) if router == "tome" else routed_blocks("few", depth)
        plan = dict.fromkeys(blocks or own, entry)
    elif router == "evit":
        plan = dict.fromkeys(blocks or quarters, Prune(keep_rate, fuse))
    elif router == "dynamicvit":
        plan = {i: Predict(round(keep_rate**stage, 12)) for stage, i in enumerate(blocks or quarters, start=1)}
    elif router == "avit":
        plan = dict.fromkeys(blocks or range(depth), Halt(halt_scale, halt_shift))
    elif router == "tuning":
        weight = float(target is not None) if scale is None else scale
        plan = dict.fromkeys(blocks or gated_blocks(depth), Gate(skip or "attention", per, target, weight, cache))
    else:
        blocks = () if router == "none" else blocks or routed_blocks("alternate", depth)
        plan = dict.fromkeys(blocks, Route(capacity, router, keep_prefix, activation, memory, skip or "block"))
    if last == "class":
        plan[depth - 1] = ClassOnly()
    check_plan(plan, depth)
    return plan


def check_plan(plan: Mapping[int, Entry], depth: int) -> None:
    """UserError unless the entries can stand together in a model of ``depth`` blocks."""
    if not isinstance(plan, Mapping):
        raise UserError(f"plan={plan!r}: write {{block: entry}}, as in {{1: Route(0.5)}}, or a YAML file's name")
    for i, entry in plan.items():
        _check_index(i, depth)
        if not isinstance(entry, tuple(ENTRIES.values())):
            raise UserError(f"plan: block {i} has {entry!r}; an entry is one of {', '.join(ENTRIES)}")
        if isinstance(entry, ClassOnly) and i != depth - 1:
            raise UserError(
                f"plan: ClassOnly in block {i}: later blocks read the tokens that it leaves out; it stands in the last "
                f"block, {depth - 1}"
            )
        if isinstance(entry, Route) and entry.router in READS_ATTENTION:
            _check_scored(plan, i, entry)
        if isinstance(entry, Gate) and (cut := next((e for e in plan.values() if isinstance(e, Merge | Prune)), None)):
            raise UserError(f"plan: block {i} has a Gate, which cannot stand beside {cut}; leave one out")
    if any(isinstance(entry, Halt) for entry in plan.values()) and (len(plan) < depth or len({*plan.values()}) > 1):
        raise UserError("plan: Halt stands in every block or in none, everywhere the same, and beside no other entry")
    stages = [plan[i] for i in sorted(plan) if isinstance(plan[i], Predict)]
    if stages and len(stages) + isinstance(plan.get(depth - 1), ClassOnly) < len(plan):
        raise UserError("plan: Predict stands beside Predict and ClassOnly alone: while it trains, it masks tokens")
    if any(later.keep > earlier.keep for earlier, later in pairwise(stages)):  # type: ignore[union-attr]
        raise UserError("plan: a later Predict keeps more than an earlier one; keep is a share of the model's patches")
    proportional = {entry.proportional for entry in plan.values() if isinstance(entry, Merge)}
    if len(proportional) > 1:
        raise UserError("plan: Merge entries differ in `proportional`; it is a setting of the whole model")


def _check_scored(plan: Mapping[int, Entry], i: int, entry: Route) -> None:
    """The scores of a block come from the block before it, and through routed blocks from one that saw all tokens."""
    if i == 0:
        raise UserError(
            "placement: block 0 has no block before it whose attention could route it; start at block 1, "
            "or use router=linear or random"
        )
    before = plan.get(i - 1)
    if isinstance(before, Gate):
        raise UserError(f"plan: block {i} (router={entry.router}) follows a Gate, which leaves no scores")
    if isinstance(before, Route) and READS_ATTENTION.get(before.router) != READS_ATTENTION[entry.router]:
        raise UserError(
            f"plan: block {i} (router={entry.router}) follows block {i - 1} (router={before.router}), whose attention "
            "sees its kept tokens alone; leave a block without Route between them, or give both the same router"
        )


def entries_of(model: Any) -> list[Entry]:
    """What the plan of a model says, if it has one; a DETR's three plans have none but Route and are left out."""
    plan = getattr(model, "plan", None)
    return [*plan.values()] if isinstance(plan, Mapping) else []


def halts(model: Any) -> bool:
    """Whether its tokens halt, so that its images cost different amounts."""
    return any(isinstance(entry, Halt) for entry in entries_of(model))


def as_data(plan: Mapping[int, Entry]) -> dict[int, dict[str, dict[str, Any]]]:
    """The plan as plain dicts, for YAML and JSON: ``{1: {"Route": {"capacity": 0.5, ...}}}``."""
    return {int(i): {type(entry).__name__: asdict(entry)} for i, entry in sorted(plan.items())}


def from_data(data: Any) -> Plan:
    """The plan of :func:`as_data`. Fields with a default may be left out, an entry without fields may be its name."""
    if not isinstance(data, Mapping):
        raise UserError(f"plan: {data!r} is no plan; write a mapping such as 1: {{Route: {{capacity: 0.5}}}}")
    plan: Plan = {}
    for key, value in data.items():
        block = int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON has no other keys
        if isinstance(block, bool) or not isinstance(block, int):
            raise UserError(f"plan: block {key!r} is no whole number; blocks are counted from 0")
        if block in plan:
            raise UserError(f"plan: block {block} stands there twice; leave one out")
        entry = {value: {}} if isinstance(value, str) else value
        if not isinstance(entry, Mapping) or len(entry) != 1 or not {*entry} <= {*ENTRIES}:
            raise UserError(f"plan: block {key} has {value!r}; write one of {', '.join(ENTRIES)} with its fields")
        ((name, given),) = entry.items()
        known = [field.name for field in fields(ENTRIES[name])]
        given = given or {}
        if not isinstance(given, Mapping) or not {*given} <= {*known}:
            raise UserError(f"plan: block {key}, {name}: has {given!r}; its fields are {', '.join(known) or 'none'}")
        try:
            plan[block] = ENTRIES[name](**given)
        except (TypeError, ValueError) as error:
            raise UserError(f"plan: block {key}, {name}: {error}") from None
    return plan


def _once(loader: Any) -> Any:
    """The YAML loader, which refuses a key that stands twice instead of forgetting the first."""

    class Once(loader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise UserError(f"{self.name}: {twice[0]!r} stands there twice; leave one out")
            return super().construct_mapping(node, deep)

    return Once


def read_plan(file: str | Path) -> Plan:
    """The plan of a YAML (or JSON) file: its blocks, or ``plan`` with them beside what ``amod.search`` says of it."""
    import yaml

    try:
        with open(file, encoding="utf-8") as text:
            data = yaml.load(text, _once(yaml.SafeLoader))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; name a plan's YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read as a plan ({' '.join(str(error).split())})") from None
    if isinstance(data, Mapping) and {"plan"} <= {*data} <= {"plan", "search"}:
        data = data["plan"]
    return from_data(data)
