"""The whole method in a few minutes on two cores: train a small ViT, make it sparse, look at what it kept.

Trains vit_pico on scikit-learn's handwritten digits, adapts it to each variant at a capacity of 12.5 %, fine-tunes
it briefly, and leaves demo/table.md and demo/kept.png. Every line of the table is an ordinary run of src/train.py,
printed as such; a finished run is not repeated, so a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path("demo")
COMMON = [
    "data=digits",
    "model=vit_pico",
    "capacity=0.125",
    "schedule.batch_size=64",
    "schedule.lr=2e-3",
    "schedule.augment.scale=[0.9,1.0]",
]
DENSE = ["router=none", "schedule.epochs=25", "schedule.warmup_epochs=3"]
ADAPT = [f"model.checkpoint={FOLDER}/none", "schedule.epochs=5", "schedule.lr=1e-3"]
VARIANTS = {
    "none": "dense",
    "isoflop": "isoFLOP (shorter)",
    "linear": "MoD (linear router)",
    "attention": "A-MoD (attention)",
    "random": "random (control)",
}


def main() -> None:
    from amod.training.checks import check_train
    from amod.training.command import one_line_errors
    from amod.training.compose import compose_config
    from amod.training.finished import load_run
    from amod.training.run import train

    with one_line_errors():
        for number, router in enumerate(VARIANTS, start=1):
            arguments = [f"router={router}", *COMMON, *(DENSE if router == "none" else ADAPT)]
            arguments = [*dict((a.split("=", 1)[0], a) for a in arguments).values(), f"run_dir={FOLDER}/{router}"]
            print(f"\n[{number}/{len(VARIANTS)}] python src/train.py {' '.join(arguments)}", flush=True)
            train(check_train(compose_config("train", arguments)))
        write_table()
        draw(*load_run(FOLDER / "attention"))
    print(f"\ntable: {FOLDER}/table.md   kept patches: {FOLDER}/kept.png")


def write_table() -> None:
    """demo/table.md, and the same on the terminal."""
    from rich.console import Console
    from rich.table import Table

    columns = ["variant", "GFLOPs", "parameters", "accuracy untrained", "accuracy after", "test accuracy"]
    rows = []
    for router, label in VARIANTS.items():
        summary = json.loads((FOLDER / router / "summary.json").read_text())
        accuracies = [summary["val_top1_untrained"], summary["val_top1"], summary["test_top1"]]
        shown = ["-" if value is None else f"{value:.1f} %" for value in accuracies]
        rows.append([label, f"{summary['gflops']:.4f}", f"{summary['params']:,}", *shown])
    table = Table(title="handwritten digits, capacity 12.5 %, seed 0; untrained and after: on the validation images")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    (FOLDER / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


def draw(cfg, model, data) -> None:
    """demo/kept.png: the patches that A-MoD kept on one test image of each of six digits."""
    import torch

    from amod.analysis.pictures import draw_kept_patches
    from amod.training.weights import input_config

    images, labels, _ = next(iter(data.test_dataloader()))
    chosen = [int((labels == digit).nonzero()[0]) for digit in (0, 2, 3, 5, 6, 8)]
    images = images[chosen]
    with torch.no_grad():
        logits, routing = model.eval()(images, return_routing=True)
    mean, std = (torch.tensor(input_config(cfg.model)[key]).view(3, 1, 1) for key in ("mean", "std"))
    names = [f"{labels[i]}, read as {int(row.argmax())}" for i, row in zip(chosen, logits, strict=True)]
    title = (
        f"Patches kept by A-MoD at a capacity of {cfg.capacity:.1%}: {model.tokens_kept(50)[1]} of 50 tokens a block\n"
        f"{cfg.model.label}, handwritten digits, seed {cfg.seed}"
    )
    grid = model.patch_embed.grid_size
    draw_kept_patches(images * std + mean, {"A-MoD": routing}, grid, FOLDER / "kept.png", title, names)


if __name__ == "__main__":
    main()
