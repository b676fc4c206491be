"""Which of timm's transformers are served, and what a plan may ask of their blocks."""

from __future__ import annotations

import inspect
from typing import Any

from timm.models import Beit, Eva, VisionTransformer, VisionTransformerRelPos
from torch import nn

from amod.attention import READABLE, ReadableAttention
from amod.dress import Dressed, check_own_forward, of_transformers
from amod.entries import READS_ATTENTION, ClassOnly, Gate, Halt, Merge, Predict, Prune, Route
from amod.errors import UserError
from amod.flops import Size, check_module, default_input_size
from amod.plan import Plan
from amod.routers import ROUTERS

FAMILIES = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)
"""timm's isotropic transformers whose forward loops over blocks of one kind."""

REFUSED = {
    "NaFlexVit": "its batches mix image sizes, with padding that a routed block would have to know",
    "Hiera": "its blocks pool tokens and attend within windows",
    "Cait": "its talking heads and class blocks leave no attention map of the usual kind",
    "Xcit": "its attention is between channels, not tokens",
    "VisionTransformerSAM": "its blocks attend within windows of a two-dimensional grid",
    "SwinTransformer": "its blocks attend within windows and merge the grid",
    "SwinTransformerV2": "its blocks attend within windows and merge the grid",
}
"""Transformers of timm that people may expect to be served, and why they are not."""

CUT = (Merge, Prune, ClassOnly)
"""What happens inside a block."""

LEARNED = (Route, Gate, Predict)
"""What asks a module of ``routers``."""


RELATIVE = (Beit, VisionTransformerRelPos)
"""Models whose positions are a table of all pairs of tokens, which tokens of several images in a row do not have."""
POOLS_EACH = ("map", "prr", "avgmax")
"""Values of ``global_pool`` by which a patch that is there twice counts twice, beside the plain average."""
READ_CLASS = (ClassOnly, Predict, Halt)
"""Entries for heads that read the class token alone."""


def check_model(vit: Any) -> None:
    if isinstance(vit, FAMILIES):
        if isinstance(vit, Dressed):
            raise UserError(
                "the model is routed already: convert the timm model it was made from, or amod.dense(model)"
            )
        return check_forward(vit)
    check_module(vit)
    library = type(vit).__module__.partition(".")[0]
    kind = f"{library}'{'' if library.endswith('s') else 's'} {type(vit).__name__}"
    reason = "it does not pass one sequence of tokens through like blocks"
    if type(vit).__name__ in {family.__name__ for family in FAMILIES}:
        reason = "it is not timm's class of that name; load its weights into timm's model"
    elif of_transformers(vit):
        reason = "amod.convert takes some of transformers' models, this takes timm's alone"
    elif type(vit).__name__ in REFUSED:
        reason = REFUSED[type(vit).__name__]
    names = ", ".join(family.__name__ for family in FAMILIES)
    raise UserError(f"{kind} cannot be routed: {reason}; served are timm's {names}")


def check_forward(vit: Any) -> None:
    """UserError for a forward of the user's own that a routed model would not run, or could not."""
    for name in ("forward", "forward_features", "forward_intermediates"):
        check_own_forward(vit, name)
        function = inspect.unwrap(getattr(type(vit), name))
        upwards = "__class__" in getattr(getattr(function, "__code__", None), "co_freevars", ())  # it says super()
        if function.__module__.partition(".")[0] != "timm" and (name == "forward" or upwards):
            how = "with super(), which the stand-in that a pass is run on has not" if name != "forward" else "itself"
            raise UserError(
                f"{type(vit).__name__} defines {name} {how}, and a routed model would not run it; convert timm's own "
                "class, and put what is yours around it"
            )


def readers(model: Any, plan: Plan) -> list[int]:
    """The blocks whose attention gets a request: it leaves scores or keys, or must know whose its tokens are, or where
    they stood."""
    cuts = [i for i, entry in plan.items() if not isinstance(entry, LEARNED)]
    found = {i - 1 for i, entry in plan.items() if isinstance(entry, Route) and entry.router in READS_ATTENTION}
    found |= {*cuts}
    gates = [i for i, entry in plan.items() if isinstance(entry, Gate) and entry.per == "token" and entry.skip != "mlp"]
    found |= {i for i in gates if type(getattr(model.blocks[i], "attn", None)) in READABLE}
    stages = [i for i, entry in plan.items() if isinstance(entry, Predict)]
    found |= {*range(min(stages), len(model.blocks))} if stages else set()
    if not isinstance(model, VisionTransformer):  # rotary tables or relative positions
        found |= {*plan} | {i for i in range(len(model.blocks)) if cuts and i > min(cuts)}
    return sorted(found)


def check_blocks(model: Any, plan: Plan) -> None:
    """UserError unless the blocks of this model can do what the plan asks of them."""
    for i in readers(model, plan):
        block = model.blocks[i]
        attn = getattr(block, "attn", None)
        if type(attn) not in READABLE:
            raise UserError(
                f"block {i} ({type(block).__name__} with {type(attn).__name__}) has no attention map that could be "
                "read for routing, merging or pruning; use router=linear or random, or another placement"
            )
    prunes = next((entry for entry in plan.values() if isinstance(entry, Prune)), None)
    if prunes and model.global_pool in POOLS_EACH and any(isinstance(entry, Merge) for entry in plan.values()):
        raise UserError(
            f"plan: {prunes} beside Merge: a head with global_pool={model.global_pool!r} counts a merged token as all "
            "of its patches, and knows no such number of pruned ones; leave one out"
        )
    for i, entry in plan.items():
        if isinstance(entry, Route):
            if entry.router not in ROUTERS:
                raise UserError(f"plan: block {i} has router={entry.router!r}; choose one of {', '.join(ROUTERS)}")
            if entry.skip == "block":
                continue
        if isinstance(entry, Gate) and entry.cache != "kept":
            raise UserError(f"cache={entry.cache!r}: is of language models; leave it out")
        if isinstance(entry, Gate) and "Post" in type(model.blocks[i]).__name__:
            raise UserError(
                f"block {i} ({type(model.blocks[i]).__name__}) normalises behind its parts, and a gate reads what is "
                "normalised before; use another model"
            )
        if isinstance(entry, READ_CLASS):
            class_tokens(model, type(entry).__name__)
        if isinstance(entry, Halt) and isinstance(model, RELATIVE):
            raise UserError(
                f"plan: Halt: {type(model).__name__}'s relative positions are a table of all pairs of tokens, which "
                "tokens of several images in a row do not have; use another method"
            )
        if isinstance(entry, Predict | Halt):
            continue
        missing = [part for part in ("norm1", "attn", "norm2", "mlp") if not hasattr(model.blocks[i], part)]
        if missing:
            raise UserError(
                f"block {i} ({type(model.blocks[i]).__name__}) has no place between attention and MLP where tokens "
                f"could leave it: no {missing[0]}"
            )
        if isinstance(entry, Prune) and entry.fuse and isinstance(model, RELATIVE):
            raise UserError(
                f"plan: block {i}, {entry}: a fused token has no place in {type(model).__name__}'s relative "
                "positions; use fuse=False"
            )


def is_readable(block: nn.Module) -> bool:
    return any(isinstance(module, ReadableAttention) for module in block.modules())


def check_readable(i: int, block: nn.Module) -> None:
    """UserError unless somewhere in the block, as it is now, is an attention that answers a request."""
    if not is_readable(block):
        attn = getattr(block, "attn", None)
        raise UserError(
            f"block {i}: {type(attn).__name__} was put there after convert, and its map cannot be read; wrap the "
            "attention that convert left there, or use router=linear or random"
        )


def class_rows(model: Any) -> int:
    """Class and distillation token."""
    return 2 if hasattr(model, "head_dist") else 1


def class_tokens(model: Any, entry: str = "ClassOnly") -> int:
    """How many of the first tokens the head reads; UserError if it reads others, too, which this entry leaves out."""
    if model.global_pool != "token" or getattr(model, "attn_pool", None) is not None:
        raise UserError(
            f"{entry}: the head of this model reads all tokens (global_pool={model.global_pool!r}), not the class "
            "token alone; leave the entry out"
        )
    return class_rows(model)


def default_tokens(vit: Any) -> int:
    """N at the model's own image size, prefix tokens included."""
    return vit.patch_embed.num_patches + vit.num_prefix_tokens


def tokens_at(vit: Any, size: Size) -> int:
    """N for an image of ``size``, prefix tokens included."""
    if tuple(size) == tuple(default_input_size(vit)):
        return default_tokens(vit)
    height, width = vit.patch_embed.dynamic_feat_size(tuple(size[1:]))
    return height * width + vit.num_prefix_tokens
