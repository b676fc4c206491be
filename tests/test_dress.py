"""``amod.dense`` gives back nothing that routing put on a model: no class, attribute, module or entry of a config."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

import amod
from hub_models import build

LLAMA = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DETR = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_queries": 9, "backbone": "resnet10t",
}  # fmt: skip


def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=32, num_heads=2, img_size=64)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def detr():
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**DETR))


def bert():
    return build("Bert", "ForSequenceClassification")


@pytest.mark.parametrize(
    ("make", "router", "given"),
    [
        *((vit, router, {}) for router in ("attention", "linear", "tuning", "evit", "dynamicvit", "avit")),
        (vit, "tome", {"r": 2}),
        *((bert, router, {"capacity": 0.5}) for router in ("attention", "linear")),
        *((detr, router, {"capacity": 0.5}) for router in ("attention", "linear")),
        (llama, "tuning", {"layers": [0]}),
    ],
)
def test_nothing_is_left_of_routing(make, router, given):
    torch.manual_seed(0)
    before = make().eval()
    after = amod.dense(amod.convert(before, router=router, **given))
    assert [*after.state_dict()] == [*before.state_dict()]
    for (name, old), (same, new) in zip(before.named_modules(), after.named_modules(), strict=True):
        assert name == same
        assert type(old) is type(new), name
        assert {*vars(old)} == {*vars(new)}, name
        assert not hasattr(getattr(new, "config", None), "amod"), name
