"""What a fitted head is worth, by how many images it was fitted on, and whether the model was trained on them:
disagreement with the dense model on the second half of the validation images of a finished dense run, which no fit saw.

    OMP_NUM_THREADS=1 python tools/fit_head.py RUN_FOLDER --data PHOTOGRAPHS --plan results/frontier/plan-0.5.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track

import amod
from amod.agreement import disagreement
from amod.refit import classifier_of, fit_to, outputs_of, read_by_head
from amod.training.finished import load_run

COUNTS = (64, 128, 256, 512, 1024, 2048, 4096)
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of router=none")
    parser.add_argument("--data", help="its photographs, where they have moved")
    parser.add_argument("--plan", type=Path, help="a plan file beside router=merge and ToMe")
    parser.add_argument("--budget", type=float, default=0.5, help="of those two, a share of the dense FLOPs")
    given = parser.parse_args()
    _, vit, data = load_run(given.run, given.data)
    macs = given.budget * amod.count_flops(vit)
    models = {"router=merge": amod.convert(vit, "merge", budget=macs, last="class")}
    models["ToMe"] = amod.convert(vit, "tome", budget=macs)
    if given.plan:
        models[given.plan.name] = amod.convert(vit, plan=given.plan)
    seen = {}  # of a split: the dense logits, and by model the features and logits
    for split in ("train", "val"):
        samples = data.samples(split, train=False)
        order, parts = samples.drawn(max(COUNTS), 0), []
        for at in track(range(0, len(order), CHUNK), f"{split} images", transient=True):
            images, _ = samples.stacked(order[at : at + CHUNK])
            parts.append([outputs_of(vit, images), *(t for m in models.values() for t in read_by_head(m, images))])
        target, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
        seen[split] = target, dict(zip(models, zip(rest[::2], rest[1::2], strict=True), strict=True))
    half = len(seen["val"][0]) // 2
    print(
        f"KL of the classes (nats), and in brackets images of another class than the dense model's (%); {half} images\n"
    )
    print("| fitted on | " + " | ".join(models) + " |\n|---|" + "---:|" * len(models), flush=True)
    rows = [("nothing", "val", 0)]
    for split, words in (("train", "images that it was trained on"), ("val", "other images")):
        most = len(seen[split][0]) if split == "train" else half
        counts = sorted({min(count, most) for count in COUNTS})
        rows += [(f"{count} {words}", split, count) for count in counts]
    for words, split, count in rows:
        cells = [words]
        for name, model in models.items():
            wanted, (features, logits) = seen["val"][0][half:], (t[half:] for t in seen["val"][1][name])
            if count:
                target, of = seen[split]
                fit = fit_to(classifier_of(model), *(t[:count] for t in of[name]), target[:count])
                logits = features @ fit.weight.T + fit.bias
            kl = disagreement(wanted, logits, True).mean().item()
            other = (wanted.argmax(1) != logits.argmax(1)).float().mean().item()
            cells.append(f"{kl:.4f} ({100 * other:.1f})")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
