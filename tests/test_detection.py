"""DETR: routed encoder, queries and memory against a plain loop; the paper's FLOPs; padding; files."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection

import amod
from amod.detection import transformer_flops
from amod.detr_plan import PARTS, DetrPlan
from amod.entries import Route

SIZE = (64, 96)  # 2 x 3 image tokens


def tiny(layers: int = 4, **kwargs) -> DetrForObjectDetection:
    torch.manual_seed(0)
    config = DetrConfig(
        d_model=16, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=9, num_labels=3, backbone="resnet10t", **kwargs,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)
    return model


@pytest.fixture(scope="module")
def detr() -> DetrForObjectDetection:
    return tiny()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks() -> Tensor:
    """The first image has all 2 x 3 tokens, the second 2 x 2, the third 1 x 2."""
    mask = torch.zeros(3, *SIZE, dtype=torch.long)
    for i, (height, width) in enumerate([SIZE, (64, 64), (32, 64)]):
        mask[i, :height, :width] = 1
    return mask


# --- an obvious reference: one image at a time, maps in memory, one layer's parts written out -----------------------


def attend(attn, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D), (m, D), (m, D) -> (n, D), and the column mean (m,)."""
    heads = attn.q_proj.out_features // attn.head_dim
    q, k, v = (
        f(x).unflatten(1, (heads, -1)).transpose(0, 1)
        for f, x in ((attn.q_proj, queries), (attn.k_proj, keys), (attn.v_proj, values))
    )
    maps = (q @ k.transpose(1, 2) / math.sqrt(attn.head_dim)).softmax(-1)
    return attn.o_proj((maps @ v).transpose(0, 1).flatten(1)), maps.mean(dim=(0, 1))


def feed_forward(layer, x: Tensor) -> Tensor:
    return layer.final_layer_norm(x + layer.mlp.fc2(layer.mlp.fc1(x).relu()))


def encoder_layer(layer, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    update, scores = attend(layer.self_attn, x + at, x + at, x)
    return feed_forward(layer, layer.self_attn_layer_norm(x + update)), scores


def decoder_layer(layer, x: Tensor, at: Tensor, memory: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    update, of_queries = attend(layer.self_attn, x + at, x + at, x)
    x = layer.self_attn_layer_norm(x + update)
    update, of_memory = attend(layer.encoder_attn, x + at, memory + places, memory)
    return feed_forward(layer, layer.encoder_attn_layer_norm(x + update)), of_queries, of_memory


def best(scores: Tensor, capacity: float) -> Tensor:
    return scores.argsort(descending=True, stable=True)[: max(int(capacity * len(scores)), 1)].sort().values


def reference(model, image: Tensor, mask: Tensor, capacity: float, routers=None) -> tuple[Tensor, Tensor, list]:
    """Logits (Q, classes + 1), boxes (Q, 4), kept image tokens of layers 1, 3 of one image (3, H, W) by the layers' own
    scores, or by the weights in ``routers``: (encoder, queries, memory), each {layer: (D,)}."""
    base = model.model
    feature, here = base.backbone(image[None], mask[None])[-1]
    at = base.position_embedding(feature.shape, image.device, image.dtype, mask=here).flatten(2)[0].T
    real = here.flatten()
    x, at, kept = base.input_projection(feature).flatten(2)[0].T[real], at[real], []
    scores = None
    for i, layer in enumerate(base.encoder.layers):
        if i % 2:
            r = x @ routers[0][i] if routers else scores
            indices = best(r, capacity)
            kept.append(indices)
            new = encoder_layer(layer, x[indices], at[indices])[0]
            x = x.clone()
            x[indices] = x[indices] + r[indices, None] * (new - x[indices]) if routers else new
        else:
            x, scores = encoder_layer(layer, x, at)
    memory, queries = x, base.query_position_embeddings.weight
    x = torch.zeros_like(queries)
    of_queries = of_memory = scores
    for i, layer in enumerate(base.decoder.layers):
        if i % 2:
            r = x @ routers[1][i] if routers else of_queries
            r_memory = memory @ routers[2][i] if routers else of_memory
            indices, seen = best(r, capacity), best(r_memory, capacity)
            sight = memory[seen] * r_memory[seen, None] if routers else memory[seen]
            new = decoder_layer(layer, x[indices], queries[indices], sight, at[seen])[0]
            x = x.clone()
            x[indices] = x[indices] + r[indices, None] * (new - x[indices]) if routers else new
        else:
            x, of_queries, of_memory = decoder_layer(layer, x, queries, memory, at)
    x = base.decoder.layernorm(x)
    return model.class_labels_classifier(x), model.bbox_predictor(x).sigmoid(), kept


@pytest.mark.parametrize("router", ["attention", "linear"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_each_image_as_the_reference_has_it(detr, images, masks, router, padded):
    model = amod.convert(detr, router, 0.5)
    weights = None
    if router == "linear":
        layers = model.model.encoder.layers, model.model.decoder.layers
        names = ("router", "router", "memory_router")
        weights = [
            {i: getattr(of[i], name).weight for i in (1, 3)}
            for of, name in zip((layers[0], layers[1], layers[1]), names, strict=True)
        ]
    masks = masks if padded else torch.ones_like(masks)
    out, routing = model(images, pixel_mask=masks, return_routing=True)
    for b in range(len(images)):
        logits, boxes, kept = reference(detr, images[b], masks[b], 0.5, weights)
        torch.testing.assert_close(out.logits[b], logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.pred_boxes[b], boxes, atol=1e-5, rtol=1e-4)
        places = masks[b, ::32, ::32].flatten().nonzero().flatten()
        for layer, mine in zip(routing.encoder, kept, strict=True):
            assert {*layer.indices[b].tolist()} == {*places[mine].tolist()}


@torch.no_grad()
def test_padding_is_never_kept_before_real_tokens(detr, images, masks):
    for router in ("attention", "linear", "random"):
        _, routing = amod.convert(detr, router, 0.9)(images, pixel_mask=masks, return_routing=True)
        for layer in (*routing.encoder, *routing.memory):
            assert masks[:, ::32, ::32].flatten(1).bool().gather(1, layer.indices).all()


# --- the same model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["none", "attention", "random"])
@torch.no_grad()
def test_capacity_one_is_dense(detr, images, masks, router):
    model = amod.convert(detr, router, None if router == "none" else 1.0)
    ours, theirs = model(images, pixel_mask=masks), detr(images, pixel_mask=masks)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pred_boxes, theirs.pred_boxes, atol=1e-5, rtol=1e-5)


def test_same_class_names_and_weights(detr):
    model = amod.convert(detr, capacity=0.5)
    assert isinstance(model, DetrForObjectDetection)
    assert type(model).__name__ == "DetrForObjectDetection"
    assert [*model.state_dict()] == [*detr.state_dict()]
    extra = {*amod.convert(detr, "linear", 0.5).state_dict()} - {*detr.state_dict()}
    assert len(extra) == 6
    assert "model.decoder.layers.1.memory_router.weight" in extra
    plain = amod.dense(model)
    assert type(plain) is DetrForObjectDetection
    assert not hasattr(plain.config, "amod")
    assert plain.config._attn_implementation == detr.config._attn_implementation


@torch.no_grad()
def test_skipped_tokens_and_queries_leave_bit_for_bit(detr, images):
    model, seen = amod.convert(detr, capacity=0.5), {}
    for name, layer in (("encoder", model.model.encoder.layers[1]), ("queries", model.model.decoder.layers[1])):
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    _, routing = model(images, return_routing=True)
    for name in ("encoder", "queries"):
        before, after = seen[name]
        skipped = ~getattr(routing, name)[0].tokens(before.shape[1])
        assert 0 < skipped.sum() < skipped.numel()
        assert torch.equal(before[skipped], after[skipped])
        assert not torch.equal(before[~skipped], after[~skipped])


@torch.no_grad()
def test_the_first_routed_layer_keeps_the_same_queries_for_every_image(detr, images):
    """Queries enter the decoder as zeros, so its first self-attention is of their positions alone."""
    _, routing = amod.convert(detr, capacity=0.5)(images, return_routing=True)
    first, second = routing.queries
    assert (first.indices == first.indices[:1]).all()
    assert not torch.equal(second.scores[0], second.scores[1])


@torch.no_grad()
def test_parts_and_where_memory_is_scored(detr, images):
    _, routing = amod.convert(detr, capacity=0.5, parts=["memory"], memory_from="encoder")(images, return_routing=True)
    assert [len(part) for part in routing] == [0, 0, 2]
    assert torch.equal(routing.memory[0].scores, routing.memory[1].scores)
    assert torch.allclose(routing.memory[0].scores.sum(1), torch.ones(3))
    plan = DetrPlan(memory={0: Route(0.5)}, memory_from="encoder")  # nothing need be before it
    assert len(amod.convert(detr, plan=plan)(images, return_routing=True)[1].memory) == 1
    learned = DetrPlan(memory={1: Route(0.5, "linear"), 2: Route(0.5)}, memory_from="encoder")  # none reads the other
    assert len(amod.convert(detr, plan=learned)(images, return_routing=True)[1].memory) == 2
    late = amod.convert(detr, capacity=0.5, placement="late")(images, return_routing=True)[1]
    for part in late:  # scores behind a routed layer are refined and still sum to one
        assert [layer.layer for layer in part] == [2, 3]
        assert torch.allclose(part[1].scores.sum(1), torch.ones(3))


# --- training --------------------------------------------------------------------------------------------------------


def labels_for(images: Tensor) -> list[dict[str, Tensor]]:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.2, 0.1]])
    return [{"class_labels": torch.tensor([0, 2]), "boxes": box} for _ in images]


@torch.no_grad()
def test_auxiliary_losses_read_the_states_and_do_not_change_them(images):
    detr = tiny(auxiliary_loss=True)
    out = amod.convert(detr, "none")(images, labels=labels_for(images))
    detr.config.auxiliary_loss = False
    plain = detr(images)  # what the original computes: transformers with auxiliary_loss hands on normalised states
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert len(out.auxiliary_outputs) == 3
    torch.testing.assert_close(out.loss_dict["loss_ce"], detr(images, labels=labels_for(images)).loss_dict["loss_ce"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(images, checkpointing):
    model = amod.convert(tiny(auxiliary_loss=True, dropout=0.0), "linear", 0.5).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(images, labels=labels_for(images)).loss.backward()
    zero = {name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum()}
    # timm's backbone begins with scales of zero; the queries begin as zeros, which nothing learns from
    assert not [name for name in zero if "backbone" not in name and "decoder.layers.0.self_attn" not in name]


def test_checkpointing_gives_the_same_gradients(images):
    grads = []
    for checkpointing in (False, True):
        model = amod.convert(tiny(auxiliary_loss=True, dropout=0.0), "attention", 0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images, labels=labels_for(images)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# --- cost and files ----------------------------------------------------------------------------------------------


def test_flops_of_table_9():
    with torch.device("meta"):
        detr = DetrForObjectDetection(DetrConfig())
    found = {
        router: transformer_flops(amod.convert(detr, router, None if router == "none" else 0.5), 800, 1066)
        for router in ("none", "linear", "attention")
    }
    assert {name: round(macs / 1e6, 2) for name, macs in found.items()} == {
        "none": 10745.83, "linear": 7747.06, "attention": 7745.68,
    }  # fmt: skip
    assert transformer_flops(detr, 800, 1066) == found["none"]
    encoder = amod.convert(detr, capacity=0.5, parts=["encoder"])
    assert round(transformer_flops(encoder, 800, 1066) / 1e6) == 8239
    whole = amod.convert(detr, capacity=0.5, parts=["encoder", "queries"])
    assert round(transformer_flops(whole, 800, 1066) / 1e6) == 7945


def test_counted_whole(detr):
    whole, half = (amod.count_flops(model, (3, *SIZE)) for model in (detr, amod.convert(detr, capacity=0.5)))
    parts = [transformer_flops(model, *SIZE) for model in (detr, amod.convert(detr, capacity=0.5))]
    assert whole - half == parts[0] - parts[1] > 0
    with pytest.raises(amod.UserError, match="images of any size"):
        amod.count_flops(detr)
    with pytest.raises(amod.UserError, match=r"input_size=\(3, 64, 0\)"):
        transformer_flops(detr, 64, 0)
    with pytest.raises(amod.UserError, match="Linear"):
        transformer_flops(torch.nn.Linear(2, 2), *SIZE)


@pytest.mark.parametrize("router", ["attention", "linear"])
@torch.no_grad()
def test_saved_and_loaded(detr, images, tmp_path, router, monkeypatch, caplog):
    model = amod.convert(detr, router, 0.5, memory_from="encoder")
    amod.save_pretrained(model, tmp_path / "saved")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again = amod.from_pretrained(tmp_path / "saved")
    assert "router" not in caplog.text  # transformers' report of what it does not know
    assert again.plan == model.plan
    assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"router": "class_attention"}, "router='class_attention': a DETR is served by"),
        ({"parts": ["decoder"]}, "must be a list with some of encoder, queries, memory"),
        ({"memory_from": "self"}, "memory_from='self': choose one of cross, encoder"),
        ({"capacity": 0.05}, "keeps no token of 9"),
        ({"keep_prefix": True}, "keep_prefix=True: a DETR does not have it"),
        ({"budget": 1e9}, "a DETR does not have it"),
        ({"placement": [0]}, "encoder: placement: block 0 has no block before it"),
        ({"plan": {1: Route(0.5)}}, "of a DETR it has encoder, queries, memory"),
        ({"plan": DetrPlan(queries={9: Route(0.5)})}, "queries: plan: block 9 is not one of 0 to 3"),
        (
            {"plan": DetrPlan(memory={4: Route(0.5)}, memory_from="encoder")},
            "memory: plan: layer 4 is not one of 0 to 3",
        ),
        (
            {"plan": DetrPlan({1: Route(0.5), 3: Route(0.5, "random")}, {}, {1: Route(0.5)}, "encoder")},
            "memory: layer 1 (router=attention) has its scores of encoder layer 3, where router=random leaves none",
        ),
        ({"plan": DetrPlan(), "capacity": 0.5}, "plan= says it already"),
        (
            {"plan": DetrPlan(encoder={1: Route(0.5, skip="mlp")})},
            "encoder 1 has skip='mlp', which a DETR does not have",
        ),
        ({"plan": DetrPlan(encoder=[1])}, "encoder is [1]; write {layer: amod.Route(0.5)}"),
        ({"parts": 3}, "must be a list with some of encoder, queries, memory"),
    ],
)
def test_refused_on_one_line(detr, given, says):
    with pytest.raises(amod.UserError, match=r".*") as error:
        amod.convert(detr, **given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_of_images_is_counted_and_export_is_refused(detr, images, tmp_path):
    model = amod.convert(detr, "linear", 0.5)
    assert amod.count_flops(model, images) < amod.count_flops(detr, images)
    with pytest.raises(amod.UserError) as error:
        amod.export(model, tmp_path / "detr.onnx")
    assert "\n" not in str(error.value)


def test_a_detrs_arguments_are_refused_elsewhere():
    import timm

    with pytest.raises(amod.UserError, match=r"parts.*DETR alone"):
        amod.convert(timm.create_model("vit_tiny_patch16_224", depth=2), parts=["encoder"])


def test_a_plan_as_data(detr):
    plan = amod.convert(detr, "linear", 0.5).plan
    from amod.detr_plan import detr_plan_from

    assert detr_plan_from(plan.as_data()) == plan
    assert {*plan.as_data()} == {*PARTS, "memory_from"}
