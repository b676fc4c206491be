"""What src/frontier.py does: one row for each method and budget, of one fine-tuned model without any training.

The plans of a budget cost the same to within a token. The searched plan is found on training images without labels;
accuracy and agreement are of images that neither it nor the model has seen. Intervals are by bootstrap over images.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amod.agreement import disagreement
from amod.entries import Merge
from amod.errors import UserError
from amod.files import Ledger, make_folder
from amod.judge import Gene, Judge, Shape, name_of
from amod.plan import MERGING, Plan, as_data, from_data
from amod.refit import HeadFit, head_fit, listen
from amod.searching import runner, search
from amod.studies.frontier_report import FITTED, write_report
from amod.timm_models import plan_for_budget
from amod.training.config import FrontierConfig
from amod.training.finished import load_run
from amod.training.folder import environment
from amod.training.loaders import Samples
from amod.vit import convert

Key = tuple[str, float]
"""A method, and the share of the dense cost that it was made for."""
FEW: dict[str, tuple[Any, ...]] = {
    "few_merges": ("merge", 1.0, False),
    "few_tokens": ("merge_tokens", 1.0, False),
    "merge": ("merge_tokens", MERGING["merge"].proportional, MERGING["merge"].norm),
}
"""Three merges: by what, and Merge's ``proportional`` and ``norm``. The last are those of router=merge."""
REFITTED = ("tome", "tome_above", "merge", "searched")
"""Methods that are measured with a fitted head too (:func:`amod.fit_head`), on the search's images."""
CHUNK, COARSE = 256, 0.03
"""Images whose dense features are remembered at once. Where ToMe, a whole number of tokens in every block, leaves more
than this share of the dense cost unspent, the number below is measured too, above the budget."""


def frontier(cfg: FrontierConfig) -> None:
    folder, output = Path(cfg.run or ""), Path(cfg.output)
    make_folder(output, f"output={cfg.output}")
    run, vit, data = load_run(folder, cfg.data.root)
    if run.router.name != "none":
        raise UserError(f"run={cfg.run}: its router is {run.router.name}; name a run of router=none")
    samples = Samples(data.splits["train"], data.eval_transform, None, False, False)
    searched_on, _ = samples.stacked(samples.drawn(cfg.search_images, cfg.seed))
    judge = Judge(vit, searched_on)
    split = data.splits[cfg.split]
    about: dict[str, Any] = {
        **judge.digest(),
        "model": run.model.label, "image_size": [*judge.size], "data": run.data.name, "split": cfg.split,
        "images": min(cfg.images, len(split)), "seed": cfg.seed, "dense_gflops": judge.whole / 1e9,
    }  # fmt: skip
    records, times = (Records(output / name, about) for name in ("records.jsonl", "times.jsonl"))
    trained = "with a linear probe trained" if run.schedule.train == "head" else "fine-tuned"
    clocks = {f"{r}, batch {b}, {cfg.clock} time": (r, b) for r in cfg.runtimes for b in cfg.batches}
    told = {**about, "trained": trained, "search_images": len(searched_on), "effort": cfg.effort, "clocks": [*clocks]}
    plans: dict[Key, Plan] = {("dense", 1.0): {}}
    for share in cfg.shares:
        found = search(
            vit, searched_on, share, seed=cfg.seed, effort=cfg.effort, ledger=output / "search.jsonl",
            progress=sys.stdout.isatty(),
        )  # fmt: skip
        found.save(output / f"plan-{share:g}.yaml")
        print(f"searched, {share:g}: {found}", flush=True)
        for name, plan in methods(judge, share):
            plans[name, share] = plan
        plans["searched", share] = found.plan
        tome = plans.get(("tome_above", share), plans.get(("tome", share)))
        if tome is not None and (near := as_near(judge, tome)) is not None:
            plans["as_tome", share] = near
    heads: dict[Key, HeadFit] = {}
    for (name, share), plan in [*plans.items()] if judge.has_head else []:
        if name in REFITTED:
            key = name + FITTED, share
            plans[key] = plan
            if records.seen(key, plan) < about["images"]:
                heads[key] = head_fit(convert(vit, plan=plan), searched_on, judge.target)
                print(f"{key[0]}, {share:g}: {heads[key]}", flush=True)

    def rows_of(images: int) -> list[dict[str, Any]]:
        return [row for key, plan in plans.items() if (row := records.get(key, plan, images)) is not None]

    for seen in measure(judge, plans, heads, Samples(split, data.eval_transform, None, False, False), cfg, records):
        if len(rows := rows_of(seen)) == len(plans):  # else a file of before has them all at once
            write_report(output, {**told, "images": seen}, environment(), rows, standing(times, plans))
        print(f"measured {seen} of {about['images']} images", flush=True)
    rows = rows_of(about["images"])
    timed = {key: plan for key, plan in plans.items() if key[0] in ("dense", *cfg.timed)}
    of = {"rounds": cfg.rounds, "plans": in_data(timed)}
    for name, (runtime, batch) in clocks.items():
        if not any(record.get("of", of) == of for record in times.of((name, 0.0), {})):  # the first had no "of"
            taken = clock(judge.vit, searched_on, timed, runtime, batch, cfg.rounds, cfg.clock)
            times.measured((name, 0.0), {}, 0, {"of": of, "times": taken})
        print(f"timed: {name}", flush=True)
        write_report(output, told, environment(), rows, standing(times, plans))
    write_report(output, told, environment(), rows, standing(times, plans))
    print(f"{output / 'README.md'}")


def in_data(plans: Mapping[Key, Plan]) -> list[Any]:
    return json.loads(json.dumps([[*key, as_data(plan)] for key, plan in plans.items()]))  # type: ignore[no-any-return]


def standing(times: Records, plans: Mapping[Key, Plan]) -> list[dict[str, Any]]:
    """Those of the times that are of these plans."""
    now = in_data(plans)
    return [record for record in times.lines if all(plan in now for plan in record.get("of", {}).get("plans", []))]


def methods(judge: Judge, share: float) -> Iterator[tuple[str, Plan]]:
    """The methods that need no search, at that share of the dense FLOPs; one that cannot cost so little is left out."""
    macs = share * judge.whole
    prefix = {"keep_prefix": judge.prefix > 0}
    last = {"last": "class"} if judge.exact else {}
    named: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "amod": ("attention", "alternate", {}),
        "late": ("class_attention", "late", {**prefix, **last}),
        "evit": ("evit", None, {}),
        "tome": ("tome", None, {}),
    }
    for name, (router, placement, options) in named.items():
        try:
            plan = plan_for_budget(judge.bare, macs, router, placement, options, judge.size)
            yield name, plan
            if name == "tome" and macs - judge.cost(plan) > COARSE * judge.whole:
                yield "tome_above", {i: Merge(entry.r - 1) for i, entry in plan.items() if isinstance(entry, Merge)}
        except UserError as error:
            print(f"{name}, {share:g}: left out, {error}", flush=True)
    for name, merges in FEW.items():
        few = judge.within(few_of(judge, *merges), macs)
        if few is not None:
            yield name, few


def few_of(judge: Judge, kind: str, *of_merges: Any) -> Shape:
    return Shape(tuple(Gene(judge.depth * twelfth // 12, kind, 1.0) for twelfth in (2, 5, 8)), *of_merges)


def as_near(judge: Judge, other: Plan) -> Plan | None:
    """The strongest merges of router=merge that agree with the dense model on the search's images as well as ``other``
    does; None: not even the weakest."""
    found, weak, strong, limit = None, 0.0, 1.0, judge.loss(other).disagreement
    for _ in range(8):
        middle = (weak + strong) / 2
        try:
            plan = judge.plan_of(few_of(judge, *FEW["merge"]), middle)
        except UserError:  # entries so strong that they cannot stand together
            strong = middle
            continue
        if judge.loss(plan).disagreement <= limit:
            found, weak = plan, middle
        else:
            strong = middle
    return found


def measure(
    judge: Judge,
    plans: Mapping[Key, Plan],
    heads: Mapping[Key, HeadFit],
    samples: Samples,
    cfg: FrontierConfig,
    records: Records,
) -> Iterator[int]:
    """Add to ``records``, for every plan and image, the disagreement with the dense model and whether the class
    was right, where it is not there yet; how many images that is so far."""
    order = samples.drawn(cfg.images, cfg.seed)
    for at in range(0, len(order), CHUNK):
        end = min(at + CHUNK, len(order))
        todo = {key: plan for key, plan in plans.items() if records.seen(key, plan) < end}
        if not todo:
            continue
        images, labels = samples.stacked(order[at:end])
        judge.show(images)
        found: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for key, plan in todo.items():
            if (name := name_of(plan)) not in found:  # else a fitted head reads the same features
                read: list[Tensor] = []
                found[name] = judge.outputs(plan, change=partial(heard, into=read)), read
            outputs, features = found[name]
            if key in heads:
                outputs = F.linear(torch.cat(features), heads[key].weight, heads[key].bias)
            losses = disagreement(judge.target, outputs, judge.has_head)
            right = (outputs.argmax(dim=1) == labels).int().tolist()
            what = {"at": at, "disagreement": losses.mean().item(), "right": "".join(map(str, right))}
            records.measured(key, plan, judge.cost(plan), what)
        yield end


def heard(model: Any, into: list[Tensor]) -> Any:
    """The model, whose classifier leaves what it reads."""
    if getattr(model, "num_classes", 0):
        listen(model, into)
    return model


def clock(
    vit: Any, samples: Tensor, plans: Mapping[Key, Plan], runtime: str, batch: int, rounds: int, kind: str
) -> list[Any]:
    """[[name, share, milliseconds of a batch, low, median and high ratio of dense / plan], ...], on one thread."""
    from amod.analysis.throughput.timing import alternate, one_thread, paired, quartiles

    images = samples[torch.arange(max(batch, 4)) % len(samples)]  # some twice, where there are fewer
    timer = time.process_time if kind == "processor" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, one_thread():
        steps = {
            key: runner(convert(vit, plan=plan), images, runtime, Path(folder) / str(i), batch)
            for i, (key, plan) in enumerate(plans.items())
        }
        seconds, _ = alternate({json.dumps(key): step for key, step in steps.items()}, rounds, fill=0.1, clock=timer)
    dense = seconds[json.dumps(["dense", 1.0])]
    table: list[Any] = []
    for name, taken in seconds.items():
        table.append([*json.loads(name), 1e3 * quartiles(taken).median, *paired(dense, taken)])
    return table


class Records(Ledger):
    """What was measured; the first line says of what."""

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        super().__init__(file, about)
        self.lines = [as_now(line) for line in self.lines]

    def of(self, key: Key, plan: Plan) -> list[dict[str, Any]]:
        wanted = json.loads(json.dumps([*key, as_data(plan)]))
        return sorted((r for r in self.lines if [r["method"], r["share"], r["plan"]] == wanted), key=begin)

    def seen(self, key: Key, plan: Plan) -> int:
        """How many images."""
        return max((begin(record) + len(record["right"]) for record in self.of(key, plan)), default=0)

    def get(self, key: Key, plan: Plan, images: int) -> dict[str, Any] | None:
        """One record of the first so many images; None: there is none of just those."""
        parts = [record for record in self.of(key, plan) if begin(record) + len(record["right"]) <= images]
        right = "".join(record["right"] for record in parts)
        if len(right) != images:
            return None
        mean = sum(len(record["right"]) * record["disagreement"] for record in parts) / images
        return {**parts[0], "right": right, "disagreement": mean}

    def measured(self, key: Key, plan: Plan, flops: int, what: Mapping[str, Any]) -> None:
        self.add({"method": key[0], "share": key[1], "plan": as_data(plan), "flops": flops, **what})


def as_now(record: dict[str, Any]) -> dict[str, Any]:
    """With every field of its plan's entries, also those that are newer than the record."""
    if not record.get("plan"):
        return record
    return {**record, "plan": json.loads(json.dumps(as_data(from_data(record["plan"]))))}


def begin(record: Mapping[str, Any]) -> int:
    """The first image of a record; one of before has them all."""
    return record.get("at", 0)
