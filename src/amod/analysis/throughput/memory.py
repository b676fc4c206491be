"""Peak memory of one step, of every variant in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amod.analysis.throughput.timing import Step
from amod.analysis.throughput.variants import Variant, build, dense, facts, make_step
from amod.flops import default_input_size


def measure_memory(cell: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Peak memory of one step in bytes, every variant in a fresh process.

    ``tensors``: the most bytes of tensors alive at once, weights and images included; on CUDA this is
    ``max_memory_allocated``, on a CPU the same sum from the allocator's own events (torch's profiler), which include
    the scratch tensors inside an operator. ``weights``: the part that is there before the step. ``process``: the
    largest resident size of the whole process, libraries and what malloc keeps included; it sees
    what other libraries allocate, but is a coarse figure.
    """
    memory, variants = {}, {}
    for name in cell["variants"]:
        request = json.dumps({**cell, "variant": name, "device": str(device), "threads": torch.get_num_threads()})
        child = subprocess.run(
            [sys.executable, "-m", "amod.analysis.throughput.memory"],
            input=request,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},  # this very code
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"memory of {name}: {child.stderr.strip().splitlines()[-1:]}")
        answer = json.loads(child.stdout.splitlines()[-1])
        memory[name] = answer["memory"]
        variants[name] = Variant(nn.Identity(), answer["flops"], answer["note"])
    return {"memory": memory, **facts(variants)}


def _memory_child(request: Mapping[str, Any]) -> dict[str, Any]:
    device = torch.device(request["device"])
    torch.set_num_threads(request["threads"])
    with torch.device("meta"):  # only the variant itself is ever in memory
        vit = dense(request["timm_name"], request["kwargs"])
        variant = build(vit, request["variant"])
    variant.model.to_empty(device=device)
    for parameter in variant.model.parameters():
        nn.init.normal_(parameter, std=0.02)
    step = make_step(variant.model, vit, request["batch"], request["mode"], request["precision"], device)
    state = variant.model.state_dict().values()
    images = 4 * request["batch"] * torch.Size(default_input_size(vit)).numel()
    weights = sum(tensor.nbytes for tensor in state) + images
    if request["mode"] == "train":  # the optimiser's buffers, made by its first step
        weights += sum(p.nbytes for p in variant.model.parameters())
    step()
    process = _resident_peak()  # before the profiler, which needs memory of its own
    if device.type == "cuda":
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        tensors = torch.cuda.max_memory_allocated()
    else:
        tensors = weights + allocated_peak(step)
    memory = {"tensors": tensors, "weights": weights, "process": process}
    return {"memory": memory, "flops": variant.flops, "note": variant.note}


def allocated_peak(step: Step) -> int:
    """Most bytes that torch's CPU allocator held at once during ``step``, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.device_type() == torch.profiler.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _resident_peak() -> int | None:
    """Of this process alone: Linux's ``ru_maxrss`` starts from that of the process which started it."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if match:
        return int(match.group(1)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(_memory_child(json.load(sys.stdin))))
