"""The parts that pictures of routing are made of: a grid of panels, patches as pixels, what was skipped faded."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amod.files import write_atomically

PALE = 0.93
"""Skipped patches lose their colour and fade towards this grey: they can be seen, and what was kept stands out."""


def pyplot_agg() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def as_shown(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3) in [0, 1]."""
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def faded(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) in pale greys, by the luma of its colours."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return (PALE + 0.35 * (grey - grey.max()))[:, :, None].repeat(3, axis=2)


def merged_patches(image: np.ndarray, group: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), the pixels of patches that are one by now in their mean colour.

    Args:
        group: (patches,), of one number where they are one.
    """
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    place, several = (
        patch_pixels(values.float(), grid, image.shape[:2]).astype(int) for values in (place, (count > 1)[place])
    )
    size = np.bincount(place.ravel(), minlength=len(count))
    mean = [np.bincount(place.ravel(), image[..., c].ravel(), len(count)) / size for c in range(3)]
    return np.where(several[..., None] > 0, np.stack(mean, axis=-1)[place], image)


def outline(axis: Any, light: np.ndarray) -> None:
    """A thin line where pixels (H, W) differ: between kept and skipped patches, around merged ones."""
    from matplotlib.collections import LineCollection

    down, right = (np.argwhere(np.diff(light, axis=axis)) for axis in (0, 1))
    lines = [[(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)] for y, x in down]
    lines += [[(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)] for y, x in right]
    axis.add_collection(LineCollection(lines, colors="black", linewidths=0.5))


def text_lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def patch_pixels(values: Tensor, grid: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """The values of the patches, the last of ``values``, as pixels (H, W)."""
    field = values[len(values) - grid[0] * grid[1] :].view(1, 1, *grid).float().cpu()
    return torch.nn.functional.interpolate(field, size=tuple(size), mode="nearest")[0, 0].numpy()


def heat(axis: Any, scores: Tensor, grid: tuple[int, int], size: Sequence[int], name: str) -> None:
    """The scores of patches from dark to bright, and squares for the tokens before them.

    The scale is that of the patches, and stands behind ``name``: on a class token's, often ten times as high, all of
    them would be dark.
    """
    prefix = len(scores) - grid[0] * grid[1]
    low, high = float(scores[prefix:].min()), float(scores[prefix:].max())
    mesh = axis.imshow(patch_pixels(scores, grid, size), cmap="cividis", vmin=low, vmax=max(high, low + 1e-12))
    squares(axis, [mesh.cmap(mesh.norm(float(score))) for score in scores[:prefix]])
    axis.set_title(f"{name}: {low:.3g} to {high:.3g}", fontsize=6)


def squares(axis: Any, colours: Sequence[Any]) -> None:
    """A square under the panel for each token without a patch."""
    from matplotlib.patches import Rectangle

    height, width = axis.get_images()[0].get_array().shape[:2]
    side = 0.09 * min(1.0, height / width)  # of the panel's width
    for place, colour in enumerate(colours):
        corner, tall = (1.2 * side * place, -0.13), side * width / height
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "linewidth": 0.5, "clip_on": False}
        axis.add_patch(Rectangle(corner, side, tall, transform=axis.transAxes, **look))
    if colours:
        axis.set_xlabel(" ", fontsize=5)  # room for them


def figure_of(rows: int, columns: int, shown: np.ndarray, title: str) -> tuple[Any, Any]:
    height, width = shown.shape[1:3]
    wide = 1.25 * min(2.0, max(1.0, width / height))
    tall = wide * height / width + 0.3
    figure, axes = pyplot_agg().subplots(
        rows, columns, figsize=(wide * columns + 0.3, tall * rows + 1.0), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def first_panel(axis: Any, image: np.ndarray, name: str, model: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(name, fontsize=7)
    axis.set_ylabel(model, fontsize=8)


def save_figure(figure: Any, axes: Any, path: Path, caption: str) -> None:
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    if caption:
        width = int(figure.get_figwidth() * 17)  # characters of this size that fit
        wrapped = "\n".join(textwrap.fill(line, width) for line in caption.splitlines())
        figure.supxlabel(wrapped, fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=130)
    pyplot_agg().close(figure)
    Image.open(drawn).convert("RGB").quantize(256, kmeans=1).save(small, "png", optimize=True)  # a third of the bytes
    write_atomically(path, small.getvalue())
