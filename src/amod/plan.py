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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

from amod.entries import ENTRIES, READS_ATTENTION, ClassOnly, Entry, Gate, Halt, Merge, Predict, Prune, Route
from amod.errors import UserError, shown

Plan = dict[int, Entry]
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
"""``config.model_type`` of transformers' causal language models whose layers take a :class:`Gate` (``text.py``)."""
BY_THEMSELVES = ("tome", "merge", "evit", "dynamicvit", "avit", "tuning")
"""The methods that are no router of ``Route``, and have blocks of their own."""
PLACEMENTS = {
    "alternate": "every second block, the first one dense: 1, 3, 5, ... (the paper)",
    "last8": "every second of the last eight blocks: 4, 6, 8, 10 of 12, the first four dense (Sec. 4.5)",
    "few": "three blocks, the last ones of the first three quarters: 2, 5, 8 of 12 (for merging)",
    "late": "the second half of the blocks, one after the other: 6 to 11 of 12",
}


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
        with _called(keep="keep_rate"):
            plan = dict.fromkeys(blocks or quarters, Prune(keep_rate, fuse))
    elif router == "dynamicvit":
        with _called(keep="keep_rate"):
            Predict(keep_rate)
        plan = {i: Predict(round(keep_rate**stage, 12)) for stage, i in enumerate(blocks or quarters, start=1)}
    elif router == "avit":
        with _called(scale="halt_scale", shift="halt_shift"):
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


@contextmanager
def _called(**arguments: str) -> Iterator[None]:
    """In the line of an entry's field, the name of the argument that it came from."""
    try:
        yield
    except UserError as error:
        field, _, rest = str(error).partition("=")
        raise UserError(f"{arguments.get(field, field)}={rest}") from None


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
    if not isinstance(before, Route) or before.skip == "mlp":
        return
    if READS_ATTENTION.get(before.router) != READS_ATTENTION[entry.router]:
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
        if missing := [f.name for f in fields(ENTRIES[name]) if f.default is MISSING and f.name not in given]:
            raise UserError(f"plan: block {key}, {name}: has no {missing[0]}; write {name}: {{{missing[0]}: ...}}")
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
