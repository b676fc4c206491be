"""Where an exported file's time goes: milliseconds by operator, dense beside routed, by the runtimes' own profilers.

python tools/profile_export.py [model] [capacity] [batch]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch

import amod
from amod.flops import default_input_size

RUNS = 30


def by_onnxruntime(path: Path, images: np.ndarray) -> Counter[str]:
    """Seconds by operator of RUNS calls, behind one to warm up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS):
        session.run(None, {"images": images})
    found: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["args"]["op_name"]] += event["dur"] / 1e6
    return found


def by_openvino(path: Path, images: np.ndarray) -> Counter[str]:
    import openvino

    core = openvino.Core()
    settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.read_model(path)
    model.reshape([*images.shape])
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    found: Counter[str] = Counter()
    for _ in range(RUNS):
        request.infer({0: images})
        for node in request.get_profiling_info():
            found[node.node_type] += node.real_time.total_seconds()
    return found


def main(model: str = "deit_small_patch16_224", capacity: str = "0.125", batch: str = "1") -> None:
    vit = timm.create_model(model).eval()
    images = torch.randn(int(batch), *default_input_size(vit)).numpy()
    variants = {"dense": vit, "A-MoD": amod.convert(vit, "attention", float(capacity))}
    print(f"{model}, C = {capacity}, batch {batch}: milliseconds for a batch, {RUNS} calls")
    for suffix, profile in ((".onnx", by_onnxruntime), (".xml", by_openvino)):
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for name, variant in variants.items():
                path = Path(folder) / f"{name}{suffix}"
                amod.export(variant, path)
                found[name] = profile(path, images)
        print(f"\n{profile.__name__[3:]}\n{'operator':<28}" + "".join(f"{name:>10}" for name in found))
        operators = sorted({*found["dense"], *found["A-MoD"]}, key=lambda key: -found["A-MoD"][key])
        rows = [(key, [1e3 * found[name][key] / RUNS for name in found]) for key in operators]
        for key, row in [
            *(r for r in rows if max(r[1]) >= 0.05),
            ("all", [sum(c) for c in zip(*(r for _, r in rows), strict=True)]),
        ]:
            print(f"{key:<28}" + "".join(f"{value:10.2f}" for value in row))


if __name__ == "__main__":
    main(*sys.argv[1:])
