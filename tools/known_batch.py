"""What OpenVINO gains where it knows how many images a call has: any batch beside a known one, in turns, on one thread.

python tools/known_batch.py [model] [pixels] [batch]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import timm
import torch

import amod
from amod.analysis.throughput.timing import alternate, paired
from amod.runtimes import open_session

ROUNDS = 25


def main(model: str = "vit_small_patch14_dinov2", pixels: str = "112", batch: str = "1") -> None:
    vit = timm.create_model(model, img_size=int(pixels), num_classes=10).eval()
    images = torch.randn(int(batch), 3, int(pixels), int(pixels)).numpy()
    variants = {
        "dense": vit,
        "A-MoD, C = 0.5": amod.convert(vit, "attention", 0.5),
        "three merges by tokens, 74 %": amod.convert(
            vit, "tome", budget=0.74 * amod.count_flops(vit), placement="few", last="class", by="tokens", rounds=2
        ),
        "ToMe, 74 %": amod.convert(vit, "tome", budget=0.74 * amod.count_flops(vit)),
    }
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, variant) in enumerate(variants.items()):
            path = Path(folder) / f"{i}.xml"
            amod.export(variant, path)
            for known in (None, len(images)):
                session = open_session(path, threads=1, batch=known)
                steps[f"{name}, {'any batch' if known is None else 'known'}"] = lambda s=session: s(images)
        seconds, _ = alternate(steps, ROUNDS, fill=0.1)
    print(f"{model}, {pixels} pixels, batch {batch}: times faster than dense, and than itself, of any batch")
    for name in variants:
        any_batch, known = seconds[f"{name}, any batch"], seconds[f"{name}, known"]
        first = seconds["dense, any batch"]
        print(f"{name:<30} {shown(first, any_batch)}   known: {shown(first, known)}   {shown(any_batch, known)}")


def shown(baseline: list[float], other: list[float]) -> str:
    q = paired(baseline, other)
    return f"{q.median:.2f} [{q.low:.2f}, {q.high:.2f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
