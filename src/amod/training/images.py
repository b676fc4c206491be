"""One image: which files are images, their pixels as RGB, and what timm makes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.datasets.folder import IMG_EXTENSIONS

from amod.errors import UserError, one_line


def hidden(name: str) -> bool:
    """What programs leave beside images: .ipynb_checkpoints, ._copies, __MACOSX, @eaDir."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def is_image(name: str) -> bool:
    """By its ending."""
    return name.lower().endswith(IMG_EXTENSIONS)


def open_rgb(file: str, upright: bool = True) -> Image.Image:
    """The image as 8-bit RGB, upright as its EXIF data say or else as it is stored, on white where it is transparent.

    16-bit grey is scaled down; PIL's own conversion would clip nearly all of it to white.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened) if upright else opened
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its 32-bit pixels have no fixed range; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


@contextmanager
def kept_rng() -> Iterator[None]:
    """Leave python's, numpy's and torch's CPU generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def transforms(input_cfg: Mapping[str, Any], augment: Mapping[str, Any], crop_pct: float | None) -> tuple[Any, Any]:
    """(for training, for evaluation). Grey images arrive as RGB.

    Only what ``augment`` sets is done, timm's defaults (flip, jitter, crop) do not apply; with nothing set,
    training images are resized and normalised exactly as in evaluation. ``crop_pct`` overrides the model's:
    1 keeps small images whole.
    """
    geometry = {key: input_cfg[key] for key in ("input_size", "mean", "std", "interpolation")}
    evaluation = create_transform(
        **geometry, crop_pct=crop_pct or input_cfg["crop_pct"], crop_mode=input_cfg.get("crop_mode")
    )
    augment = {k: v if isinstance(v, (str, float, int)) else tuple(v) for k, v in augment.items() if v is not None}
    if not augment:
        return evaluation, evaluation
    off = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None}
    try:
        training = create_transform(**{**geometry, **off, **augment}, is_training=True)
        with kept_rng():
            image = training(Image.new("RGB", (32, 32)))
        if image.shape != tuple(geometry["input_size"]) or not image.is_floating_point():
            raise ValueError(f"{image.dtype} of {tuple(image.shape)} is not what the model takes")
        return training, evaluation
    except Exception as error:  # whatever timm and torchvision make of them
        raise UserError(
            f"schedule.augment={augment}: must be arguments of timm.data.create_transform ({one_line(error)})"
        ) from error
