"""Pictures of what routing does.

Every picture is a grid of panels: the images downwards (for each of them one row per model), routed blocks or heads
to the right. Patches lie where they are in the image. Tokens without a patch (class, distillation, register) are
squares under the panel, in the order in which they enter the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amod.analysis.panels import (
    as_shown,
    faded,
    figure_of,
    first_panel,
    heat,
    merged_patches,
    outline,
    patch_pixels,
    pyplot_agg,
    save_figure,
    squares,
    text_lines,
)
from amod.analysis.routing_statistics import MEASURES, METHODS, Correlation, Seen, seen
from amod.analysis.style import COLOURS, LINES, MARKERS, NAMES
from amod.routing import Routing

SQUARES = "Squares below: tokens without a patch"
SCALE = (
    "each panel has its own scale, from the first to the second number, which are the least and the greatest of its "
    f"patches. {SQUARES}, which may lie beyond."
)


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
    shown = as_shown(images)

    def panel(axis: Any, row: int, layer: Seen) -> None:
        mask, group = layer.kept[row].cpu(), layer.group[row].cpu()
        prefix = len(mask) - grid[0] * grid[1]
        light = patch_pixels(mask.float(), grid, shown.shape[1:3])[:, :, None]
        image = merged_patches(shown[row], group[prefix:], grid)
        axis.imshow(image * light + faded(shown[row]) * (1 - light))
        outline(axis, patch_pixels(torch.where(mask, group, -1).float(), grid, shown.shape[1:3]))
        squares(axis, ["black" if kept else "white" for kept in mask[:prefix]])

    foot = f"Skipped patches are pale and without colour, merged ones have one colour. {SQUARES}, black if kept."
    _draw_blocks(shown, routings, panel, path, title, names, text_lines(caption, foot))


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
    shown = as_shown(images)

    def panel(axis: Any, row: int, layer: Seen) -> None:
        if layer.scores is None:
            return
        heat(axis, layer.scores[row].cpu(), grid, shown.shape[1:3], axis.get_title())

    foot = f"Bright: high score; {SCALE}"
    _draw_blocks(shown, routings, panel, path, title, names, text_lines(caption, foot))


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
    shown = as_shown(images)
    rows = [(image, model) for image in range(len(images)) for model in heads]
    figure, axes = figure_of(len(rows), 1 + max(scores.shape[1] for _, scores in heads.values()), shown, title)
    for row, (image, model) in enumerate(rows):
        block, scores = heads[model]
        first_panel(axes[row, 0], shown[image], names[image] if names else "image", f"{model}, block {block}")
        for head, score in enumerate(scores[image].cpu()):
            heat(axes[row, 1 + head], score, grid, shown.shape[1:3], f"head {head}")
    foot = f"Share of the attention that each token receives, as a mean over all tokens that look; {SCALE}"
    save_figure(figure, axes, path, text_lines(caption, foot))


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
    shown = as_shown(images)
    figure, axes = figure_of(len(images), 1 + len(importance), shown, title)
    for image in range(len(images)):
        first_panel(axes[image, 0], shown[image], names[image] if names else "image", "")
        for column, (block, values) in enumerate(importance.items(), start=1):
            axis, value = axes[image, column], values[image].cpu()
            field = torch.full((grid[0] * grid[1],), torch.nan)
            field[removed[image].cpu() - prefix] = value
            most = max(float(value.abs().max()), 1e-12)
            axis.imshow(patch_pixels(field, grid, shown.shape[1:3]), cmap="PuOr_r", vmin=-most, vmax=most)
            axis.set_facecolor("0.7")
            axis.set_title(f"block {block}: ±{most:.2g}", fontsize=6)
    foot = (
        "Change of the dense model's cross-entropy (nats) without the patch: orange higher, the patch mattered; purple "
        "lower; grey: not measured. Each panel has its own scale, the number above it."
    )
    save_figure(figure, axes, path, text_lines(caption, foot))


def draw_kept_often(
    routings: Mapping[str, Routing], grid: tuple[int, int], path: Path, title: str, caption: str = ""
) -> None:
    """How often each place is kept, and not merged with another, over all images: a router that does not look at the
    image keeps the same places."""
    blocks = _blocks(routings)
    figure, axes = figure_of(len(routings), len(blocks), np.zeros((1, *grid, 3)), title)
    mesh = None
    for row, (model, routing) in enumerate(routings.items()):
        for layer in seen(routing):
            axis = axes[row, blocks.index(layer.block)]
            often = layer.alone().float().mean(dim=0)
            prefix = len(often) - grid[0] * grid[1]
            mesh = axis.imshow(often[prefix:].view(grid), cmap="cividis", vmin=0, vmax=1)
            squares(axis, [mesh.cmap(float(value)) for value in often[:prefix]])
            axis.set_title(f"block {layer.block}", fontsize=7)
        axes[row, 0].set_ylabel(model, fontsize=8)
    figure.colorbar(mesh, ax=axes, label="share of the images", shrink=0.8)
    save_figure(figure, axes, path, text_lines(caption, f"{SQUARES}."))


def draw_correlation(
    table: Sequence[Correlation], path: Path, title: str, caption: str, labels: Mapping[str, str]
) -> None:
    """Correlation with importance by block, a line per source of scores, bars for the 95 % intervals, dashes for runs.

    The axes fit the runs; a bar that is longer than they are leaves the picture.

    Args:
        labels: the sources to draw, and their names.
    """
    figure, axes = pyplot_agg().subplots(
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
        points = [value for row in table if row.measure == measure for value in row.each if value == value]  # not nan
        if points and len(table[0].each) > 1:  # a long bar of few runs must not hide the rest
            room = 0.5 * (max(points) - min(points))
            axis.set_ylim(min(points) - room, max(points) + room)
        axis.set_title(f"{method}, {MEASURES[measure]}", fontsize=8)
        axis.set_xticks(sorted({row.block for row in table}))
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("routed block")
    figure.supylabel("correlation of score and importance", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, axes, path, caption)


def _line_style(source: str) -> tuple[Any, Any, Any, Any]:
    if source in NAMES:
        return COLOURS[source], MARKERS[source], LINES[source], "full"
    if source == "dense maps":
        return COLOURS["attention"], MARKERS["attention"], ":", "none"
    return COLOURS["isoflop"], MARKERS["isoflop"], LINES["isoflop"], "none"


def _blocks(routings: Mapping[str, Routing]) -> list[int]:
    return sorted({layer.layer for routing in routings.values() for layer in routing})


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
    figure, axes = figure_of(len(rows), 1 + len(blocks), shown, title)
    for row, (image, model) in enumerate(rows):
        first_panel(axes[row, 0], shown[image], names[image] if names else "image", model)
        for layer in layers[model]:
            axis = axes[row, 1 + blocks.index(layer.block)]
            axis.set_title(f"block {layer.block}", fontsize=7)
            panel(axis, image, layer)
    save_figure(figure, axes, path, caption)
