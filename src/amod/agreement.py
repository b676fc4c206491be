"""How far a model's answers are from the dense one's, and on what they can be compared. Axes: B images, C classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amod.errors import UserError

BATCH = 32
"""Images at once."""


class Loss(NamedTuple):
    """How far a plan's model is from the dense one, mean over images."""

    disagreement: float
    """Kullback-Leibler divergence of the classes in nats, or 1 - cosine of the features."""
    distance: float
    """The mean of its root, which plans are ranked by: nearly all of the divergence of images that a model was trained
    on is a few images', and its root lets the others speak (docs/untrained.md)."""


def disagreement(dense: Tensor, other: Tensor, has_head: bool) -> Tensor:
    """(B, C) logits or features, twice -> (B,): Kullback-Leibler divergence in nats, or 1 - cosine; 0 if the same."""
    if has_head:
        wanted, found = dense.float().log_softmax(-1), other.float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).clamp(min=0)  # rounding may leave less
    return (1 - torch.cosine_similarity(dense.float(), other.float(), dim=-1)).clamp(min=0)


def check_images(images: Any, least: int) -> Tensor:
    """The images; UserError unless these are prepared images, at least so many."""
    if not isinstance(images, Tensor) or images.dim() != 4 or len(images) < least:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images: {given}; at least {least} prepared images are needed as a tensor (B, C, H, W)")
    if not images.is_floating_point():
        raise UserError(
            f"images: are {images.dtype}; prepare them as for the model, which takes floating-point numbers"
        )
    if not images.isfinite().all():
        raise UserError("images: some pixels are not finite; prepare them as for the model")
    return images


def check_finite(model: Any, outputs: Tensor) -> None:
    """UserError where a model's own answers cannot be compared with anything."""
    if not outputs.isfinite().all():
        raise UserError(
            f"{type(model).__name__}: its answers to these images are not finite; look at its weights, or use float32"
        )


def refuse_one_output(model: Any, outputs: int, instead: str) -> None:
    if outputs == 1:
        raise UserError(
            f"{type(model).__name__}: has one output, where plans are judged by how the shares of classes change; "
            f"{instead}"
        )
