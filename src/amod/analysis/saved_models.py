"""What a saved model keeps of your own pictures: a folder of ``amod.save_pretrained`` or of transformers', no run.

Importance is not measured here: nothing says what the pictures show, or what the model was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

import amod
from amod.analysis.depths import draw_depths
from amod.analysis.measurement import grid_of
from amod.analysis.pictures import draw_kept_patches, draw_scores
from amod.analysis.style import NAMES
from amod.analysis.subjects import output_of
from amod.deploy import picture, preparation
from amod.dress import of_detection, of_transformers
from amod.errors import UserError, one_line
from amod.files import expanded
from amod.hub import class_names_of
from amod.image_files import images_below
from amod.plan import halts
from amod.routing import Routing
from amod.training.config import ExplainConfig
from amod.training.terminal import quiet, say
from amod.training.weights import variant


def explain_saved(cfg: ExplainConfig) -> None:
    """What ``src/explain.py`` does with such a folder as run=: kept.png and scores.png of the first pictures."""
    quiet()
    folder = expanded(str(cfg.run))
    model = amod.from_pretrained(folder)
    if of_detection(model):
        raise UserError(f"run={cfg.run}: is a detector; name its run folder of src/train.py, whose images are drawn")
    if of_transformers(model) and model.main_input_name != "pixel_values":
        raise UserError(f"run={cfg.run}: its {type(model).__name__} reads no images alone; text= is for models of text")
    transform, mean, std = prepare(model, folder)
    files = images_below(expanded(str(cfg.images)))
    if not files:
        raise UserError(f"images={cfg.images}: holds no picture ({', '.join(IMG_EXTENSIONS)})")
    output = output_of(cfg, folder.resolve().name)
    images = torch.stack([picture(file, transform) for file in files[: cfg.shown]])
    saved = getattr(model, "plan", None)
    if not saved:
        model = variant(model, cfg)
    torch.manual_seed(cfg.seed)
    logits, routing, grid = run(model, images)
    shown = images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    output.mkdir(parents=True, exist_ok=True)
    name = "the saved plan" if saved else f"{NAMES[cfg.router.name]}, untrained"
    amount = f"capacity {cfg.capacity:g}" if cfg.budget is None else f"budget {cfg.budget}"
    asked = "" if saved else f", {amount}"
    names = [file.stem for file in files] if logits is None else [f"read as {n}" for n in read(model, logits)]
    panels: Any = (grid, output / "kept.png", "Patches that each routed block kept", names, f"{folder.name}{asked}.")
    draw_kept_patches(shown, {name: routing}, *panels)
    panels = (grid, output / "scores.png", "Scores by which each routed block chose", names, f"{folder.name}{asked}.")
    draw_scores(shown, {name: routing}, *panels)
    written = f"{output}/kept.png, {output}/scores.png"
    if halts(model):
        draw_depths(shown, routing, grid, output / "depths.png", names)
        written += f", {output}/depths.png"
    say(f"{written} (importance needs a run folder of src/train.py)")


def prepare(model: Any, folder: Path) -> tuple[Callable[[Any], Tensor], Any, Any]:
    """From a picture to (3, H, W) as the model takes it; the mean and standard deviation that were taken out."""
    if not of_transformers(model):
        transform, inputs = preparation(model)
        return transform, inputs["mean"], inputs["std"]
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(
            f"run={folder}: has no image processor ({one_line(error)}); save it into the same folder"
        ) from error
    return (
        lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        processor.image_mean,
        processor.image_std,
    )


@torch.inference_mode()
def run(model: Any, images: Tensor) -> tuple[Tensor | None, Routing, tuple[int, int]]:
    """Logits (B, classes), if there is a head; the routing; rows and columns of patches."""
    out, routing = model(images, return_routing=True)
    if not of_transformers(model):
        return (out if model.num_classes else None), routing, grid_of(model, images)
    patch = getattr(model.config, "vision_config", model.config).patch_size
    return getattr(out, "logits", None), routing, (images.shape[-2] // patch, images.shape[-1] // patch)


def read(model: Any, logits: Tensor) -> list[str]:
    """The most likely class of each image, by its name where the model knows it."""
    top = logits.argmax(dim=-1).tolist()
    if of_transformers(model):
        return [str(model.config.id2label.get(i, i)) for i in top]
    names = class_names_of(model)
    return [names[i] if names else f"class {i}" for i in top]
