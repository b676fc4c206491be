from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import timm
import timm.data
import timm.optim
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode

import amod
import reference
from amod.families import default_tokens
from families import FAMILIES, build


def small(**kwargs):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5} | kwargs
    vit = VisionTransformer(**kwargs).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return vit


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("router", "capacity", "keep_prefix"),
    [
        ("attention", 0.125, False),
        ("attention", 0.5, True),
        ("attention", 0.9, False),
        ("attention_weighted", 0.4, False),
        ("linear", 0.4, False),
    ],
)
@torch.no_grad()
def test_every_family_agrees_with_the_obvious_implementation(family, router, capacity, keep_prefix):
    vit, size = build(family)
    images = torch.randn(2, *size)
    model = amod.convert(vit, router, capacity, keep_prefix=keep_prefix)
    weights = {i: model.routers[str(i)].weight for i in model.blocks_routed} if router == "linear" else None
    logits, routing = model(images, return_routing=True)
    n = routing[0].scores.shape[1]
    k = int(capacity * n)
    expected, decisions = reference.forward(
        vit, images, router, model.blocks_routed, k, weights=weights, keep_prefix=keep_prefix
    )
    for layer in routing:
        assert layer.scores.shape == (2, n)
        assert layer.scores.dtype == torch.float32
        assert layer.indices.shape == (2, k)
        for b, (kept, scores) in enumerate(decisions[layer.layer]):
            torch.testing.assert_close(layer.scores[b], scores, atol=1e-5, rtol=1e-4)
            assert layer.indices[b].tolist() == kept
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["attention", "random", "none"])
@torch.no_grad()
def test_capacity_one_is_the_dense_model(family, router):
    vit, size = build(family)
    images = torch.randn(2, *size)
    model = amod.convert(vit, router, 1.0)
    torch.testing.assert_close(model(images), vit(images), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_pruned_is_as_if_nobody_could_see_it(family):
    """Without fusing: the tokens that remain are those of the dense model with the others' columns hidden behind it."""
    vit, size = build(family)
    images = torch.randn(2, *size)
    model = amod.convert(vit, plan={1: amod.Prune(0.5, fuse=False)})
    walk_record = model(images, return_routing=True)[1]
    seen = walk_record[0].tokens(walk_record[0].owner.shape[1])
    features = model.forward_features(images)
    hidden = reference.hiding(vit, seen, later_than=1)
    expected = torch.stack([row[kept] for row, kept in zip(hidden.forward_features(images), seen, strict=True)])
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_class_token_alone_gives_the_same_logits_or_is_refused(family):
    vit, size = build(family)
    images = torch.randn(2, *size)
    if vit.global_pool != "token":
        with pytest.raises(amod.UserError, match="reads all tokens"):
            amod.convert(vit, "none", last="class")
        return
    model = amod.convert(vit, "none", last="class")
    torch.testing.assert_close(model(images), vit(images), atol=2e-5, rtol=1e-4)
    assert amod.count_flops(model, size) < amod.count_flops(vit, size)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging_nothing_is_dense_and_merging_keeps_all_intermediates(family):
    vit, size = build(family)
    images = torch.randn(2, *size)
    torch.testing.assert_close(amod.convert(vit, "tome", r=0)(images), vit(images), atol=2e-5, rtol=1e-4)
    merged = amod.convert(vit, "tome", r=1)
    assert merged.forward_features(images).shape[1] == vit.forward_features(images).shape[1] - len(vit.blocks)
    assert [f.shape for f in merged.forward_intermediates(images, intermediates_only=True)] == [
        f.shape for f in vit.forward_intermediates(images, intermediates_only=True)
    ]


@pytest.mark.parametrize("blocks", [[1, 2, 3], [1, 2, 4, 5], [5], [2, 3, 4, 5]])
@pytest.mark.parametrize("options", [{}, {"keep_prefix": True}])
@pytest.mark.parametrize("router", ["attention", "class_attention", "linear"])
@torch.no_grad()
def test_any_placement_agrees_with_the_obvious_implementation(blocks, options, router):
    """Consecutive routed blocks use the scores as ``routing.refine`` defines them."""
    torch.manual_seed(2)  # class_attention keeps the class token of one image and skips those of the others
    vit = small(reg_tokens=1)
    model = amod.convert(vit, router, 0.4, blocks, **options)
    weights = {i: model.routers[str(i)].weight for i in blocks} if router == "linear" else None
    logits, routing = model(IMAGES, return_routing=True)
    expected, decisions = reference.forward(vit, IMAGES, router, blocks, int(0.4 * 18), **options, weights=weights)
    assert [layer.layer for layer in routing] == blocks
    for layer in routing:
        assert [row.tolist() for row in layer.indices] == [kept for kept, _ in decisions[layer.layer]]
        if options:
            assert (layer.indices[:, :2] == torch.tensor([0, 1])).all()
        if router != "linear":
            torch.testing.assert_close(layer.scores.sum(dim=1), torch.ones(3))
    if router == "class_attention" and blocks in ([1, 2, 3], [2, 3, 4, 5]) and not options:
        assert (routing[0].indices[:, 0] == 0).sum() == 1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_linear_routers_sigmoid():
    vit = small()
    model = amod.convert(vit, "linear", 0.5, activation="sigmoid")
    weights = {i: model.routers[str(i)].weight for i in model.blocks_routed}
    expected, _ = reference.forward(vit, IMAGES, "linear", model.blocks_routed, 8, weights=weights, sigmoid=True)
    torch.testing.assert_close(model(IMAGES), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", ["attention", "attention_weighted", "linear", "random"])
@torch.no_grad()
def test_skipped_tokens_are_bit_identical_and_never_reach_the_block(router):
    vit = small()
    model = amod.convert(vit, router, 0.3, [5])
    seen = {}
    model.blocks[4].register_forward_hook(lambda m, args, out: seen.update(dense=out))
    model.blocks[4].drop_path2.register_forward_hook(lambda m, args, out: seen.update(update=out))
    model.blocks[5].norm1.register_forward_hook(lambda m, args, out: seen.update(kept=args[0]))
    model.norm.register_forward_hook(lambda m, args, out: seen.update(after=args[0]))
    model.blocks[4].norm2.register_forward_hook(lambda m, args, out: seen.update(middle=args[0]))
    _, routing = model(IMAGES, return_routing=True)
    assert seen["kept"].shape == (3, int(0.3 * 17), 32)
    before = seen["middle"] + seen["update"]  # what leaves block 4
    skipped = torch.ones(3, 17, dtype=torch.bool)
    skipped[torch.arange(3)[:, None], routing[0].indices] = False
    assert torch.equal(seen["after"][skipped], before[skipped])
    assert (seen["after"][~skipped] != before[~skipped]).any(dim=-1).all()


@pytest.mark.parametrize("router", ["attention", "attention_weighted", "linear", "random", "none"])
def test_every_trainable_parameter_gets_a_gradient(router):
    # averaged: with a class token alone, the last block learns only from images whose class token it keeps
    model = amod.convert(small(init_values=0.5, global_pool="avg"), router, 0.4).train()
    model(IMAGES).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_state_dict_is_timms_both_ways():
    vit = small()
    for router in ("attention", "attention_weighted", "random", "none"):
        model = amod.convert(vit, router, 0.4)
        assert set(model.state_dict()) == set(vit.state_dict())
        other = small()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(IMAGES), vit(IMAGES), atol=0, rtol=0)
        model.load_state_dict(small().state_dict())
    linear = amod.convert(vit, "linear", 0.4)
    assert set(linear.state_dict()) - set(vit.state_dict()) == {f"routers.{i}.weight" for i in (1, 3, 5)}
    again = amod.convert(small(), "linear", 0.4)
    again.load_state_dict(linear.state_dict())
    assert torch.equal(again(IMAGES), linear(IMAGES))
    wrapped = torch.nn.ModuleDict({"model": linear})
    assert "model.blocks.0.attn.qkv.weight" in wrapped.state_dict()
    wrapped.load_state_dict(wrapped.state_dict())


def test_the_given_model_is_left_alone():
    vit = small()
    before = copy.deepcopy(vit.state_dict())
    model = amod.convert(vit, "attention", 0.4).train()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in before.items())
    assert not vit.training


def test_copies_and_pickles():
    model = amod.convert(small(), "linear", 0.4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), model(IMAGES))
        assert set(other.state_dict()) == set(model.state_dict())


def test_drop_path_acts_on_the_update_of_kept_tokens():
    """With every update of blocks 4 and 5 dropped, all tokens leave the model as block 3 left them."""
    model = amod.convert(small(drop_path_rate=0.5), "linear", 0.4, [5]).train()
    seen = {}
    for i in (4, 5):
        block = model.blocks[i]
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1 - 1e-7
    model.blocks[3].register_forward_hook(lambda m, args, out: seen.update(before=out))
    model.norm.register_forward_hook(lambda m, args, out: seen.update(after=args[0]))
    model(IMAGES)
    assert torch.equal(seen["before"], seen["after"])


@pytest.mark.parametrize("router", ["attention", "linear"])
def test_gradient_checkpointing_changes_nothing(router):
    model = amod.convert(small(), router, 0.4, [1, 2, 4]).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["attention", "linear"])
def test_autocast_keeps_scores_in_float32(router, dtype):
    model = amod.convert(small(), router, 0.4)
    with torch.autocast("cpu", dtype):
        logits, routing = model(IMAGES, return_routing=True)
        logits.float().sum().backward()
    assert logits.dtype == dtype
    assert all(layer.scores.dtype == torch.float32 for layer in routing)


@pytest.mark.parametrize("router", ["attention", "linear"])
def test_compile_of_training_has_no_graph_break_and_gives_the_routing(router):
    model = amod.convert(small(), router, 0.4, [1, 2, 4]).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (logits, routing), (expected, decided) = (f(IMAGES, return_routing=True) for f in (compiled, model))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert [r.layer for r in routing] == [1, 2, 4]
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(routing, decided, strict=True))


def test_dynamic_image_size_keeps_the_share_of_whatever_comes():
    vit = small(dynamic_img_size=True)
    model = amod.convert(vit, "attention", 0.5)
    for size in (16, 32, 48):
        _, routing = model(torch.randn(2, 3, size, size), return_routing=True)
        assert routing[0].indices.shape[1] == ((size // 8) ** 2 + 1) // 2


def test_truncate_keeps_the_first_blocks():
    vit = small()
    short = amod.truncate(vit, 2)
    assert len(short.blocks) == 2
    assert len(vit.blocks) == 6
    x = vit.norm(vit.blocks[:2](vit._pos_embed(vit.patch_embed(IMAGES))))
    torch.testing.assert_close(short(IMAGES), vit.forward_head(x))
    with torch.no_grad():
        short.blocks[0].norm1.weight.zero_()
    assert vit.blocks[0].norm1.weight.abs().sum() > 0
    for depth in (0, 7, 1.5, True):
        with pytest.raises(amod.UserError, match="depth="):
            amod.truncate(vit, depth)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"router": "atention"}, "router='atention': choose one of attention"),
        ({"router": "isoflop"}, "amod.truncate"),
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 2}, "capacity=2"),
        ({"capacity": "abc"}, "'abc'"),
        ({"capacity": 0.01}, "keeps no token of 17"),
        ({"placement": "every"}, "'every'"),
        ({"placement": [0]}, "block 0"),
        ({"placement": []}, "routes none"),
        ({"placement": 3}, "placement=3"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"budget": "abc"}, "budget='abc'"),
        ({"placement": [6]}, "6 is not one of 0 to 5"),
        ({"router": "linear", "activation": "relu"}, "activation='relu'"),
        ({"capacity": 0.06, "keep_prefix": True}, "keep_prefix takes 1"),
        ({"budget": 1.0}, "reaches"),
        ({"budget": 1e15}, "reaches"),
        ({"budget": 2e6, "capacity": 0.5}, "capacity=0.5: budget= picks it"),
        ({"router": "tome", "capacity": 0.5}, "capacity=0.5: router=tome has no capacity"),
        ({"router": "tome", "keep_prefix": True}, "keep_prefix=True: router=tome has no keep_prefix"),
        ({"router": "evit", "r": 3}, "r=3: router=evit has no r"),
        ({"router": "linear", "fuse": False}, "fuse=False: router=linear has no fuse"),
        ({"plan": {1: amod.Route(0.5)}, "capacity": 0.5}, "capacity=0.5: plan= says it already"),
        ({"plan": {1: amod.Route(0.5)}, "fuse": False}, "fuse=False: plan= says it already"),
        ({"plan": {1: amod.Route(0.5)}, "activation": "sigmoid"}, "activation='sigmoid': plan= says it already"),
    ],
)
def test_convert_refuses_what_it_cannot_serve(arguments, words):
    with pytest.raises(amod.UserError, match=words) as error:
        amod.convert(small(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_other_families_are_refused_at_convert(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(amod.UserError, match=f"{type(model).__name__} cannot be routed"):
        amod.convert(model)


def test_a_block_without_a_readable_map_is_refused_for_attention_only():
    vit = small(block_fn=ParallelScalingBlock)
    with pytest.raises(amod.UserError, match="ParallelScalingBlock"):
        amod.convert(vit, "attention", 0.4)
    model = amod.convert(vit, "random", 1.0)
    torch.testing.assert_close(model(IMAGES), vit(IMAGES), atol=1e-5, rtol=1e-4)
    with pytest.raises(amod.UserError, match="routed already"):
        amod.convert(model)


def test_timms_optimizer_groups_see_through_the_wrapper():
    vit = small()
    model = amod.convert(vit, "linear", 0.4)
    names = dict(model.named_parameters())
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay() & set(names)
    groups = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
    lr_scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    scales = [lr_scale[id(block.attn.qkv.weight)] for block in model.blocks]
    assert scales == sorted(scales)
    assert len(set(scales)) == 6


def test_timms_helpers_see_the_models_own_data_config():
    """Weights trained with a mean of 0.5 must not be fed images normalised for ImageNet's."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k")
        model = amod.convert(vit)
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(vit)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.5, 0.5, 0.5)
    model.reset_classifier(7)
    assert model.num_classes == model.get_classifier().out_features == 7


def test_numbers_of_numpy_are_numbers():
    model = amod.convert(small(), capacity=np.float32(0.5), placement=np.array([1, 3]))
    assert model.blocks_routed == (1, 3)


def test_tokens_of_the_models_own_size():
    assert default_tokens(small(reg_tokens=3)) == 20


@torch.no_grad()
def test_memory_is_an_exponential_mean_over_routed_blocks():
    """With every token kept nothing is skipped, so each block's scores are half its own and half what came before."""
    vit = small()
    plain = amod.convert(vit, "class_attention", 1.0, [2, 3, 4])(IMAGES, return_routing=True)[1]
    mixed = amod.convert(vit, "class_attention", 1.0, [2, 3, 4], memory=0.5)(IMAGES, return_routing=True)[1]
    own = [layer.scores for layer in plain]
    torch.testing.assert_close(mixed[0].scores, own[0])
    torch.testing.assert_close(mixed[1].scores, own[0] / 2 + own[1] / 2)
    torch.testing.assert_close(mixed[2].scores, own[0] / 4 + own[1] / 4 + own[2] / 2)
    plan = {
        2: amod.Route(0.5, "class_attention", memory=0.5),
        3: amod.Merge(3),
        4: amod.Route(0.5, "class_attention", memory=0.5),
    }
    layers = amod.convert(vit, plan=plan)(IMAGES, return_routing=True)[1]
    torch.testing.assert_close(layers[-1].scores.sum(dim=1), torch.ones(3))  # what merges adds up what it remembers
    for wrong in ({"memory": 1.0}, {"memory": 0.5, "router": "linear"}):
        with pytest.raises(amod.UserError, match="memory="):
            amod.convert(vit, **wrong)


# --- masks of the caller's, and forwards of the caller's ----------------------------------------------------------

CUTS = [
    {1: amod.Merge(4)},
    {1: amod.Prune(0.5)},
    {1: amod.Merge(4), 3: amod.Route(0.5, "linear")},
    {1: amod.Prune(0.5, fuse=False), 2: amod.Merge(2), 5: amod.ClassOnly()},
    {1: amod.Route(0.5, "linear"), 3: amod.Route(0.5)},
]


@pytest.mark.parametrize("plan", CUTS, ids=str)
@torch.no_grad()
def test_a_mask_goes_with_the_tokens(plan):
    """A padding mask says what the same mask of pairs says, and follows tokens whether they are recorded or not."""
    model = amod.convert(small(), plan=plan)
    padding = torch.arange(17).expand(3, 17) < torch.tensor([[17], [12], [9]])
    pairs = padding[:, None, None, :].expand(3, 1, 17, 17)
    logits = model(IMAGES, attn_mask=pairs)
    assert (logits - model(IMAGES)).abs().max() > 1e-4
    torch.testing.assert_close(model(IMAGES, attn_mask=pairs, return_routing=True)[0], logits)
    torch.testing.assert_close(model(IMAGES, attn_mask=padding[:, None, None, :]), logits)
    torch.testing.assert_close(model(IMAGES, attn_mask=torch.ones(17, 17, dtype=torch.bool)), model(IMAGES))


def test_a_forward_that_would_not_be_run_is_refused():
    class Scaled(VisionTransformer):
        def forward(self, x, attn_mask=None):
            return super().forward(2 * x)

    class Noted(VisionTransformer):
        def forward_features(self, x, **kwargs):
            return super().forward_features(2 * x, **kwargs)

    class Placed(VisionTransformer):
        def _pos_embed(self, x):
            return 2 * super()._pos_embed(x)

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    for kind, words in ((Scaled, "defines forward itself"), (Noted, "defines forward_features with super")):
        with pytest.raises(amod.UserError, match=words):
            amod.convert(kind(**shape), capacity=0.5)
    for name in ("forward", "forward_features", "forward_intermediates"):
        hooked = VisionTransformer(**shape)
        setattr(hooked, name, getattr(hooked, name))
        with pytest.raises(amod.UserError, match=f"its {name} was replaced on this object"):
            amod.convert(hooked, capacity=0.5)
    placed = Placed(**shape).eval()
    torch.testing.assert_close(amod.convert(placed, plan={1: amod.Route(1.0)})(IMAGES), placed(IMAGES))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"router": "none", "budget": 1e6}, "router=none is the dense model"),
        ({"capacity": 0.5, "input_size": (3, 32, 32)}, "at which size budget= is counted"),
        ({"plan": {1: amod.Route(0.5)}, "input_size": (3, 32, 32)}, "at which size budget= is counted"),
        ({"activation": "sigmoid"}, "is of router=linear"),
        ({"budget": 1e6, "input_size": 32}, r"give \(channels, height, width\)"),
        ({"budget": 1e6, "input_size": (32, 32)}, r"give \(channels, height, width\)"),
        ({"budget": 1e6, "input_size": IMAGES}, r"a tensor \(3, 3, 32, 32\)"),
        ({"budget": 0.75}, r"share \* amod.count_flops"),
        ({"plan": [amod.Route(0.5)]}, "write {block: entry}"),
        ({"plan": amod.Route(0.5)}, "write {block: entry}"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(given, words):
    with pytest.raises(amod.UserError, match=words) as error:
        amod.convert(small(), **given)
    assert "\n" not in str(error.value)


def test_a_mask_in_the_second_place_is_refused():
    model = amod.convert(small(), capacity=0.5)
    with pytest.raises(amod.UserError, match="attn_mask=mask"):
        model(IMAGES, torch.ones(17, 17))


def test_counting_leaves_every_module_in_its_mode():
    model = amod.convert(small(), capacity=0.5).train()
    model.blocks[0].eval()
    amod.count_flops(model, IMAGES)
    assert model.blocks[1].training
    assert not model.blocks[0].mlp.training


def test_the_record_of_no_images():
    model = amod.convert(small(), plan={1: amod.Merge(4), 2: amod.Prune(0.5)})
    _, routing = model(IMAGES[:0], return_routing=True)
    assert [layer.tokens(17).shape for layer in routing] == [(0, 17), (0, 17)]


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {1: amod.Route(0.5), 2: amod.Route(0.5), 3: amod.Route(0.5, skip="attention")},
        {1: amod.Route(0.5, "linear"), 3: amod.Route(0.5, "linear")},
        {0: amod.Merge(3), 1: amod.Merge(1), 2: amod.Merge(2)},
        {1: amod.Prune(0.5), 2: amod.Route(0.5, memory=0.5), 3: amod.Route(0.5, memory=0.5), 5: amod.ClassOnly()},
    ],
)
def test_blocks_may_live_on_several_devices(plan):
    """Two pretended GPUs, whose tensors have devices and no numbers; accelerate's hooks move what a block is given."""
    model = amod.convert(small(), plan=plan)

    def move(module, args, kwargs):
        def moved(value):
            return value.to("cuda:1") if isinstance(value, torch.Tensor) else value

        return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}

    later = [*model.blocks[2:], model.norm, model.head]
    with FakeTensorMode(), torch.no_grad():
        for part, device in [(model, "cuda:0"), *((part, "cuda:1") for part in later)]:
            for module in part.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device=device))
        for part in later:
            part.register_forward_pre_hook(move, with_kwargs=True)
        images = torch.empty(3, 3, 32, 32, device="cuda:0")
        assert model(images).device == torch.device("cuda:1")
        features, intermediates = model.forward_intermediates(images)
        assert [f.device.index for f in intermediates] == [0, 0, 1, 1, 1, 1]
        assert features.device.index == 1


@pytest.mark.parametrize("router", ["attention", "linear", "tuning", "tome", "evit", "dynamicvit"])
def test_a_model_of_double_precision_stays_one(router):
    vit = small().double()
    model = amod.convert(vit, router)
    assert model(IMAGES.double()).dtype == torch.float64
    model.train()(IMAGES.double()).sum().backward()
