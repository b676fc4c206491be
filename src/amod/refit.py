"""``amod.fit_head``: the classifier of a model that a plan made faster, moved to where the plan has moved its features.

An untrained plan moves the features that the classifier reads, and in part alike in all images. What it took from the
dense model's logits is predicted from the features by ridge regression, and a linear classifier takes the prediction
in: no label, no gradient, no FLOPs. Axes: B images, D features, C classes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from amod.agreement import BATCH, check_finite, check_images, disagreement, refuse_one_output
from amod.errors import UserError, one_line
from amod.flops import modes_kept

RIDGES = [10.0 ** (k / 2) for k in range(-6, 7)]
"""Tried, in means of the squared features; beside them no slope at all, and the classifier as it is."""
FOLDS = 4
"""Each left out once while the others are fitted: every fourth image, so that a folder sorted by class is no harm."""


class HeadFit(NamedTuple):
    """A classifier, and how far its model was from the dense one before and is with it, on images left out of the fit:
    mean root of the divergence of the classes (nats), by which :func:`amod.search` ranks too."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    before: float
    after: float

    def __str__(self) -> str:
        if self.after == self.before:
            return "the head stays as it is: nothing fitted was nearer on images left out"
        return f"the head is fitted: mean root of the KL {self.before:.4g} -> {self.after:.4g} on images left out"


def fit_head(model: Any, dense: nn.Module, images: Tensor) -> Any:
    """A copy of ``model`` whose classifier is fitted to say what ``dense`` says; all else is as it was.

    The ridge is the one that does best on images left out; where none is better than no change, nothing changes.

    Args:
        model: of :func:`amod.convert`, not trained since, with a linear classifier; or any other of timm's.
        dense: the model that it was made of.
        images: (B, C, H, W), prepared for the model, at least 8, no labels. A few hundred; ten times as many are a
            little better.

    Raises:
        UserError: there is no classifier of one linear layer, or the images or classes are not of this model.
    """
    if not isinstance(dense, nn.Module):
        raise UserError(f"dense: {type(dense).__name__}; give the dense model, then the images")
    check_images(images, 2 * FOLDS)
    classifier_of(model)
    fit = head_fit(model, images, outputs_of(dense, images))
    return give_head(copy.deepcopy(model), fit)


def give_head(model: Any, fit: HeadFit) -> Any:
    """The model, which has that classifier now."""
    head = classifier_of(model)
    with torch.no_grad():
        head.weight.copy_(fit.weight)
        head.bias.copy_(fit.bias)
    return model


def head_fit(model: Any, images: Tensor, target: Tensor) -> HeadFit:
    """``target``: (B, C), the dense model's logits."""
    head = classifier_of(model)
    if target.shape[1:] != head.weight.shape[:1]:
        raise UserError(
            f"dense: has {tuple(target.shape[1:])} classes and the model {head.out_features}; they must agree"
        )
    return fit_to(head, *read_by_head(model, images), target)


def read_by_head(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features (B, D) that the classifier reads, and its logits (B, C)."""
    read: list[Tensor] = []
    hook = listen(model, read)
    try:
        logits = outputs_of(model, images)
    finally:
        hook.remove()
    return torch.cat(read), logits


def listen(model: Any, into: list[Tensor]) -> RemovableHandle:
    """From now on what the classifier reads goes into the list, batch by batch."""
    return classifier_of(model).register_forward_pre_hook(lambda module, given: into.append(given[0]))


def fit_to(head: nn.Linear, features: Tensor, logits: Tensor, target: Tensor) -> HeadFit:
    """Ridge regression of what the logits lack, on the features, by the ridge that does best on images left out."""
    features, logits, wanted = (each.double().cpu() for each in (features, logits, target))
    as_it_is = disagreement(wanted, logits, True).sqrt()
    left_out = torch.stack([as_it_is, *(torch.zeros_like(as_it_is) for _ in range(1 + len(RIDGES)))])
    for fold in range(FOLDS):
        out = torch.arange(len(features)) % FOLDS == fold
        maps = ridge_maps(features[~out], (wanted - logits)[~out])
        for line, (slope, shift) in zip(left_out[1:], maps, strict=True):
            moved = logits[out] + features[out] @ slope + shift
            line[out] = disagreement(wanted[out], moved, True).sqrt()
    means = left_out.mean(dim=1).tolist()
    best = means.index(min(means))
    weight, bias = head.weight.detach(), head.bias.detach()
    if best:
        slope, shift = ridge_maps(features, wanted - logits)[best - 1]
        weight, bias = ((old.double().cpu() + new).to(old) for old, new in ((weight, slope.T), (bias, shift)))
    return HeadFit(weight, bias, means[0], means[best])


def ridge_maps(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(slope (D, C), shift (C,)) of x (B, D) -> y (B, C): the mean of y alone, then ridge regression by ``RIDGES``."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    values, vectors = torch.linalg.eigh((x - mean_x).T @ (x - mean_x))
    seen = vectors.T @ ((x - mean_x).T @ (y - mean_y))
    slopes = [torch.zeros_like(seen)]
    for ridge in RIDGES:
        slopes.append(vectors @ (seen / (values.clamp(min=0) + ridge * values.mean()).unsqueeze(1)))
    return [(slope, mean_y - mean_x @ slope) for slope in slopes]


@torch.inference_mode()
def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """(B, C), in evaluation mode, on the model's device and in its precision."""
    like = next(model.parameters())
    if images.shape[1] != getattr(model, "in_chans", images.shape[1]):
        raise UserError(f"images: have {images.shape[1]} channels; this model takes {model.in_chans}")
    with modes_kept(model):
        model.eval()
        try:
            outputs = torch.cat([model(batch.to(like)) for batch in images.split(BATCH)])
        except AssertionError as error:  # timm's, of another size
            raise UserError(f"images: {tuple(images.shape)} do not fit the model: {one_line(error)}") from None
    check_finite(model, outputs)
    return outputs


def classifier_of(model: Any) -> nn.Linear:
    """The one linear layer that reads the features."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(found, nn.Linear) or found.bias is None:
        kind = "two" if isinstance(found, tuple | list) else type(found).__name__ if found is not None else "none"
        raise UserError(
            f"{type(model).__name__}: its classifier ({kind}) is no linear layer with a bias, so no head is fitted"
        )
    refuse_one_output(model, found.out_features, "its head stays as it is")
    return found
