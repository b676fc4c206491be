"""Pictures of what routing does.

Every picture is a grid of panels: the images downwards (for each of them one row per model), routed blocks or heads
to the right. Patches lie where they are in the image. Tokens without a patch (class, distillation, register) are
squares under the panel, in the order in which they enter the model.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amod.analysis.routing_statistics import MEASURES, METHODS, Correlation, Seen, seen
from amod.analysis.style import COLOURS, LINES, MARKERS, NAMES
from amod.routing import Routing

PALE = 0.93
"""Skipped patches lose their colour and fade towards this grey: they can be seen, and what was kept stands out."""
SQUARES = "Squares below: tokens without a patch"


def draw_kept_patches(
    images: Tensor,
    routings: Mapping[str, Routing],
    grid: tuple[int, int],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    caption: str = "",
) -> None:
    """The image, then what each routed block kept, with the rest faded; one model above the other (Fig. 6, 24).

    Args:
        images: (B, 3, H, W) in [0, 1], as they should be shown.
        routings: by the model's name, of the same batch.
        grid: patches in a column and in a row; tokens beyond their product are the prefix tokens.
        names: a label per image.
    """
    shown = _as_shown(images)

    def panel(axis: Any, row: int, layer: Seen) -> None:
        mask, group = layer.kept[row].cpu(), layer.group[row].cpu()
        prefix = len(mask) - grid[0] * grid[1]
        light = _patches(mask.float(), grid, shown.shape[1:3])[:, :, None]
        image = _merged(shown[row], group[prefix:], grid)
        axis.imshow(image * light + _faded(shown[row]) * (1 - light))
        _outline(axis, _patches(torch.where(mask, group, -1).float(), grid, shown.shape[1:3]))
        _squares(axis, ["black" if kept else "white" for kept in mask[:prefix]])

    foot = f"Skipped patches are pale and without colour, merged ones have one colour. {SQUARES}, black if kept."
    _draw_blocks(shown, routings, panel, path, title, names, _lines(caption, foot))


def draw_scores(
    images: Tensor,
    routings: Mapping[str, Routing],
    grid: tuple[int, int],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    caption: str = "",
) -> None:
    """The score of every token as heat, for each routed block and model (Fig. 26). Arguments as above."""
    shown = _as_shown(images)

    def panel(axis: Any, row: int, layer: Seen) -> None:
        if layer.scores is None:
            return
        scores = layer.scores[row].cpu()
        _heat(axis, scores, grid, shown.shape[1:3])
        axis.set_title(f"{axis.get_title()}: {_span(scores)}", fontsize=6)

    foot = f"Bright: high score; each panel has its own scale, from the first to the second number. {SQUARES}."
    _draw_blocks(shown, routings, panel, path, title, names, _lines(caption, foot))


def draw_heads(
    images: Tensor,
    heads: Mapping[str, tuple[int, Tensor]],
    grid: tuple[int, int],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    caption: str = "",
) -> None:
    """What each head of the last dense block looks at (Fig. 7, 25).

    Args:
        heads: by the model's name, the block and the column mean of each head's map, (B, H, N).
    """
    shown = _as_shown(images)
    rows = [(image, model) for image in range(len(images)) for model in heads]
    figure, axes = _figure(len(rows), 1 + max(scores.shape[1] for _, scores in heads.values()), shown, title)
    for row, (image, model) in enumerate(rows):
        block, scores = heads[model]
        _first_panel(axes[row, 0], shown[image], names[image] if names else "image", f"{model}, block {block}")
        for head, score in enumerate(scores[image].cpu()):
            axis = axes[row, 1 + head]
            _heat(axis, score, grid, shown.shape[1:3])
            axis.set_title(f"head {head}: {_span(score)}", fontsize=6)
    foot = (
        "Share of the attention that each token receives, as a mean over all tokens that look; each panel has its own "
        f"scale, from the first to the second number. {SQUARES}."
    )
    _save(figure, axes, path, _lines(caption, foot))


def draw_importance(
    images: Tensor,
    importance: Mapping[int, Tensor],
    removed: Tensor,
    prefix: int,
    grid: tuple[int, int],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    caption: str = "",
) -> None:
    """How the loss changes when a patch is removed before each block: dark orange up, dark purple down.

    Args:
        importance: by block, (B, M), of the positions ``removed`` (B, M).
    """
    shown = _as_shown(images)
    figure, axes = _figure(len(images), 1 + len(importance), shown, title)
    for image in range(len(images)):
        _first_panel(axes[image, 0], shown[image], names[image] if names else "image", "")
        for column, (block, values) in enumerate(importance.items(), start=1):
            axis, value = axes[image, column], values[image].cpu()
            field = torch.full((grid[0] * grid[1],), torch.nan)
            field[removed[image].cpu() - prefix] = value
            most = max(float(value.abs().max()), 1e-12)
            axis.imshow(_patches(field, grid, shown.shape[1:3]), cmap="PuOr_r", vmin=-most, vmax=most)
            axis.set_facecolor("0.7")
            axis.set_title(f"block {block}: ±{most:.2g}", fontsize=6)
    foot = (
        "Change of the dense model's cross-entropy (nats) without the patch: orange higher, the patch mattered; purple "
        "lower; grey: not measured. Each panel has its own scale, the number above it."
    )
    _save(figure, axes, path, _lines(caption, foot))


def draw_kept_often(
    routings: Mapping[str, Routing], grid: tuple[int, int], path: Path, title: str, caption: str = ""
) -> None:
    """How often each place is kept, and not merged with another, over all images: a router that does not look at the
    image keeps the same places."""
    blocks = _blocks(routings)
    figure, axes = _figure(len(routings), len(blocks), np.zeros((1, *grid, 3)), title)
    mesh = None
    for row, (model, routing) in enumerate(routings.items()):
        for layer in seen(routing):
            axis = axes[row, blocks.index(layer.block)]
            often = layer.alone().float().mean(dim=0)
            prefix = len(often) - grid[0] * grid[1]
            mesh = axis.imshow(often[prefix:].view(grid), cmap="cividis", vmin=0, vmax=1)
            _squares(axis, [mesh.cmap(float(value)) for value in often[:prefix]])
            axis.set_title(f"block {layer.block}", fontsize=7)
        axes[row, 0].set_ylabel(model, fontsize=8)
    figure.colorbar(mesh, ax=axes, label="share of the images", shrink=0.8)
    _save(figure, axes, path, _lines(caption, f"{SQUARES}."))


def draw_correlation(
    table: Sequence[Correlation], path: Path, title: str, caption: str, labels: Mapping[str, str]
) -> None:
    """Correlation with importance by block, a line per source of scores, bars for the 95 % intervals, dashes for runs.

    The axes fit the runs; a bar that is longer than they are leaves the picture.

    Args:
        labels: the sources to draw, and their names.
    """
    figure, axes = _pyplot().subplots(
        len(MEASURES), len(METHODS), figsize=(10, 6), sharex=True, sharey="row", layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    for axis, (measure, method) in zip(axes.flat, product(MEASURES, METHODS), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        for place, (source, label) in enumerate(labels.items()):
            rows = [row for row in table if (row.measure, row.method, row.router) == (measure, method, source)]
            colour, marker, line, fill = _line_style(source)
            places = [row.block + 0.9 * ((place + 0.5) / len(labels) - 0.5) for row in rows]  # no bar hides another
            for at, row in zip(places, rows, strict=True):
                axis.scatter([at] * len(row.each), row.each, color=colour, marker="_", s=30, linewidths=1)
            axis.errorbar(
                places,
                [row.value.mean for row in rows],
                yerr=np.nan_to_num([row.value.high - row.value.mean for row in rows]),
                label=label,
                color=colour,
                marker=marker,
                linestyle=line,
                fillstyle=fill,
                capsize=2,
                elinewidth=1,
                markersize=5,
            )
        points = [value for row in table if row.measure == measure for value in row.each]
        if len(table[0].each) > 1:  # a long bar of few runs must not hide the rest
            room = 0.5 * (max(points) - min(points))
            axis.set_ylim(min(points) - room, max(points) + room)
        axis.set_title(f"{method}, {MEASURES[measure]}", fontsize=8)
        axis.set_xticks(sorted({row.block for row in table}))
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("routed block")
    figure.supylabel("correlation of score and importance", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    _save(figure, axes, path, caption)


def _line_style(source: str) -> tuple[Any, Any, Any, Any]:
    if source in NAMES:
        return COLOURS[source], MARKERS[source], LINES[source], "full"
    if source == "dense maps":
        return COLOURS["attention"], MARKERS["attention"], ":", "none"
    return COLOURS["isoflop"], MARKERS["isoflop"], LINES["isoflop"], "none"


# --- panels -------------------------------------------------------------------------------------------------------


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _as_shown(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3) in [0, 1]."""
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _faded(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) in pale greys, by the luma of its colours."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    return (PALE + 0.35 * (grey - grey.max()))[:, :, None].repeat(3, axis=2)


def _merged(image: np.ndarray, group: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """(H, W, 3), the pixels of patches that are one by now in their mean colour.

    Args:
        group: (patches,), of one number where they are one.
    """
    _, place, count = group.unique(return_inverse=True, return_counts=True)
    place, several = (
        _patches(values.float(), grid, image.shape[:2]).astype(int) for values in (place, (count > 1)[place])
    )
    size = np.bincount(place.ravel(), minlength=len(count))
    mean = [np.bincount(place.ravel(), image[..., c].ravel(), len(count)) / size for c in range(3)]
    return np.where(several[..., None] > 0, np.stack(mean, axis=-1)[place], image)


def _outline(axis: Any, light: np.ndarray) -> None:
    """A thin line where pixels (H, W) differ: between kept and skipped patches, around merged ones."""
    from matplotlib.collections import LineCollection

    down, right = (np.argwhere(np.diff(light, axis=axis)) for axis in (0, 1))
    lines = [[(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)] for y, x in down]
    lines += [[(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)] for y, x in right]
    axis.add_collection(LineCollection(lines, colors="black", linewidths=0.5))


def _blocks(routings: Mapping[str, Routing]) -> list[int]:
    return sorted({layer.layer for routing in routings.values() for layer in routing})


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _span(scores: Tensor) -> str:
    return f"{float(scores.min()):.3g} to {float(scores.max()):.3g}"


def _patches(values: Tensor, grid: tuple[int, int], size: Sequence[int]) -> np.ndarray:
    """The values of the patches, the last of ``values``, as pixels (H, W)."""
    field = values[len(values) - grid[0] * grid[1] :].view(1, 1, *grid).float().cpu()
    return torch.nn.functional.interpolate(field, size=tuple(size), mode="nearest")[0, 0].numpy()


def _heat(axis: Any, scores: Tensor, grid: tuple[int, int], size: Sequence[int]) -> None:
    low, high = float(scores.min()), float(scores.max())
    mesh = axis.imshow(_patches(scores, grid, size), cmap="cividis", vmin=low, vmax=max(high, low + 1e-12))
    _squares(axis, [mesh.cmap(mesh.norm(float(score))) for score in scores[: len(scores) - grid[0] * grid[1]]])


def _squares(axis: Any, colours: Sequence[Any]) -> None:
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


def _figure(rows: int, columns: int, shown: np.ndarray, title: str) -> tuple[Any, Any]:
    height, width = shown.shape[1:3]
    wide = 1.25 * min(2.0, max(1.0, width / height))
    tall = wide * height / width + 0.3
    figure, axes = _pyplot().subplots(
        rows, columns, figsize=(wide * columns + 0.3, tall * rows + 1.0), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _first_panel(axis: Any, image: np.ndarray, name: str, model: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(name, fontsize=7)
    axis.set_ylabel(model, fontsize=8)


def _draw_blocks(
    shown: np.ndarray,
    routings: Mapping[str, Routing],
    panel: Any,
    path: Path,
    title: str,
    names: Sequence[str],
    caption: str,
) -> None:
    """A row per image and model, a column per block of any of the models that has an entry in its plan."""
    blocks = _blocks(routings)
    layers = {model: seen(routing) for model, routing in routings.items()}
    rows = [(image, model) for image in range(len(shown)) for model in routings]
    figure, axes = _figure(len(rows), 1 + len(blocks), shown, title)
    for row, (image, model) in enumerate(rows):
        _first_panel(axes[row, 0], shown[image], names[image] if names else "image", model)
        for layer in layers[model]:
            axis = axes[row, 1 + blocks.index(layer.block)]
            axis.set_title(f"block {layer.block}", fontsize=7)
            panel(axis, image, layer)
    _save(figure, axes, path, caption)


def _save(figure: Any, axes: Any, path: Path, caption: str) -> None:
    for axis in axes.flat:
        if not axis.has_data():
            axis.set_axis_off()
    if caption:
        width = int(figure.get_figwidth() * 17)  # characters of this size that fit
        wrapped = "\n".join(textwrap.fill(line, width) for line in caption.splitlines())
        figure.supxlabel(wrapped, fontsize=7, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    _pyplot().close(figure)
    Image.open(drawn).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)  # a third of the bytes
