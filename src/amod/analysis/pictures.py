"""Pictures of what routing does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from amod.routing import Routing


def kept_mask(indices: Tensor, tokens: int) -> Tensor:
    """Kept positions (B, K) -> which tokens were kept, (B, N) bool."""
    mask = torch.zeros(len(indices), tokens, dtype=torch.bool, device=indices.device)
    return mask.scatter_(1, indices, True)


def draw_kept_patches(
    images: Tensor, routing: Routing, grid: tuple[int, int], path: Path, title: str, names: Sequence[str] = ()
) -> None:
    """One row per image: the image, then what each routed block kept, with the rest dimmed (the paper's Fig. 6).

    A dot beside the block's name says that the class token (the first token without a patch) was kept as well.

    Args:
        images: (B, 3, H, W) in [0, 1], as they should be shown.
        routing: of the same batch.
        grid: patches in a column and in a row; tokens beyond their product are the prefix tokens.
        names: a label per image.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows, columns = len(images), 1 + len(routing)
    shape = (1.1 * columns, 1.25 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=shape, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=9)
    shown = images.clamp(0, 1).permute(0, 2, 3, 1).cpu()
    for row in range(rows):
        axes[row, 0].imshow(shown[row], interpolation="nearest")
        axes[row, 0].set_title(names[row] if names else "image", fontsize=7)
        for column, layer in enumerate(routing, start=1):
            tokens = layer.scores.shape[1]
            mask = kept_mask(layer.indices.cpu(), tokens)[row]
            prefix = tokens - grid[0] * grid[1]
            patches = mask[prefix:].view(1, 1, *grid).float()
            light = torch.nn.functional.interpolate(patches, size=shown.shape[1:3], mode="nearest")[0, 0, :, :, None]
            # skipped patches fade towards a grey blue, so that kept black ones still stand out
            veil = torch.tensor([0.25, 0.33, 0.45])
            axes[row, column].imshow(shown[row] * light + (0.2 * shown[row] + 0.8 * veil) * (1 - light))
            class_token = " ●" if prefix and mask[0] else ""
            axes[row, column].set_title(f"block {layer.layer}{class_token}", fontsize=7)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
