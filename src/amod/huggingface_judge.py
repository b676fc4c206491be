"""``amod.search`` for transformers' encoders: their layers route and nothing merges, and they are judged on what a
tokenizer gives, or on images. Axes: B texts or images, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amod.agreement import check_images, refuse_one_output
from amod.entries import Route
from amod.errors import UserError, one_line
from amod.huggingface import check_model, find_encoder, prefix_of, routed, tokens_of
from amod.judge import Judge
from amod.plan import Plan

IDS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"


class Inputs:
    """A mapping of tensors (B, ...) whose rows are taken together; padding behind them that none needs goes."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = dict(named)

    def __len__(self) -> int:
        return len(next(iter(self.named.values())))

    def __getitem__(self, rows: Any) -> Inputs:
        taken = {name: value[rows] for name, value in self.named.items()}
        if MASK in taken:
            end = int(taken[MASK].any(dim=0).nonzero()[-1]) + 1  # what stands before a text moves its positions
            taken = {name: value[:, :end] for name, value in taken.items()}
        return Inputs(taken)

    def split(self, size: int) -> list[Inputs]:
        return [self[rows] for rows in torch.arange(len(self)).split(size)]


class EncoderJudge(Judge):
    """The model's answer to a text is its logits (B, C), or the mean of its last layer over the tokens (B, D)."""

    kinds = ("attention", "class_attention")
    routed = staticmethod(routed)

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], ledger: Any = None) -> None:
        like = next(model.parameters())
        there = {name: value.to(like if value.is_floating_point() else like.device) for name, value in inputs.items()}
        super().__init__(model, Inputs(there), ledger)

    def describe(self) -> None:
        named, (encoder, layers) = self.images.named, find_encoder(self.vit)
        self.size = named[IDS].shape[1] if IDS in named else tuple(named[PIXELS].shape[1:])
        self.depth, self.prefix, self.exact = len(layers), prefix_of(encoder.config), False
        self.tokens, self.where = tokens_of(self.vit, self.size)
        if self.depth < 2:
            raise UserError(f"{type(self.vit).__name__}: has one layer, and before the first none has any attention")
        texts = {"texts": len(self.images), "tokens": self.size}
        images = {"images": len(self.images), "image_size": self.size}
        self.about = {**(texts if IDS in named else images), "model": type(self.vit).__name__}
        try:
            with torch.inference_mode():
                out = self.vit(**self.images[:1].named)
        except (RuntimeError, ValueError, IndexError) as error:  # of another size, longer, or other words
            raise UserError(f"{type(self.vit).__name__}: refuses these inputs ({one_line(error)})") from error
        self.has_head = hasattr(out, "logits")
        self.read_off(out, self.images[:1])  # refuses a model that has no such answer

    def answer(self, model: Any, images: Inputs) -> Tensor:
        return self.read_off(model(**images.named), images)

    def read_off(self, out: Any, images: Inputs) -> Tensor:
        """The answer in what the model gives."""
        if (logits := getattr(out, "logits", None)) is not None and logits.dim() == 2:
            refuse_one_output(self.vit, logits.shape[1], "search with the base model, whose features are then compared")
            return logits
        hidden = getattr(out, "last_hidden_state", None)
        if logits is not None or hidden is None:
            raise UserError(
                f"{type(self.vit).__name__}: gives no one answer to a text or image; search with a classifier, or with "
                "the base model, whose features are then compared"
            )
        if MASK not in images.named:
            return hidden.mean(dim=1)
        real = images.named[MASK].unsqueeze(-1).to(hidden)
        return (hidden * real).sum(dim=1) / real.sum(dim=1)

    def probes(self) -> list[Plan]:
        blocks = (1, self.depth // 2, self.depth - 1)
        plans: list[Plan] = [{i: Route(keep, "class_attention")} for i in blocks for keep in (0.5, 0.25)]
        return [{}, *plans]

    @property
    def stride(self) -> int:
        """Nothing is remembered: every plan runs all layers."""
        return self.depth

    def read(self) -> list[Tensor]:
        return [*self.images.named.values()]


def check_inputs(model: Any, inputs: Any, least: int) -> Mapping[str, Tensor]:
    """The inputs; UserError unless the model can be routed and these are what it reads, at least so many."""
    if getattr(model.config, "model_type", None) == "detr":
        raise UserError(
            f"{type(model).__name__}: a search compares one answer for an image, and a DETR gives many boxes"
        )
    check_model(model)
    name = model.main_input_name
    said = "what its tokenizer gives" if name == IDS else f"a mapping with {name}"
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get(name), Tensor):
        raise UserError(f"images: {type(inputs).__name__}; {type(model).__name__} needs {said}, as tensors")
    if name == PIXELS:
        check_images(inputs[name], least)
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != len(inputs[name]):
            raise UserError(f"images: {key} is no tensor of {len(inputs[name])} rows; give the model's inputs alone")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"images: {key} has values that are not finite; prepare it as for the model")
    if len(inputs[name]) < least:
        raise UserError(f"images: {len(inputs[name])} of them; at least {least} are needed")
    if MASK in inputs and not inputs[MASK].any(dim=1).all():
        raise UserError(f"images: a text has no token ({MASK} is 0 throughout); leave it out")
    return inputs
