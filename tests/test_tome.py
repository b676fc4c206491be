from __future__ import annotations

import pytest
import timm
import torch
from torch.testing import assert_close

import amod
from amod.baselines.tome import Match, match, merge, merged, r_for_flops, tome, tome_flops


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


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", [16, 17])
def test_total_size_and_weighted_sum_are_kept_and_prefix_tokens_stay(prefix, tokens):
    generator = torch.Generator().manual_seed(prefix)
    x = torch.randn(3, tokens, 8, generator=generator)
    start = x.clone()
    size = None
    for _ in range(3):
        r = merged(x.shape[1], 3, prefix)
        x, size = merge(x, size, match(torch.randn(x.shape, generator=generator), r, prefix), prefix)
    assert_close(size.sum(dim=1), torch.full((3,), float(tokens)))
    assert_close((x * size.unsqueeze(-1)).sum(dim=1), start.sum(dim=1))
    assert torch.equal(x[:, :prefix], start[:, :prefix])
    assert (size[:, :prefix] == 1).all()


def test_every_block_loses_r_tokens_and_the_last_ones_at_most_half():
    model = tome(vit(depth=4), 6)
    seen = []
    for block in model.vit.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(images())
    assert seen == [11, 6, 4, 3]  # 17 - 6, 11 - min(6, 5), 6 - 2, 4 - 1


@pytest.mark.parametrize("changes", [{}, {"name": "deit_tiny_distilled_patch16_224"}, {"class_token": False}])
def test_r_0_is_the_dense_model(changes):
    if "class_token" in changes:
        changes = {**changes, "global_pool": "avg"}
    dense = vit(**changes)
    assert_close(tome(dense, 0)(images()), dense(images()))


@pytest.mark.parametrize("prop_attn", [True, False])
def test_against_merging_one_image_and_one_token_at_a_time(prop_attn):
    dense, r = vit(), 4
    x = dense._pos_embed(dense.patch_embed(images(1)))[0]
    sizes = [1.0] * len(x)
    for block in dense.blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, 4, 8).unbind(1)  # (N, H, d)
        logits = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
        if prop_attn:
            logits = logits + torch.tensor(sizes).log()
        x = x + attn.proj(torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).reshape(len(x), 32))
        keys = k.mean(1)
        edges = []
        for i in range(2, len(x), 2):
            similar = [torch.cosine_similarity(keys[i], keys[j], dim=0).item() for j in range(1, len(x), 2)]
            edges.append((max(similar), i, 2 * similar.index(max(similar)) + 1))
        joins = {i: j for _, i, j in sorted(edges, reverse=True)[:r]}
        groups = [[i] for i in range(0, len(x), 2) if i not in joins]
        groups += [[j, *(i for i in joins if joins[i] == j)] for j in range(1, len(x), 2)]
        total = [sum(sizes[i] for i in group) for group in groups]
        x = torch.stack([sum(x[i] * sizes[i] for i in group) / s for group, s in zip(groups, total, strict=True)])
        sizes = total
        x = x + block.mlp(block.norm2(x))
    assert_close(tome(dense, r, prop_attn)(images(1))[0], dense.forward_head(dense.norm(x)[None])[0])


def test_flops_of_deit_small_and_equal_cost():
    with torch.device("meta"):
        small = timm.create_model("deit_small_patch16_224")
    assert tome_flops(tome(small, 0)) == amod.count_flops(small)
    assert tome_flops(tome(small, 13)) / 1e9 == pytest.approx(2.71, abs=0.01)  # the ToMe paper prints 2.7
    assert tome_flops(tome(small, 8)) / 1e9 == pytest.approx(3.43, abs=0.01)
    assert r_for_flops(small, amod.count_flops(amod.convert(small, capacity=0.5))) == 8
    assert r_for_flops(small, amod.count_flops(amod.convert(small, capacity=0.125))) == 14


def test_it_trains_under_timms_keys_and_leaves_the_model_alone():
    dense = vit(drop_path_rate=0.1)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    model = tome(dense, 3).train()
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    vit().load_state_dict(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_checkpointing_and_bf16_give_the_same():
    dense = vit()
    model, plain = tome(dense, 3), tome(dense, 3)
    model.vit.set_grad_checkpointing()
    assert_close(model(images()), plain(images()))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(plain(images()).float(), model(images()).float())


@pytest.mark.parametrize("r", [-1, 2.5, True, "13"])
def test_r_must_be_a_count(r):
    with pytest.raises(amod.UserError, match="whole number"):
        tome(vit(), r)


def test_other_models_are_refused():
    with pytest.raises(amod.UserError, match="cannot be routed"):
        tome(torch.nn.Linear(2, 2), 3)
    with pytest.raises(amod.UserError, match="routed already"):
        tome(amod.convert(vit(), capacity=0.5), 3)
    with pytest.raises(amod.UserError, match="block 0"):
        tome(vit(name="vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock), 3)
