"""What timm makes of an image, in training and in evaluation."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from amod.errors import UserError, one_line

log = logging.getLogger(__name__)


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
    if augment.get("auto_augment") and (jitter := augment.get("color_jitter")):
        log.warning("warning: schedule.augment.color_jitter=%s: timm leaves it out beside auto_augment", jitter)
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
