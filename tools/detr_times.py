"""Time of a DETR's encoder and decoder, dense and routed, one image and eight: random weights, which cost the same.

    OMP_NUM_THREADS=2 python tools/detr_times.py --out results/detr-times.json

Each round times every variant once, in turn; the figure is the median over rounds, with the quartiles. The backbone's
time stands beside it, which no routing changes. 800 x 1066 pixels are 850 tokens, as in the paper. The image tokens
are drawn from a normal distribution: an untrained backbone's are so small that the processor slows down on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DetrConfig, DetrForObjectDetection

import amod
from amod.detection import TransformerAlone

VARIANTS = {"dense": None, "random": 0.5, "linear": 0.5, "attention": 0.5}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def of(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_ms": round(middle, 2), "quartiles_ms": [round(low, 2), round(high, 2)]}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1066], help="height and width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--backbone", default="resnet50")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error(f"--rounds {given.rounds}: at least 2, of which quartiles can be had")
    torch.manual_seed(0)
    detr = DetrForObjectDetection(DetrConfig(backbone=given.backbone)).eval()
    models: Any = {
        name: detr if capacity is None else amod.convert(detr, name, capacity) for name, capacity in VARIANTS.items()
    }
    found: dict[str, Any] = {
        "size": given.size, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}", "rounds": given.rounds,
    }  # fmt: skip
    for batch in (1, 8):
        images = torch.randn(batch, 3, *given.size)
        masks = torch.ones(batch, *given.size, dtype=torch.long)
        features = torch.randn(batch, detr.config.d_model, *(-(-side // 32) for side in given.size))
        calls: dict[str, Callable[[], Any]] = {"backbone": lambda: detr.model.backbone(images, masks)}  # noqa: B023
        for name, model in models.items():
            calls[name] = lambda model=model: TransformerAlone(model)(features)  # noqa: B023
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(given.rounds + 1):
            for name, call in calls.items():
                if name == "backbone" and turn > 3:
                    continue
                took = timed(call)
                if turn:  # the first is a warm-up
                    times[name].append(took)
        found[f"batch {batch}"] = {name: of(values) for name, values in times.items()}
        base = found[f"batch {batch}"]["dense"]["median_ms"]
        for name in VARIANTS:
            found[f"batch {batch}"][name]["speedup"] = round(base / found[f"batch {batch}"][name]["median_ms"], 3)
        print(f"batch {batch}", json.dumps(found[f"batch {batch}"]), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
