"""What trained gates do to a language model's loss, speed and cache, beside the dense model.

    python tools/router_tuning_text.py --model models/stories260K --texts texts/stories --runs runs/stories --out OUT

Trains the gates of GATES below, one src/train.py each, whose settings may follow behind ``--`` (finished runs are not
repeated), and measures them in turns with the dense model, best on an idle machine with OMP_NUM_THREADS=1: the time of
a prefill (a batch of held-out texts) and of a decoded token, what the cache holds in the end, and which share those
texts kept. A speed-up is the median over the rounds of dense time over gated time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from amod.errors import UserError
from amod.gates import share_kept
from amod.text_walk import cache_bytes
from amod.training.command import one_line_errors
from amod.training.finished import with_weights
from amod.training.folder import environment, read_config
from amod.training.language import build, pieces

GATES = [
    ("attention", "token", "all", 0.5),
    ("attention", "token", "all", 0.25),
    ("attention", "token", "kept", 0.5),
    ("attention", "token", "kept", 0.25),
    ("mlp", "token", "kept", 0.5),
    ("block", "token", "kept", 0.5),
    ("attention", "sequence", "kept", 0.5),
]
HEADER = ["gates", "target", "share kept", "loss, gates open", "loss", "kept of the timed", "prefill x", "decoding x"]
HEADER += ["cache"]


def trained(given: argparse.Namespace, skip: str, per: str, cache: str, target: float) -> Path:
    """The run folder, finished."""
    folder = given.runs / f"{skip}-{per}-{cache}-{target}"
    words = [f"router.skip={skip}", f"router.per={per}", f"router.cache={cache}", f"router.target={target}"]
    words += ["router=tuning", "model=stories", f"model.name={given.model}", "data=text", f"data.root={given.texts}"]
    words += ["schedule=router_tuning", f"run_dir={folder}", *given.settings]
    script = Path(__file__).parents[1] / "src/train.py"
    if done := subprocess.run([sys.executable, script, *words], check=False).returncode:
        raise SystemExit(done)
    return folder


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor, count: int) -> tuple[float, float, int]:
    """(seconds of the prefill, seconds of a decoded token, bytes of the cache) for ids (B, N)."""
    begin = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - begin
    cache, word = out.cache, out.logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(count):
        out = model(word, use_cache=True, cache=cache)
        word = out.logits[:, -1:].argmax(-1)
    return prefill, (time.perf_counter() - begin) / count, cache_bytes(cache)


def held_out(folder: Path, given: argparse.Namespace) -> torch.Tensor:
    """(B, N) of the test texts, which all runs share."""
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(given.model), read_config(folder / "config.yaml")
    rows = pieces(config.data.model_copy(update={"length": given.length}), tokenizer)["test"]
    if len(rows) < given.batch:
        raise UserError(f"--batch {given.batch}: the test texts are {len(rows)} pieces of {given.length} tokens")
    return torch.from_numpy(rows[: given.batch])


def row(folder: Path, dense: Any, ids: torch.Tensor, given: argparse.Namespace) -> list[Any]:
    """A line of the table."""
    config, summary = read_config(folder / "config.yaml"), json.loads((folder / "summary.json").read_text())
    model = with_weights(build(config, None).model, folder)
    with torch.no_grad():
        kept = share_kept([model(ids, use_cache=False, return_routing=True, logits_to_keep=1)[1]])["share_kept"]
    measure(dense, ids, 4), measure(model, ids, 4)  # warm
    rounds = [(measure(dense, ids, given.decode), measure(model, ids, given.decode)) for _ in range(given.rounds)]
    prefill, decode = (statistics.median(a[at] / b[at] for a, b in rounds) for at in (0, 1))
    router = config.router
    gates = f"{router.skip} per {router.per}, keys of {router.cache}"
    losses = [summary["share_kept"], summary["test_loss_untrained"], summary["test_loss"]]
    return [gates, router.target, *losses, kept, prefill, decode, rounds[0][1][2] / rounds[0][0][2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the dense model's folder")
    parser.add_argument("--texts", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs are, or will be")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--gates",
        type=int,
        nargs="+",
        choices=range(len(GATES)),
        default=[*range(len(GATES))],
        help="which of GATES, from 0",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("settings", nargs="*", help="of src/train.py, behind --")
    given = parser.parse_args()
    for name in ("model", "texts"):
        if not getattr(given, name).is_dir():
            raise UserError(f"--{name} {getattr(given, name)}: no such folder")
    folders = [trained(given, *GATES[i]) for i in given.gates]
    dense = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    ids = held_out(folders[0], given)
    lines = [HEADER, ["---"] * 2 + ["---:"] * (len(HEADER) - 2)]
    lines += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row(f, dense, ids, given)] for f in folders]
    code = environment()
    commit = str(code["git_commit"])[:7]
    told = (
        f"`python tools/router_tuning_text.py` on {given.model.name} and {given.texts.name}"
        f"{''.join(f' `{word}`' for word in given.settings)}, commit {commit}, torch {code['torch']}, "
        f"{code['system']}, {code['threads']} thread(s). Loss in nats per token of the test texts, which a "
        f"gate per sequence decides on the whole piece. Timed: {given.batch} test texts of {given.length} tokens, "
        f"{given.decode} decoded; one seed, {given.rounds} rounds, dense time / gated time; the cache, with its "
        "positions, as a share of the dense model's."
    )
    given.out.mkdir(parents=True, exist_ok=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (given.out / "README.md").write_text(f"# Trained gates in a language model\n\n{told}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    with one_line_errors():
        main()
