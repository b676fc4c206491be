"""What a plan costs, and how far its model is from the dense one, on unlabelled images: what ``amod.search`` asks.

Axes: B images, N tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from amod.agreement import BATCH, Loss, check_finite, disagreement, refuse_one_output
from amod.entries import MERGE_BY, READS_ATTENTION, ClassOnly, Entry, Merge, Prune, Route
from amod.errors import UserError
from amod.families import class_tokens, tokens_at
from amod.files import Ledger
from amod.flops import count_on_meta, on_meta
from amod.plan import Plan, as_data, check_plan, from_data
from amod.timm_models import routed
from amod.vit import dense

CACHE_BYTES = 1 << 30
"""Of the dense model's features that are kept."""
KINDS = ("merge_tokens", "merge", "fuse", "prune", "class_attention")
"""What a block of a shape may do: Merge by tokens in two rounds, and as ToMe does, Prune with and without the fused
token, Route by class attention."""

MERGES: dict[str, tuple[str, int]] = {"merge": ("keys", 1), "merge_tokens": ("tokens", 2)}
"""Kinds of a gene that merge: by what, in how many rounds."""


class Gene(NamedTuple):
    block: int
    kind: str
    weight: float
    """In (0, 1]: its share of the patches that go, against the strongest block's."""


@dataclass(frozen=True)
class Shape:
    genes: tuple[Gene, ...] = ()
    proportional: float = 1.0
    norm: bool = False
    """Of its merges, like ``proportional`` (:class:`amod.Merge`)."""


def name_of(plan: Plan) -> str:
    return json.dumps(as_data(plan), sort_keys=True)


class Judge:
    """The dense model on the images, against which plans are judged. Of transformers' models: ``huggingface_judge.py``.

    Args:
        ledger: a file of losses by plan, read at first, then written line by line.
    """

    kinds: tuple[str, ...] = KINDS
    """What its blocks may do."""
    routed: Callable[[Any, Plan], Any] = staticmethod(routed)

    def __init__(self, vit: Any, images: Any, ledger: str | Path | None = None) -> None:
        self.vit = dense(vit).eval().requires_grad_(False)
        self.images, self.bare = images, on_meta(self.vit)
        self.describe()
        self.whole = count_on_meta(self.bare, self.size)
        self.measure = "KL of the classes (nats)" if self.has_head else "1 - cosine of the features"
        self.costs: dict[str, int] = {}
        self.known: dict[str, list[Loss | None]] = {}
        self.ledger = None if ledger is None else self.known_from(ledger)
        self.prices = self.price_list()
        self.clock: Any = None
        self.seen: Tensor | None = None
        self.inputs: dict[int, Tensor] = {}

    def describe(self) -> None:
        """What is known of the model and of one image."""
        self.size: Any = tuple(self.images.shape[1:])
        self.about: dict[str, Any] = {"images": len(self.images), "image_size": [*self.size]}
        self.about["model"] = (getattr(self.vit, "pretrained_cfg", None) or {}).get("architecture")
        self.where = f"{self.size[1]} x {self.size[2]} pixels"
        self.depth, self.prefix = len(self.vit.blocks), self.vit.num_prefix_tokens
        self.tokens = tokens_at(self.vit, self.size)
        self.has_head = getattr(self.vit, "num_classes", 0) > 0
        refuse_one_output(self.vit, getattr(self.vit, "num_classes", 0), "reset_classifier(0) leaves its features")
        try:
            class_tokens(self.vit)
            routed(self.bare, {self.depth - 1: ClassOnly()})
            self.exact = True
        except UserError:
            self.exact = False

    # - cost

    def cost(self, plan: Plan) -> int:
        """Multiply-accumulates of one image."""
        key = name_of(plan)
        if key not in self.costs:
            self.costs[key] = count_on_meta(self.routed(self.bare, plan), self.size) if plan else self.whole
            self.note(plan, flops=self.costs[key])
        return self.costs[key]

    def price_list(self) -> Tensor:
        """What ``tallies`` cost, learned from the counts of a few plans: counting each candidate would take longer than
        judging it."""
        plans = self.probes()
        tallies = torch.tensor([self.tallies(plan) for plan in plans], dtype=torch.float64)
        costs = torch.tensor([[self.cost(plan)] for plan in plans], dtype=torch.float64)
        scale = tallies.amax(dim=0).clamp(min=1)
        return torch.linalg.lstsq(tallies / scale, costs, driver="gelsd").solution[:, 0] / scale

    def probes(self) -> list[Plan]:
        """Different enough that from what they cost follows what others do."""
        last: Plan = {self.depth - 1: ClassOnly()} if self.exact else {}
        blocks = (0, self.depth // 2, max(self.depth - 2, 0))
        plans = [last, *({i: Prune(keep, False), **last} for i in blocks for keep in (0.5, 0.25))]
        return plans + [{0: Merge(self.tokens // 4, by=by), **last} for by in MERGE_BY]

    def tallies(self, plan: Plan) -> list[float]:
        """[1, tokens n that attention sees in all blocks, their n^2, tokens that MLPs see, pairs that merges compare by
        keys and by tokens, n of a last block that is the class token's alone]."""
        here, seen, pairs, through, last = self.tokens, 0, 0, 0, 0
        compared = dict.fromkeys(MERGE_BY, 0)
        for i in range(self.depth):
            entry, n, left = plan.get(i), here, here
            if isinstance(entry, ClassOnly):
                last = here
                continue
            if isinstance(entry, Route):
                n = left = entry.kept(here, self.prefix)
            elif isinstance(entry, Merge | Prune):
                if isinstance(entry, Merge):
                    rest = here
                    for part in entry.parts(here, self.prefix):
                        compared[entry.by] += (rest // 2) * (rest - rest // 2)
                        rest -= part
                left = here = entry.remain(here, self.prefix)
            seen, pairs, through = seen + n, pairs + n * n, through + left
        return [1, seen, pairs, through, *compared.values(), last]

    def watch(self, clock: Callable[[Plan], float]) -> None:
        """Budgets are of time now, in shares of the dense model's. What ``clock`` says of a few plans tells what others
        take: few large merges and many small ones may cost the same FLOPs, and never take the same time."""
        from scipy.optimize import nnls  # takes as long to import as a plan to judge

        few = [self.depth // 6, self.depth // 2]
        plans = [p for p in self.probes() if p]
        plans += [dict.fromkeys(range(self.depth - 1), Merge(1, by=by)) for by in MERGE_BY]
        plans += [dict.fromkeys(few, Merge(max(self.tokens // 8, 1), True, "tokens", 2))]
        plans += [{i: Prune(0.8, fuse) for i in few} for fuse in (True, False)]
        if self.depth > 2:
            plans += [dict.fromkeys(range(self.depth // 2, self.depth - 1), Route(0.5, "class_attention"))]
        features = np.array([self.features(plan, self.cost(plan)) for plan in plans])
        self.clock = nnls(features, np.array([clock(plan) for plan in plans]))[0]

    def features(self, plan: Plan, macs: float) -> list[float]:
        """What its time is made of: [1, FLOPs of dense, matchings, prunings, routed blocks]."""
        entries = [*plan.values()]
        matchings = sum(entry.rounds for entry in entries if isinstance(entry, Merge))
        others = (sum(isinstance(entry, kind) for entry in entries) for kind in (Prune, Route))
        return [1.0, macs / self.whole, matchings, *others]

    def takes(self, plan: Plan, roughly: bool = False) -> float:
        """What the budget is of: FLOPs, or predicted time. ``roughly``: FLOPs by the price list, to a few parts in
        1e5."""
        macs: float
        if roughly:
            macs = float(torch.tensor(self.tallies(plan), dtype=torch.float64) @ self.prices)
        else:
            macs = self.cost(plan)
        return macs if self.clock is None else float(np.dot(self.features(plan, macs), self.clock))

    def within(self, shape: Shape, budget: float) -> Plan | None:
        """The shape's plan that takes most within the budget; None: it cannot be had."""
        try:
            weak, low, high = self.plan_of(shape, 0.0), 0.0, 1.0
            if self.takes(weak) <= budget:
                return weak
            for _ in range(12):
                middle = (low + high) / 2
                low, high = (low, middle) if self.takes(self.plan_of(shape, middle), True) <= budget else (middle, high)
            while self.takes(plan := self.plan_of(shape, high)) > budget:
                if high >= 1:
                    return None
                high = min(high + 0.01, 1.0)
            return plan
        except UserError:  # entries that cannot stand together, or not in this model
            return None

    def plan_of(self, shape: Shape, strength: float) -> Plan:
        """The plan in which the strongest block lets ``strength`` of the model's patches go.

        What rounding takes from one merge the next one gets: twelve equal merges of 5.5 patches are 6, 5, 6, 5, ...
        """
        plan: Plan = {}
        here, patches, owed = self.tokens, self.tokens - self.prefix, 0.0
        for block, kind, weight in shape.genes:
            entry: Entry
            share = strength * weight
            if kind in MERGES:
                owed += share * patches
                r = math.floor(owed + 0.5)
                owed -= r
                entry = Merge(r, shape.proportional, *MERGES[kind], shape.norm)
                entry = replace(entry, r=entry.merged(here, self.prefix))
                skip, here = not entry.r, entry.remain(here, self.prefix)
            elif kind in ("fuse", "prune"):
                count = max(round((1 - share) * (here - self.prefix)), 1)
                entry = Prune(math.floor(1e4 * count / (here - self.prefix)) / 1e4, kind == "fuse")
                skip = self.prefix + entry.kept(here, self.prefix) == here
                here = entry.remain(here, self.prefix)
            else:
                count = max(round((1 - share) * here), self.prefix + 1)
                entry = Route(math.ceil(1e4 * count / here) / 1e4, kind, keep_prefix=self.prefix > 0)
                skip = entry.capacity == 1
            if not skip:
                plan[block] = entry
        if self.exact:
            plan[self.depth - 1] = ClassOnly()
        check_plan(plan, self.depth)
        return plan

    def effort(self, plan: Plan) -> float:
        """What judging it takes, in dense passes over all images: its cost without what is remembered."""
        return max(self.cost(plan) / self.whole - self.start_of(plan) / self.depth, 0.05)

    # - agreement

    def loss(self, plan: Plan, part: int | None = None) -> Loss:
        """On the first quarter of the images (part 0), on the others (part 1), or on all."""
        if part is None:
            quarter, rest = self.loss(plan, 0), self.loss(plan, 1)
            first, second = self.parts
            return Loss(*((first * a + second * b) / (first + second) for a, b in zip(quarter, rest, strict=True)))
        known = self.known.setdefault(name_of(plan), [None, None])
        if (loss := known[part]) is None:
            loss = known[part] = self.judged(plan, part)
            self.note(plan, judged=known)
        return loss

    def judged(self, plan: Plan, part: int) -> Loss:
        first, _ = self.parts
        rows = slice(0, first) if part == 0 else slice(first, len(self.images))
        each = disagreement(self.target[rows], self.outputs(plan, rows), self.has_head)
        return Loss(each.mean().item(), each.sqrt().mean().item())

    @property
    def parts(self) -> tuple[int, int]:
        """Images of the first quarter, and of the others."""
        return len(self.images) // 4, len(self.images) - len(self.images) // 4

    @torch.inference_mode()
    def outputs(self, plan: Plan, rows: slice = slice(None), change: Callable[[Any], Any] | None = None) -> Tensor:
        """What the plan's model says of those images: (rows, C) logits, or features where there is no head.

        ``change``: what is made of the model before it is run (a fitted head).
        """
        target, start = self.target, self.start_of(plan)
        if not plan:
            return target[rows]
        model: Any = self.routed(self.vit, plan)
        model = model if change is None else change(model)
        given = Given()
        for i in range(start):
            model.blocks[i] = given
        found: list[Tensor] = []
        for at in torch.arange(len(self.images))[rows].split(BATCH):
            if start:
                given.x = self.inputs[start][at]
            found.append(self.answer(model, self.images[at]))
        return torch.cat(found)

    def answer(self, model: Any, images: Any) -> Tensor:
        """(B, C) logits, or features where there is no head."""
        answer: Tensor = model(images)
        return answer

    def start_of(self, plan: Plan) -> int:
        """The last block up to which nothing changes and whose input is remembered; 0: all must be run."""
        first = min(plan, default=self.depth - 1)
        entry = plan.get(first)
        if isinstance(entry, Route) and entry.router in READS_ATTENTION:
            first -= 1  # the block before leaves its scores
        return first - first % self.stride

    @property
    def stride(self) -> int:
        """Every so many blocks the tokens that enter are kept, so that all fit ``CACHE_BYTES``."""
        each = len(self.images) * self.tokens * self.vit.embed_dim * 4
        return max(1, -(-each * self.depth // CACHE_BYTES))

    @property
    def target(self) -> Tensor:
        """(B, C): what the dense model says."""
        if self.seen is None:
            self.look()
        assert self.seen is not None
        return self.seen

    def show(self, images: Tensor) -> None:
        """Judge on other images of the same size from now on; for ``outputs`` alone."""
        self.images, self.seen, self.inputs = images, None, {}

    @torch.inference_mode()
    def look(self) -> None:
        """The dense model's own output, and the tokens (B, N, D) that enter its blocks."""
        kept: dict[int, list[Tensor]] = {i: [] for i in range(self.stride, self.depth, self.stride)}
        hooks = [
            self.vit.blocks[i].register_forward_pre_hook(lambda module, args, i=i: kept[i].append(args[0]))
            for i in kept
        ]
        try:
            self.seen = torch.cat([self.answer(self.vit, batch) for batch in self.images.split(BATCH)])
        finally:
            for hook in hooks:
                hook.remove()
        check_finite(self.vit, self.seen)
        self.inputs = {i: torch.cat(batches) for i, batches in kept.items()}
        if self.seen.dim() != 2:  # plans that merge leave fewer
            raise UserError(
                f"{type(self.vit).__name__}: gives all its tokens {tuple(self.seen.shape[1:])}, and plans are compared "
                "by one vector for an image; choose a pooling (reset_classifier(0, 'avg'))"
            )

    # - the file

    def read(self) -> list[Tensor]:
        """What the model is shown."""
        return [self.images]

    def digest(self) -> dict[str, str]:
        """Hex digits that change with the model's weights and with what it is shown."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (*self.read(), *self.vit.state_dict().values()):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"model and images": digest.hexdigest()}

    def known_from(self, file: str | Path) -> Ledger:
        """The file of what was judged, and what it knows already."""
        ledger = Ledger(file, self.digest())
        for line in ledger.lines:
            name = name_of(from_data(json.loads(line["plan"])))  # with fields that are newer than the file
            if "judged" in line:
                self.known[name] = [loss and Loss(*loss) for loss in line["judged"]]
            if "flops" in line:
                self.costs[name] = line["flops"]
        return ledger

    def note(self, plan: Plan, **found: Any) -> None:
        """A search that goes on neither judges nor counts again."""
        if self.ledger is not None:
            self.ledger.add({"plan": name_of(plan), **found})


class Given(nn.Module):
    """In the place of blocks whose outcome is known."""

    x: Tensor

    def forward(self, x: Tensor, **inputs: Any) -> Tensor:
        return self.x
