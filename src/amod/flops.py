"""One counter of FLOPs, in the convention that gives every FLOPs figure of the paper's Tables 1, 4 and 5.

The model runs on the meta device, which has shapes and no numbers, and its operators are counted as they come: one
multiply-accumulate (MAC) each of a convolution, linear layer or matrix product, five per element of a norm (of torch's
and timm's; transformers' RMSNorms are left out), two of a batch norm. Softmax, activations, additions, LayerScale,
rotations, sorting, merging's averages and whatever is read off an attention map are free. No model, router or method
has a formula of its own.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from amod.dress import DETECTORS, of_transformers
from amod.errors import UserError, one_line
from amod.gates import is_gated
from amod.plan import halts

Size = tuple[int, int, int]
"""(channels, height, width) of an image. For a model of text, an int is as much: how many tokens."""
T = TypeVar("T")


def _product(args: Any, out: Any) -> int:
    """A matrix product: every element of the result is a sum over the last axis of the second-last factor."""
    left = [a for a in args if isinstance(a, Tensor)][-2]
    return out.numel() * left.shape[-1]


def _attention(args: Any, out: Any) -> int:
    q, k, v = args[:3]
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _convolution(args: Any, out: Any) -> int:
    transposed = len(args) > 6 and args[6]  # from each element of its input it makes what others make one from
    return (args[0] if transposed else out).numel() * prod(args[1].shape[1:])


def _batch_norm(args: Any, out: Any) -> int:
    return 0 if args[5] else 2 * args[0].numel()  # in training it is somebody's weight standardisation


RULES: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), _product),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "native_batch_norm": _batch_norm,
}


ALIKE = ("native_layer_norm", "gelu", "_softmax", "_safe_softmax")
"""Operators without a rule whose outputs are shaped like their first argument, or are not read. On the meta device
torch runs them, and the next ones, in Python, which was most of a count's time."""
BROADCAST = {(name, kind) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")}
BROADCAST |= {("clamp_min", "default"), ("clamp_min", "Tensor")}
"""Without a rule as well; the result is shaped as the two arguments broadcast."""
PRODUCTS = ("mm", "addmm", "bmm")
"""The result is shaped like the first factor but for its last axis."""


class Counter(TorchDispatchMode):
    """Adds up the MACs of the operators that run under it, in ``macs``."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ALIKE and args[0].is_meta:
            like = torch.empty_like(args[0])
            return (like,) * len(func._schema.returns) if len(func._schema.returns) > 1 else like
        if (name, func._overloadname) in BROADCAST and args[0].is_meta and args[0].is_floating_point():
            shape = torch.broadcast_shapes(*(a.shape for a in args[:2] if isinstance(a, Tensor)))
            return args[0].new_empty(shape, dtype=torch.result_type(*args[:2]))
        if name in PRODUCTS and args[-1].is_meta and args[-2].shape[-1] == args[-1].shape[-2]:
            out = args[-2].new_empty(*args[-2].shape[:-1], args[-1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        rule = RULES.get(name, _attention if "scaled_dot_product" in name else None)
        if rule is not None:
            self.macs += rule(args, out)
        return out


def count_flops(model: nn.Module, input_size: Size | int | Tensor | None = None) -> int:
    """Multiply-accumulates of one image or text, in the convention above.

    Args:
        model: any model of timm's or of :func:`amod.convert`'s, on any device; it is left as it is.
        input_size: (channels, height, width), by default the model's own; or images (B, 3, H, W), for a model whose
            cost depends on them: they are run, and the mean over them is counted. Without any, a model whose tokens
            halt costs what it does where none halts before the end. For a model of text, how many
            tokens, or token ids (B, N): each text costs what N tokens cost, padding as well.
    """
    check_module(model)
    if isinstance(input_size, Tensor):
        if is_gated(model) or halts(model):
            return int(image_flops(model, input_size).double().mean())  # each alone: a batch may pad what it keeps
        check_batch(model, input_size)
        input_size = input_size.shape[1] if reads_text(model) else tuple(input_size.shape[1:])  # type: ignore[assignment]
    return count_on_meta(on_meta(model), input_size)  # type: ignore[arg-type]


def image_flops(model: nn.Module, images: Tensor) -> Tensor:
    """(B,) multiply-accumulates of each of the images (B, 3, H, W), run by itself: they differ where tokens halt."""
    check_module(model)
    check_batch(model, images)
    return torch.tensor([_taken(model, images[i : i + 1], tuple(images.shape[1:])) for i in range(len(images))])


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model={model!r}: is no model; give one of timm's or transformers', as a module")


def check_batch(model: Any, batch: Any) -> None:
    """UserError unless these are images, or for a model of text token ids, at least one."""
    reads, said = reads_text(model), repr(batch)
    if isinstance(batch, Tensor):
        if batch.dim() == (2 if reads else 4) and batch.numel() and batch.is_floating_point() != reads:
            return
        said = f"a tensor {tuple(batch.shape)} of {str(batch.dtype).removeprefix('torch.')}"
    takes = "whole numbers (B, N), the token ids" if reads else "floats (B, channels, height, width), the images"
    raise UserError(f"images={said}: {type(model).__name__} takes {takes}, at least one")


def reads_text(model: Any) -> bool:
    return getattr(model, "main_input_name", None) == "input_ids"


def count_on_meta(model: nn.Module, input_size: Size | int | None) -> int:
    """The same for a model that is on the meta device already (:func:`on_meta`)."""
    input_size = input_size_of(model, input_size)
    if isinstance(input_size, int):
        given = torch.empty(1, input_size, dtype=torch.long, device="meta")
    else:
        given = torch.empty(1, *input_size, device="meta", dtype=dtype_of(model))
    return _taken(model, given, input_size)


def _taken(model: nn.Module, given: Tensor, input_size: Any) -> int:
    """What the pass costs; UserError if the model refuses an input of that size."""
    refusals: Any = (ValueError, RuntimeError) if of_transformers(model) else AssertionError
    try:
        return _count(model, given)
    except UserError:
        raise
    except refusals as error:
        raise UserError(f"input_size={input_size}: this model refuses such an input: {one_line(error)}") from None


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of its weights, and so of the images that it takes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def input_size_of(model: Any, size: Any = None) -> Any:
    """``size``, or for None the model's own; UserError unless it is (channels, height, width), or of a model of text a
    number of tokens."""
    size = default_input_size(model) if size is None else size
    reads = reads_text(model)
    if isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0 and reads:
        return int(size)
    triple = isinstance(size, Sequence) and len(size) == 3 and not reads
    if triple and all(isinstance(n, Integral) and int(n) > 0 for n in size):
        size = tuple(int(n) for n in size)
        if getattr(model, "in_chans", size[0]) != size[0]:
            raise UserError(f"input_size={size}: this model takes {model.in_chans} channels")
        return size
    said = f"a tensor {tuple(size.shape)}" if isinstance(size, Tensor) else repr(size)
    why = "reads text; say how many tokens" if reads else "reads no text; give (channels, height, width)"
    raise UserError(f"input_size={said}: {type(model).__name__} {why}")


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Behind it each module trains or evaluates as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _count(model: nn.Module, images: Tensor) -> int:
    norms = 0

    def count_norm(
        module: nn.Module, args: Any, out: Any
    ) -> None:  # as a module: some norms are made of many operators
        nonlocal norms
        norms += 5 * out.numel()

    found = (m for m in model.modules() if hasattr(m, "normalized_shape") or isinstance(m, nn.GroupNorm))
    hooks = [module.register_forward_hook(count_norm) for module in found]
    readers = [m for m in model.modules() if of_transformers(m) and hasattr(m, "set_attn_implementation")]
    hooks += [module.register_forward_pre_hook(_without_masks, with_kwargs=True) for module in readers]
    try:
        # inference mode would hand the counter whole layers, for which it has no rule
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            Counter() as counter,
            modes_kept(model),
        ):
            model.eval()(images.clone() if images.is_inference() else images)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.macs + norms


def _without_masks(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers looks whether a mask masks anything; on the meta device it cannot, and the cost is the same."""
    masks = {
        name for name, value in kwargs.items() if name.endswith("attention_mask") and getattr(value, "is_meta", False)
    }
    return args, {name: value for name, value in kwargs.items() if name not in masks}


def default_input_size(model: Any) -> Size:
    """The image that the model was made for."""
    if of_transformers(model):
        config = model.config
        config = getattr(config, "vision_config", config)
        if config.model_type in DETECTORS:
            raise UserError("input_size: a DETR takes images of any size; say (channels, height, width)")
        if not hasattr(config, "image_size"):
            raise UserError(f"input_size: {type(model).__name__} reads text; say how many tokens, or give token ids")
        size = config.image_size
        return (config.num_channels, *((size, size) if isinstance(size, int) else size))
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        return (model.in_chans, *embed.img_size)
    return tuple((getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without numbers, and without the hooks of whoever uses the model: this pass is not theirs to see."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    model = copy.deepcopy(model, memo)
    for module in model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        rope: Any = getattr(module, "rope_type", None)
        if isinstance(rope, str | dict):  # all but the default look at the numbers of positions
            vars(module)["rope_type"] = dict.fromkeys(rope, "default") if isinstance(rope, dict) else "default"
    return model


def check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise UserError(
            f"budget={budget!r}: must be a number of multiply-accumulates of one image, e.g. 2.6e9, or "
            "0.75 * amod.count_flops(vit)"
        )


def within_budget(
    candidates: Sequence[T],
    cost: Callable[[T], int],
    budget: float,
    what: str,
    tokens: Callable[[T], float],
) -> T:
    """The dearest of ``candidates``, which are in order of their cost, that does not exceed the budget in MACs.

    Args:
        tokens: what a candidate's cost is nearly linear in, and is known without counting: how many tokens its blocks
            see together.
    Raises:
        UserError: the budget is outside of what they reach; the message gives the range.
    """
    most = cost(candidates[-1]) if candidates else 0
    low, high = -1, len(candidates) - 1  # what is known to fit, and not to
    known = {0: 0.0, most: tokens(candidates[-1])} if candidates else {}
    while budget < most and high - low > 1:
        guess = bisect_left(candidates, _meets(known, budget), low + 1, high - 1, key=tokens)
        found = cost(candidates[guess])
        known[found] = tokens(candidates[guess])
        low, high = (guess, high) if found <= budget else (low, guess)
    if not candidates or not budget <= most or (budget < most and low < 0):
        least = cost(candidates[0]) if candidates else 0
        share = "; a share of the dense cost is share * amod.count_flops(vit)" if 0 < budget <= 100 else ""
        raise UserError(
            f"budget of {float(budget) / 1e9:.6g} GFLOPs: {what} reaches {least / 1e9:.4f} to {most / 1e9:.4f} GFLOPs"
            f"{share}"
        )
    return candidates[high if budget == most else low]


def _meets(known: dict[int, float], budget: float) -> float:
    """Where the parabola through the three known costs next to the budget meets it, in tokens."""
    near = sorted(known, key=lambda cost: abs(cost - budget))[:3]
    return sum(known[a] * prod((budget - b) / (a - b) for b in near if b != a) for a in near)
