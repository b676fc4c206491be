"""A picture of A-ViT: how many blocks each patch ran before it halted, or its image's class token did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from amod.analysis.style import save
from amod.routing import Routing


def depths(routing: Routing, tokens: int) -> Tensor:
    """(B, tokens) int64: the blocks that each of the model's tokens ran."""
    return torch.stack([layer.tokens(tokens) for layer in routing]).sum(dim=0)


def draw_depths(images: Tensor, routing: Routing, grid: tuple[int, int], path: Path, names: Sequence[str]) -> None:
    """Each image, and the depths of its patches beside it.

    Args:
        images: (B, 3, H, W) in [0, 1], as they should be shown.
        grid: patches in a column and in a row.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tokens = routing[0].scores.shape[1]
    found = depths(routing, tokens)[:, tokens - grid[0] * grid[1] :]
    figure, axes = pyplot.subplots(
        2, len(images), figsize=(1.4 * len(images) + 1, 3.6), squeeze=False, layout="constrained"
    )
    for i, image in enumerate(images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()):
        axes[0, i].imshow(image, interpolation="nearest")
        axes[0, i].set_title(names[i], fontsize=7)
        mesh = axes[1, i].imshow(found[i].view(grid).cpu(), cmap="cividis", vmin=0, vmax=len(routing))
        axes[1, i].set_title(f"mean {found[i].float().mean():.1f}", fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(mesh, ax=axes[1], label="blocks run", shrink=0.8)
    figure.suptitle("How deep each patch went", fontsize=9)
    save(figure, path, dpi=150)
