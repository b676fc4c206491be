"""What merging loses by how it averages: whether a merged token keeps the norm of those in it, and how much attention
counts it. Disagreement with the dense model on validation images of a finished dense run, at the same FLOPs.

    OMP_NUM_THREADS=1 python tools/merging.py RUN_FOLDER --images 640 --data PHOTOGRAPHS
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.progress import track

from amod.judge import Gene, Judge, Shape
from amod.studies.frontier import Samples, few_of
from amod.training.finished import load_run

AVERAGES = {
    "as ToMe": (1.0, False),
    "norm kept": (1.0, True),
    "norm kept, size^0.9": (0.9, True),
    "norm kept, size^0.75": (0.75, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of router=none")
    parser.add_argument("--data", help="its photographs, where they have moved")
    parser.add_argument("--images", type=int, default=640)
    given = parser.parse_args()
    _, vit, data = load_run(given.run, given.data)
    samples = Samples(data.splits["val"], data.eval_transform, None, False, False)
    judge = Judge(vit, samples.stacked(samples.drawn(given.images, 0))[0])
    print(f"{judge.measure}, {len(judge.images)} validation images, {judge.size[1]} pixels\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (["merges", "GFLOPs", *AVERAGES], ["---"] * 6)), flush=True)
    cells = [
        (blocks, kind, share)
        for share in (0.74, 0.5)
        for kind in ("merge", "merge_tokens")
        for blocks in ("three", "all")
    ]
    for blocks, kind, share in track(cells, "merging", transient=True):
        genes = tuple(Gene(block, kind, 1.0) for block in range(judge.depth - judge.exact))
        genes = few_of(judge, kind).genes if blocks == "three" else genes
        plans = [judge.within(Shape(genes, *average), share * judge.whole) for average in AVERAGES.values()]
        if None in plans:
            continue
        losses = [f"{judge.loss(plan).disagreement:.4f}" for plan in plans]
        by = "keys" if kind == "merge" else "tokens, 2 rounds"
        print(f"| {blocks} by {by} | {judge.cost(plans[0]) / 1e9:.3f} | {' | '.join(losses)} |", flush=True)


if __name__ == "__main__":
    main()
