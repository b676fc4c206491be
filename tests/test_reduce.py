from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models import Eva, VisionTransformer
from torch.testing import assert_close

import amod
import reference
from amod import attention
from amod.entries import Merge, Prune, Route
from amod.errors import UserError
from amod.exporting import Exported
from amod.reduce import Match, match, merge, merge_places, moved, prune, prune_places
from amod.walk import Walk


def vit(**changes):
    """17 tokens: 4 x 4 patches and the class token."""
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    name = changes.pop("name", "vit_tiny_patch16_224")
    return timm.create_model(name, **{**kwargs, **changes}).eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_two_tokens_become_their_mean_by_hand():
    # positions 0..4; even 0, 2, 4 and odd 1, 3; 2 and 3 have the same key, all other pairs are at right angles or worse
    keys = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 2], [-1, -1, 0]]])
    pairs = match(keys, 1, prefix=0)
    assert pairs.source.tolist() == [[1]]  # position 2
    assert pairs.target.tolist() == [[1]]  # position 3
    assert pairs.rest.tolist() == [[0, 2]]  # positions 0 and 4
    x = torch.tensor([[[1.0], [2.0], [3.0], [9.0], [5.0]]])
    x, size = merge(x, None, pairs, prefix=0)
    assert x.flatten().tolist() == [1, 5, 2, 6]  # (3 + 9) / 2 = 6
    assert size.tolist() == [[1, 1, 1, 2]]
    # a token that stands for two patches weighs twice: (2 * 6 + 1 * 3) / 3 = 5
    again = Match(torch.tensor([[1]]), torch.tensor([[1]]), torch.tensor([[0]]))
    x, size = merge(torch.tensor([[[1.0], [2.0], [3.0], [6.0]]]), torch.tensor([[1.0, 1, 1, 2]]), again, prefix=0)
    assert x.flatten().tolist() == [1, 2, 5]
    assert size.tolist() == [[1, 1, 3]]


def test_several_sources_of_one_target():
    pairs = Match(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), torch.tensor([[2]]))
    x, size = merge(torch.tensor([[[1.0], [4.0], [7.0], [8.0], [9.0]]]), None, pairs, prefix=0)
    assert x.flatten().tolist() == [9, 4, 8]  # (1 + 4 + 7) / 3
    assert size.tolist() == [[1, 3, 1]]


def test_a_merged_token_may_keep_the_length_of_those_in_it():
    pairs = Match(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([[1]]))
    x, _ = merge(torch.tensor([[[3.0, 0], [0, 4], [5, 12]]]), None, pairs, prefix=0, norm=True)
    assert_close(x, torch.tensor([[[5.0, 12], [2.1, 2.8]]]))  # mean (1.5, 2), 2.5 long; the two are 3.5 long on average
    x, _ = merge(torch.tensor([[[3.0, 0], [0, 4], [5, 12]]]), torch.tensor([[3.0, 1, 1]]), pairs, prefix=0, norm=True)
    assert_close(x[0, 1], torch.tensor([2.25, 1.0]) * 3.25 / (2.25**2 + 1) ** 0.5)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [16, 17])
def test_total_size_and_weighted_sum_are_kept_and_prefix_tokens_stay(prefix, tokens):
    generator = torch.Generator().manual_seed(prefix)
    x = torch.randn(3, tokens, 8, generator=generator)
    start = x.clone()
    size = None
    for _ in range(3):
        count = x.shape[1]
        pairs = match(torch.randn(x.shape, generator=generator), Merge(3).merged(count, prefix), prefix)
        before, weight = x, torch.ones(3, count) if size is None else size
        x, size = merge(x, size, pairs, prefix)
        kept, owner = merge_places(pairs, count, prefix)
        assert torch.equal(owner.gather(1, kept), torch.arange(x.shape[1]).expand(kept.shape))
        # every token is the weighted mean of those that it stands for
        sums = torch.zeros(x.shape).scatter_add(
            1, owner.unsqueeze(-1).expand(before.shape), before * weight.unsqueeze(-1)
        )
        assert_close(x, sums / size.unsqueeze(-1))
    assert_close(size.sum(dim=1), torch.full((3,), float(tokens)))
    assert_close((x * size.unsqueeze(-1)).sum(dim=1), start.sum(dim=1))
    assert torch.equal(x[:, :prefix], start[:, :prefix])
    assert (size[:, :prefix] == 1).all()


def test_rounds_merge_what_remains():
    """9 patches and a class token: half of 9 and half of the other 5, where one round is at most half of 9."""
    assert [Merge(8, rounds=n).parts(10, 1) for n in (1, 2, 3)] == [[4], [4, 2], [3, 3, 1]]
    assert Merge(8, rounds=2).remain(10, 1) == 4
    assert Merge(1, rounds=3).parts(10, 1) == [1]
    refused = [
        ({"by": "values"}, "by='values': choose one of keys, tokens"),
        ({"rounds": 0}, "rounds=0"),
        ({"proportional": 1.5}, "proportional=1.5: must be a number in"),
        ({"proportional": "yes"}, "proportional='yes'"),
        ({"norm": 1}, "norm=1: must be true or false"),
    ]
    for given, line in refused:
        with pytest.raises(UserError, match=line):
            Merge(8, **given)


def test_said_by_arguments_and_found_by_a_budget():
    given = {"placement": "few", "last": "class", "by": "tokens", "rounds": 2, "norm": True, "proportional": 0.75}
    entry = Merge(5, 0.75, by="tokens", rounds=2, norm=True)
    assert amod.convert(vit(depth=4), "tome", r=5, **given).plan == {0: entry, 1: entry, 2: entry, 3: amod.ClassOnly()}
    dense = vit(depth=4)
    half = amod.convert(dense, "tome", budget=amod.count_flops(dense) // 2, **given)
    assert {(e.by, e.rounds) for e in half.plan.values() if isinstance(e, Merge)} == {("tokens", 2)}
    assert 0.4 < amod.count_flops(half) / amod.count_flops(dense) <= 0.5
    ours = amod.convert(vit(depth=4), "merge", r=5, proportional=0.75, last="class")
    assert ours.plan == amod.convert(vit(depth=4), "tome", r=5, **given).plan
    ours = amod.convert(dense, "merge", r=4, norm=False, placement=[1])
    assert ours.plan == {1: Merge(4, 0.9, by="tokens", rounds=2)}
    with pytest.raises(UserError, match="router=merge: say what it may cost"):
        amod.convert(dense, "merge")
    with pytest.raises(UserError, match=r"rounds=2: router=evit has no rounds"):
        amod.convert(dense, "evit", rounds=2)


def test_two_rounds_reach_budgets_that_one_does_not():
    dense = vit(depth=4)
    least = amod.count_flops(amod.convert(dense, "merge", r=12, last="class"))  # 8 of 16 patches, then 4 of 8
    assert least < amod.count_flops(amod.convert(dense, "merge", r=8, last="class"))
    assert amod.count_flops(amod.convert(dense, "merge", budget=least, last="class")) == least
    with pytest.raises(UserError, match="reaches"):
        amod.convert(dense, "merge", budget=least - 1, last="class")


def test_an_average_over_patches_counts_a_merged_one_as_all_that_it_stands_for():
    """Of two kinds of patches that merge among themselves alone, with nothing to tell where one stood."""
    dense = vit(depth=4, class_token=False, global_pool="avg", pos_embed="none")
    dense.head.weight.data *= 10  # by how little the logits of random weights differ is up to the processor
    one, other = torch.randn(2, 3, 1, 4, 1, 4)
    kinds = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]]).bool()[None, None, :, None, :, None]
    x = torch.where(kinds, one, other).expand(1, 3, 4, 4, 4, 4).reshape(1, 3, 16, 16)
    model = amod.convert(dense, plan={0: Merge(6), 1: Merge(3)})
    tokens = model.forward_features(x)
    assert tokens.shape[1] == 16 - 6 - 3
    assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)
    assert (model.forward_head(tokens) - dense(x)).abs().max() > 1e-2  # as if each were one patch
    assert_close(Exported(model).eval()(x)[0], dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "map", "prr"])
@pytest.mark.parametrize("family", [VisionTransformer, Eva])
@torch.no_grad()
def test_every_pool_counts_a_merged_patch_as_all_that_it_stands_for(family, pool):
    """Equal patches that merge change nothing, where nothing tells where one stood."""
    if family is Eva and pool == "prr":
        pytest.skip("timm's Eva has no such pool")
    torch.manual_seed(0)
    nowhere = {"use_abs_pos_emb": False} if family is Eva else {"pos_embed": "none"}
    dense = family(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, global_pool=pool, **nowhere).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x = torch.randn(3, 3, 1, 4, 1, 4).expand(3, 3, 4, 4, 4, 4).clone()
    x[:, :, 0, :, 0] = torch.randn(3, 3, 4, 4)  # 14 equal patches, two others
    x[:, :, 1, :, 0] = torch.randn(3, 3, 4, 4)
    x = x.reshape(3, 3, 16, 16)
    model = amod.convert(dense, plan={0: Merge(6), 1: Merge(3)})
    assert model.forward_features(x).shape[1] == 16 + dense.num_prefix_tokens - 6 - 3
    assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)
    assert_close(Exported(model).eval()(x)[0], dense(x), atol=1e-5, rtol=1e-4)
    if pool in ("map", "prr", "avgmax"):
        with pytest.raises(UserError, match=f"global_pool='{pool}' counts a merged token"):
            amod.convert(dense, plan={0: Merge(6), 1: Prune(0.5)})


def test_a_fused_token_counts_once_whatever_merges_beside_it():
    def sizes(plan):
        walk = Walk(amod.convert(vit(), plan=plan))
        walk.forward_features(images())
        return walk.size.sort(dim=1).values

    before, behind = sizes({0: Merge(1), 1: Prune(0.5)}), sizes({1: Prune(0.5), 2: Merge(1)})
    assert behind.tolist() == [[1] * 8 + [2]] * 2
    assert all(row in ([1] * 10, [1] * 9 + [2]) for row in before.tolist())  # of 17: the dropped ones are gone


def test_a_fused_tokens_weights_have_their_gradient_whoever_reads_the_attention_beside():
    """A block that keeps all tokens changes nothing, and so no gradient."""
    gradients = []
    for later in ({}, {2: Route(1.0)}, {2: Route(1.0, "class_attention")}):
        model = amod.convert(vit().double(), plan={1: Prune(0.3)} | later).train()
        weight = model.blocks[1].attn.qkv.weight
        gradients.append(torch.autograd.grad(model(images().double()).square().sum(), weight)[0])
    for other in gradients[1:]:
        assert_close(other, gradients[0])
    fixed = amod.convert(vit().double(), plan={1: Prune(0.3, fuse=False)}).train()
    (without,) = torch.autograd.grad(fixed(images().double()).square().sum(), fixed.blocks[1].attn.qkv.weight)
    assert not torch.allclose(without, gradients[0])


@pytest.mark.parametrize(
    ("plan", "maps"),
    [
        (dict.fromkeys(range(3), Merge(3)), 0),
        ({1: Merge(3, by="tokens", rounds=2)}, 0),
        ({1: Prune(0.5, fuse=False)}, 0),
        ({1: Prune(0.5)}, 1),
    ],
)
def test_only_a_fused_token_asks_training_for_a_map(plan, maps, monkeypatch):
    made = []
    explicit = attention.explicit
    monkeypatch.setattr(attention, "explicit", lambda *args, **kwargs: made.append(1) or explicit(*args, **kwargs))
    amod.convert(vit(), plan=plan).train()(images()).sum().backward()
    assert len(made) == maps


def test_every_block_loses_r_tokens_and_the_last_ones_at_most_half():
    model = amod.convert(vit(depth=4), "tome", r=6)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(images())
    assert seen == [11, 6, 4, 3]  # 17 - 6, 11 - min(6, 5), 6 - 2, 4 - 1


@pytest.mark.parametrize("changes", [{}, {"name": "deit_tiny_distilled_patch16_224"}, {"class_token": False}])
def test_r_0_is_the_dense_model(changes):
    if "class_token" in changes:
        changes = {**changes, "global_pool": "avg"}
    dense = vit(**changes)
    assert_close(amod.convert(dense, "tome", r=0)(images()), dense(images()))


@pytest.mark.parametrize(("by", "rounds"), [("keys", 1), ("tokens", 1), ("tokens", 2), ("keys", 3)])
@pytest.mark.parametrize(("prop_attn", "norm"), [(True, False), (False, True), (0.75, True)])
def test_against_merging_one_image_and_one_token_at_a_time(prop_attn, norm, by, rounds):
    dense, r = vit(), 5

    def average(values, groups):
        weighed = [sum(values[i] * sizes[i] for i in g) / sum(sizes[i] for i in g) for g in groups]
        return torch.stack(weighed)

    def average_of_tokens(values, groups):
        if not norm:
            return average(values, groups)
        lengths = average(values.norm(dim=1), groups)
        return torch.stack([v / v.norm() * length for v, length in zip(average(values, groups), lengths, strict=True)])

    x = dense._pos_embed(dense.patch_embed(images(1)))[0]
    sizes = [1.0] * len(x)
    for block in dense.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, 4, 8).unbind(1)  # (N, H, d)
        logits = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
        logits = logits + (torch.tensor(sizes) ** float(prop_attn)).log()
        x = x + attn.proj(torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).reshape(len(x), 32))
        keys = k.mean(1)
        for part in {1: [5], 2: [3, 2], 3: [2, 2, 1]}[rounds]:
            alike, edges = keys if by == "keys" else x, []
            for i in range(2, len(x), 2):
                similar = [torch.cosine_similarity(alike[i], alike[j], dim=0).item() for j in range(1, len(x), 2)]
                edges.append((max(similar), i, 2 * similar.index(max(similar)) + 1))
            joins = {i: j for _, i, j in sorted(edges, reverse=True)[:part]}
            groups = [[i] for i in range(0, len(x), 2) if i not in joins]
            groups += [[j, *(i for i in joins if joins[i] == j)] for j in range(1, len(x), 2)]
            x, keys = average_of_tokens(x, groups), average(keys, groups)
            sizes = [sum(sizes[i] for i in group) for group in groups]
        x = x + block.mlp(block.norm2(x))
    plan = dict.fromkeys(range(len(dense.blocks)), Merge(r, prop_attn, by, rounds, norm))
    assert_close(amod.convert(dense, plan=plan)(images(1))[0], dense.forward_head(dense.norm(x)[None])[0])


def test_pruning_by_hand():
    """Class token, then patches 1..4 with attention .4 .1 .2 .3: two stay, the others fuse with their own weights."""
    x = torch.tensor([[[10.0], [1.0], [2.0], [3.0], [4.0]]])
    scores = torch.tensor([[0.0, 0.4, 0.1, 0.2, 0.3]])
    fused, size, kept = prune(x, None, scores, 2, prefix=1, fuse=True)
    assert size is None
    assert kept.tolist() == [[0, 1, 4]]
    assert_close(fused.flatten(), torch.tensor([10.0, 1.0, 4.0, 0.1 * 2 + 0.2 * 3]))
    assert prune(x, None, scores, 2, prefix=1, fuse=False)[0].flatten().tolist() == [10, 1, 4]
    sizes = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert prune(x, sizes, scores, 2, prefix=1, fuse=True)[1].tolist() == [
        [1, 2, 5, 1]
    ]  # the fused one is no mean of the others
    assert prune_places(kept, 5, 4).owner.tolist() == [[0, 1, 3, 3, 2]]
    assert prune_places(kept, 5, 4).kept.tolist() == [[0, 1, 4, -1]]
    assert prune_places(kept, 5, 3).owner.tolist() == [[0, 1, -1, -1, 2]]
    assert moved(torch.tensor([[7, 8, 9]]), torch.tensor([[2, -1, 0]])).tolist() == [[9, -1, 7]]


def evit_by_hand(dense, keep, fuse, blocks):
    """One image of EViT, one token after the other."""
    x = dense._pos_embed(dense.patch_embed(images(1)))[0]
    for i, block in enumerate(dense.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, 4, 8).unbind(1)
        maps = (torch.einsum("ihd,jhd->hij", q, k) / 8**0.5).softmax(-1)
        x = x + attn.proj(torch.einsum("hij,jhd->ihd", maps, v).reshape(len(x), 32))
        stay = math.ceil(keep * (len(x) - 1))
        if i in blocks and stay < len(x) - 1:
            row = maps.mean(0)[0]
            order = sorted(range(1, len(x)), key=lambda j: -row[j].item())
            gone = sum(row[j] * x[j] for j in order[stay:])
            x = torch.stack([x[0], *(x[j] for j in sorted(order[:stay])), *([gone] if fuse else [])])
        x = x + block.mlp(block.norm2(x))
    return dense.forward_head(dense.norm(x)[None])[0]


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_evit_against_pruning_one_image_and_one_token_at_a_time(fuse):
    dense = vit(depth=4)
    model = amod.convert(dense, "evit", placement=[1, 2], keep_rate=0.6, fuse=fuse)
    assert_close(model(images(1))[0], evit_by_hand(dense, 0.6, fuse, (1, 2)))
    assert_close(amod.convert(dense, "evit", keep_rate=1.0)(images()), dense(images()))


PLANS = {
    "tome": {0: Merge(3), 1: Merge(3), 2: Merge(3)},
    "evit": {1: amod.Prune(0.5), 2: amod.Prune(0.5)},
    "mixed": {0: Merge(3), 1: amod.Route(0.5, keep_prefix=True), 2: amod.ClassOnly()},
    "class_attention behind a merge": {1: Merge(3), 2: amod.Route(0.5, "class_attention", keep_prefix=True)},
    "rounds": {
        0: Merge(5, 0.75, by="tokens", rounds=2, norm=True),
        1: Merge(4, 0.75, rounds=2),
        2: amod.Route(0.5, "class_attention", keep_prefix=True),
    },
    "unfused": {1: amod.Prune(0.5, fuse=False), 2: amod.Route(0.5, "linear", keep_prefix=True)},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_it_trains_under_timms_keys_and_leaves_the_model_alone(plan):
    dense = vit(drop_path_rate=0.1)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = amod.convert(dense, plan=plan).train()
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {key for key in model.state_dict() if "routers" not in key} == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_checkpointing_gives_the_same_gradients_and_bf16_runs(plan):
    model = amod.convert(vit(), plan=plan).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        model(images()).float().sum().backward()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@torch.no_grad()
def test_the_record_says_which_patches_each_token_stands_for(plan):
    """The size of a token, counted again from ``owner``, and scores that still sum to one."""
    model = amod.convert(vit(), plan=plan)
    _, routing = model(images(), return_routing=True)
    assert [layer.layer for layer in routing] == sorted(plan)
    sizes = model.tokens_kept(17)
    for layer in routing:
        entry = plan[layer.layer]
        assert layer.tokens(17).shape == (2, 17)
        assert layer.tokens(17)[:, 0].all()
        if isinstance(entry, Merge):
            assert layer.tokens(17).all()
            assert (layer.owner.max(dim=1).values + 1 == sizes[layer.layer]).all()
        if isinstance(entry, amod.Route) and entry.router != "linear":
            assert_close(layer.scores.sum(dim=1), torch.ones(2))
        if isinstance(entry, amod.ClassOnly):
            assert (layer.tokens(17).sum(dim=1) == 1 + (layer.owner[:, 1:] == 0).sum(dim=1)).all()


@torch.no_grad()
def test_intermediates_are_of_all_tokens():
    """A merged token stands in for its patches; a pruned one stays as it was when it went."""
    dense = vit(depth=4)
    model = amod.convert(dense, plan={0: Merge(4), 2: amod.Prune(0.5, fuse=False)})
    final, found = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=True)
    assert_close(final, model.forward_features(images()))
    _, routing = model(images(), return_routing=True)
    merged, pruned = routing
    for b in range(2):
        for patch in range(1, 17):
            other = merged.owner[b].tolist().index(merged.owner[b, patch].item())
            if other:
                assert torch.equal(found[0][0][b, patch - 1], found[0][0][b, other - 1])
        gone = (pruned.owner[b, 1:] < 0).nonzero().flatten()
        assert len(gone) >= 6
        assert torch.equal(found[2][0][b, gone], found[3][0][b, gone])  # nothing happens to it any more
        assert not torch.equal(found[1][0][b, gone], found[2][0][b, gone])  # the attention before it still did
    maps = model.forward_intermediates(images(), indices=[1, 3], intermediates_only=True, norm=True)
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 2
    asked = model.get_intermediate_layers(images(), n=2, reshape=True, norm=True)
    assert torch.equal(asked[1], maps[1])


@torch.no_grad()
def test_the_class_token_alone_gives_the_same_logits():
    names = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
    for name in names:
        dense = vit(name=name)
        model = amod.convert(dense, "none", last="class")
        assert_close(model(images()), dense(images()), atol=1e-6, rtol=1e-5)
        seen = []
        model.blocks[-1].mlp.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape[1]))
        model(images())
        assert seen == [2 if "distilled" in name else 1]
    with pytest.raises(amod.UserError, match="global_pool='avg'"):
        amod.convert(vit(global_pool="avg", class_token=False), "none", last="class")


def test_other_blocks_are_refused():
    parallel = vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    for plan in ({0: Merge(3)}, {0: amod.Prune(0.5)}):
        with pytest.raises(amod.UserError, match="block 0"):
            amod.convert(parallel, plan=plan)
    with pytest.raises(amod.UserError, match="routed already"):
        amod.convert(amod.convert(vit(), capacity=0.5), "tome", r=3)
    with pytest.raises(amod.UserError, match="plan= says it already"):
        amod.convert(vit(), capacity=0.5, plan={0: Merge(3)})


def test_dense_takes_the_plan_off_again():
    dense = vit()
    for plan in PLANS.values():
        back = amod.dense(amod.convert(dense, plan=plan))
        assert type(back) is type(dense)
        assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
        assert back.state_dict().keys() == dense.state_dict().keys()
        assert torch.equal(back(images()), dense(images()))


@pytest.mark.parametrize("fuse", [True, False])
@torch.no_grad()
def test_scores_behind_a_pruning_block_are_those_of_the_tokens_that_remain(fuse):
    """A fused token has the sum of what it stands for; what is gone takes its score along."""
    dense = vit(depth=4)
    _, routing = amod.convert(dense, plan={1: amod.Prune(0.5, fuse), 2: amod.Route(0.5)})(images(), return_routing=True)
    _, decisions = reference.forward(dense, images(), "attention", [2], 8)
    for b, (_, scores) in enumerate(decisions[2]):
        kept = routing[0].tokens(17)[b]
        expected = scores[kept].tolist() + ([scores[~kept].sum().item()] if fuse else [])
        assert_close(routing[1].scores[b], torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_who_stands_for_whom_is_followed_between_scored_blocks_too():
    """Only blocks 1 and 4 leave scores; what blocks 3 and 4 merge are tokens that block 1 has merged."""
    plan = {1: Merge(3), 2: Route(0.5, "class_attention"), 3: Merge(3), 4: Merge(3), 5: Route(0.5, "class_attention")}
    model = amod.convert(vit(depth=6), plan=plan)
    with torch.no_grad():
        assert torch.equal(model(images()), model(images(), return_routing=True)[0])
