"""``amod.search``: the plan for a budget, found on unlabelled images by agreement with the dense model.

What is searched are *shapes*: which blocks merge, prune or route, and how strongly against each other. The one number
that all of a shape's blocks share, its strength, follows from the budget, so every candidate spends all of it. The
search starts from the plans that people make by hand, changes the best ones a little at a time, looks at a quarter of
the images first, and at the others only where the quarter looks as good as the best so far. Plans are ranked by the
mean root of their images' disagreement with the dense model (``agreement.Loss``). The class token is alone in
the last block wherever the head reads nothing else: that costs nothing.

B counts images. Costs and losses of a plan are ``judge.py``'s.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress
from torch import Tensor, nn

from amod.agreement import check_images
from amod.dress import of_transformers
from amod.entries import READS_ATTENTION
from amod.errors import UserError
from amod.families import check_model
from amod.files import make_folder, write_atomically
from amod.judge import KINDS, Gene, Judge, Shape, name_of
from amod.plan import MERGING, Plan, as_data
from amod.vit import convert

PROPORTIONAL = (0.0, 0.75, 0.9, 1.0)
"""What the merges of a shape may have (:class:`amod.Merge`)."""
OURS = MERGING["merge"].proportional
"""Of router=merge, which the search begins with."""
ELITE = 5
"""Shapes that are changed further."""
ROUNDING = 1e-3
"""A distance that float32 makes of the same model (1e-6 nats): there is nothing left to find."""
RUNTIMES = ("eager", "openvino", "onnx")
"""Those whose time can be a budget."""
TRIES, ROUNDS = 4, 15
"""Of a measured runtime: searches with another budget of FLOPs, and rounds of dense and plan in turns."""


@dataclass(frozen=True)
class Found:
    """What :func:`search` found. ``str`` is one line, ``save`` writes the plan file."""

    plan: Plan
    flops: int
    dense_flops: int
    disagreement: float
    """Mean over the images: Kullback-Leibler divergence of the plan's classes from the dense model's, in nats; of a
    model without a head 1 - cosine of its features to the dense model's."""
    about: dict[str, Any] = field(default_factory=dict)
    """What it was found on: images or texts, their size, seed, ..., and for a measured runtime the milliseconds of one
    image."""

    def __str__(self) -> str:
        timed = self.about.get("milliseconds")
        clock = f", {timed['plan']:.1f} of {timed['dense']:.1f} ms ({self.about['runtime']})" if timed else ""
        share = self.flops / self.dense_flops
        seen = "texts" if "texts" in self.about else "images"
        return (
            f"{self.flops / 1e9:.4f} of {self.dense_flops / 1e9:.4f} GFLOPs ({share:.1%}){clock}, "
            f"{self.about['measure']} {self.disagreement:.4g} on {self.about[seen]} {seen}"
        )

    def save(self, path: str | Path) -> None:
        """The plan as YAML for ``amod.convert(vit, plan=path)`` and ``router=plan router.file=path``."""
        costs = {"gflops": round(self.flops / 1e9, 6), "dense_gflops": round(self.dense_flops / 1e9, 6)}
        about = {**costs, "disagreement": float(f"{self.disagreement:.6g}"), **self.about}
        data = {"plan": as_data(self.plan), "search": about}
        path = Path(path)
        make_folder(path.parent, f"{path}")
        write_atomically(path, yaml.safe_dump(data, sort_keys=False).encode())


def search(
    vit: nn.Module,
    images: Tensor | Mapping[str, Tensor],
    budget: float,
    runtime: str = "flops",
    *,
    seed: int = 0,
    effort: float = 60,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> Found:
    """The plan within a budget whose model says most nearly what the dense model says.

    Args:
        vit: as for :func:`amod.convert`, its weights loaded; it is left as it is.
        images: (B, C, H, W), prepared for the model; no labels. A few hundred; 128 do. Of transformers' encoders a
            mapping, what its tokenizer gives of so many texts (``padding=True, return_tensors="pt"``), or
            ``{"pixel_values": images}``; there blocks are routed, nothing merges, and FLOPs are counted for a text of
            the batch's length.
        budget: below 1 a share of the dense model's cost; from 1 on multiply-accumulates of one image, or for a
            measured runtime milliseconds of one image.
        runtime: ``flops``, or of timm's models what is timed on this machine: ``eager``, ``openvino``, ``onnx``.
        seed: of the changes; the same seed, images and effort give the same plan (of ``flops``).
        effort: how long to look, in passes of the dense model over all images. The plans that people make are judged
            first, whatever it is: about 20 passes.
        ledger: a file of every plan that was judged; a search that was stopped goes on from it, and one of another
            budget uses it.
        progress: show a bar.

    Raises:
        UserError: the model, budget or file cannot be served.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise UserError(f"budget={budget!r}: must be a number above 0; below 1 it is a share of the dense model's cost")
    if runtime not in ("flops", *RUNTIMES):
        raise UserError(f"runtime={runtime!r}: choose one of flops, {', '.join(RUNTIMES)}")
    if isinstance(effort, bool) or not isinstance(effort, int | float) or not 0 < effort < float("inf"):
        raise UserError(f"effort={effort!r}: must be a number above 0, passes of the dense model over the images")
    if of_transformers(vit):
        if runtime != "flops":
            raise UserError(f"runtime={runtime!r}: of transformers' models the budget is of FLOPs; leave runtime out")
        from amod.huggingface_judge import EncoderJudge, check_inputs

        judge: Judge = EncoderJudge(vit, check_inputs(vit, images, 8), ledger)
    else:
        check_model(vit)
        judge = Judge(vit, check_images(images, 8).to(next(vit.parameters())), ledger)
    about = {"measure": judge.measure, **judge.about, "seed": seed, "effort": effort}
    about |= {"runtime": runtime, "budget": budget}
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("search", total=effort)

        def spent(amount: float, best: float) -> None:
            bar.update(task, advance=amount, description=f"{judge.measure} {best:.4g}")

        if runtime == "flops":
            macs = budget * judge.whole if budget < 1 else budget
            plan = evolve(judge, macs, random.Random(seed), effort, spent)
        else:

            def tell(text: str) -> None:
                bar.update(task, description=text)

            plan, about["milliseconds"] = by_the_clock(judge, budget, runtime, effort, seed, spent, tell)
    return Found(plan, judge.cost(plan), judge.whole, judge.loss(plan).disagreement, about)


# --- the search ---------------------------------------------------------------------------------------------------


def evolve(
    judge: Judge, budget: float, rng: random.Random, effort: float, spent: Callable[[float, float], None]
) -> Plan:
    """The hand-made shapes, then changes of the best of them until the effort is spent. The budget is of
    what the judge says that a plan takes."""
    ranked: list[tuple[float, float, Shape, Plan]] = []  # distance, that of the first quarter, ...
    seen: set[str] = set()
    left, idle = effort, 0

    def judged(shape: Shape, screen: bool) -> None:
        nonlocal left, idle
        plan = judge.within(shape, budget)
        idle += 1
        if plan is None or (key := name_of(plan)) in seen:
            return
        seen.add(key)
        idle = 0
        before = left
        first, left = judge.loss(plan, 0).distance, left - judge.effort(plan) / 4
        if not screen or first <= max(quarter for _, quarter, _, _ in ranked[:ELITE]):
            distance, left = judge.loss(plan).distance, left - judge.effort(plan) * 3 / 4
            ranked.append((distance, first, shape, plan))
            ranked.sort(key=lambda entry: entry[0])
        spent(before - left, judge.loss(ranked[0][3]).disagreement)

    for shape in by_hand(judge.depth, judge.exact):
        judged(shape, screen=False)
    if not ranked:
        raise UserError(
            f"budget of {budget / 1e9:.4g} GFLOPs: no plan of this model ({judge.whole / 1e9:.4g} GFLOPs) at "
            f"{judge.where} costs so little; raise it"
        )
    while left > 0 and idle < 200 and ranked[0][0] > ROUNDING:
        parent = ranked[min(int(rng.expovariate(1)), min(ELITE, len(ranked)) - 1)][2]
        judged(changed(parent, judge.depth - judge.exact, rng, judge.kinds), screen=True)
    return ranked[0][3]


def by_hand(depth: int, exact: bool) -> Iterator[Shape]:
    """The plans that people make, for any depth; ``exact``: the last block is the class token's alone."""

    def at(*twelfths: int) -> list[int]:
        return sorted({block * depth // 12 for block in twelfths if block * depth // 12 < depth - exact})

    yield Shape()  # nothing at all, where that fits
    for kind, proportional, norm in (
        ("merge_tokens", OURS, True),
        ("merge_tokens", 0.75, True),
        ("merge", 1.0, False),
    ):
        for merging in ([*range(12)], [2, 5, 8], [1, 4, 7], [0, 2, 4, 6, 8], [1, 2, 3, 4]):  # ToMe, then few merges
            yield Shape(tuple(Gene(block, kind, 1.0) for block in at(*merging)), proportional, norm)
    for weights in ((lambda i: 1 - i / (2 * depth)), (lambda i: (i + 1) / depth)):  # stronger at first, or later
        yield Shape(tuple(Gene(block, "merge_tokens", weights(block)) for block in at(*range(12))), OURS, True)
    others: tuple[tuple[str, Sequence[int]], ...]
    others = (("fuse", (3, 6, 9)), ("prune", (3, 6, 9)), ("class_attention", range(6, 12)),
              ("class_attention", range(3, 12)), ("attention", (1, 3, 5, 7, 9, 11)),
              ("attention", (4,)), ("attention", (2, 6)))  # fmt: skip
    for kind, places in others:
        yield Shape(tuple(Gene(block, kind, 1.0) for block in at(*places) if block or kind not in READS_ATTENTION))
    merges = [Gene(block, "merge_tokens", 1.0) for block in at(1, 3, 5)]
    yield Shape((*merges, *(Gene(block, "class_attention", 0.5) for block in at(8, 9, 10))))


def changed(shape: Shape, end: int, rng: random.Random, kinds: Sequence[str] = KINDS) -> Shape:
    """One small change: a place moves, is added, goes, weighs more or less, does something else, or all move."""
    genes = {gene.block: gene for gene in shape.genes}
    free = [block for block in range(end) if block not in genes]
    step = rng.choice(("move", "weigh", "weigh", "weigh", "add", "drop", "kind", "shift", "proportional", "norm"))
    gene = rng.choice(shape.genes) if shape.genes else Gene(end // 2, kinds[0], 1.0)
    if step == "move" and (near := [block for block in free if abs(block - gene.block) <= 2]):
        genes.pop(gene.block, None)
        block = rng.choice(near)
        genes[block] = gene._replace(block=block)
    elif step == "weigh":
        genes[gene.block] = gene._replace(weight=gene.weight * rng.choice((0.5, 0.7, 0.85, 1.2, 1.5, 2.0)))
    elif step == "add" and free:
        block = rng.choice(free)
        genes[block] = Gene(block, gene.kind, gene.weight * rng.choice((0.5, 1.0)))
    elif step == "drop" and len(genes) > 1:
        del genes[gene.block]
    elif step == "kind":
        genes[gene.block] = gene._replace(kind=rng.choice([kind for kind in kinds if kind != gene.kind]))
    elif step == "shift":
        by = rng.choice((-1, 1))
        genes = {g.block + by: g._replace(block=g.block + by) for g in shape.genes if 0 <= g.block + by < end}
    elif step == "proportional":
        shape = replace(shape, proportional=rng.choice([p for p in PROPORTIONAL if p != shape.proportional]))
    elif step == "norm":
        shape = replace(shape, norm=not shape.norm)
    heaviest = max((g.weight for g in genes.values()), default=1.0)
    return replace(
        shape, genes=tuple(genes[i]._replace(weight=round(genes[i].weight / heaviest, 3)) for i in sorted(genes))
    )


# --- a budget of time ---------------------------------------------------------------------------------------------


def by_the_clock(
    judge: Judge,
    budget: float,
    runtime: str,
    effort: float,
    seed: int,
    spent: Callable[[float, float], None],
    tell: Callable[[str], None],
) -> tuple[Plan, dict[str, float]]:
    """(plan, milliseconds of one image): what plans take is predicted from the measured times of a few, and where
    the plan that is found takes another time, the search is made again for so much more or less."""
    fastest, took, timed = 0.0, {"dense": 0.0, "plan": 0.0}, 0

    def share_of(plan: Plan) -> float:
        nonlocal fastest, took, timed
        timed += 1
        tell(f"{runtime}: timing plan {timed}")
        took = milliseconds(judge, plan, runtime)
        ratio = took["plan"] / took["dense"]
        fastest = min(fastest or ratio, ratio)
        return ratio

    judge.watch(share_of)
    share = budget if budget < 1 else budget / took["dense"]
    wanted, best = share, None
    for _ in range(TRIES):
        try:
            plan = evolve(judge, wanted, random.Random(seed), effort / TRIES, spent)
        except UserError:  # so little time cannot be had
            break
        ratio, expected = share_of(plan), judge.takes(plan)
        if ratio <= share and (best is None or judge.loss(plan).distance < judge.loss(best[0]).distance):
            best = plan, took
        if 0.97 * expected <= ratio <= share:
            break
        wanted = 0.99 * share * expected / ratio
    if best is None:
        raise UserError(
            f"budget={budget:g}: no plan was so fast in runtime={runtime}, the fastest took {fastest:.0%} of dense"
        )
    return best


def milliseconds(judge: Judge, plan: Plan, runtime: str) -> dict[str, float]:
    """Of one image, dense and by the plan: the dense median, and that times the median ratio within a round."""
    from amod.analysis.throughput.timing import alternate, paired, quartiles

    with tempfile.TemporaryDirectory() as folder:
        models = {"dense": judge.vit, "plan": convert(judge.vit, plan=plan)}
        steps = {name: runner(model, judge.images[:4], runtime, Path(folder) / name) for name, model in models.items()}
        seconds, _ = alternate(steps, ROUNDS, fill=0.05)
    dense = quartiles(seconds["dense"]).median * 1e3
    return {"dense": round(dense, 3), "plan": round(dense / paired(seconds["dense"], seconds["plan"]).median, 3)}


def runner(model: nn.Module, images: Tensor, runtime: str, place: Path, batch: int = 1) -> Callable[[], Any]:
    """The first images through the model in that runtime; ``place``: a file of it, without suffix.

    ``images`` (at least 4) are what an exported file is checked on."""
    if runtime == "eager":
        return torch.inference_mode()(lambda: model(images[:batch]))
    from amod.exporting import export
    from amod.runtimes import SUFFIXES, open_session

    file, image = place.with_suffix(SUFFIXES[runtime]), images[:batch].numpy()
    export(model, file, input_size=(images.shape[1], images.shape[2], images.shape[3]), images=images)
    session = open_session(file, threads=torch.get_num_threads(), batch=batch)
    return lambda: session(image)
