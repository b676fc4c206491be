"""Trained gates in causal language models: against the masked computation, the own model, and recomputed texts."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import amod
from amod.gates import penalty, share_kept
from amod.text_walk import KeptCache, cache_bytes

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": 6, "head_dim": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
}
SKIPS = ("attention", "mlp", "block")
LENGTHS = (3, 9, 5, 12)


def language_model(kind: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    text = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{text}")(**SMALL, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.25)  # so that what is skipped matters
    return model


def gated(model: nn.Module, layers=(0, 2), **given) -> nn.Module:
    model = amod.convert(model, router="tuning", layers=[*layers], **given)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            nn.init.normal_(parameter)
    return model


def prompts() -> dict[str, torch.Tensor]:
    """Four texts of different lengths, padded on the left."""
    torch.manual_seed(2)
    ids = torch.randint(2, 60, (4, max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS).unsqueeze(1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits


def generated(model: nn.Module, count: int = 24, **given):
    asked = {"do_sample": False, "return_dict_in_generate": True} | given
    return model.generate(**prompts(), max_new_tokens=count, min_new_tokens=count, **asked)


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_the_own_model(kind):
    own = language_model(kind)
    model = amod.convert(own, router="tuning", layers=[0, 2])
    assert type(model).__name__ == type(own).__name__
    real = prompts()["attention_mask"].bool()
    one, other = (logits(m, **prompts_as())[real] for m in (model, own))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert torch.equal(generated(model).sequences, generated(own).sequences)


def prompts_as() -> dict[str, torch.Tensor]:
    given = prompts()
    return {"ids": given["input_ids"], "mask": given["attention_mask"]}


@pytest.mark.parametrize("cache", ["kept", "all"])
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("skip", SKIPS)
def test_skipping_equals_the_masked_computation(skip, per, cache):
    for kind in ("Llama", "Gemma3"):
        model = gated(language_model(kind), skip=skip, per=per, cache=cache)
        real = prompts()["attention_mask"].bool()
        skipping = logits(model, **prompts_as())
        masked = logits(model.train(), **prompts_as())
        torch.testing.assert_close(skipping[real], masked[real], rtol=1e-3, atol=1e-4)
        _, routing = model(**prompts(), return_routing=True)
        assert any(0 < float(layer.gate.mean()) < 1 for layer in routing)


def test_keys_of_all_is_the_update_multiplied():
    """cache=all by the definition: the own layer's attention over everything, times the gate."""
    own = language_model()
    model = gated(own, layers=[1], cache="all")
    ids = prompts()["input_ids"]
    found, layer = {}, own.model.layers[1]
    layer.self_attn.register_forward_hook(
        lambda module, args, kwargs, out: (out[0] * found["gate"].unsqueeze(-1), out[1]), with_kwargs=True
    )
    with torch.no_grad():
        out, routing = model(ids, return_routing=True)
        found["gate"] = routing[0].gate
        torch.testing.assert_close(out.logits, own(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", ["kept", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_recomputation(kind, cache):
    """64 tokens behind prompts of four lengths, against the whole text at once, without a cache."""
    count = 64 if kind in ("Llama", "Gemma3") else 20
    model = gated(language_model(kind), cache=cache, skip="block" if kind == "Qwen3" else "attention")
    out = generated(model, count, output_logits=True)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(4, count, dtype=torch.long)], dim=1)
    whole = logits(model, out.sequences, mask)[:, -count - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(whole.argmax(-1), out.sequences[:, -count:])
    alone = model.generate(prompts()["input_ids"][:1, -3:], max_new_tokens=count, do_sample=False)
    assert torch.equal(alone[0], out.sequences[0, -count - 3 :])  # as if it were alone


@pytest.mark.parametrize("skip", SKIPS)
def test_sampled_texts_have_the_logits_of_a_recomputation(skip):
    model = gated(language_model(), skip=skip)
    out = generated(model, 64, output_logits=True, do_sample=True)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(4, 64, dtype=torch.long)], dim=1)
    whole = logits(model, out.sequences, mask)[:, -65:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole.argmax(-1), out.sequences[:, -64:])


def test_a_sequence_keeps_the_decision_of_its_prompt():
    model = gated(language_model(), per="sequence")
    out = generated(model, 16, output_logits=True)
    _, routing = model(**prompts(), position_ids=places(prompts()["attention_mask"]), return_routing=True)
    for i, layer in zip((0, 2), routing, strict=True):
        model.model.layers[i].router.forward = lambda x, real, gate=layer.scores[:, :1]: gate
    mask = torch.cat([prompts()["attention_mask"], torch.ones(4, 16, dtype=torch.long)], dim=1)
    whole = logits(model, out.sequences, mask)[:, -17:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-3)
    assert {float(g) for layer in routing for g in layer.gate.flatten()} == {0.0, 1.0}


def test_the_cache_holds_what_was_kept():
    own = generated(language_model()).cache
    for cache in ("kept", "all"):
        model = gated(language_model(), cache=cache)
        held = generated(model).cache
        layer = held.layers[0]
        assert isinstance(layer, KeptCache)
        counts = (layer.positions >= 0).sum(1)
        assert layer.keys.shape[2] == int(counts.max())
        if cache == "all":  # padding has none
            assert counts.tolist() == [23 + length for length in LENGTHS]
        else:
            assert all(0 < count < 23 + length for count, length in zip(counts.tolist(), LENGTHS, strict=True))
            assert cache_bytes(held) < cache_bytes(own)


def test_the_cache_falls_with_the_share_kept():
    held, own = [], cache_bytes(generated(language_model()).cache)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        model = gated(language_model())
        for i in (0, 2):  # open for that share, by a digit of the token's features
            model.model.layers[i].router.forward = lambda x, _, share=share: share - 1e-9 - (1e3 * x.sum(-1)) % 1
        held.append(cache_bytes(generated(model).cache) / own)
    assert held[0] == 0.5  # two of four layers have gates
    assert held == sorted(set(held))
    assert 1 < held[-1] < 1.2  # the positions of the tokens


@pytest.mark.parametrize("kind", ["Mistral", "Gemma3"])
@pytest.mark.parametrize("cache", ["kept", "all"])
def test_a_window_keeps_no_more_than_itself(kind, cache):
    """A window of 6 needs 6 columns of layer 0; what is behind it is let go, as the own model does."""
    own = generated(language_model(kind)).cache
    held = generated(gated(language_model(kind), layers=(0,), cache=cache)).cache
    layer = held.layers[0]
    assert layer.keys.shape[2] == layer.positions.shape[1] <= 6
    assert int(layer.positions[layer.positions >= 0].min()) > layer.seen - 1 - 6
    if cache == "kept":
        assert cache_bytes(held) <= cache_bytes(own) + layer.positions.numel() * 8


@pytest.mark.parametrize("cache", ["kept", "all"])
def test_texts_without_an_open_gate_are_not_computed(cache):
    """Neither in a prefill, where whole texts are shut, nor in decoding, where each step is one token of a text."""
    model = gated(language_model(), layers=(1,), per="sequence", cache=cache)
    layer, texts = model.model.layers[1], {"q_proj": [], "k_proj": []}
    layer.router.forward = lambda x, real: torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])[: len(x)]
    for name, seen in texts.items():
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, given, out, seen=seen: seen.append(len(given[0]))
        )
    generated(model, 3)
    assert texts == {"q_proj": [2, 2, 2], "k_proj": [2, 2, 2] if cache == "kept" else [4, 4, 4]}
    layer.router.forward = lambda x, real: torch.full((len(x), 1), -1.0)
    before = [*texts["q_proj"]]
    generated(model, 3)
    assert texts["q_proj"] == before


def test_sampling_beams_and_nothing_left_on_modules():
    model = gated(language_model())
    before = {name: {*vars(module)} for name, module in model.named_modules()}
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(model.generate(**prompts(), max_new_tokens=10, do_sample=True, top_k=0))
    assert torch.equal(*texts)
    beams = [
        model.generate(**prompts(), max_new_tokens=8, do_sample=False, num_beams=3, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    assert {name: {*vars(module)} for name, module in model.named_modules()} == before


def test_only_gates_get_gradients_when_the_rest_is_frozen(tmp_path):
    model = gated(language_model(), target=0.5).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" in name)
    model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
    routers = [p.grad for name, p in model.named_parameters() if "router" in name]
    assert len(routers) == 2
    assert all(grad.abs().sum() > 0 for grad in routers)
    model.eval()
    amod.save_pretrained(model, tmp_path / "lm")
    again = amod.from_pretrained(tmp_path / "lm")
    assert again.plan == model.plan
    assert torch.equal(logits(again, **prompts_as()), logits(model, **prompts_as()))
    plain = amod.dense(model)
    assert torch.equal(logits(plain, **prompts_as()), logits(language_model(), **prompts_as()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"router": "tuning", "layers": [4]}, "block 4 is not one of 0 to 3"),
        ({"router": "tuning", "cache": "none"}, "cache='none': choose one of kept, all"),
        ({"router": "tuning", "target": 2}, "target=2: must be a share"),
        ({"router": "attention"}, "depends on later ones"),
    ],
)
def test_bad_input_is_one_line(given, words):
    with pytest.raises(amod.UserError, match=words) as caught:
        amod.convert(language_model(), **given)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_served():
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(amod.UserError, match="GPT2LMHeadModel cannot be routed"):
        amod.convert(transformers.GPT2LMHeadModel(config), router="tuning")
    both_ways = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, is_causal=False))
    with pytest.raises(amod.UserError, match="its attention is not plain and causal"):
        amod.convert(both_ways, router="tuning")
    static = transformers.StaticCache(config=language_model().config, max_cache_len=8)
    with pytest.raises(amod.UserError, match="needs an empty DynamicCache"):
        gated(language_model())(prompts()["input_ids"][:, :4], cache=static)


# --- masks of the caller's, training and other ways to be wrong ---------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize("given", [{}, {"skip": "block"}, {"cache": "all"}], ids=str)
def test_packed_texts_do_not_see_each_other(kind, given):
    """Two texts in a row, told apart by their positions, are what each is alone."""
    model = gated(language_model(kind), **given)
    torch.manual_seed(2)
    ids, at = torch.randint(2, 60, (1, 12)), torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=at, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in (ids[:, :7], ids[:, 7:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", ["kept", "all"])
def test_tokens_of_an_image_see_those_behind_them(cache):
    torch.manual_seed(0)
    seen = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**SMALL, **KINDS["Gemma3"]}, vision_config={**seen, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_index=59, boi_token_index=57, eoi_token_index=58,
    )  # fmt: skip
    own = transformers.Gemma3ForConditionalGeneration(config).eval()
    for name, parameter in own.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.25)
    given = prompts()
    given["input_ids"][:, -3:], given["input_ids"][1, 2:6] = 5, 59
    given |= {"token_type_ids": (given["input_ids"] == 59).long(), "pixel_values": torch.randn(1, 3, 16, 16)}
    given["attention_mask"][1] = 1
    real = given["attention_mask"].bool()
    with torch.no_grad():
        dense = own(**given).logits
        torch.testing.assert_close(
            amod.convert(own, router="tuning", layers=[0, 2], cache=cache)(**given).logits[real],
            dense[real], rtol=1e-3, atol=1e-4,
        )  # fmt: skip
        model = gated(own, cache=cache)
        skipping = model(**given, use_cache=False).logits[real]
        masked = model.train()(**given, use_cache=False).logits[real]
    assert not torch.allclose(skipping, dense[real], atol=1e-2)
    torch.testing.assert_close(skipping, masked, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", ["each its own", "all the same"])
@pytest.mark.parametrize("as_float", [False, True])
def test_a_mask_of_the_callers_is_kept_to(as_float, rows):
    own = language_model()
    ids = torch.randint(2, 60, (1, 9))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[5:, 1:4] = False
    mask = mask[None, None, -1:] if rows == "all the same" else mask[None, None]
    real = [0, 4, 5, 6, 7, 8] if rows == "all the same" else [*range(9)]  # whom nobody sees is padding
    if as_float:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        one, other = (
            m(ids, attention_mask=mask, use_cache=False).logits
            for m in (own, amod.convert(own, router="tuning", layers=[0, 2]))
        )
    torch.testing.assert_close(one[:, real], other[:, real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_training_in_half_precision(skip, per):
    model = gated(language_model().bfloat16(), skip=skip, per=per).train()
    out = model(**prompts(), use_cache=False, labels=prompts()["input_ids"])
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert any(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "router" in name)


@pytest.mark.parametrize("skip", SKIPS)
def test_generating_while_training_is_generating(skip):
    model = gated(language_model(), skip=skip)
    wanted = generated(model).sequences
    assert torch.equal(generated(model.train()).sequences, wanted)


def test_padding_is_no_gate_that_is_counted():
    """The texts of a batch cost as much of the loss as one behind the other."""
    model = gated(language_model(), target=0.1, scale=2.0)
    _, routing = model(**prompts(), position_ids=places(prompts()["attention_mask"]), return_routing=True)
    real = prompts()["attention_mask"].bool()
    shares = [float(layer.gate[real].mean()) for layer in routing]
    assert float(penalty(routing, model.plan)) == pytest.approx(sum(2 * max(share - 0.1, 0) for share in shares))
    assert share_kept([routing])["share_kept_by_block"] == {
        str(i): pytest.approx(share, abs=1e-4) for i, share in zip((0, 2), shares, strict=True)
    }
    assert any(abs(float(layer.gate.mean()) - share) > 0.01 for layer, share in zip(routing, shares, strict=True))


def test_what_a_gated_layer_cannot_do_is_refused():
    model = gated(language_model(), target=0.5)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(amod.UserError, match=r"^attn_implementation=flex_attention: its mask .* 'sdpa' or 'eager'"):
        model.model.layers[0](torch.randn(1, 3, 32), attention_mask=torch.ones(1, 3))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(amod.UserError, match=r"^count_flops: what a trained gate costs"):
        amod.count_flops(model, 30)
    with pytest.raises(amod.UserError, match="output_attentions"):
        model(**prompts(), output_attentions=True)
    with pytest.raises(amod.UserError, match="return_routing: ask the model that was converted"):
        model.model(**prompts(), return_routing=True)
    model.train()
    past = model(**prompts()).cache
    with pytest.raises(amod.UserError, match="reads whole texts"):
        model(prompts()["input_ids"][:, -1:], cache=past)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(amod.UserError, match="use_reentrant=True"):
        model(**prompts(), use_cache=False, return_routing=True)


@torch.no_grad()
def test_a_first_chunk_of_padding_decides_nothing():
    model = amod.convert(language_model(), "tuning", layers=[0, 2], per="sequence")
    for i in (0, 2):
        model.model.layers[i].router.forward = lambda x, real: torch.zeros(len(x), 1) - real.any(1, keepdim=True) * 1.0
    ids, mask = prompts()["input_ids"], prompts()["attention_mask"]
    whole = model(ids, attention_mask=mask).cache
    first = model(ids[:, :4], attention_mask=mask[:, :4]).cache
    assert first.layers[0].open.isnan().any()
    model(ids[:, 4:], attention_mask=mask, cache=first)
    assert torch.equal(first.layers[0].open, whole.layers[0].open)


@torch.no_grad()
def test_a_cache_of_shut_gates_is_repeated():
    model = amod.convert(language_model(), "tuning", layers=[0, 2], per="sequence")
    for i in (0, 2):
        model.model.layers[i].router.forward = lambda x, real: torch.full((len(x), 1), -1.0)
    ids = torch.randint(2, 60, (2, 5))
    cache = model(ids).cache
    cache.batch_repeat_interleave(2)
    again = model(ids[[0, 0, 1, 1], :1], cache=cache).logits
    torch.testing.assert_close(again[::2], again[1::2])


def test_a_cache_of_training_is_refused_in_evaluation():
    model = gated(language_model()).train()
    ids = torch.randint(2, 60, (1, 8))
    cache = model(ids[:, :6]).cache
    with pytest.raises(amod.UserError, match="read in training"), torch.no_grad():
        model.eval()(ids[:, 6:], cache=cache)
