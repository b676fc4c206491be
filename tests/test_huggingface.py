from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from torch.testing import assert_close

import amod
from hub_models import CONFIGS, LENGTHS, TEXTS, WORDS, build, inputs_of, layers_of, padded, reference

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PLACEMENTS = {"alternate": (1, 3), "consecutive": (1, 2, 3)}
every_family = pytest.mark.parametrize("family", CONFIGS)
every_text = pytest.mark.parametrize("family", TEXTS)


def weights_of(model):
    return {i: layers_of(model)[i].router.weight for i in model.blocks_routed}


@every_family
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("router", ["attention", "attention_weighted", "class_attention", "reversed", "linear"])
@torch.no_grad()
def test_every_class_agrees_with_the_obvious_implementation(family, router, placement):
    if (family, router) == ("SiglipVision", "class_attention"):
        pytest.skip("no class token: the mean query stands in for it, which the reference has not")
    dense, blocks = build(family), PLACEMENTS[placement]
    model = amod.convert(dense, router, 0.4, blocks)
    weights = weights_of(model) if router == "linear" else None
    inputs = inputs_of(model)
    out, routing = model(**inputs, return_routing=True)
    assert [layer.layer for layer in routing] == [*blocks]
    for b in range(3):
        alone = {name: value[b : b + 1] for name, value in inputs.items()}
        expected, decisions = reference(dense, alone, router, blocks, 0.4, weights)
        for layer in routing:
            kept, scores = decisions[layer.layer]
            assert layer.indices[b].tolist() == kept
            assert len(kept) == int(0.4 * len(scores))
            assert_close(layer.scores[b], scores, **CLOSE)
        assert_close(out.last_hidden_state[b], expected, **CLOSE)


@every_text
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("router", ["attention", "attention_weighted", "class_attention", "reversed", "linear"])
@torch.no_grad()
def test_a_padded_text_agrees_with_the_obvious_implementation_on_it_alone(family, router, placement, side):
    dense, blocks = build(family), PLACEMENTS[placement]
    model = amod.convert(dense, router, 0.4, blocks)
    weights = weights_of(model) if router == "linear" else None
    inputs = padded(side)
    if family == "Bert" and side == "left":  # its positions count from the first column
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    out, routing = model(**inputs, return_routing=True)
    for b, length in enumerate(LENGTHS):
        alone = {"input_ids": WORDS[b : b + 1, :length]}
        expected, decisions = reference(dense, alone, router, blocks, 0.4, weights)
        start = 0 if side == "right" else max(LENGTHS) - length
        for layer in routing:
            kept, scores = decisions[layer.layer]
            assert sorted({*layer.indices[b].tolist()}) == [start + j for j in kept]
            assert_close(layer.scores[b, start : start + length], scores, **CLOSE)
            shown = layer.tokens(max(LENGTHS))[b]
            assert shown.sum() == len(kept) == int(0.4 * length)
        assert_close(out.last_hidden_state[b, start : start + length], expected, **CLOSE)


@every_text
@pytest.mark.parametrize("router", ["attention", "attention_weighted", "class_attention", "reversed", "linear"])
@pytest.mark.parametrize("options", [{}, {"keep_prefix": True}])
@torch.no_grad()
def test_a_text_in_a_batch_is_treated_as_alone(family, router, options):
    model = amod.convert(build(family), router, 0.3, "late", **options)
    out, routing = model(**padded(), return_routing=True)
    for b, length in enumerate(LENGTHS):
        alone, decided = model(input_ids=WORDS[b : b + 1, :length], return_routing=True)
        assert_close(out.last_hidden_state[b, :length], alone.last_hidden_state[0], atol=2e-6, rtol=1e-5)
        for together, by_itself in zip(routing, decided, strict=True):
            assert sorted({*together.indices[b].tolist()}) == by_itself.indices[0].tolist()
            if options:
                assert 0 in by_itself.indices[0]


@every_family
@pytest.mark.parametrize("router", ["attention", "random", "none"])
@torch.no_grad()
def test_capacity_one_is_the_dense_model(family, router):
    dense = build(family)
    model = amod.convert(dense, router, 1.0)
    assert_close(model(**inputs_of(model))[0], dense(**inputs_of(model))[0], **CLOSE)
    if family in TEXTS:
        real = padded()["attention_mask"].bool()
        assert_close(model(**padded())[0][real], dense(**padded())[0][real], **CLOSE)


@torch.no_grad()
def test_a_text_of_nothing_and_one_of_a_word_are_no_trouble():
    model = amod.convert(build("Bert"), "attention", 0.1, "late")
    mask = torch.zeros(3, 9, dtype=torch.long)
    mask[0], mask[1, 0] = 1, 1
    out, routing = model(input_ids=WORDS[:, :9], attention_mask=mask, return_routing=True)
    assert out.last_hidden_state.isfinite().all()
    assert {*routing[0].indices[1].tolist()} == {0}
    assert model(input_ids=WORDS[:, :2], return_routing=True)[1][0].indices.shape == (3, 1)


@every_text
def test_padding_changes_no_gradient_of_a_real_token(family):
    model = amod.convert(build(family), "attention_weighted", 0.4)
    grads = []
    for inputs in (padded(), {"input_ids": WORDS[1:2, :7]}):
        model.zero_grad()
        row = model(**inputs).last_hidden_state[1 if len(inputs["input_ids"]) > 1 else 0, :7]
        row.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for together, alone in zip(*grads, strict=True):
        assert_close(together, alone, atol=2e-4, rtol=1e-3)


@every_family
@torch.no_grad()
def test_skipped_tokens_pass_bit_for_bit_and_are_not_computed(family):
    model = amod.convert(build(family), "attention", 0.4, [2])
    seen, layer = {}, layers_of(model)[2]
    layer.register_forward_hook(lambda m, args, out: seen.update(before=args[0], after=out))
    linear = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda m, args, out: seen.update(computed=out.shape[1]))
    routing = model(**inputs_of(model), return_routing=True)[1]
    skipped = ~routing[0].tokens(seen["after"].shape[1])
    assert seen["computed"] == routing[0].indices.shape[1] < seen["after"].shape[1]
    assert torch.equal(seen["after"][skipped], seen["before"][skipped])
    assert (seen["after"][~skipped] != seen["before"][~skipped]).any(dim=-1).all()


@pytest.mark.parametrize("router", ["attention", "attention_weighted", "class_attention", "linear"])
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "DINOv3ViT"])
def test_gradients_are_the_slopes(family, router):
    """Along a random direction, of the real tokens' output: through the weights r too, where there are any."""
    model = amod.convert(build(family), router, 0.4, [1, 3]).double()
    inputs = padded() if family in TEXTS else {k: v.double() for k, v in inputs_of(model).items()}
    real = inputs["attention_mask"].bool() if family in TEXTS else slice(None)
    generator = torch.Generator().manual_seed(4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    along = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    goal = torch.randn(3, max(LENGTHS) if family in TEXTS else 20, 32, generator=generator, dtype=torch.float64)

    def value():
        return (model(**inputs).last_hidden_state * goal)[real].sum()

    found = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum((g * v).sum() for g, v in zip(found, along, strict=True) if g is not None)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, v in zip(parameters, along, strict=True):
                p.add_(v, alpha=step)
            values.append(value())
    assert_close((values[0] - values[1]) / 2e-6, slope, atol=1e-4, rtol=1e-4)


HEADS = [
    ("ViT", "ForImageClassification"),
    ("ViT", "ForMaskedImageModeling"),
    ("DeiT", "ForImageClassification"),
    ("DeiT", "ForImageClassificationWithTeacher"),
    ("Dinov2", "ForImageClassification"),
    ("Dinov2", "Backbone"),
    ("Dinov2WithRegisters", "ForImageClassification"),
    ("DINOv3ViT", "Backbone"),
    ("CLIPVision", "ModelWithProjection"),
    *((text, f"For{task}") for text in TEXTS for task in
      ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "MultipleChoice")),
]  # fmt: skip


@pytest.mark.parametrize(("family", "head"), HEADS)
@torch.no_grad()
def test_every_head_is_of_its_class_and_hands_out_routing_and_hidden_states(family, head):
    dense = build(family, head, **({"encoder_stride": 8} if family == "ViT" else {}))
    model = amod.convert(dense, "linear", 0.4)
    assert isinstance(model, type(dense))
    assert type(model).__name__ == type(dense).__name__
    names = [name for name, _ in model.named_parameters() if ".router." not in name]
    assert names == [name for name, _ in dense.named_parameters()]
    inputs = inputs_of(model)
    if head == "ForMultipleChoice":
        inputs = {"input_ids": WORDS[:, None].repeat(1, 2, 1)}
    if head == "ForMaskedImageModeling":
        inputs["bool_masked_pos"] = torch.zeros(3, 16, dtype=torch.bool)
    out, routing = model(**inputs, return_routing=True)
    assert [layer.layer for layer in routing] == [1, 3]
    assert_close(amod.convert(dense, "random", 1.0)(**inputs)[0], dense(**inputs)[0], **CLOSE)
    states = model(**inputs, output_hidden_states=True)
    assert len(states.hidden_states) >= len(dense(**inputs, output_hidden_states=True).hidden_states)
    assert len({state.shape for state in states.hidden_states}) == 1
    with pytest.raises(amod.UserError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    if (base := model.base_model) is not model and head not in ("ForMultipleChoice", "ForMaskedImageModeling"):
        with pytest.raises(amod.UserError, match="return_routing: ask the model that was converted"):
            base(**inputs, return_routing=True)
    assert type(out) is type(dense(**inputs))


def test_a_part_that_was_converted_by_itself_gets_its_own_attention_back():
    vision = transformers.CLIPVisionConfig(**CONFIGS["CLIPVision"])
    text = {**CONFIGS["Bert"], "eos_token_id": 3}
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text)
    whole = transformers.CLIPModel(config).eval()
    whole.set_attn_implementation("eager")
    whole.vision_model = amod.convert(whole.vision_model, "attention", 0.5)
    assert whole.vision_model.config._attn_implementation != "eager"
    assert amod.dense(whole).vision_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("tower", ["CLIP", "Siglip"])
@torch.no_grad()
def test_one_tower_of_two(tower):
    vision, text = f"{tower}VisionConfig", f"{tower}TextConfig"
    config = getattr(transformers, f"{tower}Config")(
        vision_config=getattr(transformers, vision)(**CONFIGS["CLIPVision"]).to_dict(),
        text_config=getattr(transformers, text)(**{**CONFIGS["Bert"], "eos_token_id": 3}).to_dict(),
    )
    dense = getattr(transformers, f"{tower}Model")(config).eval()
    inputs = {"input_ids": WORDS, "pixel_values": torch.randn(3, 3, 32, 32)}
    assert_close(amod.convert(dense, "attention", 1.0)(**inputs)[0], dense(**inputs)[0], **CLOSE)
    model, routing = amod.convert(dense, "attention", 0.5)(**inputs, return_routing=True)
    assert len(routing) == 2
    assert_close(model.text_embeds, dense(**inputs).text_embeds, **CLOSE)
    expected = dense(**inputs)[0]
    dense.vision_model = amod.convert(dense.vision_model, "attention", 0.5)
    assert_close(dense(**inputs)[0], model[0], **CLOSE)
    with pytest.raises(amod.UserError, match="vision_model: was converted by itself"):
        amod.save_pretrained(dense, "nowhere")
    assert torch.equal(amod.dense(dense)(**inputs)[0], expected)
    classifier = getattr(transformers, f"{tower}ForImageClassification")(config).eval()
    routed = amod.convert(classifier, "attention", 0.5)
    assert len(routed(pixel_values=inputs["pixel_values"], return_routing=True)[1]) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("router", ["attention", "attention_weighted", "class_attention", "linear", "random", "none"])
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "ViT"])
def test_trainer_trains_one_step_with_a_gradient_on_every_trainable_parameter(family, router, checkpointing, tmp_path):
    head = "ForImageClassification" if family == "ViT" else "ForSequenceClassification"
    if family == "ViT":  # with a class token alone, the last layer learns only from images whose class token it keeps
        model = amod.convert(build(family, head, num_labels=5), router, 0.6, [1, 2], keep_prefix=True)
        rows = [{"pixel_values": image, "labels": i} for i, image in enumerate(inputs_of(model)["pixel_values"])]
    else:
        model = amod.convert(build(family, head, num_labels=5), router, 0.6, keep_prefix=True)
        ids, mask = padded().values()
        rows = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": i, "unused": 1} for i in range(3)]
    without = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            without.extend(n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True,
        gradient_checkpointing=checkpointing, disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[Look()]).train()
    assert without == []
    assert any((p != before[name]).any() for name, p in model.named_parameters())


def test_gradient_checkpointing_changes_no_gradient():
    for router in ("attention", "attention_weighted", "linear", "random"):
        model, grads = amod.convert(build("Bert"), router, 0.4, [1, 3]).train(), []
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            torch.manual_seed(3)
            model(**padded()).last_hidden_state.square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for plain, checkpointed in zip(*grads, strict=True):
            assert_close(plain, checkpointed)


@pytest.mark.parametrize("router", ["attention", "linear"])
@pytest.mark.parametrize(("family", "head"), [("Bert", "ForSequenceClassification"), ("ViT", "ForImageClassification"),
                                              ("ModernBert", "Model"), ("DINOv3ViT", "Model")])  # fmt: skip
@torch.no_grad()
def test_saving_keeps_the_plan_and_transformers_reads_the_dense_model(family, head, router, tmp_path):
    dense = build(family, head)
    model = amod.convert(dense, router, 0.4, "late")
    inputs = inputs_of(model)
    amod.save_pretrained(model, tmp_path)
    again = amod.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.plan == model.plan
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    plain = type(dense).from_pretrained(tmp_path)
    assert type(plain) is type(dense)
    assert torch.equal(plain(**inputs)[0], dense(**inputs)[0])
    assert torch.equal(amod.dense(model)(**inputs)[0], dense(**inputs)[0])
    assert type(type(model).from_pretrained(tmp_path)) is type(dense)
    amod.save_pretrained(amod.dense(model), tmp_path)
    assert type(amod.from_pretrained(tmp_path)) is type(dense)


def test_routers_that_were_not_saved_are_missed(tmp_path):
    model = amod.convert(build("Bert"), "linear", 0.4)
    model.save_pretrained(tmp_path, state_dict=build("Bert").state_dict())
    with pytest.raises(amod.UserError, match=r"^[^ ]*: has no weights of layer 1's router.weight"):
        amod.from_pretrained(tmp_path)


def test_copies_pickles_and_the_model_that_was_given():
    dense = build("Bert", "ForSequenceClassification")
    before = copy.deepcopy(dense.state_dict())
    model = amod.convert(dense, "linear", 0.4)
    expected = model(**padded()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**padded()).logits, expected)
        assert type(other) is type(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in before.items())
    assert dense.config._attn_implementation == "sdpa"
    assert "plan 1: Route(capacity=0.4, router='linear'" in repr(model)


def test_threads_do_not_meet():
    model = amod.convert(build("Bert"), "attention", 0.4, "late")
    texts = [WORDS[:, : 5 + i] for i in range(8)]
    expected, found = [model(input_ids=ids)[0] for ids in texts], {}

    def work(i):
        found[i] = [model(input_ids=texts[i])[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected[i]) for i, outs in found.items() for out in outs)


@torch.no_grad()
def test_compile_has_no_graph_break_with_padding():
    model = amod.convert(build("Bert", num_hidden_layers=3), "attention", 0.4, [1, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = padded().values()
    mask = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)  # a 2D one is looked at by transformers
    assert_close(compiled(ids, mask)[0], model(ids, mask)[0], **CLOSE)
    assert_close(compiled(ids)[0], model(ids)[0], **CLOSE)


@torch.no_grad()
def test_a_mask_of_numbers_is_as_good_as_one_of_truths():
    model = amod.convert(build("Bert"), "attention", 0.4, "late")
    ids, mask = padded().values()
    real = mask.bool()
    truths = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
    numbers = torch.zeros(truths.shape).masked_fill(~truths, torch.finfo(torch.float32).min)
    assert_close(model(ids, numbers)[0][real], model(ids, mask)[0][real], **CLOSE)


def test_pipelines_take_a_routed_model():
    vocab = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a", "short", "text", "longer"])}
    tokenizer = transformers.BertTokenizer(vocab=vocab)
    model = amod.convert(build("Bert", "ForSequenceClassification"), "attention", 0.5)
    texts = ["a short text", "a longer text a longer text"]
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    together, alone = pipe(texts), [pipe(text)[0] for text in texts]
    assert [row["label"] for row in together] == [row["label"] for row in alone]
    assert_close([row["score"] for row in together], [row["score"] for row in alone])


# --- counting -----------------------------------------------------------------------------------------------------


def test_flops_of_a_text_are_those_of_its_layers():
    dense = build("Bert")
    n, d, m = 20, 32, 48
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m + 2 * 5 * n * d
    assert amod.count_flops(dense, 20) == 4 * layer + 5 * n * d + d * d  # embedding norm, pooler
    assert amod.count_flops(dense, torch.zeros(3, 20, dtype=torch.long)) == amod.count_flops(dense, 20)
    model = amod.convert(dense, "attention", 0.25)
    k = 5
    short = 4 * k * d * d + 2 * k * k * d + 2 * k * d * m + 2 * 5 * k * d
    assert amod.count_flops(model, 20) == 2 * (layer + short) + 5 * n * d + d * d
    cheaper = amod.convert(dense, budget=amod.count_flops(model, 20), input_size=20)
    assert cheaper.plan[1].capacity == 0.25
    with pytest.raises(amod.UserError, match="say how many tokens"):
        amod.count_flops(dense)


@every_family
def test_every_class_is_counted(family):
    dense = build(family)
    size = 20 if family in TEXTS else None
    full = amod.count_flops(dense, size)
    model = amod.convert(dense, budget=0.8 * full, input_size=size)
    assert 0.7 * full < amod.count_flops(model, size) <= 0.8 * full


# --- the same weights in both libraries ---------------------------------------------------------------------------


def timms_dinov2(hub, registers):
    """timm's model with the weights of transformers' Dinov2."""
    import timm

    config = hub.config
    vit = timm.create_model(
        "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2", img_size=32, patch_size=8,
        embed_dim=32, depth=4, num_heads=2, init_values=1e-5, num_classes=0,
        mlp_ratio=config.mlp_ratio,
    ).eval()  # fmt: skip
    state, theirs = {}, hub.state_dict()
    state["cls_token"] = theirs["embeddings.cls_token"]
    state["pos_embed"] = theirs["embeddings.position_embeddings"]
    if registers:
        state["reg_token"] = theirs["embeddings.register_tokens"]
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    parts = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(4):
        ours, there = f"blocks.{i}", f"encoder.layer.{i}"
        parts |= {f"{ours}.norm1": f"{there}.norm1", f"{ours}.norm2": f"{there}.norm2"}
        parts |= {f"{ours}.attn.proj": f"{there}.attention.o_proj", f"{ours}.mlp.fc1": f"{there}.mlp.fc1"}
        parts |= {f"{ours}.mlp.fc2": f"{there}.mlp.fc2"}
        state |= {f"{ours}.ls{n}.gamma": theirs[f"{there}.layer_scale{n}.lambda1"] for n in (1, 2)}
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{there}.attention.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
    state |= {
        f"{ours}.{kind}": theirs[f"{there}.{kind}"] for ours, there in parts.items() for kind in ("weight", "bias")
    }
    vit.load_state_dict(state)
    return vit


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("router", ["attention", "class_attention", "attention_weighted", "linear"])
@torch.no_grad()
def test_dinov2_keeps_the_same_tokens_and_gives_the_same_features_in_both_layouts(family, router):
    hub = build(family, use_swiglu_ffn=False)
    vit = timms_dinov2(hub, family != "Dinov2")
    images = inputs_of(hub)["pixel_values"]
    assert_close(vit.forward_features(images), hub(images).last_hidden_state, **CLOSE)
    assert amod.count_flops(vit) == amod.count_flops(hub)
    for options in ({"placement": "alternate"}, {"placement": "late", "keep_prefix": True}):
        ours, theirs = amod.convert(vit, router, 0.45, **options), amod.convert(hub, router, 0.45, **options)
        if router == "linear":
            for i, weight in weights_of(theirs).items():
                weight.copy_(ours.routers[str(i)].weight)
        logits, kept = ours(images, return_routing=True)
        out, routing = theirs(images, return_routing=True)
        assert_close(logits, out.pooler_output, **CLOSE)
        for a, b in zip(kept, routing, strict=True):
            assert torch.equal(a.indices, b.indices)
            assert_close(a.scores, b.scores, **CLOSE)
        assert amod.count_flops(ours) == amod.count_flops(theirs)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"router": "tome"}, "served by Route alone"),
        ({"router": "evit"}, "served by Route alone"),
        ({"router": "none", "last": "class"}, "served by Route alone"),
        ({"router": "atention"}, "router='atention'"),
        ({"capacity": 2}, "capacity=2"),
        ({"placement": [4]}, "4 is not one of 0 to 3"),
        ({"router": "class_attention_value"}, "has router=class_attention_value, which models of transformers do not"),
        ({"memory": 0.5}, "has memory=0.5, which models of transformers do not"),
        ({"budget": 1.0, "input_size": 20}, "20 tokens reaches"),
        ({"budget": 1e6}, "say how many tokens"),
    ],
)
def test_convert_refuses_what_it_cannot_serve(arguments, words):
    with pytest.raises(amod.UserError, match=words) as error:
        amod.convert(build("Bert"), **arguments)
    assert "\n" not in str(error.value)


def test_other_models_and_decoders_are_refused():
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60))
    with pytest.raises(amod.UserError, match="GPT2Model cannot be routed: its model_type is gpt2; served are vit"):
        amod.convert(gpt)
    with pytest.raises(amod.UserError, match="cannot be routed as a decoder"):
        amod.convert(build("Bert", is_decoder=True))
    with pytest.raises(amod.UserError, match="routed already"):
        amod.convert(amod.convert(build("Bert")))
    two = torch.nn.ModuleDict({"a": build("Bert"), "b": build("Bert")})
    model = build("Bert")
    model.two = two
    with pytest.raises(amod.UserError, match="several encoders"):
        amod.convert(model)
    with pytest.raises(amod.UserError, match="served are timm's"):
        amod.truncate(build("Bert"), 2)


def test_what_is_timms_is_refused_in_one_line(tmp_path):
    text, image = amod.convert(build("Bert")), build("ViT")
    for attempt, words in (
        (lambda: amod.export(text, tmp_path / "text.onnx"), "torch.export.export takes it"),
        (lambda: amod.save_pretrained(text, tmp_path, class_names=["a"]), "id2label"),
        (lambda: amod.count_flops(text, 500), "input_size=500: this model refuses"),
        (lambda: amod.count_flops(image, (3, 40, 40)), "doesn't match model"),
        (lambda: amod.count_flops(image, 20), "ViTModel reads no text"),
    ):
        with pytest.raises(amod.UserError, match=words) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_another_attention_implementation_is_noticed():
    model = amod.convert(build("Bert"), "attention", 0.4)
    model.set_attn_implementation("eager")
    with pytest.raises(amod.UserError, match=r"attn_implementation='eager'.*set_attn_implementation\('amod'\)"):
        model(**padded())


def test_an_encoder_that_hands_nothing_on_is_noticed(monkeypatch):
    """As DINOv2's did before transformers 5.24: without a word, every layer would be whole."""
    encoder = type(build("Dinov2").encoder)
    own = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, *args, walk=None, **kwargs: own(self, *args, **kwargs))
    model = amod.convert(build("Dinov2"), "attention", 0.4)
    with pytest.raises(amod.UserError, match="Dinov2Encoder: hands no options on"):
        model(**inputs_of(model))


def test_transformers_is_imported_only_when_a_model_of_it_is_given():
    code = (
        "import sys, amod, timm; amod.convert(timm.create_model('vit_tiny_patch16_224', depth=2))\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_or_old_transformers_is_one_line(tmp_path, monkeypatch):
    model = build("Bert")
    amod.save_pretrained(amod.convert(model), tmp_path)
    for name in [name for name in sys.modules if name.startswith("amod.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(amod, name.partition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    for attempt in (lambda: amod.from_pretrained(tmp_path), lambda: amod.convert(model)):
        with pytest.raises(amod.UserError, match=r"pip install 'amod\[transformers\]'") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_scores_in_float32(dtype):
    model = amod.convert(build("ModernBert"), "attention", 0.4, "late").to(dtype)
    out, routing = model(**padded(), return_routing=True)
    assert out.last_hidden_state.dtype == dtype
    assert out.last_hidden_state[0].isfinite().all()
    assert all(layer.scores.dtype == torch.float32 for layer in routing)


@torch.no_grad()
def test_export_serves_any_batch_with_padding():
    model, inputs = amod.convert(build("Bert"), "attention", 0.4, [1, 2]), padded()
    batch = {name: {0: torch.export.Dim("batch")} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=batch)
    assert not any("amod" in str(node.target) for node in program.graph.nodes)
    two = {name: value[1:] for name, value in inputs.items()}
    assert_close(program.module()(**two)[0], model(**two)[0], **CLOSE)


def test_lora_trains_and_is_merged():
    peft = pytest.importorskip("peft")
    base = amod.convert(build("Bert", "ForSequenceClassification"), "attention", 0.4)
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.train()(**padded(), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    logits, routing = model.eval()(**padded(), return_routing=True)
    assert len(routing) == 2
    assert not torch.allclose(logits.logits, base(**padded()).logits)
    merged = model.merge_and_unload()
    assert merged.plan == base.plan
    assert_close(merged(**padded()).logits, logits.logits, atol=1e-4, rtol=1e-3)


def test_a_forward_that_was_set_on_the_object_is_refused():
    """As accelerate's hooks do: it would hide the class that routes, and all would be dense without a word."""
    for part in (lambda model: model, lambda model: model.encoder.layer[1]):
        dense = build("Bert")
        part(dense).forward = part(dense).forward
        with pytest.raises(amod.UserError, match="convert first"):
            amod.convert(dense, "attention", 0.25)


@pytest.mark.parametrize("hidden", [None, -1e4, -1e9, -torch.inf])
@pytest.mark.parametrize("rows", ["one", "all"])
@torch.no_grad()
def test_masks_of_four_axes_say_what_padding_is(rows, hidden):
    model, inputs = amod.convert(build("Bert"), "attention", 0.5), padded()
    mask = inputs["attention_mask"].bool()[:, None, None]
    if rows == "all":
        mask = mask.expand(-1, 1, mask.shape[-1], -1)
    if hidden is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    real = inputs["attention_mask"].bool()
    got, wanted = (model(inputs["input_ids"], attention_mask=m).last_hidden_state for m in (mask, real))
    assert_close(got[real], wanted[real], **CLOSE)


def test_checkpointing_that_would_lose_the_scores_gradient_is_refused():
    model = amod.convert(build("Bert"), "attention_weighted", 0.5, [1, 3]).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(amod.UserError, match="use_reentrant=True"):
        model(**padded())
    model.eval()(**padded())


def test_the_hub_gives_where_generation_ends_and_the_parts_of_large_files(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("amod.hub.snapshot_download", lambda repo, **how: asked.update(how) or tmp_path)
    with pytest.raises(amod.UserError):
        amod.from_pretrained("some/model")
    assert {"generation_config.json", "model.safetensors.index.json", "model-*.safetensors"} < {
        *asked["allow_patterns"]
    }


def test_a_plain_model_keeps_its_attention():
    plain = build("Bert")
    plain.set_attn_implementation("eager")
    assert amod.dense(plain).config._attn_implementation == "eager"


@pytest.mark.parametrize("inputs", [{"input_ids": WORDS[:, :1].repeat(6, 80)}, {"input_ids": WORDS.repeat(6, 1) + 60}])
def test_search_on_texts_that_the_model_refuses_is_one_line(inputs):
    with pytest.raises(amod.UserError, match="refuses these inputs") as error:
        amod.search(build("Bert"), inputs, 0.8, progress=False)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_hooks_of_accelerate_on_a_routed_model_leave_its_routing():
    accelerate = pytest.importorskip("accelerate")
    model = amod.convert(build("Bert"), "attention", 0.25)
    hooked = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    (out, routing), (wanted, decided) = (one(**padded(), return_routing=True) for one in (hooked, model))
    assert torch.equal(out.last_hidden_state, wanted.last_hidden_state)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(routing, decided, strict=True))
    assert len(routing) == len(decided) > 0
