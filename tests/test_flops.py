from __future__ import annotations

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import amod
from amod import attention
from amod.studies.paper import GFLOPS
from amod.studies.report import computed_gflops
from families import FAMILIES, build


def meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.mark.parametrize(("model", "router", "capacity"), GFLOPS)
def test_the_papers_figures_to_the_printed_digits(model, router, capacity):
    printed = GFLOPS[model, router, capacity]
    assert computed_gflops(model, router, capacity, printed) == printed


def test_table_7_and_sec_4_5():
    vit = meta("deit_small_patch16_224")
    assert f"{amod.count_flops(amod.convert(vit, 'attention', 0.5, 'last8')) / 1e9:.3f}" == "3.816"
    assert f"{amod.count_flops(amod.convert(vit, 'attention', 0.65)) / 1e9:.3f}" == "3.771"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("capacity", [None, 0.4])
def test_every_family_agrees_with_an_operator_level_counter(family, capacity, monkeypatch):
    """FlopCounterMode sees matrix products and convolutions alone: the norms are what the convention adds."""
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *_: attention.explicit(q, k, v))
    vit, size = build(family)
    model = vit if capacity is None else amod.convert(vit, "attention", capacity)
    model.requires_grad_(False)
    norms = 0

    def count_norm(module, args, output):
        nonlocal norms
        norms += 5 * output.numel()

    for module in model.modules():
        if isinstance(getattr(module, "normalized_shape", None), tuple) or isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(count_norm)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, *size))
    assert amod.count_flops(model, size) - norms == counter.get_total_flops() // 2


def test_the_linear_router_adds_n_d_per_block():
    vit, size = build("augreg")
    plain, mod = (amod.count_flops(amod.convert(vit, router, 0.4), size) for router in ("attention", "linear"))
    assert mod - plain == 2 * 17 * 32


def test_flops_fall_with_capacity_and_placement():
    vit, size = build("augreg")
    counts = [amod.count_flops(amod.convert(vit, "attention", c), size) for c in (1.0, 0.8, 0.5, 0.2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == amod.count_flops(vit, size)
    assert amod.count_flops(amod.convert(vit, "attention", 0.5, [1]), size) > counts[2]


@pytest.mark.parametrize("router", ["attention", "linear"])
def test_a_budget_is_met_from_below_and_the_next_token_exceeds_it(router):
    vit = meta("deit_small_patch16_224")
    model = amod.convert(vit, router, budget=2.6e9)
    kept = model.tokens_kept(197)
    assert amod.count_flops(model) <= 2.6e9
    assert amod.count_flops(amod.convert(vit, router, (kept + 1) / 197)) > 2.6e9
    with pytest.raises(amod.UserError, match=r"reaches 2\.\d+ to 4\.60\d+ GFLOPs"):
        amod.convert(vit, router, budget=1e9)


def test_every_k_can_be_granted_exactly():
    """The capacity K / N that a budget yields keeps K tokens again, for each K."""
    from amod.routing import tokens_kept

    for n in (50, 197, 577, 4097):
        assert all(tokens_kept(k / n, n) == k for k in range(1, n + 1))


def test_isoflop_depth_is_the_deepest_that_does_not_exceed_mod():
    vit = meta("deit_small_patch16_224")
    for capacity in (0.125, 0.5, 0.8):
        depth = amod.isoflop_depth(vit, capacity)
        limit = amod.count_flops(amod.convert(vit, "linear", capacity))
        assert amod.count_flops(amod.truncate(vit, depth)) <= limit
        assert amod.count_flops(amod.truncate(vit, depth + 1)) > limit


def test_a_wrong_input_size_is_named():
    vit = meta("deit_tiny_patch16_224")
    for size in ((3, 384, 384), (1, 224, 224)):
        with pytest.raises(amod.UserError, match="input_size="):
            amod.count_flops(vit, size)
    with pytest.raises(amod.UserError, match="ResNet"):
        amod.count_flops(meta("resnet18"))
