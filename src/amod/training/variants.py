"""What a config says of the model and of its routing must go together: whatever trains or measures asks this."""

from __future__ import annotations

import math
import re
from typing import Any

from amod.errors import UserError, shown
from amod.plan import make_plan
from amod.training.config import WITHOUT_CAPACITY, Model, Placement, Router, Variant, choices, model_file


def check_variant(cfg: Variant) -> None:
    check_model(cfg.model)
    check_placement(cfg)
    depth, wanted = depth_of(cfg.model), cfg.router.depth
    if wanted is not None and depth is not None and wanted > depth:
        raise UserError(f"router.depth={wanted}: {cfg.model.label} has {depth} blocks; choose 1 to {depth}, or null")
    if cfg.budget is not None and cfg.router.name in ("none", "plan", "tuning"):
        why = "costs what its gates leave" if cfg.router.name == "tuning" else "always costs the same"
        raise UserError(f"budget={cfg.budget}: router={cfg.router.name} {why}; leave budget out")
    if cfg.budget is not None and cfg.router.name == "avit":
        raise UserError(
            f"budget={cfg.budget}: router=avit decides image by image what it computes; leave budget out, and choose "
            "router.ponder, the weight of the loss that makes tokens halt early"
        )
    if cfg.budget is not None and cfg.router.name == "merge" and cfg.router.r is not None:
        raise UserError(f"budget={cfg.budget}: picks r, and router.r={cfg.router.r} says it; leave one of them out")
    if cfg.budget is not None and wanted is not None:
        raise UserError(f"budget={cfg.budget}: router.depth={wanted} says the depth; leave one of them out")
    check_tokens(cfg)


def check_model(model: Model) -> None:
    channels = model.kwargs.arguments().get("in_chans", 3)
    if channels != 3:
        raise UserError(f"model.kwargs.in_chans={shown(channels)}: must be 3; grey images are repeated to RGB")
    known = model.label in choices("model")
    meant = model_file(model.label).name if known else model.name
    if model.name != meant:
        raise UserError(
            f"model.name={model.name}: the model.kwargs of model={model.label} would overrule it; leave model.name at "
            f"{meant}, or start from another choice, as in model=deit_small model.name={model.name}"
        )


def from_weights(model: Model) -> bool:
    return model.checkpoint is not None or model.pretrained


def check_placement(cfg: Variant) -> None:
    blocks, router, said = cfg.placement.blocks, cfg.router, said_of(cfg.placement)
    if blocks is not None and (not isinstance(blocks, list) or not blocks):
        raise UserError(f"{said}: must be a list of 0-based block indices such as [1,4,7], or null for the name's own")
    if router.name == "plan":
        if router.plan is None:
            raise UserError("router.file=null: router=plan needs a plan's YAML file, as in router.file=PLAN.yaml")
        for key, value, usual in (("blocks", blocks, None), ("last", cfg.placement.last, None)):
            if value != usual:
                raise UserError(f"placement.{key}={shown(value)}: router=plan says it already; leave it out")
        return
    if router.name == "tuning":
        check_gates(cfg, depth_of(cfg.model) or 1000)
        return
    if router.name == "isoflop":
        if cfg.placement.last is not None:
            raise UserError("placement.last=class: router=isoflop has no plan; leave it out")
        return
    if blocks is None and router.name == "none":
        return
    depth = depth_of(cfg.model) or 1000  # an unknown depth is checked when the model is built
    named = None if cfg.placement.name == "own" else cfg.placement.name
    try:
        make_plan(depth, router.name, placement=named if blocks is None else blocks, last=cfg.placement.last)
    except UserError as error:
        raise UserError(f"{said}: {in_settings(error).partition(': ')[2]}") from None


def said_of(placement: Placement) -> str:
    """The setting that places."""
    return f"placement={placement.name}" if placement.blocks is None else f"placement.blocks={shown(placement.blocks)}"


def check_gates(cfg: Variant, depth: int) -> None:
    """Of router=tuning in a model of so many blocks."""
    if cfg.placement.blocks is not None or cfg.placement.name != "own":
        raise UserError(f"{said_of(cfg.placement)}: router=tuning has router.layers in its place; leave it out")
    if cfg.router.cache != "kept" and cfg.model.task != "language":
        raise UserError(f"router.cache={cfg.router.cache}: is of language models; leave it out")
    try:
        make_plan(depth, "tuning", placement=cfg.router.layers, last=cfg.placement.last, **gates_of(cfg.router))
    except UserError as error:
        raise UserError(f"router.{in_settings(error)}") from None


def in_settings(error: UserError) -> str:
    """A plan's error, with ``last`` as the command has it."""
    return str(error).replace("(last=", "(placement.last=")


def gates_of(router: Router) -> dict[str, Any]:
    """What a config says of the gates, as arguments of ``make_plan`` and ``convert``."""
    named = {name: getattr(router, name) for name in ("skip", "per", "target", "scale", "cache")}
    return {name: value for name, value in named.items() if value is not None}


def check_tokens(cfg: Variant) -> None:
    """A routed block must keep at least one token. Models whose name does not tell are checked when built."""
    tokens = tokens_of(cfg.model)
    if tokens is None or cfg.router.name in WITHOUT_CAPACITY or cfg.budget is not None:
        return
    if math.floor(round(cfg.capacity * tokens, 9)) < 1:
        raise UserError(
            f"capacity={cfg.capacity}: keeps none of {cfg.model.label}'s {tokens} tokens; the least is "
            f"{math.ceil(10000 / tokens) / 10000:g} (one token)"
        )


def depth_of(model: Model) -> int | None:
    """Blocks of a timm ViT as far as its settings or its name tell, else None."""
    if model.kwargs.depth is not None:
        return model.kwargs.depth
    sizes = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}
    found = re.search(r"_(tiny|small|base|large|huge)_patch\d+(_\d+)?(\.|$)", model.name)  # plain names only
    return sizes[found.group(1)] if found else None


def tokens_of(model: Model) -> int | None:
    """Tokens of a timm ViT, class token included, as far as its settings or its name tell, else None."""
    match = re.search(r"^(?:vit|deit|deit3)_\w+?_patch(\d+)_(\d+)(?:\.|$)", model.name)
    patch = model.kwargs.patch_size or (match and int(match.group(1)))
    pixels = model.kwargs.img_size or (match and int(match.group(2)))
    if not isinstance(patch, int) or not isinstance(pixels, int) or "dist" in model.name:
        return None
    return (pixels // patch) ** 2 + 1
