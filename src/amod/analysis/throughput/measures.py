"""The measurements, each of one cell: what `src/benchmark.py` calls, and how long it will take."""

from __future__ import annotations

import atexit
import gc
import json
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from amod.analysis.throughput.memory import measure_memory
from amod.analysis.throughput.parts import PARTS, Stopwatch, watching
from amod.analysis.throughput.timing import Step, alternate
from amod.analysis.throughput.variants import Variant, build, dense, facts, make_step
from amod.exporting import export
from amod.flops import default_input_size
from amod.runtimes import SUFFIXES, open_session


def synchroniser(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def measure_speed(cell: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds per step of every variant and round. For the keys of ``cell`` see `src/benchmark.py`."""
    gc.collect()
    vit = dense(cell["timm_name"], cell["kwargs"]).to(device)
    tokens = cell["kwargs"].get("tokens")
    variants = {name: build(vit, name, tokens) for name in cell["variants"]}
    if cell["runtime"] != "torch":
        return _measure_files(cell, variants)
    steps: dict[str, Step] = {}
    torch.compiler.reset()
    # one limit for all models of a class: beyond it a model would silently run uncompiled
    with torch._dynamo.config.patch(recompile_limit=64):
        for name, variant in variants.items():
            model = variant.model
            model.train(cell["mode"] == "train")
            run: Any = torch.compile(model, fullgraph=True, dynamic=False) if cell["compile"] else model
            steps[name] = make_step(run, vit, cell["batch"], cell["mode"], cell["precision"], device, tokens)
        seconds, repeats = alternate(
            steps,
            cell["rounds"],
            min_rounds=cell["min_rounds"],
            seconds=cell["seconds"],
            fill=cell["fill"],
            settle=cell["compile"],
            synchronise=synchroniser(device),
        )
    return {"seconds": seconds, "repeats": repeats, **facts(variants)}


FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}


def _measure_files(cell: Mapping[str, Any], variants: Mapping[str, Variant]) -> dict[str, Any]:
    """The same of exported files in another runtime, on the processor."""
    size = default_input_size(variants["dense"].model)
    images = torch.randn(cell["batch"], *size, generator=torch.Generator().manual_seed(0)).numpy()
    form, precisions = FORMATS[cell["runtime"]], set()
    steps: dict[str, Step] = {}
    for name, variant in variants.items():
        path = (
            _files() / f"{cell['timm_name']}-{zlib.crc32(json.dumps(cell['kwargs']).encode())}-{name}{SUFFIXES[form]}"
        )
        if not path.exists():
            export(variant.model, path, form)
        session = open_session(path, form, cell["threads"], cell["precision"] == "default", cell["batch"])
        precisions.add(session.precision)
        steps[name] = partial(session.run, images)
    seconds, repeats = alternate(
        steps, cell["rounds"], min_rounds=cell["min_rounds"], seconds=cell["seconds"], fill=cell["fill"]
    )
    return {"seconds": seconds, "repeats": repeats, "computed_in": sorted(precisions), **facts(variants)}


@lru_cache
def _files() -> Path:
    """Where exported files are until this process ends: a model's cells differ in batch and precision alone."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def measure_parts(cell: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of the forward pass by part (``PARTS``), of every variant and round, in turns."""
    vit = dense(cell["timm_name"], cell["kwargs"]).to(device)
    variants = {name: build(vit, name) for name in cell["variants"]}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in variants}

    def watched(name: str) -> Step:
        step = make_step(variants[name].model, vit, cell["batch"], "forward", cell["precision"], device)
        watch = Stopwatch(device)

        def run() -> None:
            with watching(variants[name].model, watch):
                begin = watch.mark()
                step()
                watch.marks.append(("rest", begin, watch.mark()))
            spent = watch.read()
            spent["rest"] -= sum(spent[part] for part in PARTS if part != "rest")
            for part in PARTS:
                seconds[name][part].append(spent[part])

        return run

    alternate({name: watched(name) for name in variants}, cell["rounds"], synchronise=synchroniser(device))
    for parts in seconds.values():
        for part in PARTS:
            parts[part] = parts[part][1:]  # the first is the untimed call
    return {"parts": seconds, **facts(variants)}


MEASURES: dict[str, Callable[[Mapping[str, Any], torch.device], dict[str, Any]]] = {
    "speed": measure_speed,
    "parts": measure_parts,
    "memory": measure_memory,
}


# --- how long it will take ----------------------------------------------------------------------------------------


def cost(cell: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one round of a cell, a training step counted as three forward passes."""
    one = _cost_of_one(cell["timm_name"], json.dumps(cell["kwargs"]), tuple(cell["variants"]))
    return one * cell["batch"] * (3.0 if cell["mode"] == "train" else 1.0)


@lru_cache
def _cost_of_one(name: str, kwargs: str, variants: tuple[str, ...]) -> int:
    with torch.device("meta"):
        vit = dense(name, json.loads(kwargs))
        return sum(build(vit, variant, json.loads(kwargs).get("tokens")).flops for variant in variants)


def expected_seconds(cell: Mapping[str, Any], macs: float, finished: Iterable[Mapping[str, Any]]) -> float:
    """From the speed of the finished cells on this machine; before the first one a guess."""
    rates = [
        statistics.median(done["seconds"]["dense"]) / done["flops"]["dense"] / done["cell"]["batch"]
        / (3 if done["cell"]["mode"] == "train" else 1)
        for done in finished
        if "seconds" in done and done["cell"]["kind"] == cell["kind"]
    ]  # fmt: skip
    one_round = macs * (statistics.median(rates) if rates else 1.5e-11 / cell["threads"])
    if cell["measure"] == "memory":
        return 10.0 * len(cell["variants"]) + one_round
    one_round = max(one_round, cell["fill"] * len(cell["variants"]))
    if cell["measure"] == "parts":
        return one_round * (cell["rounds"] + 1)
    rounds = min(cell["rounds"], max(cell["min_rounds"], cell["seconds"] / one_round))
    return one_round * (rounds + 1) + (
        30.0 * len(cell["variants"]) if cell["compile"] or cell["runtime"] != "torch" else 0
    )
