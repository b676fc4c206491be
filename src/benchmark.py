"""Measure speed, memory and where the time goes: python src/benchmark.py --help"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from amod.errors import UserError, did_you_mean
from amod.files import Ledger, expanded, make_folder
from amod.training.command import launch
from amod.training.config import choices, model_file
from amod.training.folder import git
from amod.training.rules import Count, NotNegative, Share, Text, allows, in_words, one_of

MODELS = tuple(n for n in choices("model") if model_file(n).get("task", "classification") == "classification")
VARIANTS = (
    "dense", "isoflop", "linear", "attention", "attention_weighted", "class_attention", "random", "tome", "few_merges",
)  # fmt: skip
CHOICES: dict[str, tuple[str, ...]] = {
    "measures": ("speed", "parts", "memory"),
    "models": MODELS,
    "variants": VARIANTS,
    "modes": ("forward", "train"),
    "precision": ("32-true", "bf16-mixed", "default"),
    "runtimes": ("torch", "onnxruntime", "openvino"),
}
# What an item of a list, and a single value, may be.
LISTS: dict[str, Any] = {
    "measures": one_of(*CHOICES["measures"]),
    "models": one_of(*MODELS),  # or hf:NAME
    "variants": one_of(*VARIANTS),
    "capacities": Share,
    "batch_sizes": Count,
    "modes": one_of(*CHOICES["modes"]),
    "compile": bool,
    "precision": one_of(*CHOICES["precision"]),
    "runtimes": one_of(*CHOICES["runtimes"]),
}
VALUES: dict[str, Any] = {
    "tokens": Count | None,
    "image_size": Count | None,
    "rounds": Count | None,
    "min_rounds": Count | None,
    "seconds": NotNegative | None,
    "fill": NotNegative | None,
    "threads": Count | None,
    "output": Text | None,
    "fresh": bool,
    "device": one_of("auto", "cpu", "cuda"),
}
TOKENS = 128
"""Of a text, where ``tokens`` is null."""
OVERRIDABLE = (*LISTS, "image_size", "rounds", "min_rounds", "seconds", "fill")
FIELDS = {
    "measures": "measure", "modes": "mode", "compile": "compile", "precision": "precision", "runtimes": "runtime",
}  # fmt: skip
"""What of a cell an axis sets."""
TIMED = {"rounds": "speed,parts", "min_rounds": "speed", "seconds": "speed", "fill": "speed"}
"""What is measured by them."""


# --- what is asked ------------------------------------------------------------------------------------------------


def check(cfg: DictConfig) -> None:
    presets = [name for name in cfg.presets if name not in ("base", "transformers")]
    if cfg.preset not in presets:
        hint = did_you_mean(str(cfg.preset), presets)
        raise UserError(f"preset={cfg.preset}: choose one of {', '.join(presets)}{hint}")
    for key, rule in VALUES.items():
        if not allows(rule, cfg[key]):
            raise UserError(f"{key}={_shown(cfg[key])}: must be {in_words(rule)}")
    for key, rule in LISTS.items():
        value = cfg[key]
        if value is None:
            continue
        if not OmegaConf.is_list(value) or not value:
            raise UserError(f"{key}={_shown(value)}: must be a list, as in {key}=[{_example(key)}], or null")
        for item in value:
            if (key == "variants" and re.fullmatch(r"tome_r\d+", str(item))) or (
                key == "models" and of_transformers(item)
            ):
                continue
            if not allows(rule, item):
                hint = did_you_mean(str(item), CHOICES.get(key, ()))
                raise UserError(f"{key}={_shown(value)}: {_shown(item)} must be {in_words(rule)}{hint}")
    if cfg.rounds is not None and cfg.min_rounds is not None and cfg.min_rounds > cfg.rounds:
        raise UserError(f"min_rounds={cfg.min_rounds}: rounds={cfg.rounds} are fewer; leave one of them out")
    if hub_models(cfg):
        check_hub_models(cfg)
    elif cfg.tokens is not None:
        raise UserError(f"tokens={cfg.tokens}: is of models that read texts; leave it out")
    output = output_of(cfg)
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output}: is a file; name a folder")


def one_model(arguments: list[str]) -> list[str]:
    """``model=X`` says ``models=[X]``; to Hydra, model= would be a choice of conf/model."""
    return [f"models=['{a.removeprefix('model=')}']" if a.startswith("model=") else a for a in arguments]


def of_transformers(model: object) -> bool:
    return str(model).startswith("hf:")


def hub_models(cfg: DictConfig) -> list[str]:
    """The models of transformers' that are asked for."""
    return [str(model) for model in cfg.models or [] if of_transformers(model)]


def check_hub_models(cfg: DictConfig) -> None:
    asked = hub_models(cfg)
    if len(asked) < len(cfg.models) or "hf:" in asked:
        raise UserError(f"models={_shown(cfg.models)}: name models of timm's or of transformers' (hf:NAME, hf:FOLDER)")
    for key, only in (("measures", "speed"), ("runtimes", "torch")):
        if others := [item for item in cfg[key] or [] if item != only]:
            raise UserError(f"{key}=[{','.join(others)}]: models of transformers are measured by {key}=[{only}] alone")


def output_of(cfg: DictConfig) -> Path:
    if cfg.output is not None:
        return Path(cfg.output)
    if asked := hub_models(cfg):  # a report of other cells does not replace that of the goals
        return Path("outputs/benchmark") / expanded(asked[0].removeprefix("hf:")).name
    plain = cfg.preset == "goals" and all(cfg[key] is None for key in OVERRIDABLE)
    return Path("results/benchmark" if plain else f"outputs/benchmark/{cfg.preset}")


def _example(key: str) -> str:
    return {"models": "deit_small", "capacities": "0.125,0.5", "batch_sizes": "1,32", "compile": "false,true"}.get(
        key, CHOICES[key][0] if key in CHOICES else "1"
    )


def _shown(value: Any) -> str:
    if OmegaConf.is_list(value):
        return "[" + ",".join(map(_shown, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def cells_of(cfg: DictConfig) -> Iterator[dict[str, Any]]:
    """The cells of a preset. One cell is timed in one go, its variants in turns; its values are its identity."""
    presets: Any = OmegaConf.to_container(cfg.presets)
    asked = {key: value for key in OVERRIDABLE if (value := _plain(cfg[key])) is not None}
    seen = []
    for part in presets["transformers" if hub_models(cfg) else cfg.preset].values():
        s = {**presets["base"], **part, **asked}
        if asked.get("rounds") is None:
            s["rounds"] = max(s["rounds"], asked.get("min_rounds") or 0)
        s["measures"] = [m for m in {**presets["base"], **part}["measures"] if m in asked.get("measures", (m,))]
        axes = (s["measures"], s["models"], s["batch_sizes"], s["modes"], s["compile"], s["precision"], s["runtimes"])
        for measure, model, batch, mode, compiled, precision, runtime in itertools.product(*axes):
            if not _runs(measure, mode, compiled, precision, runtime):
                continue
            cell = {
                "measure": measure,
                "model": model,
                **_source(model, s["image_size"], cfg.tokens),
                "batch": batch,
                "mode": "forward" if measure == "parts" else mode,
                "compile": compiled and measure == "speed",
                "precision": precision,
                "runtime": runtime,
                "variants": _variants(s["variants"], s["capacities"]),
                "rounds": s["rounds"],
                "min_rounds": s["min_rounds"],
                "seconds": s["seconds"],
                "fill": s["fill"],
            }
            if cell not in seen:
                seen.append(cell)
                yield cell


def check_cells(cfg: DictConfig, cells: list[dict[str, Any]]) -> None:
    """UserError for what was asked for and is in no cell: the preset has it not, or nothing is measured so."""
    why = (
        "preset=full has more (exported files run modes=[forward] compile=[false] measures=[speed] alone, parts are of "
        "forward passes, and only speed is measured compiled)"
    )
    if not cells:
        raise UserError(f"preset={cfg.preset}: has no cell of all that was asked for; {why}")
    for key, field in FIELDS.items():
        there = {cell[field] for cell in cells}
        if idle := [item for item in cfg[key] or [] if item not in there]:
            raise UserError(
                f"{key}={_shown(cfg[key])}: preset={cfg.preset} has no cell of {_shown(idle[0])} beside the rest that "
                f"was asked for; {why}"
            )
    if cfg.capacities is not None and not any("@" in variant for cell in cells for variant in cell["variants"]):
        raise UserError(f"capacities={_shown(cfg.capacities)}: none of these variants has a capacity; leave it out")
    measured = {cell["measure"] for cell in cells}
    for key, of in TIMED.items():
        if cfg[key] is not None and measured.isdisjoint(of.split(",")):
            raise UserError(f"{key}={_shown(cfg[key])}: is of measures=[{of}]; leave it out")


def _runs(measure: str, mode: str, compiled: bool, precision: str, runtime: str) -> bool:
    """Whether there is such a cell: other runtimes run forward passes alone, and only OpenVINO chooses a precision."""
    if runtime == "torch":
        return precision != "default"
    plain = (measure, mode, compiled) == ("speed", "forward", False)
    return plain and (precision == "32-true" or (precision == "default" and runtime == "openvino"))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _source(model: str, image_size: int | None, tokens: int | None) -> dict[str, Any]:
    """What makes the model: its name at timm or transformers, and arguments."""
    if of_transformers(model):
        from amod.analysis.throughput.variants import read_config

        config = read_config(model)
        if hasattr(config, "image_size") or hasattr(config, "vision_config"):
            if tokens is not None:
                raise UserError(f"tokens={tokens}: {model} reads images; leave it out")
            return {"timm_name": model, "kwargs": {"img_size": image_size} if image_size else {}}
        if image_size is not None:
            raise UserError(f"image_size={image_size}: {model} reads texts; leave it out, or say tokens=")
        return {"timm_name": model, "kwargs": {"tokens": tokens or TOKENS}}
    settings = model_file(model)
    kwargs = _plain(settings.kwargs)
    return {"timm_name": settings.name, "kwargs": {**kwargs, "img_size": image_size} if image_size else kwargs}


def _variants(names: list[str], capacities: list[float]) -> list[str]:
    alone = [name for name in names if name.startswith(("tome_r", "few_merges"))]
    routed = [name for name in names if name not in ("dense", *alone)]
    return ["dense", *(f"{name}@{c:g}" for c in capacities for name in routed), *alone]


# --- the run ------------------------------------------------------------------------------------------------------


def job(cfg: DictConfig) -> None:
    import torch  # seconds: only once the config is checked

    from amod.analysis.throughput import figures, machine, measures, report

    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; use device=cpu or auto")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    here = machine.describe(device)
    where = {key: here[key] for key in ("kind", "threads", "torch")}
    cells = [{**cell, **where} for cell in cells_of(cfg)]
    check_cells(cfg, cells)
    macs = [measures.cost(cell) for cell in cells]  # builds every model without memory: mistakes show before the work

    output = output_of(cfg)
    make_folder(output, f"output={output}")
    store = output / "cells.jsonl"
    ledger = Ledger(store)
    finished = {identity(record["cell"]): record for record in ledger.lines}
    if cfg.fresh:  # the others stay
        finished = {key: finished[key] for key in finished.keys() - {identity(cell) for cell in cells}}
    head = {
        "command": f"python src/benchmark.py {shlex.join(sys.argv[1:])}",
        "commit": commit(),
        "preset": cfg.preset,
        **here,
    }
    missing = machine.no_compiler(device)
    failed: list[dict[str, Any]] = []

    def write() -> str:
        records = [finished[identity(cell)] for cell in cells if identity(cell) in finished]
        more = len(records) < report.cells_in(output)  # a report of more of them stays until this has as many
        return report.write(output / "partial" if more else output, head, records, failed)

    print(f"{len(cells)} cells on {here['kind']}; threads: {here['threads']}", flush=True)
    for number, cell in enumerate(cells, 1):
        name = figures.title(cell)
        done = finished.get(identity(cell))
        if done is None and cell["compile"] and missing:
            failed.append({"cell": cell, "not_run": missing})
            print(f"[{number}/{len(cells)}] {name}: not run: {missing}", flush=True)
            continue
        if done is None:
            todo = [i for i in range(number - 1, len(cells)) if identity(cells[i]) not in finished]
            left = sum(measures.expected_seconds(cells[i], macs[i], finished.values()) for i in todo)
            end = time.strftime("%H:%M", time.localtime(time.time() + left))
            print(f"[{number}/{len(cells)}] {name} ... ({len(todo)} left, expected end {end})", flush=True)
            begin = time.time()
            try:
                result = measures.MEASURES[cell["measure"]](cell, device)
            except (UserError, KeyboardInterrupt):
                raise
            except Exception as error:  # one cell (too little memory, a compiler's fault) must not cost the others
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                failed.append({"cell": cell, "not_run": reason})
                print(f"    not run: {reason}", flush=True)
                continue
            done = {"cell": cell, "commit": head["commit"], "took": round(time.time() - begin, 1), **result}
            finished[identity(cell)] = done
            ledger.add(done)
            write()  # a run that is stopped leaves the report of what it measured
        print(f"    {figures.summary(done)}", flush=True)
    print(write())


def identity(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


def commit() -> str | None:
    """The code's version; with a + where files differ from it."""
    known = git("rev-parse", "--short", "HEAD")
    return known and known + ("+" if git("status", "--porcelain", "--", ".", "../src") else "")


if __name__ == "__main__":
    sys.argv = one_model(sys.argv)
    launch(job, "benchmark", check)
