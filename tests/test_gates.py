"""Trained gates: a hand-worked one, and skipping against the masked computation that training makes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import amod
from amod import reduce
from amod.entries import Gate
from amod.gates import kept_first, penalty, put_kept, straight_through
from amod.plan import gated_blocks, make_plan
from amod.routing import RoutedLayer

SKIPS = ("attention", "mlp", "block")
FAMILIES = ("vit_tiny_patch16", "eva02_tiny_patch14", "beit_base_patch16", "vit_relpos_small_patch16")


def vit(name: str = "vit_tiny_patch16_224", **given) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**small, **given}).eval()


def gated(model: nn.Module, **given) -> nn.Module:
    """With routers that keep about half."""
    torch.manual_seed(1)
    model = amod.convert(model, router="tuning", layers=given.pop("layers", [1, 2]), **given)
    for router in model.routers.values():
        nn.init.normal_(router.weight)
    return model


# --- by hand ---------------------------------------------------------------------------------------------------


def test_a_gate_by_hand():
    """w = (1, -1): x = (2, 1), (0, 3), (1, 1) has w.x = 1, -3, 0, so g = 1, 0, 1 (at exactly 1/2 it is open)."""
    w = torch.tensor([1.0, -1.0], requires_grad=True)
    x = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])
    gate = straight_through(x @ w)
    assert gate.tolist() == [1, 0, 1]
    gate[1].backward()  # d g / d w = sigmoid'(-3) x: the step's own derivative is taken as 1
    slope = 1 / (1 + 2.718281828459045**3) * (1 - 1 / (1 + 2.718281828459045**3))
    torch.testing.assert_close(w.grad, torch.tensor([0.0, 3.0]) * slope)


def test_the_loss_of_open_gates_by_hand():
    """Shares .75 and .25: scale 2 and target .5 give 2 (.75 - .5) = .5 and 0; without a target, scale times each."""
    one, two = torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([[0.0, 0, 1, 0]])
    routing = [RoutedLayer(i, g, torch.empty(1, 0), None, g) for i, g in ((1, one), (2, two))]
    towards = Gate(target=0.5, scale=2.0)
    assert float(penalty(routing, {1: towards, 2: towards})) == 0.5
    assert float(penalty(routing, {1: Gate(scale=1.0), 2: Gate(scale=4.0)})) == 1.75
    assert penalty(routing, {1: Gate(), 2: Gate()}) == 0


def test_kept_tokens_are_padded_to_the_most():
    keep = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    indices, among = kept_first(keep)
    assert among.tolist() == [[True, True], [True, False], [False, False]]
    assert indices[0].tolist() == [1, 3]
    assert indices[1, 0] == 2
    x = torch.arange(4.0).expand(3, 4).unsqueeze(-1)
    after = put_kept(x, indices, among, -torch.ones(3, 2, 1))
    assert after[..., 0].tolist() == [[0, -1, 2, -1], [0, 1, -1, 3], [0, 1, 2, 3]]


def test_where_the_gates_are():
    """Router-Tuning: layers L - n - 1 to L - 2; n = 16 of 32 gives 15 to 30."""
    assert gated_blocks(32) == tuple(range(15, 31))
    assert gated_blocks(12) == (5, 6, 7, 8, 9, 10)
    assert list(make_plan(12, "tuning")) == [5, 6, 7, 8, 9, 10]


# --- skipping is the masked computation --------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", [f"{name}_224" for name in FAMILIES])
def test_skipping_equals_the_masked_computation(name, skip, per):
    extra = {} if name.startswith("vit") else {"mlp_ratio": 2.0}
    dense = vit(name, **extra)
    for key, weight in dense.blocks.named_parameters():  # so that what is skipped, and who is seen, matters
        if key.endswith("gamma"):
            nn.init.ones_(weight)
        elif "norm" not in key and weight.dim() > 1:
            nn.init.normal_(weight, std=0.25)
    for module in dense.modules():
        if isinstance(module, nn.Dropout):  # of relative positions
            module.p = 0.0
    model = gated(dense, skip=skip, per=per)
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        skipping, routing = model(images, return_routing=True)
        masked, same = model.train()(images, return_routing=True)  # no dropout here: training is the masked computation
    torch.testing.assert_close(skipping, masked, rtol=1e-4, atol=1e-5)
    shares = [float(layer.gate.mean()) for layer in routing]
    assert all(torch.equal(a.gate, b.gate) for a, b in zip(routing, same, strict=True))
    assert any(0 < share < 1 for share in shares), shares


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_kept_tokens_are_in_one_row_without_fillers(name, skip, monkeypatch):
    model, seen = gated(vit(name, **({} if name.startswith("vit") else {"mlp_ratio": 2.0})), skip=skip), []
    for part in ("attn.proj", "mlp"):
        model.blocks[1].get_submodule(part).register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:2]))
    images = torch.randn(6, 3, 32, 32)
    logits, routing = model(images, return_routing=True)
    kept = routing[0].gate.sum(dim=1)
    assert len(kept.unique()) > 1
    some, whole = (1, int(kept.sum())), (6, 17)
    assert seen == [some if skip != "mlp" else whole, some if skip != "attention" else whole]
    monkeypatch.setattr(reduce, "FEW", 0)  # attention in groups of images with like numbers
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("skip", SKIPS)
def test_what_is_skipped_is_left_as_it_came_and_costs_nothing(skip, per):
    model = gated(vit(), skip=skip, per=per)
    images = torch.randn(6, 3, 32, 32)
    dense, some = amod.count_flops(vit(), images), amod.count_flops(model, images)
    for router in model.routers.values():
        nn.init.zeros_(router.weight)
    torch.testing.assert_close(model(images), vit()(images))  # all open is the dense model
    router_cost = 2 * 17 * 32  # two gates: w.x of 17 tokens of width 32
    assert amod.count_flops(model, images) == dense + router_cost
    shut = copy.deepcopy(model)
    for router in shut.routers.values():
        router.forward = lambda x: torch.full((*x.shape[:2],) if per == "token" else (x.shape[0], 1), -1.0)
    none = amod.count_flops(shut, images)
    assert none < some < dense
    if skip == "block":
        plain = vit()
        del plain.blocks[1:3]
        torch.testing.assert_close(shut(images), plain(images))
        assert none == amod.count_flops(plain, images) + 2 * 5 * 17 * 32  # the gates' own norms, and no products


@pytest.mark.parametrize("skip", SKIPS)
def test_only_the_gates_updates_carry_a_gradient(skip):
    model = gated(vit(), skip=skip).train()
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers.values())


def test_checkpointing_and_saving_keep_the_gates(tmp_path):
    model = gated(vit(), skip="attention", target=0.5)
    images = torch.randn(3, 3, 32, 32)
    amod.save_pretrained(model, tmp_path / "model")
    again = amod.from_pretrained(tmp_path / "model")
    assert again.plan == model.plan
    assert torch.equal(again(images), model(images))
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train().set_grad_checkpointing(checkpointing)
        model(images).sum().backward()
        grads.append([router.weight.grad.clone() for router in model.routers.values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(amod.dense(model).eval()(images), vit()(images))


# --- attention alone, with a capacity ------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["attention", "linear"])
@pytest.mark.parametrize("skip", ["attention", "mlp"])
def test_a_capacity_for_one_half(router, skip):
    images = torch.randn(2, 3, 32, 32)
    model = amod.convert(vit(), router=router, capacity=0.5, placement=[1, 2], skip=skip)
    x = model._pos_embed(model.patch_embed(images))
    x = vit().blocks[0](x)
    with torch.no_grad():
        out, routing = model(images, return_routing=True)
        block, kept = vit().blocks[1], routing[0].indices
        row = torch.arange(2).unsqueeze(1)
        by_hand = x if skip == "attention" else x + block.attn(block.norm1(x))
        some = by_hand[row, kept]
        update = block.attn(block.norm1(some)) if skip == "attention" else block.mlp(block.norm2(some))
        factor = routing[0].scores[row, kept].unsqueeze(-1) if router == "linear" else 1
        by_hand = by_hand.index_put((row, kept), some + factor * update)
        by_hand = by_hand + block.mlp(block.norm2(by_hand)) if skip == "attention" else by_hand
        behind = model.forward_intermediates(images, indices=[1], norm=False, intermediates_only=True, output_fmt="NLC")
    assert kept.shape == (2, 8)  # of 17
    torch.testing.assert_close(behind[0], by_hand[:, 1:], rtol=1e-4, atol=1e-5)
    assert out.shape == (2, 5)
    assert amod.count_flops(model) < amod.count_flops(vit())


def test_capacity_one_for_one_half_is_dense():
    images = torch.randn(2, 3, 32, 32)
    for skip in ("attention", "mlp"):
        model = amod.convert(vit(), router="attention", capacity=1.0, placement=[1, 2], skip=skip)
        torch.testing.assert_close(model(images), vit()(images), rtol=1e-5, atol=1e-6)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": [4]}, "block 4 is not one of 0 to 3"),
        ({"target": 1.5}, r"target=1.5: must be a share in \[0, 1\]"),
        ({"target": 0.5, "scale": 0}, "target=0.5: does nothing with scale=0"),
        ({"skip": "norm"}, "skip='norm': choose one of block, attention, mlp"),
        ({"per": "image"}, "per='image': choose one of token, sequence"),
        ({"cache": "all"}, "cache='all': is of language models"),
        ({"capacity": 0.5}, "capacity=0.5: router=tuning has no capacity"),
        ({"placement": "late"}, "placement='late': router=tuning has layers="),
        ({"budget": 1e6}, "router=tuning has layers= and target="),
    ],
)
def test_bad_input_is_one_line(given, words):
    with pytest.raises(amod.UserError, match=words) as caught:
        amod.convert(vit(), router="tuning", **given)
    assert "\n" not in str(caught.value)


def test_other_routers_have_no_target():
    with pytest.raises(amod.UserError, match=r"target=0\.5: router=attention has no target"):
        amod.convert(vit(), target=0.5)
    with pytest.raises(amod.UserError, match="a Gate, which cannot stand beside Merge"):
        amod.convert(vit(), plan={1: amod.Gate(), 2: amod.Merge(2)})
    with pytest.raises(amod.UserError, match="export: what trained gates skip differs"):
        amod.export(gated(vit()), "model.onnx")
    with pytest.raises(amod.UserError, match="depends on the images; give images"):
        amod.count_flops(gated(vit()))
