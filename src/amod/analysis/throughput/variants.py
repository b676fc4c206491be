"""What is timed: a timm model, and by a variant's name what is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amod.analysis.throughput.timing import Step
from amod.errors import UserError
from amod.flops import count_flops, default_input_size
from amod.vit import PAPER_DEPTHS, check_model, convert, default_tokens, isoflop_depth, truncate


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
    check_model(vit)
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
        return _tome(vit, int(match.group(1)))
    if variant == "few_merges":
        few = convert(vit, "tome", placement="few", r=46, last="class")
        return Variant(few, count_flops(few, size), "")
    capacity = float(c)
    if name == "isoflop":
        timm_name = vit.pretrained_cfg.get("architecture") or ""
        standard = len(vit.blocks) in (12, 24) and size[1:] == (224, 224)
        depth = PAPER_DEPTHS.get(timm_name, {}).get(capacity) if standard else None
        depth = depth or isoflop_depth(vit, capacity)
        short = truncate(vit, depth)
        return Variant(short, count_flops(short, size), f"{depth} blocks")
    if name == "tome":
        return _tome(vit, closest_r(vit, count_flops(convert(vit, "attention", capacity), size)))
    routed = convert(vit, name, capacity)
    kept = next(iter(routed.plan.values())).kept(default_tokens(vit))
    return Variant(routed, count_flops(routed, size), f"K = {kept}")


def _tome(vit: Any, r: int) -> Variant:
    merging = convert(vit, "tome", r=r)
    return Variant(merging, count_flops(merging), f"r = {r}")


def closest_r(vit: Any, flops: int) -> int:
    """The r of ToMe whose cost comes closest to ``flops``: the one within that budget, or the one before it."""
    within = convert(vit, "tome", budget=flops).plan[0].r
    cost = {r: count_flops(convert(vit, "tome", r=r)) for r in (within, within - 1) if r >= 0}
    return min(cost, key=lambda r: abs(cost[r] - flops))


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


def make_step(model: nn.Module, vit: Any, batch: int, mode: str, precision: str, device: torch.device) -> Step:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *default_input_size(vit), generator=generator).to(device)
    if mode == "forward":
        return forward_step(model, images, precision)
    labels = torch.randint(vit.num_classes, (batch,), generator=generator).to(device)
    return train_step(model, images, labels, precision)


def facts(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """What a cell's record says of its variants."""
    return {
        "flops": {name: variant.flops for name, variant in variants.items()},
        "notes": {name: variant.note for name, variant in variants.items()},
    }
