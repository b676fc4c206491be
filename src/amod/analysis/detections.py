"""What a detector of a run folder finds, and what its routed layers kept: boxes, image tokens, memory and queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from amod.analysis.explain_checks import data_config, folders, saved
from amod.analysis.panels import as_shown, faded, figure_of, first_panel, outline, patch_pixels, save_figure
from amod.analysis.style import NAMES
from amod.analysis.subjects import output_of
from amod.detection import dense
from amod.detr_walk import DetrRouting
from amod.training import coco, detecting
from amod.training.config import UNROUTED, ExplainConfig
from amod.training.record import classes_of
from amod.training.terminal import quiet, say

SURE = 0.5
"""Score from which a box is drawn."""
KEPT, SKIPPED, TRUTH = "#0072B2", "#D55E00", "#FFFFFF"


def explain_detections(cfg: ExplainConfig) -> None:
    """What ``src/explain.py`` does with a detector's run as run=: detections.png of images of its data."""
    quiet()
    folder = folders(cfg, "run")[0]
    run = saved(folder)
    run.data = data_config(cfg, run)
    model: Any
    model, data = detecting.load_measured(folder, run, cfg.split)
    name = NAMES[run.router.name]
    if run.router.name in UNROUTED:
        model = detecting.variant(dense(model), cfg).eval()
        name = f"{NAMES[cfg.router.name]}, untrained"
    output = output_of(cfg, folder.resolve().name)
    samples = data.samples("test", train=False)
    images, masks, targets, _ = coco.join([samples[0, place] for place in range(min(cfg.shown, len(samples)))])
    torch.manual_seed(cfg.seed)
    with torch.inference_mode():
        out, routing = model(images, pixel_mask=masks, return_routing=True)
        grid = tuple(model.model.backbone(images, masks)[-1][0].shape[-2:])
    picture, classes = output / "detections.png", classes_of(folder) or []
    draw_detections(images, masks, targets, out, routing, grid, classes, picture, name)
    kept = [sum(layer.indices.shape[1] for layer in part) for part in routing]
    say(f"{picture}: {len(images)} images, of each at most {kept[0]} image tokens, {kept[1]} queries, {kept[2]} "
        "tokens of the memory kept in all routed layers")  # fmt: skip


def draw_detections(
    images: Tensor, masks: Tensor, targets: list[dict[str, Tensor]], out: Any, routing: DetrRouting,
    grid: tuple[int, int], classes: list[str], path: Path, title: str,
) -> None:  # fmt: skip
    """A row per image: what is found, then what each routed layer kept; encoder layers first.

    Args:
        images, masks, targets: of :func:`amod.training.coco.join`.
        grid: image tokens in a column and in a row.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    shown = as_shown((images * std + mean) * masks[:, None])
    sizes = [mask_size(mask) for mask in masks]
    found = detecting.detections(out, sizes)
    decoder = sorted({layer.layer for part in (routing.queries, routing.memory) for layer in part})
    figure, axes = figure_of(len(images), 1 + len(routing.encoder) + len(decoder), shown, title)
    for row in range(len(images)):
        axis, boxes = axes[row, 0], found[row]
        first_panel(axis, shown[row], "", "")
        for target in targets[row]["boxes"]:
            rectangle(axis, corners(target, sizes[row]), TRUTH, ":")
        for score, label, box in zip(boxes["scores"], boxes["labels"], boxes["boxes"].tolist(), strict=True):
            if score >= SURE:
                rectangle(axis, box, KEPT, "-")
                word = classes[int(label)] if classes else str(int(label))
                axis.text(box[0] + 1, box[1] - 1, f"{word} {score:.2f}", fontsize=5, va="bottom", color="white",
                          bbox={"facecolor": KEPT, "pad": 0.5, "linewidth": 0})  # fmt: skip
        for place, layer in enumerate(routing.encoder):
            axis = axes[row, 1 + place]
            axis.set_title(f"encoder {layer.layer}", fontsize=7)
            kept_tokens(axis, shown[row], layer.tokens(grid[0] * grid[1])[row], grid)
        for place, number in enumerate(decoder):
            axis = axes[row, 1 + len(routing.encoder) + place]
            axis.set_title(f"decoder {number}", fontsize=7)
            memory = next((layer for layer in routing.memory if layer.layer == number), None)
            every = torch.ones(grid[0] * grid[1], dtype=torch.bool)
            kept_tokens(axis, shown[row], every if memory is None else memory.tokens(len(every))[row], grid)
            queries = next((layer for layer in routing.queries if layer.layer == number), None)
            count = len(boxes["boxes"])
            kept = torch.ones(count, dtype=torch.bool) if queries is None else queries.tokens(count)[row]
            for box, score, is_kept in zip(boxes["boxes"].tolist(), boxes["scores"], kept.tolist(), strict=True):
                colour = KEPT if is_kept else SKIPPED
                if score >= SURE:
                    rectangle(axis, box, colour, "-")
                else:
                    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    axis.plot(x, y, "o" if is_kept else "x", color=colour, markersize=2.5, markeredgewidth=0.7)
    caption = (
        f"First: boxes of a score of at least {SURE:g}, and dotted the true ones. Encoder: image tokens that went "
        "through the layer. Decoder: the memory that it looked at, and its queries where their final boxes are: blue "
        "the kept, red the skipped; a dot or a cross for one whose score is lower."
    )
    save_figure(figure, axes, path, caption)


def mask_size(mask: Tensor) -> Tensor:
    """Height and width (2,) of the image in a padded one."""
    return torch.stack([mask.any(1).sum(), mask.any(0).sum()])


def corners(box: Tensor, size: Tensor) -> list[float]:
    """Centre and size in shares of the image -> left, top, right, bottom in pixels."""
    height, width = size.tolist()
    x, y, w, h = box.tolist()
    return [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]


def rectangle(axis: Any, box: list[float], colour: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style,
                             linewidth=0.9))  # fmt: skip


def kept_tokens(axis: Any, image: np.ndarray, kept: Tensor, grid: tuple[int, int]) -> None:
    """The image with the tokens that were skipped faded."""
    light = patch_pixels(kept.float(), grid, image.shape[:2])
    axis.imshow(image * light[..., None] + faded(image) * (1 - light[..., None]))
    outline(axis, light)
