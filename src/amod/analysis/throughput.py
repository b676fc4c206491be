"""How fast, how large, and where the time goes: what `src/benchmark.py` measures.

Variants are timed in turns in one process (A B C A B C ...), so that whatever else the machine does meets all of
them alike, and a speed-up is the median of the ratios *within* a round, never a ratio of two medians. A variant is a
name: ``dense`` (the timm model with its fused attention, the baseline of everything), ``tome_r13`` (ToMe with r = 13),
or one of ``isoflop linear attention attention_weighted random tome`` with a capacity, as in ``attention@0.125``.
``tome@C`` merges the r tokens per block whose FLOPs come closest to those of A-MoD at C.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import amod.baselines.tome as tome_module
import amod.vit as vit_module
from amod.baselines.tome import ToMeViT, r_for_flops, tome, tome_flops
from amod.errors import UserError
from amod.flops import PAPER_DEPTHS, count_flops, default_input_size, isoflop_depth
from amod.routers import Router
from amod.vit import RoutedViT, convert, truncate

Step = Callable[[], Any]


# --- statistics ---------------------------------------------------------------------------------------------------


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles by linear interpolation; of one value, that value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired(baseline: Sequence[float], other: Sequence[float], scale: float = 1.0) -> Quartiles:
    """Quartiles of baseline / other within each round, times ``scale``: how many times faster ``other`` was."""
    return quartiles([scale * b / o for b, o in zip(baseline, other, strict=True)])


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    min_rounds: int = 1,
    seconds: float = float("inf"),
    fill: float = 0.0,
    settle: bool = False,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time the steps in turns, after one untimed call of each (two with ``settle``: the first one compiles).

    Args:
        rounds: at most so many; fewer, but not fewer than ``min_rounds``, once ``seconds`` have passed.
        fill: a step shorter than so many seconds is repeated to fill them, and its mean is what one round notes.
    Returns:
        Seconds per call of every round, and how many calls each of them is the mean of, by name.
    """
    repeats: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(2 if settle else 1):
            synchronise()
            start = clock()
            step()
            synchronise()
            last = clock() - start
        if last < fill:  # the first call is slow; a second one tells how often the step fits
            start = clock()
            step()
            synchronise()
            last = clock() - start
        repeats[name] = max(1, round(fill / max(last, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = clock()
    for done in range(rounds):
        if done >= min_rounds and clock() - begin > seconds:
            break
        turn = done % len(steps)  # each round starts one further: a step's place behind another is no advantage
        for name in [*steps][turn:] + [*steps][:turn]:
            start = clock()
            for _ in range(repeats[name]):
                steps[name]()
            synchronise()
            times[name].append((clock() - start) / repeats[name])
    return times, repeats


# --- variants -----------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    model: nn.Module
    flops: int
    """Multiply-accumulates of one image."""
    note: str
    """What the name does not say: the depth, the r."""


def dense(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The timm model, its weights random: they do not change the time."""
    torch.manual_seed(0)
    vit: Any = timm.create_model(name, pretrained=False, **kwargs)
    vit_module.check_model(vit)
    if not all(getattr(getattr(block, "attn", None), "fused_attn", True) for block in vit.blocks):
        raise UserError("timm's fused attention is off (TIMM_FUSED_ATTN=0): the baseline is the fused one; unset it")
    return vit


def build(vit: Any, variant: str) -> Variant:
    """The variant of a dense timm model; ``vit`` itself is ``dense``."""
    name, _, c = variant.partition("@")
    size = default_input_size(vit)
    if variant == "dense":
        return Variant(vit, count_flops(vit, size), "")
    if match := re.fullmatch(r"tome_r(\d+)", variant):
        merging = tome(vit, int(match.group(1)))
        return Variant(merging, tome_flops(merging), f"r = {merging.r}")
    capacity = float(c)
    if name == "isoflop":
        timm_name = vit.pretrained_cfg.get("architecture") or ""
        standard = len(vit.blocks) in (12, 24) and size[1:] == (224, 224)
        depth = PAPER_DEPTHS.get(timm_name, {}).get(capacity) if standard else None
        depth = depth or isoflop_depth(vit, capacity)
        short = truncate(vit, depth)
        return Variant(short, count_flops(short, size), f"{depth} blocks")
    if name == "tome":
        merging = tome(vit, r_for_flops(vit, count_flops(convert(vit, "attention", capacity), size)))
        return Variant(merging, tome_flops(merging), f"r = {merging.r}")
    routed = convert(vit, name, capacity)
    kept = routed.tokens_kept(vit_module.default_tokens(vit))
    return Variant(routed, count_flops(routed, size), f"K = {kept}")


def forward_step(model: nn.Module, images: Tensor, precision: str) -> Step:
    model.eval()

    def step() -> None:
        with torch.inference_mode(), _precision(images.device, precision):
            model(images)

    return step


def train_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Step:
    """Forward, backward and an SGD step with momentum, as in the transfer recipe. Gradients are freed after it."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with _precision(images.device, precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _precision(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def _step(model: nn.Module, vit: Any, batch: int, mode: str, precision: str, device: torch.device) -> Step:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *default_input_size(vit), generator=generator).to(device)
    if mode == "forward":
        return forward_step(model, images, precision)
    labels = torch.randint(vit.num_classes, (batch,), generator=generator).to(device)
    return train_step(model, images, labels, precision)


def synchroniser(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


# --- the three measurements ---------------------------------------------------------------------------------------


def measure_speed(cell: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds per step of every variant and round. For the keys of ``cell`` see `src/benchmark.py`."""
    gc.collect()
    vit = dense(cell["timm_name"], cell["kwargs"]).to(device)
    variants = {name: build(vit, name) for name in cell["variants"]}
    steps = {}
    torch.compiler.reset()
    # one limit for all models of a class: beyond it a model would silently run uncompiled
    with torch._dynamo.config.patch(recompile_limit=64):
        for name, variant in variants.items():
            model = variant.model
            model.train(cell["mode"] == "train")
            run: Any = torch.compile(model, fullgraph=True, dynamic=False) if cell["compile"] else model
            steps[name] = _step(run, vit, cell["batch"], cell["mode"], cell["precision"], device)
        seconds, repeats = alternate(
            steps,
            cell["rounds"],
            min_rounds=cell["min_rounds"],
            seconds=cell["seconds"],
            fill=cell["fill"],
            settle=cell["compile"],
            synchronise=synchroniser(device),
        )
    return {"seconds": seconds, "repeats": repeats, **_facts(variants)}


def _facts(variants: Mapping[str, Variant]) -> dict[str, Any]:
    return {
        "flops": {name: variant.flops for name, variant in variants.items()},
        "notes": {name: variant.note for name, variant in variants.items()},
    }


PARTS = ("attention", "mlp", "routing", "movement", "rest")
"""Of a forward pass: the attention modules with their projections (and, for A-MoD, the column means), the MLPs, what
decides which tokens go where (router, top-k, matching), what moves tokens (take, put, merge), and everything else
(patch embedding, norms, residual additions, head)."""

_FUNCTIONS = (
    (vit_module, "attention_with_scores", "attention"),
    (vit_module, "top_k", "routing"),
    (vit_module, "refine", "routing"),
    (vit_module, "weigh_update", "routing"),
    (vit_module, "take", "movement"),
    (vit_module, "put", "movement"),
    (tome_module, "attention_with_keys", "attention"),
    (tome_module, "match", "routing"),
    (tome_module, "merge", "movement"),
)


class Stopwatch:
    """Adds up the seconds spent inside wrapped functions; a wrapped function within another counts to the outer.

    On CUDA it notes events, so that no part waits for the device and the time is the device's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []
        self.inside = False

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            start = self._mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.marks.append((part, start, self._mark()))
                self.inside = False

        return watched

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self.marks:
            totals[part] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        self.marks.clear()
        return totals


@contextlib.contextmanager
def watching(model: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """While it lasts, the parts of ``model`` are timed: its own forwards and this package's functions are wrapped."""
    vit: Any = model.vit if isinstance(model, RoutedViT | ToMeViT) else model
    modules: list[tuple[nn.Module, str]] = [(m, "routing") for m in model.modules() if isinstance(m, Router)]
    for block in vit.blocks:
        modules += [(block.attn, "attention"), (block.mlp, "mlp")]
    functions = [(home, name, getattr(home, name)) for home, name, _ in _FUNCTIONS]
    try:
        for module, part in modules:
            module.forward = watch.wrap(part, module.forward)  # type: ignore[method-assign]
        for home, name, part in _FUNCTIONS:
            setattr(home, name, watch.wrap(part, getattr(home, name)))
        yield
    finally:
        for module, _ in modules:
            module.__dict__.pop("forward", None)
        for home, name, function in functions:
            setattr(home, name, function)


def measure_parts(cell: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of the forward pass by part (``PARTS``), of every variant and round, in turns."""
    vit = dense(cell["timm_name"], cell["kwargs"]).to(device)
    variants = {name: build(vit, name) for name in cell["variants"]}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in variants}

    def watched(name: str) -> Step:
        step = _step(variants[name].model, vit, cell["batch"], "forward", cell["precision"], device)
        watch = Stopwatch(device)

        def run() -> None:
            with watching(variants[name].model, watch):
                begin = watch._mark()
                step()
                watch.marks.append(("rest", begin, watch._mark()))
            spent = watch.read()
            spent["rest"] -= sum(spent[part] for part in PARTS if part != "rest")
            for part in PARTS:
                seconds[name][part].append(spent[part])

        return run

    alternate({name: watched(name) for name in variants}, cell["rounds"], synchronise=synchroniser(device))
    for parts in seconds.values():
        for part in PARTS:
            parts[part] = parts[part][1:]  # the first is the untimed call
    return {"parts": seconds, **_facts(variants)}


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
            [sys.executable, "-m", "amod.analysis.throughput"],
            input=request,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise RuntimeError(f"memory of {name}: {child.stderr.strip().splitlines()[-1:]}")
        answer = json.loads(child.stdout.splitlines()[-1])
        memory[name] = answer["memory"]
        variants[name] = Variant(nn.Identity(), answer["flops"], answer["note"])
    return {"memory": memory, **_facts(variants)}


def _memory_child(request: Mapping[str, Any]) -> dict[str, Any]:
    device = torch.device(request["device"])
    torch.set_num_threads(request["threads"])
    with torch.device("meta"):  # only the variant itself is ever in memory
        vit = dense(request["timm_name"], request["kwargs"])
        variant = build(vit, request["variant"])
    variant.model.to_empty(device=device)
    for parameter in variant.model.parameters():
        nn.init.normal_(parameter, std=0.02)
    step = _step(variant.model, vit, request["batch"], request["mode"], request["precision"], device)
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


MEASURES: dict[str, Callable[[Mapping[str, Any], torch.device], dict[str, Any]]] = {
    "speed": measure_speed,
    "parts": measure_parts,
    "memory": measure_memory,
}


# --- how long it will take ----------------------------------------------------------------------------------------


def cost(cell: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one round of a cell, a training step counted as three forward passes."""
    with torch.device("meta"):
        vit = dense(cell["timm_name"], cell["kwargs"])
        flops = sum(build(vit, name).flops for name in cell["variants"])
    return flops * cell["batch"] * (3.0 if cell["mode"] == "train" else 1.0)


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
    return one_round * (rounds + 1) + (30.0 * len(cell["variants"]) if cell["compile"] else 0)


# --- the machine --------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine to compare figures."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()}, {os.cpu_count()} cores"
    return {
        "device": device.type,
        "kind": kind,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and there is no {compiler} (set CXX to name another)"
    return None


if __name__ == "__main__":
    print(json.dumps(_memory_child(json.load(sys.stdin))))
