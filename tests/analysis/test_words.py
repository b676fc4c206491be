from __future__ import annotations

import pytest
import transformers

import amod
from amod.analysis.explain_checks import check_explain
from amod.analysis.words import explain_text, kept_words
from amod.training.compose import compose_config
from hub_models import build

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a", "short", "text", "of", "word", "##s"]


@pytest.fixture
def folder(tmp_path):
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokenizer.save_pretrained(tmp_path)
    build("Bert").save_pretrained(tmp_path)
    return tmp_path


def test_each_layers_line_is_the_text_with_what_it_skips_paled(folder):
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), amod.from_pretrained(folder)
    model = amod.convert(model, "attention", 0.5)
    text = "A short  text of words"
    lines = kept_words(model, tokenizer, text)
    assert [line.plain for line in lines] == [f"layer {i}: 4 of 8  [CLS] {text} [SEP]" for i in (1, 3)]
    routing = model(**tokenizer(text, return_tensors="pt"), return_routing=True)[1]
    for line, layer, plain in zip(lines, routing, kept_words(model, tokenizer, text, coloured=False), strict=True):
        kept = [span.style == "bold green" for span in line.spans]
        assert [i for i, stays in enumerate(kept) if stays] == layer.indices[0].tolist()
        skipped = sum(span.end - span.start for span in line.spans if span.style == "dim")
        assert plain.plain.count("_") == skipped
        assert len(plain.plain) == len(line.plain)


@pytest.mark.parametrize("saved_routed", [False, True])
def test_the_command_prints_them(folder, capsys, saved_routed):
    if saved_routed:
        amod.save_pretrained(amod.convert(build("Bert"), "random", 0.25), folder)
    explain_text(check_explain(compose_config("explain", [f"run={folder}", "text=a text", "capacity=0.5"])))
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"layer 1: {1 if saved_routed else 2} of 4")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["run=nowhere"], "run=nowhere: name the folder"),
        (["run=null"], "run=null: name the folder"),
        (["images=pictures"], "images=pictures"),
        (["router=tome"], "router=tome: keeps no words"),
        (["output=there"], "output=there: does nothing to what is shown of text="),
        (["shown=3"], "shown=3: does nothing"),
    ],
)
def test_what_does_not_go_with_text_is_refused(folder, given, words):
    with pytest.raises(amod.UserError, match=words):
        check_explain(compose_config("explain", [f"run={folder}", "text=a text", *given]))
