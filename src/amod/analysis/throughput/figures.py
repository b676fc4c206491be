"""The figures of a finished cell, and the words for it.

efficiency = speed-up / FLOPs ratio, both against dense timm with its fused attention in the same rounds: 1 means that
the clock sees every saved multiply-accumulate. ``median [lower, upper quartile]`` of the ratios within each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from amod.analysis.style import NAMES
from amod.analysis.throughput.parts import PARTS
from amod.analysis.throughput.timing import Quartiles, paired, quartiles

Record = Mapping[str, Any]


def speed_up(record: Record, variant: str, baseline: str = "dense") -> Quartiles:
    """How many times as many images per second as ``baseline``."""
    return paired(record["seconds"][baseline], record["seconds"][variant])


def flops_ratio(record: Record, variant: str) -> float:
    return record["flops"]["dense"] / record["flops"][variant]


def efficiency(record: Record, variant: str) -> Quartiles:
    return paired(record["seconds"]["dense"], record["seconds"][variant], 1 / flops_ratio(record, variant))


def images_per_second(record: Record, variant: str) -> float:
    return record["cell"]["batch"] / statistics.median(record["seconds"][variant])


def title(cell: Mapping[str, Any]) -> str:
    units = {"img_size": "pixels", "tokens": "tokens"}
    size = "".join(f" at {cell['kwargs'][key]} {unit}" for key, unit in units.items() if cell["kwargs"].get(key))
    what = {"speed": "", "parts": ", where the time goes", "memory": ", peak memory"}[cell["measure"]]
    return f"{cell['model']}{size}, batch {cell['batch']}, {setting(cell)}{what}"


RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}


def setting(cell: Mapping[str, Any]) -> str:
    mode = "training step" if cell["mode"] == "train" else "forward"
    how = RUNTIMES.get(cell["runtime"]) or ("compiled" if cell["compile"] else "eager")
    precision = "its own precision" if cell["precision"] == "default" else cell["precision"]
    return f"{mode}, {how}, {precision}"


def label(record: Record, variant: str) -> str:
    name, _, capacity = variant.partition("@")
    name = "tome" if name.startswith("tome_r") else name
    note = record["notes"][variant]
    parts = [f"C = {float(capacity):g}" if capacity else "", note if name in ("isoflop", "tome") else ""]
    return ", ".join([NAMES[name], *filter(None, parts)])


def summary(record: Record) -> str:
    """One line on a finished cell."""
    names = [v for v in record["cell"]["variants"] if v != "dense"]
    if record["cell"]["measure"] == "speed":
        rounds = len(record["seconds"]["dense"])
        figures = (f"{v} {speed_up(record, v).median:.2f}x (eff. {efficiency(record, v).median:.3f})" for v in names)
        return f"{', '.join(figures)}; {rounds} rounds, {record['took']:.0f} s"
    if record["cell"]["measure"] == "memory":
        return ", ".join(f"{v} {memory_ratio(record, v):.3f} of dense" for v in names)
    return f"{len(record['parts']['dense']['rest'])} rounds, {record['took']:.0f} s"


def memory_ratio(record: Record, variant: str, kind: str = "tensors") -> float:
    return record["memory"][variant][kind] / record["memory"]["dense"][kind]


def activations_ratio(record: Record, variant: str) -> float:
    ours, dense = (record["memory"][v]["tensors"] - record["memory"][v]["weights"] for v in (variant, "dense"))
    return ours / dense


def model_of(record: Record) -> str:
    size = record["cell"]["kwargs"].get("img_size")
    return f"{record['cell']['model']} ({size} px)" if size else record["cell"]["model"]


def milliseconds(record: Record, variant: str) -> list[float]:
    """Per image and part."""
    return [1000 * quartiles(record["parts"][variant][part]).median / record["cell"]["batch"] for part in PARTS]
