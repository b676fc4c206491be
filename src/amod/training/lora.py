"""``schedule.lora``: peft's low-rank updates of frozen weights, trained beside the routers, folded in at the end."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from amod.errors import UserError, one_line


def add_lora(model: nn.Module, rank: int) -> None:
    """A LoRA of that rank on every linear layer of the model's blocks, in place; it begins as the model is.

    Its scale is 2 (alpha = 2 rank).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"schedule.lora={rank}: needs peft ({one_line(error)}); pip install 'amod[lora]'") from error
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and {"blocks", "layers"} & {*(parts := name.split("."))}
        and not any("router" in part for part in parts)
        and not read_past(model, name)
    ]
    if not found:
        raise UserError(f"schedule.lora={rank}: this model's blocks have no linear layers")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=found), model)
    for parameter in trained:  # peft freezes all but its own
        parameter.requires_grad_(True)


def read_past(model: nn.Module, name: str) -> bool:
    """Whether it is the qkv of BEiT's or EVA-02's attention, whose weight timm takes without calling the layer: what is
    added to the layer would never be computed."""
    attn: Any = model.get_submodule(name.rpartition(".")[0])
    return name.endswith(".qkv") and getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate


def merged(model: nn.Module) -> nn.Module:
    """A copy whose LoRA is part of its weights, and whose parameters have their names of before."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(model)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    return model
