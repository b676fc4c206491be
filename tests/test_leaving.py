"""DynamicViT and A-ViT: hand-worked cases, and training's masks against inference's removal."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import amod
from amod import reduce
from amod.analysis.depths import depths, draw_depths
from amod.attention import attend_packed
from amod.entries import Halt, Predict
from amod.plan import make_plan
from amod.reduce import halt, masked_softmax, pack
from amod.walk import Walk

NAMES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224")
DYNAMICVIT = {  # of 224 pixels and 1000 classes: tokens, and GFLOPs of DeiT-T, S and B
    0.9: ((177, 159, 143), (1.0960, 4.0498, 15.531)),
    0.7: ((138, 97, 68), (0.8046, 2.9876, 11.489)),
    0.5: ((99, 50, 25), (0.6041, 2.2340, 8.571)),
}
LIVELY = {"halt_scale": 3.0, "halt_shift": 1.0}


def vit(spread=0.2, **changes):
    """17 tokens, 6 blocks, weights that make the tokens differ."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**kwargs, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def walked(model, masks):
    walk = Walk(model, masks=masks)
    with torch.no_grad():
        return model.forward_head(walk.forward_features(images())), walk


# --- DynamicViT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", DYNAMICVIT)
def test_dynamicvits_figures(rho):
    tokens, gflops = DYNAMICVIT[rho]
    for name, printed in zip(NAMES, gflops, strict=True):
        with torch.device("meta"):
            model = amod.convert(timm.create_model(name), "dynamicvit", keep_rate=rho)
        assert tuple(model.tokens_kept(197).values()) == tokens
        digits = 3 if printed > 5 else 4
        assert round(amod.count_flops(model) / 1e9, digits) == printed


def test_the_predictors_parameters():
    for name, millions in zip(NAMES, (0.182, 0.724, 2.885), strict=True):
        with torch.device("meta"):
            routers = amod.convert(timm.create_model(name), "dynamicvit").routers
        assert round(sum(p.numel() for p in routers.parameters()) / 1e6, 3) == millions


def test_masked_softmax_by_hand():
    # e = 1, 1/2, 1/4; the second has gone: the first sees 1 and 1/4, the second itself too
    logits = torch.tensor([0.0, -math.log(2), -math.log(4)]).expand(1, 1, 3, 3)
    maps = masked_softmax(logits, torch.tensor([[1.0, 0.0, 1.0]]))[0, 0]
    assert_close(maps[0], torch.tensor([0.8, 0.0, 0.2]), atol=1e-5, rtol=0)
    assert_close(maps[1], torch.tensor([4 / 7, 2 / 7, 1 / 7]), atol=1e-5, rtol=0)


def test_keeping_all_is_the_dense_model_trained_or_not():
    dense, model = vit(), amod.convert(vit(), "dynamicvit", keep_rate=1.0)
    with torch.no_grad():
        assert torch.equal(model(images()), dense(images()))
        for predictor in model.routers.values():  # sure to keep
            predictor.output[-1].weight.zero_()
            predictor.output[-1].bias.copy_(torch.tensor([60.0, -60.0]))
    logits, walk = walked(model, masks=True)
    assert [float(kept.mean()) for kept in walk.decisions] == [1, 1, 1]
    assert_close(logits, dense(images()), atol=1e-5, rtol=0)


def test_training_agrees_with_what_is_gathered_where_the_decisions_agree(monkeypatch):
    model = amod.convert(vit(), "dynamicvit", keep_rate=0.7)
    with torch.no_grad():
        expected, routing = model(images(), return_routing=True)
    kept = iter([layer.tokens(17)[:, 1:].float() for layer in routing])
    monkeypatch.setattr("amod.leaving.decide", lambda log_probs, before: next(kept) * before)
    logits, walk = walked(model, masks=True)
    assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    stages = [walked_kept.bool() for walked_kept in walk.decisions]
    assert all((later <= earlier).all() for earlier, later in pairwise(stages))  # nested


def test_a_patch_that_has_gone_does_not_come_back():
    _, walk = walked(amod.convert(vit(), "dynamicvit"), masks=True)
    first, second, third = (kept.bool() for kept in walk.decisions)
    assert (second <= first).all()
    assert (third <= second).all()
    assert 0 < first.sum() < first.numel()


def test_every_parameter_of_dynamicvit_gets_a_gradient():
    model = amod.convert(vit(), "dynamicvit").train()
    model(images()).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- A-ViT --------------------------------------------------------------------------------------------------------


def test_halting_by_hand():
    # h = .3, .4, .5: sums .3, .7, 1.2; halts in the third block with the remainder 1 - .7
    total, weights = torch.zeros(1), []
    for score in (0.3, 0.4, 0.5):
        weight, going = halt(total, torch.tensor([score]), 0.01)
        weights.append(float(weight))
        total = total + score
        if not going:
            break
    assert_close(torch.tensor(weights), torch.tensor([0.3, 0.4, 0.3]))
    assert not halt(torch.tensor(0.5), torch.tensor(0.495), 0.01)[1]  # exceeds 1 - epsilon
    assert halt(torch.tensor(0.5), torch.tensor(0.485), 0.01)[1]


def test_packing_by_hand():
    packed = pack(torch.tensor([0, 0, 2, 2, 2]))  # image 1 has left; one group holds four
    ((slots, filled),) = packed.groups
    assert slots.tolist()[1] == [2, 3, 4]
    assert filled.tolist() == [[True, True, False], [True, True, True]]
    assert packed.back.tolist() == [0, 1, 3, 4, 5]
    assert pack(torch.tensor([0, 0, 1, 1])).groups[0][1] is None


def test_packing_sorts_images_of_different_length_into_groups(monkeypatch):
    lengths = [9, 1, 8, 2, 7, 1, 9, 2, 3]
    image = torch.arange(9).repeat_interleave(torch.tensor(lengths))
    assert len(pack(image).groups) == 1  # so small that it is not worth it
    monkeypatch.setattr(reduce, "FEW", 0)
    packed = pack(image)
    assert [slots.shape for slots, _ in packed.groups] == [(4, 2), (4, 9), (1, 9)]
    places = torch.cat([slots.flatten() for slots, _ in packed.groups])
    assert places[packed.back].tolist() == [*range(sum(lengths))]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8).unbind()
    alone = [
        F.scaled_dot_product_attention(*parts)
        for parts in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ]
    assert_close(attend_packed(q, k, v, packed), torch.cat(alone, dim=2))


@pytest.mark.parametrize("name", ["vit", "eva"])
def test_removing_tokens_equals_masking_them(name):
    if name == "eva":
        kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5}
        torch.manual_seed(0)
        plain = timm.create_model("eva02_tiny_patch14_224", dynamic_img_size=False, global_pool="token", **kwargs)
    else:
        plain = vit()
    model = amod.convert(plain.eval(), "avit", **(LIVELY if name == "vit" else {"halt_scale": 8.0, "halt_shift": 1.0}))
    removed, walk = walked(model, masks=False)
    masked, other = walked(model, masks=True)
    assert_close(removed, masked, atol=5e-6, rtol=1e-5)
    assert other.going.ponder.max() > other.going.ponder.min()  # tokens do halt, at different depths
    assert_close(walk.going.ponder[:, 0], other.going.ponder[:, 0], atol=1e-4, rtol=0)


def test_a_batch_gives_what_each_image_gives_by_itself():
    model = amod.convert(vit(), "avit", **LIVELY)
    with torch.no_grad():
        assert_close(model(images()), torch.cat([model(image[None]) for image in images()]), atol=5e-6, rtol=1e-5)


def test_without_halting_it_is_the_dense_model():
    model = amod.convert(vit(), "avit", halt_scale=0.0, halt_shift=100.0)
    with torch.no_grad():
        assert_close(model(images()), vit()(images()))
    assert amod.count_flops(model) == amod.count_flops(vit())


def test_images_that_halt_earlier_cost_less():
    model = amod.convert(vit(), "avit", **LIVELY)
    costs = amod.image_flops(model, images())
    with torch.no_grad():
        _, routing = model(images(), return_routing=True)
    run = torch.stack([layer.tokens(17).sum(dim=1) for layer in routing]).sum(dim=0)  # tokens x blocks
    assert costs.max() < amod.count_flops(model)
    assert torch.equal(costs.argsort(), run.argsort())
    assert amod.count_flops(model, images()) == int(costs.double().mean())


def test_dense_features_keep_a_halted_token_as_it_was():
    model = amod.convert(vit(), "avit", **LIVELY)
    with torch.no_grad():
        _, routing = model(images(), return_routing=True)
        found = model.forward_intermediates(images(), norm=False, output_fmt="NLC", intermediates_only=True)
    gone = ~routing[3].tokens(17)[:, 1:]  # did not run block 3
    assert gone.any()
    assert torch.equal(found[3][gone], found[2][gone])


def test_the_depth_of_each_patch_and_its_picture(tmp_path):
    model = amod.convert(vit(), "avit", **LIVELY)
    _, walk = walked(model, masks=False)
    with torch.no_grad():
        _, routing = model(images(), return_routing=True)
    found = depths(routing, 17)
    ran = walk.going.ponder.detach()  # blocks, and a remainder below 1 where a token halted by itself
    assert ((ran - found) >= -1e-5).all()
    assert ((ran - found) <= 1 + 1e-5).all()
    draw_depths(images().clamp(0, 1), routing, (4, 4), tmp_path / "depths.png", ["a"] * 6)
    assert (tmp_path / "depths.png").stat().st_size > 1000


# --- plans --------------------------------------------------------------------------------------------------------


def test_plans_and_budgets():
    assert make_plan(12, "dynamicvit", keep_rate=0.7) == {3: Predict(0.7), 6: Predict(0.49), 9: Predict(0.343)}
    assert make_plan(3, "avit") == dict.fromkeys(range(3), Halt(10.0, 75.0))
    limit = 0.7 * amod.count_flops(vit())
    assert 0.97 * limit < amod.count_flops(amod.convert(vit(), "dynamicvit", budget=limit)) <= limit


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"router": "avit", "budget": 1e6}, "image by image"),
        ({"plan": {0: Halt()}}, "Halt stands in every block"),
        ({"plan": {1: Predict(0.5), 3: Predict(0.7)}}, "keeps more than an earlier one"),
        ({"plan": {1: Predict(0.5), 3: amod.Merge(2)}}, "beside Predict and ClassOnly alone"),
        ({"router": "dynamicvit", "keep_rate": 0.1}, "keeps no patch .* keep_rate has the stage as its power"),
        ({"router": "dynamicvit", "keep_rate": "0.5"}, "keep_rate='0.5': must be a number"),
        ({"router": "evit", "keep_rate": 2}, "keep_rate=2: must be a number"),
        ({"router": "avit", "halt_shift": "a"}, "halt_shift='a': must be a number"),
        ({"router": "avit", "budget": "75%"}, "budget='75%': must be a number"),
        ({"router": ["attention"]}, "router=.'attention'.: choose one of"),
        ({"router": "dynamicvit", "r": 3}, "has no r"),
    ],
)
def test_what_cannot_be_is_said(arguments, line):
    with pytest.raises(amod.UserError, match=line):
        amod.convert(vit(), **arguments)


def test_a_head_that_reads_all_tokens_is_refused():
    with pytest.raises(amod.UserError, match="Halt: the head of this model reads all tokens"):
        amod.convert(vit(global_pool="avg"), "avit")


@pytest.mark.parametrize(("router", "entry"), [("avit", "Halt"), ("dynamicvit", "Predict"), ("none", "ClassOnly")])
def test_another_head_is_refused_where_it_is_asked_and_by_the_entrys_name(router, entry):
    model = amod.convert(vit(), router, last="class" if router == "none" else None)
    images = torch.randn(2, 3, 32, 32)
    model.reset_classifier(5, "avg")
    with pytest.raises(amod.UserError, match=f"{entry}: the head of this model reads all tokens"):
        model(images)
    features = model.forward_features(images)
    assert features.shape[2] == 32
    with pytest.raises(amod.UserError, match=f"{entry}: the head of this model reads all tokens"):
        model.forward_head(features)
    if router != "none":
        model.prune_intermediate_layers([3], prune_head=True)
        assert len(model.forward_intermediates(images, indices=[3], intermediates_only=True)) == 1


@pytest.mark.parametrize("router", ["avit", "dynamicvit"])
def test_no_images_are_no_logits(router):
    assert amod.convert(vit(), router)(torch.randn(0, 3, 32, 32)).shape == (0, 5)


def test_the_weights_and_the_plan_come_back(tmp_path):
    model = amod.convert(vit(), "dynamicvit", keep_rate=0.7)
    amod.save_pretrained(model, tmp_path)
    again = amod.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
