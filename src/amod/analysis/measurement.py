"""What routed models and the dense model they come from do with the same images: the numbers behind every picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from amod.analysis.importance import dense_walk, is_scorable, leave_one_out, patches_to_remove
from amod.analysis.routing_statistics import (
    MEASURES,
    METHODS,
    Correlation,
    correlate,
    correlation,
    patch_contrast,
    seen,
)
from amod.attention import Request, explicit, logit_bias, project, request_in
from amod.entries import ClassOnly, Predict, Route
from amod.errors import UserError
from amod.routing import RoutedLayer, Routing, take
from amod.timm_models import RoutedViT

BATCH = 16
DENSE_MAPS, CONTRAST = "dense maps", "contrast"


@dataclass
class Measured:
    """One run's (seed's) measurements over B images; blocks are those that any of the models routes.

    ``routing`` by router: what each model decided. ``scores[source][block]`` (B, N): ``dense maps`` is Eq. 4 on the
    dense model's map of the block before; a router's own name is what it gave in its model; ``random`` is uniform;
    ``contrast`` is the spread of the patch's pixels (zero for prefix tokens). ``importance[block]`` (B, M) belongs to
    the positions ``removed`` (B, M). ``predicted`` (B,) are the dense model's classes.
    """

    grid: tuple[int, int]
    prefix: int
    class_token: bool
    routing: dict[str, Routing]
    scores: dict[str, dict[int, Tensor]]
    removed: Tensor
    importance: dict[int, Tensor]
    predicted: Tensor


def grid_of(vit: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches that the model makes of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    return vit.patch_embed.dynamic_feat_size((height, width))


def blocks_of(models: Mapping[str, RoutedViT]) -> list[int]:
    """The blocks in which any of the models chooses among its tokens."""
    return sorted(
        {i for model in models.values() for i, entry in model.plan.items() if not isinstance(entry, ClassOnly)}
    )


@torch.no_grad()
def measure(
    dense: VisionTransformer,
    models: Mapping[str, RoutedViT],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    tokens: int | None = None,
    seed: int = 0,
    draws: int = 0,
    done: Callable[[int], object] = lambda blocks: None,
) -> Measured:
    """Route, score and remove the tokens of images (B, 3, H, W), in batches, on the models' device.

    Args:
        dense: where importance is measured.
        models: by router name; in evaluation mode like ``dense``.
        labels: (B,); None: importance is about the class that the dense model predicts.
        tokens: remove at most so many patches of each image, drawn by ``seed``; None: each in turn.
        draws: the seed of random scores and of a random router: a run's own, so that runs differ in them.
        done: as in :func:`~amod.analysis.importance.leave_one_out`, which takes nearly all of the time.
    """
    device = next(dense.parameters()).device
    blocks = blocks_of(models)
    grid, prefix = grid_of(dense, images), dense.num_prefix_tokens
    class_token = getattr(dense, "cls_token", None) is not None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.Generator().manual_seed(draws)
    torch.manual_seed(draws)  # a random router draws from torch's own
    parts: list[Measured] = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH].to(device)
        walk = dense_walk(dense, batch, blocks)
        predicted = walk.logits.argmax(dim=1)
        wanted = predicted if labels is None else labels[start : start + BATCH].to(device)
        b, n = walk.inputs[blocks[0]].shape[:2]
        removed = patches_to_remove(b, n, prefix, tokens, generator).to(device)
        routing = {
            router: [layer for layer in model(batch, return_routing=True)[1] if layer.layer in blocks]
            for router, model in models.items()
        }
        contrast = torch.nn.functional.pad(patch_contrast(batch, grid), (prefix, 0))
        scores = {
            DENSE_MAPS: walk.scores,
            **{
                router: {layer.block: layer.scores for layer in seen(layers) if layer.scores is not None}
                for router, layers in routing.items()
                if any(layer.scores.shape[1] for layer in layers)
            },
            CONTRAST: dict.fromkeys(blocks, contrast),
        }
        chance = {block: torch.rand(b, n, generator=drawn).to(device) for block in blocks}
        scores.setdefault("random", chance)  # a random router's own are as good
        importance = {block: leave_one_out(dense, walk.inputs[block], wanted, block, removed, done) for block in blocks}
        parts.append(Measured(grid, prefix, class_token, routing, scores, removed, importance, predicted))
    return _joined(parts)


def _joined(parts: Sequence[Measured]) -> Measured:
    """The batches as one, on the CPU."""

    def cat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.cpu() for tensor in tensors])

    def cat_layers(router: str, place: int) -> RoutedLayer:
        layers = [part.routing[router][place] for part in parts]
        owners = [x.owner for x in layers if x.owner is not None]
        scores, indices = (cat([getattr(x, name) for x in layers]) for name in ("scores", "indices"))
        return RoutedLayer(layers[0].layer, scores, indices, cat(owners) if owners else None)

    first = parts[0]
    return Measured(
        first.grid,
        first.prefix,
        first.class_token,
        {
            router: [cat_layers(router, place) for place in range(len(layers))]
            for router, layers in first.routing.items()
        },
        {
            source: {block: cat([part.scores[source][block] for part in parts]) for block in scores}
            for source, scores in first.scores.items()
        },
        cat([part.removed for part in parts]),
        {block: cat([part.importance[block] for part in parts]) for block in first.importance},
        cat([part.predicted for part in parts]),
    )


def correlations(runs: Sequence[Measured]) -> list[Correlation]:
    """Every source of scores against importance, per block, measure and method, over the removed tokens of each image.

    Several runs must have routed the same blocks.
    """
    table = []
    for measure, method in product(MEASURES, METHODS):
        for source, scores in runs[0].scores.items():
            for block in scores:
                single = []
                for run in runs:
                    wanted = run.importance[block].abs() if measure == "size" else run.importance[block]
                    single.append(correlate(take(run.scores[source][block], run.removed), wanted, method))
                table.append(correlation(source, block, measure, method, single))
    return table


@torch.no_grad()
def head_scores(model: Any, images: Tensor) -> tuple[int, Tensor]:
    """The index of the last block that sees all N tokens, and the column mean of each of its heads' maps, (B, H, N).

    "How much the others look at each token": their mean over the heads is Eq. 4's score of the next block.
    """
    plan = model.plan if isinstance(model, RoutedViT) else {}
    first = min((i for i, entry in plan.items() if not isinstance(entry, Route)), default=len(model.blocks))
    seen = first + (not isinstance(plan.get(first), Predict))  # whose tokens are fewer before its block already
    found = [i for i in range(min(seen, len(model.blocks))) if not isinstance(plan.get(i), Route)]
    found = [i for i in found if is_scorable(model.blocks[i])]
    if not found:
        raise UserError("no block of this model that sees all tokens has an attention map that can be read")
    attn: Any = model.blocks[found[-1]].attn
    caught: list[Any] = []
    hook = attn.register_forward_pre_hook(lambda module, *given: caught.append(given), with_kwargs=True)
    try:
        model(images)
    finally:
        hook.remove()
    (x, *rest), inputs = caught[0]
    q, k, v = project(attn, x, inputs.get("rope"))
    bias = logit_bias(attn, request_in(tuple(rest), inputs) or Request(), q)
    return found[-1], explicit(q, k, v, bias)[1].mean(dim=2)
