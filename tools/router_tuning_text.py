"""What trained gates do to a language model's speed and cache: runs of src/train.py, measured beside the dense model.

    OMP_NUM_THREADS=1 python tools/router_tuning_text.py --model models/stories260K --out OUT RUN...

For each run folder (model.task=language): its test loss and share kept (summary.json), the time of a prefill (a batch
of texts) and of decoding, and what the cache holds in the end. Dense and gated model take turns; a speed-up is the
median over the rounds of dense time over gated time. The timed texts are random words: the loss is not of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from amod.text_walk import cache_bytes
from amod.training.finished import with_weights
from amod.training.folder import read_config
from amod.training.language import build


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, count: int) -> tuple[float, float, int]:
    """(seconds of the prefill, seconds of a decoded token, bytes of the cache) for ids (B, N)."""
    begin = time.perf_counter()
    out = model(ids, use_cache=True)
    prefill = time.perf_counter() - begin
    cache, word = out.cache, out.logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(count):
        out = model(word, use_cache=True, cache=cache)
        word = out.logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - begin) / count, cache_bytes(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, required=True, help="the dense model's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    dense = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(3, dense.config.vocab_size, (given.batch, given.length))
    rows = []
    for folder in given.runs:
        config, summary = read_config(folder / "config.yaml"), json.loads((folder / "summary.json").read_text())
        model = with_weights(build(config, None).model, folder)
        measure(dense, ids, 4), measure(model, ids, 4)  # warm
        rounds = [(measure(dense, ids, given.decode), measure(model, ids, given.decode)) for _ in range(given.rounds)]
        router = config.router
        gates = f"{router.skip} per {router.per}, keys of {router.cache}" if router.name == "tuning" else "none"
        prefill, decode = (statistics.median(a[at] / b[at] for a, b in rounds) for at in (0, 1))
        shares = [summary.get("share_kept", 1.0), summary["test_loss_untrained"], summary["test_loss"]]
        rows.append([gates, router.target, *shares, prefill, decode, rounds[0][1][2] / rounds[0][0][2]])
    header = ["gates", "target", "share kept", "loss, gates open", "loss", "prefill x", "decoding x", "cache"]
    lines = [header, ["---"] * len(header)]
    lines += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    told = (
        f"`python tools/router_tuning_text.py`, commit {commit.strip()}, torch {torch.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} thread(s); batch {given.batch}, prompts of {given.length}, "
        f"{given.decode} decoded; "
        f"one seed, {given.rounds} rounds."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (given.out / "README.md").write_text(f"# Trained gates in a language model\n\n{told}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
