"""What is timed: a model of timm's or transformers', and by a variant's name what is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amod.analysis.throughput.timing import Step
from amod.dress import of_transformers
from amod.errors import UserError, one_line
from amod.families import check_model, default_tokens
from amod.flops import Size, count_flops, default_input_size
from amod.routers import ROUTERS
from amod.vit import PAPER_DEPTHS, convert, isoflop_depth, truncate


class Variant(NamedTuple):
    model: nn.Module
    flops: int
    """Multiply-accumulates of one image."""
    note: str
    """What the name does not say: the depth, the r."""


HF = "hf:"
"""Before the name or folder of a model of transformers'."""


def dense(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The model of timm's, or of transformers', its weights random: they do not change the time.

    ``kwargs``: timm's; of transformers' ``img_size`` (pixels), or for texts ``tokens``.
    """
    torch.manual_seed(0)
    if name.startswith(HF):
        return _of_transformers(name, kwargs)
    vit: Any = timm.create_model(name, pretrained=False, **kwargs)
    check_model(vit)
    if not all(getattr(getattr(block, "attn", None), "fused_attn", True) for block in vit.blocks):
        raise UserError("timm's fused attention is off (TIMM_FUSED_ATTN=0): the baseline is the fused one; unset it")
    return vit


def _of_transformers(name: str, kwargs: Mapping[str, Any]) -> Any:
    import transformers

    from amod.huggingface import check_model as check_encoder

    config = read_config(name)
    if kwargs.get("img_size"):
        config.image_size = kwargs["img_size"]
    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], transformers.AutoModel)
    build_from = kind.from_config if kind is transformers.AutoModel else kind._from_config
    model = build_from(config, dtype=torch.float32)
    check_encoder(model)
    return model


def read_config(name: str) -> Any:
    """transformers' config of ``hf:NAME``."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError(f"model={name}: transformers is missing; pip install 'amod[transformers]'") from error
    try:
        return AutoConfig.from_pretrained(name.removeprefix(HF))
    except Exception as error:  # whatever transformers makes of the name or the file
        raise UserError(
            f"model={name}: transformers finds no such model ({one_line(error)}); name a folder or a hub id"
        ) from error


def size_of(vit: Any, tokens: int | None = None) -> Size | int:
    """What one input of the model is: of a model of texts, so many tokens."""
    return tokens or 0 if getattr(vit, "main_input_name", None) == "input_ids" else default_input_size(vit)


def build(vit: Any, variant: str, tokens: int | None = None) -> Variant:
    """The variant of a dense model; ``vit`` itself is ``dense``. ``tokens``: of a text, for a model that reads them."""
    name, _, c = variant.partition("@")
    size: Any = size_of(vit, tokens)
    if of_transformers(vit) and name not in ("dense", *ROUTERS):
        raise UserError(f"variants: {variant} is of timm's models; of transformers' choose from {', '.join(ROUTERS)}")
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
    if of_transformers(vit):
        return Variant(routed, count_flops(routed, size), "")
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
            loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loss_of(out: Any, labels: Tensor) -> Tensor:
    """Of logits (B, classes); of what transformers gives, maybe without a head, the mean square of its first tensor."""
    return F.cross_entropy(out, labels) if isinstance(out, Tensor) else out[0].square().mean()


def _precision(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def make_step(
    model: nn.Module, vit: Any, batch: int, mode: str, precision: str, device: torch.device, tokens: int | None = None
) -> Step:
    generator, size = torch.Generator().manual_seed(0), size_of(vit, tokens)
    if isinstance(size, int):
        images = torch.randint(vit.config.vocab_size, (batch, size), generator=generator).to(device)
    else:
        images = torch.randn(batch, *size, generator=generator).to(device)
    if mode == "forward":
        return forward_step(model, images, precision)
    classes = 1 if of_transformers(vit) else vit.num_classes
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    return train_step(model, images, labels, precision)


def facts(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """What a cell's record says of its variants."""
    return {
        "flops": {name: variant.flops for name, variant in variants.items()},
        "notes": {name: variant.note for name, variant in variants.items()},
    }
