"""The obvious implementation: timm's own dense forward, every map in memory, tokens hidden by masks. Slow and plain.

It uses a timm model and nothing of this package. A routed block's update of its kept tokens is what the whole block
computes for them when nobody can see the others: -inf is added to the others' columns, and the others' rows are thrown
away. So nothing is gathered here, neither tokens nor rotary rows nor relative positions.
"""

from __future__ import annotations

import copy

import torch

MASKS = ("attn_mask", "shared_rel_pos_bias", "shared_rel_pos")


def keep(scores, k, prefix=0):
    """The first ``prefix`` tokens, then the highest scores, earlier tokens first among equals; ascending."""
    order = sorted(range(len(scores)), key=lambda j: (j >= prefix, -float(scores[j]), j))
    return sorted(order[:k])


@torch.no_grad()
def forward(vit, images, router, blocks, k, keep_prefix=False, weights=None, sigmoid=False):
    """Logits (B, classes) and, per routed block, the kept positions of each image and their scores."""
    vit = copy.deepcopy(vit)
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    prefix = vit.num_prefix_tokens if keep_prefix else 0
    state = {"left": None}
    decisions = {i: [] for i in blocks}

    def see_map(module, args, maps):  # (B, H, N, N), as it goes into timm's attention dropout
        state["maps"] = maps

    def hide(module, args, biased):  # a block with relative positions of its own ignores a mask
        return biased + state["mask"] if state["mask"] is not None else biased

    def before(i):
        def choose(block, args, kwargs):
            state["mask"] = None
            if i not in blocks:
                return None
            x = args[0]
            if router == "linear":
                scores = torch.stack([torch.stack([weights[i] @ token for token in image]) for image in x])
                scores = torch.sigmoid(scores) if sigmoid else scores
            else:
                scores = state["left"]
            kept = [keep(row, k, prefix) for row in scores]
            decisions[i] += list(zip(kept, scores, strict=True))
            seen = torch.zeros(x.shape[:2], dtype=torch.bool)
            for image, positions in enumerate(kept):
                seen[image, positions] = True
            state["seen"], state["scores"] = seen, scores
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None, :]
            name = next(n for n in MASKS if n in type(block).forward.__code__.co_varnames)
            if getattr(block.attn, "rel_pos", None) is not None:
                state["mask"] = mask
            else:
                given = kwargs.get(name)
                kwargs[name] = mask if given is None else given + mask
            return args, kwargs

        return choose

    def after(i):
        def mix(block, args, kwargs, out):
            maps, by_class = state["maps"], router == "class_attention"
            if i not in blocks:
                state["left"] = maps[:, :, 0].mean(dim=1) if by_class else maps.mean(dim=(1, 2))
                return None
            seen, scores = state["seen"], state["scores"]
            if state["left"] is not None:
                left = state["left"].clone()
                for image in range(len(seen)):
                    rows = seen[image]
                    if by_class and not rows[0]:
                        continue  # the class token was not there to ask
                    share = sum(left[image, j] for j in rows.nonzero().flatten())
                    among = maps[image][:, rows][:, :, rows]
                    left[image, rows] = share * (among[:, 0].mean(dim=0) if by_class else among.mean(dim=(0, 1)))
                state["left"] = left
            x, r = args[0], 1.0
            if router in ("linear", "attention_weighted"):
                r = scores.unsqueeze(-1)
            return torch.where(seen.unsqueeze(-1), x + r * (out - x), x)

        return mix

    for i, block in enumerate(vit.blocks):
        block.attn.attn_drop.register_forward_hook(see_map)
        if getattr(block.attn, "rel_pos", None) is not None:
            block.attn.rel_pos.register_forward_hook(hide)
        block.register_forward_pre_hook(before(i), with_kwargs=True)
        block.register_forward_hook(after(i), with_kwargs=True)
    return vit(images), decisions


def hiding(vit, seen, later_than):
    """A copy of ``vit`` in which nobody sees the tokens that are not ``seen`` (B, N) in the blocks behind one."""
    vit = copy.deepcopy(vit)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None, :]

    def hide(block, args, kwargs):
        name = next(n for n in MASKS if n in type(block).forward.__code__.co_varnames)
        given = kwargs.get(name)
        return args, {**kwargs, name: mask if given is None else given + mask}

    for block in vit.blocks:
        if hasattr(block.attn, "fused_attn"):
            block.attn.fused_attn = False
    for block in vit.blocks[later_than + 1 :]:
        if getattr(block.attn, "rel_pos", None) is not None:
            block.attn.rel_pos.register_forward_hook(lambda module, args, biased: biased + mask)
        else:
            block.register_forward_pre_hook(hide, with_kwargs=True)
    return vit
