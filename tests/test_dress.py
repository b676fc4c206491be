"""``amod.dense`` gives back nothing that routing put on a model: no class, attribute, module or entry of a config."""

from __future__ import annotations

import copy
import io

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


def test_what_is_compiled_can_be_copied():
    """The copy runs itself and not the model it was made from; so do those that EMA, dense and counting make."""
    torch.manual_seed(0)
    model, images = amod.convert(vit().eval(), capacity=0.5), torch.randn(2, 3, 64, 64)
    cost, whole = amod.count_flops(model), amod.dense(model)
    model.compile(backend="eager")
    model.blocks[0].attn.compile(backend="eager")
    before = model(images)
    twin = copy.deepcopy(model)
    twin.head.bias.data += 100
    torch.testing.assert_close(twin(images), before + 100)
    twin.blocks[0].attn.qkv.bias.data += 1
    assert (twin(images) - before - 100).abs().max() > 1e-4
    assert torch.equal(amod.dense(model)(images), whole(images))
    assert amod.count_flops(model) == cost
    torch.save(model, io.BytesIO())


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
