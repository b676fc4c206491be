"""The goals, and what of them was reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amod.analysis.throughput.figures import Record, activations_ratio, efficiency, memory_ratio, speed_up
from amod.analysis.throughput.timing import Quartiles


@dataclass(frozen=True)
class Row:
    """One line of the goals table; ``reached`` is None where it was not run."""

    goal: str
    limit: str
    where: str
    measured: Quartiles | None
    reached: bool | None
    remark: str = ""


Value = Callable[[Record, str], Quartiles]


def goals(records: Sequence[Record]) -> list[Row]:
    """The goals of the project's issue 3, each with every cell of ``records`` that speaks about it."""
    batch_32 = {"measure": "speed", "batch": 32, "precision": "32-true", "runtime": "torch"}
    models = ("deit_tiny", "deit_small", "vit_base")
    rows = []
    for name, least, settings in (
        ("efficiency, forward, compiled", 0.99, {"mode": "forward", "compile": True}),
        ("efficiency, forward, eager", 0.95, {"mode": "forward", "compile": False}),
        ("efficiency, training step, eager", 0.95, {"mode": "train", "compile": False}),
    ):
        rows += _rows(records, name, least, {**batch_32, **settings}, models, efficiency, ("attention@",))
    for mode, what in (("forward", "forward"), ("train", "training step")):
        settings = {**batch_32, "mode": mode, "compile": False}
        rows += _rows(
            records, f"A-MoD / MoD, {what}, eager", 1.0, settings, models, _against("linear"), ("attention@",)
        )
    eager = {**batch_32, "mode": "forward", "compile": False}
    for capacity, rival in (("0.125", "tome_r13"), ("0.125", "tome@0.125"), ("0.5", "tome@0.5")):
        rows += _rows(
            records,
            "A-MoD / ToMe at equal GFLOPs, forward, eager",
            1.1,
            eager,
            ("deit_small",),
            lambda record, variant, rival=rival: speed_up(record, variant, rival),  # type: ignore[misc]
            (f"attention@{capacity}",),
            rival,
        )
    one = {**eager, "batch": 1}
    rows += _rows(records, "speed-up, batch 1, forward, eager", 1.65, one, models[1:2], speed_up, ("attention@0.125",))
    return rows + _memory_rows(records) + _runtime_rows(records)


RUNTIME_GOALS = (("openvino", 1, 0.97), ("openvino", 8, 1.0), ("onnxruntime", 1, 0.9), ("onnxruntime", 8, 0.97))


def _runtime_rows(records: Sequence[Record]) -> list[Row]:
    """Of exported files, in float32."""
    rows = []
    small = ("deit_small",)
    for runtime, batch, least in RUNTIME_GOALS:
        settings = {"measure": "speed", "batch": batch, "runtime": runtime, "precision": "32-true"}
        rows += _rows(
            records, f"efficiency, {runtime}, batch {batch}", least, settings, small, efficiency, ("attention@",)
        )
    for batch, least in ((1, 1.3), (8, 1.2)):
        settings = {"measure": "speed", "batch": batch, "runtime": "openvino", "precision": "32-true"}
        for capacity, rival in (("0.125", "tome_r13"), ("0.5", "tome@0.5")):
            rows += _rows(
                records,
                f"A-MoD / ToMe at equal GFLOPs, openvino, batch {batch}",
                least,
                settings,
                small,
                lambda record, variant, rival=rival: speed_up(record, variant, rival),  # type: ignore[misc]
                (f"attention@{capacity}",),
                rival,
            )
    return rows


def _against(router: str) -> Value:
    return lambda record, variant: speed_up(record, variant, variant.replace("attention", router))


def _rows(
    records: Sequence[Record],
    goal: str,
    least: float,
    settings: Mapping[str, Any],
    models: Sequence[str],
    value: Value,
    starts: tuple[str, ...],
    rival: str = "dense",
) -> list[Row]:
    rows = []
    for model in models:
        found = False
        wanted = {**settings, "model": model}
        for record in records:
            cell = record["cell"]
            if any(cell[key] != wanted[key] for key in wanted) or cell["kwargs"].get("img_size"):
                continue
            for variant in cell["variants"]:
                needed = rival if rival != "dense" or "MoD" not in goal else variant.replace("attention", "linear")
                if variant.startswith(starts) and needed in cell["variants"]:
                    found = True
                    measured = value(record, variant)
                    remark = "" if rival == "dense" else _gflops(record, variant, rival)
                    where = f"{model}, C = {variant.partition('@')[2]}"
                    rows.append(Row(goal, f">= {least:g}", where, measured, measured.median >= least, remark))
        if not found:
            rows.append(Row(goal, f">= {least:g}", model, None, None))
    return rows


def _gflops(record: Record, variant: str, rival: str) -> str:
    ours, theirs = (record["flops"][v] / 1e9 for v in (variant, rival))
    return f"{record['notes'][rival]}; {ours:.2f} G, ToMe {theirs:.2f} G"


def _memory_rows(records: Sequence[Record]) -> list[Row]:
    goal, limit = "peak memory at 4097 tokens, forward, / dense", "<= 1.05"
    rows = []
    for record in records:
        cell = record["cell"]
        large = cell["model"] == "deit_small" and cell["kwargs"].get("img_size") == 1024
        if cell["measure"] != "memory" or not large or cell["mode"] != "forward" or cell["precision"] != "32-true":
            continue
        for variant in cell["variants"]:
            if variant.startswith("attention@"):
                ratio = memory_ratio(record, variant)
                where = f"deit_small, C = {variant.partition('@')[2]}"
                remark = f"{activations_ratio(record, variant):.3f} without the weights"
                rows.append(Row(goal, limit, where, Quartiles(ratio, ratio, ratio), ratio <= 1.05, remark))
    return rows or [Row(goal, limit, "deit_small", None, None)]
