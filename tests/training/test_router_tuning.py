"""Trained gates through the commands' own functions: images, and a folder of texts."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import amod
import benchmark
import search
import tiny
from amod.analysis.explain_checks import check_explain
from amod.errors import UserError
from amod.training.callbacks import RunRecorder
from amod.training.checks import check_evaluate, check_train
from amod.training.compose import compose_config
from amod.training.evaluation import evaluate
from amod.training.finished import load_run
from amod.training.folder import read_config
from amod.training.language import LanguageModel, cut, measured, read
from amod.training.lora import add_lora
from amod.training.run import callbacks, train
from amod.training.tasks import LANGUAGE

QUICK = ["trainer.accelerator=cpu", "data.num_workers=0"]
DIGITS = [*tiny.MODEL, "data=digits", *QUICK]


def run(folder, *overrides):
    train(check_train(compose_config("train", [*overrides, f"run_dir={folder}"])))
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    run(folder, *DIGITS, "router=none", "schedule.epochs=2")
    return folder


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A tiny language model with its tokenizer, and texts."""
    root = tmp_path_factory.mktemp("stories")
    words = ["<s>", "</s>", "<unk>", *"abcdefghij"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(words), num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "model")
    (root / "texts").mkdir()
    for i in range(4):
        texts = [" ".join("abcdefghij"[(i + j + k) % 10] for k in range(30)) for j in range(12)]
        (root / f"texts/{i}.txt").write_text("\n<|endoftext|>\n".join(texts))
    text = ["data=text", "model=stories", f"model.name={root / 'model'}", f"data.root={root / 'texts'}", *QUICK]
    return [*text, "data.length=16", "schedule=router_tuning", "schedule.batch_size=8"]


def test_only_the_routers_change(dense, tmp_path, capsys):
    target = ["router.target=0.5", "router.layers=[1,2]", "schedule.epochs=2", f"model.checkpoint={dense}"]
    summary = run(tmp_path / "run", *DIGITS, "router=tuning", *target, "schedule=router_tuning")
    before, after = (load_file(folder / "weights.safetensors") for folder in (dense, tmp_path / "run"))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {*after} - {*before} == {"routers.1.weight", "routers.2.weight"}
    assert all(after[f"routers.{i}.weight"].abs().sum() > 0 for i in (1, 2))
    assert summary["params_trained"] == 2 * 32
    assert f"64 of {summary['params']:,} parameters are trained: the routers" in capsys.readouterr().out
    assert 0 < summary["share_kept"] < 1
    assert sorted(summary["share_kept_by_block"]) == ["1", "2"]
    dense_summary = json.loads((dense / "summary.json").read_text())
    assert summary["gflops"] < dense_summary["gflops"] + 2e-9 * 26 * 32
    assert summary["test_top1_untrained"] == dense_summary["test_top1"]  # all gates open
    found = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert found["test/top1"] == pytest.approx(summary["test_top1"], abs=1e-3)


@pytest.mark.parametrize("router", ["tuning", "avit"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_what_an_image_costs_is_measured_in_the_trainings_precision(dense, tmp_path, router, precision):
    asked = [f"router={router}", f"model.checkpoint={dense}", f"trainer.precision={precision}", "schedule.epochs=1"]
    short = ["trainer.limit_train_batches=2", "trainer.limit_test_batches=1", "schedule.eval_batch_size=32"]
    summary = run(tmp_path / "run", *DIGITS, *asked, *short)
    assert 0 < summary["gflops"] < 1
    assert (tmp_path / "run/weights.safetensors").is_file()


def test_a_probe_trains_the_head_alone(dense, tmp_path, capsys):
    probed = [f"model.checkpoint={dense}", "schedule=probe", "schedule.epochs=2"]
    summary = run(tmp_path / "run", *DIGITS, "router=attention", *probed)
    before, after = (load_file(folder / "weights.safetensors") for folder in (dense, tmp_path / "run"))
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"head.weight", "head.bias"}
    assert summary["params_trained"] == 330
    assert f"330 of {summary['params']:,} parameters are trained: the head" in capsys.readouterr().out


def test_a_model_without_a_head_has_no_probe(stories, tmp_path):
    with pytest.raises(UserError, match=r"train=head: there are no such weights; choose schedule\.train=all"):
        run(tmp_path / "run", *stories, "schedule=probe", "schedule.batch_size=8", "router=none")


@pytest.mark.parametrize("router", ["tuning", "attention"])
def test_with_a_lora_that_ends_in_the_weights(dense, tmp_path, capsys, router):
    """peft's, of rank 2 on qkv, proj, fc1 and fc2 of 4 blocks; the file has the names of a model without one."""
    gates = ["router.target=0.5", "router.layers=[1,2]"] if router == "tuning" else ["capacity=0.5"]
    asked = [*DIGITS, f"router={router}", *gates, f"model.checkpoint={dense}", "schedule=router_tuning"]
    asked += ["schedule.lora=2", "schedule.epochs=2", "schedule.lr=0.01"]
    summary = run(tmp_path / "run", *asked)
    before, after = (load_file(folder / "weights.safetensors") for folder in (dense, tmp_path / "run"))
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{i}.{name}.weight" for i in range(4) for name in inner}
    assert all(torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3) <= 2 for key in changed)
    routers = {"routers.1.weight", "routers.2.weight"} if router == "tuning" else set()
    assert {*after} - {*before} == routers
    width = 32  # rank x (inputs + outputs) of each linear layer
    assert summary["params_trained"] == 4 * 2 * width * (4 + 2 + 5 + 5) + len(routers) * width
    assert "and a LoRA of rank 2" in capsys.readouterr().out
    found = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert found["test/top1"] == pytest.approx(summary["test_top1"], abs=1e-3)


def test_a_language_model_with_a_lora(stories, tmp_path):
    summary = run(tmp_path / "run", *stories, "router=tuning", "router.target=0.5", "schedule.lora=2")
    weights = load_file(tmp_path / "run/weights.safetensors")
    assert not [key for key in weights if "lora" in key or "base_layer" in key]
    data = read(read_config(tmp_path / "run/config.yaml"))
    costs = measured(amod.from_pretrained(tmp_path / "run"), data)
    assert summary["gflops"] == costs["gflops"]
    found = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert found["test/loss"] == pytest.approx(summary["test_loss"], abs=1e-4)


def test_a_language_model_on_a_folder_of_texts(stories, tmp_path):
    summary = run(tmp_path / "run", *stories, "router=tuning", "router.target=0.5", "schedule.epochs=2")
    weights = load_file(tmp_path / "run/weights.safetensors")
    base = load_file(next(item for item in stories if item.startswith("model.name"))[11:] + "/model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in base.items())
    assert [key for key in weights if "router" in key] == ["model.layers.1.router.weight"]  # 1 of 0, 1, 2
    rows = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert rows[0] == "epoch,step,lr,train/loss,val/loss,val/perplexity"
    best = min(float(row.split(",")[4]) for row in rows[1:])
    assert summary["val_loss"] == best
    assert summary["test_perplexity"] == pytest.approx(2.718281828 ** summary["test_loss"], rel=1e-3)
    found = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert found["test/loss"] == pytest.approx(summary["test_loss"], abs=1e-4)
    model = amod.from_pretrained(tmp_path / "run")
    assert {key for key in weights if not torch.equal(model.state_dict()[key], weights[key])} == set()
    assert not model.training
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, pad_token_id=0).shape == (1, 7)
    with pytest.raises(UserError, match="gates skip differs"):
        amod.export(model, tmp_path / "model.onnx")


def test_a_run_is_read_without_the_folder_that_it_began_from(stories, tmp_path, monkeypatch, capsys):
    """Moved, from another place, its base model gone; other texts, and those of its training, are said."""
    base = shutil.copytree(next(item for item in stories if item.startswith("model.name"))[11:], tmp_path / "base")
    transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0).save_pretrained(base)
    texts = [item for item in stories if not item.startswith("model.name")]
    monkeypatch.chdir(tmp_path)
    summary = run(tmp_path / "run", *texts, "model.name=base", "router=tuning", "router.target=0.5")
    shutil.rmtree(base)
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    monkeypatch.chdir("/")
    capsys.readouterr()

    def measured_on(*asked):
        found = evaluate(check_evaluate(compose_config("evaluate", [f"run={moved}", *asked])))
        return found, capsys.readouterr().out

    found, said = measured_on()
    assert found["test/loss"] == pytest.approx(summary["test_loss"], abs=1e-4)
    assert "run's own" not in said
    assert "warning: it was trained on " in measured_on("split=all")[1]
    shutil.copytree(next(item for item in stories if item.startswith("data.root"))[10:], tmp_path / "texts")
    (tmp_path / "texts/more.txt").write_text("\n<|endoftext|>\n".join(["a b c d e f g h i j"] * 40))
    assert "they are not the run's own test sequences (it had " in measured_on(f"data.root={tmp_path / 'texts'}")[1]
    said = measured_on(f"data.root={tmp_path / 'texts'}", "split=all")[1]
    assert "warning: it may have been trained on some of these sequences" in said
    assert amod.from_pretrained(moved).generate(torch.tensor([[3, 4, 5]])).shape == (1, 6)


def test_early_stopping_takes_every_number_that_it_offers(stories, tmp_path):
    for name, low in (("val/loss", True), ("val/perplexity", True)):
        asked = [*stories, "router=tuning", "callbacks=early_stopping", f"callbacks.monitor={name}"]
        cfg = check_train(compose_config("train", [*asked, f"run_dir={tmp_path / 'run'}"]))
        (stop,) = callbacks(cfg, LANGUAGE)
        assert (stop.monitor, stop.mode) == (name, "min" if low else "max")


def test_a_lora_leaves_out_what_is_never_called():
    """timm takes the weight of qkv of BEiT's and EVA-02's attention without calling the layer."""
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "img_size": 32}
    for name in ("beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"):
        vit = timm.create_model(name, **sizes)
        for parameter in vit.parameters():
            parameter.requires_grad_(False)
        add_lora(vit, 2)
        vit(torch.randn(2, 3, 32, 32)).sum().backward()
        trained = {key: value for key, value in vit.named_parameters() if value.requires_grad}
        assert all(value.grad is not None for value in trained.values())
        assert any("attn.proj" in key for key in trained)
        assert any("attn.qkv" in key for key in trained) == (name == "vit_tiny_patch16_224")


def test_a_model_that_came_in_evaluation_mode_is_trained_in_training_mode(stories, tmp_path, monkeypatch):
    """In evaluation a shut gate computes nothing, and so learns nothing."""
    modes = []

    def loss(self, batch, loss=LanguageModel.loss):
        modes.append(self.model.training)
        return loss(self, batch)

    monkeypatch.setattr(LanguageModel, "loss", loss)
    run(tmp_path / "run", *stories, "router=tuning", "router.target=0.5", "schedule.epochs=2")
    assert len(modes) >= 2
    assert all(modes)


@pytest.mark.parametrize("lora", ["null", "2"])
def test_a_text_run_goes_on_where_it_was_killed(stories, tmp_path, lora):
    settings = [*stories, "router=tuning", "router.target=0.5", "schedule.epochs=2", f"schedule.lora={lora}"]
    whole = run(tmp_path / "whole", *settings)
    save = RunRecorder._save
    with pytest.MonkeyPatch.context() as patch:

        def save_and_die(self, trainer, name):
            save(self, trainer, name)
            if name == "last":
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(RunRecorder, "_save", save_and_die)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", *settings)
    again = run(tmp_path / "run", *settings)
    files = [tmp_path / name / "weights.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again["test_loss"] == whole["test_loss"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["router=attention", "schedule=router_tuning"], "schedule.train=routers: router=attention has no weights"),
        (["router=tuning", "router.target=1.5"], r"router.target=1.5: must be a number in \[0, 1\]"),
        (["router=tuning", "router.layers=[9]"], r"^router.layers: block 9 is not one of 0 to 3"),
        (
            ["router=tuning", "router.layers=[-1]"],
            r"router.layers=\[-1\]: must be a list, each a whole number of at le",
        ),
        (["router=dynamicvit", "schedule=router_tuning"], "router=dynamicvit has no weights that are trained alone"),
        (["router=tuning", "placement=late"], "placement=late: router=tuning has router.layers in its place"),
        (["router=tuning", "router.cache=all"], "router.cache=all: is of language models; leave it out"),
        (["router=tuning", "budget=1"], "budget=1.0: router=tuning costs what its gates leave"),
        (["router=tuning", "router.target=0.5", "router.scale=0"], "target=0.5: does nothing with scale=0"),
        (
            ["router=tuning", "schedule=router_tuning", "schedule.train=all", "schedule.lora=4"],
            "schedule.lora=4: is for weights that stay as they are.* schedule.train=all choose schedule.lora=null",
        ),
        (
            ["schedule=router_tuning", "schedule.train=head", "schedule.lora=4"],
            "schedule.lora=4: is .* schedule.train=head choose schedule.lora=null",
        ),
    ],
)
def test_bad_settings_are_one_line(overrides, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        check_train(compose_config("train", [*DIGITS, *overrides, f"run_dir={tmp_path / 'run'}"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["router=attention"], "router=attention: model=stories is a language model; choose none or tuning"),
        (["router=tuning", "router.layers=[3]"], "block 3 is not one of 0 to 2"),
        (["router=tuning", "data.length=4096"], "data.length=4096: this model reads at most 2048 tokens"),
        (["router=tuning", "data=digits"], "data=digits: is not for model=stories, whose task is language"),
        (["router=tuning", "model.name=nowhere"], r"model.name=nowhere: no config.json there"),
        (
            ["router=tuning", "distil=0.5", "model.pretrained=true"],
            "model.pretrained=true: model=stories is a language",
        ),
        (["router=tuning", "distil=0.5"], "distil=0.5: model=stories is a language model; leave it out"),
        (["router=tuning", "model.drop_path=0.3"], "model.drop_path=0.3: model=stories is a language model"),
        (["router=tuning", "placement=late"], "placement=late: router=tuning has router.layers in its place"),
        (["router=tuning", "placement.last=class"], "placement.last=class: model=stories is a language model"),
        (
            ["router=none", "schedule.train=all", "schedule.augment.hflip=0.5"],
            "hflip=0.5: model=stories is a language model; set schedule.augment.hflip=null",
        ),
        (
            ["router=tuning", "callbacks=early_stopping"],
            "callbacks.monitor=val/top1: language measures val/loss, val/perplexity; choose one of them",
        ),
    ],
)
def test_bad_settings_of_a_language_model_are_one_line(stories, overrides, words, tmp_path):
    settings = stories if "data=digits" not in overrides else [item for item in stories if "data." not in item]
    with pytest.raises(UserError, match=words):
        check_train(compose_config("train", [*settings, *overrides, f"run_dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize(
    ("bos", "rows"),
    [
        (None, [[1, 5, 6, 7], [8, 1, 5, 6]]),
        (1, [[1, 5, 6, 7], [1, 8, 9, 1], [1, 5, 6, 2]]),  # no second one where a text begins
    ],
)
def test_where_the_pieces_of_a_text_begin(bos, rows):
    texts = {None: [1, 5, 6, 7, 8, 1, 5, 6, 7], 1: [1, 5, 6, 7, 8, 9, 1, 5, 6, 2, 9]}
    assert cut(texts[bos], 4, bos).tolist() == rows


def test_a_run_whose_pieces_begin_with_the_beginning_token(stories, tmp_path):
    config = check_train(
        compose_config("train", [*stories, "router=tuning", "data.bos=true", f"run_dir={tmp_path / 'run'}"])
    )
    assert all((ids[:, 0] == 0).all() and (ids[:, 1:] != 0).all() for ids in read(config).splits.values())
    train(config)
    assert (tmp_path / "run/summary.json").exists()


def test_a_tokenizer_without_a_beginning_token(stories, tmp_path):
    folder = Path(next(item for item in stories if item.startswith("model.name"))[11:])
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="bos=true: this model's tokenizer has no beginning token"):
        run(tmp_path / "run", *stories, "router=tuning", "data.bos=true", f"model.name={tmp_path / 'model'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_that_is_not_served(stories, tmp_path, kind):
    """Said by its config.json, before any weights are read; a bidirectional one would see what it must foretell."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=f"its config.json is of {kind}; choose a causal language model of th"):
        check_train(compose_config("train", [*stories, "router=none", "schedule.train=all", f"model.name={tmp_path}"]))


def test_gates_are_not_trained_on_random_weights(dense, tmp_path):
    """Nor before a head of other classes, which would stay random."""
    state, other = load_file(dense / "weights.safetensors"), tmp_path / "other.safetensors"
    save_file(state | {key: state[key][:3] for key in ("head.weight", "head.bias")}, other)
    for checkpoint in ("null", other):
        gates = ["router=tuning", "schedule=router_tuning", f"model.checkpoint={checkpoint}"]
        with pytest.raises(UserError, match="the head at least would be random; give model"):
            run(tmp_path / "run", *DIGITS, *gates)
        assert not (tmp_path / "run").exists()


def test_a_target_that_is_missed_is_said(stories, tmp_path, capsys):
    run(tmp_path / "run", *stories, "router=tuning", "router.target=0", "schedule.lr=1e-9", "schedule.min_lr=0")
    assert "above router.target=0; longer or with a larger router.scale comes nearer" in capsys.readouterr().out
    summary = run(tmp_path / "shut", *stories, "router=tuning", "router.target=1", "schedule.lr=1")
    said = capsys.readouterr().out
    assert "below router.target=1; a target shuts gates and opens none; a smaller router.scale or schedule.lr" in said
    assert summary["blocks_routed"] == [int(layer) for layer in summary["share_kept_by_block"]]


def test_commands_of_images_refuse_a_run_of_texts(stories, tmp_path):
    run(tmp_path / "run", *stories, "router=none", "schedule.train=all", "schedule.epochs=1")
    for command in (load_run, lambda folder: check_explain(compose_config("explain", [f"run={folder}"]))):
        with pytest.raises(UserError, match="/run: is a model of language; this command is for image classifiers"):
            command(tmp_path / "run")


def test_commands_of_images_refuse_models_of_texts():
    with pytest.raises(UserError, match="model=stories: is a model of language"):
        check_explain(compose_config("explain", ["model=stories"]))
    with pytest.raises(UserError, match="model=stories: is a model of language"):
        search.check(compose_config("search", ["model=stories", "images=tests", "budget=0.5"]))
    for model in ("stories", "detr_pico"):
        with pytest.raises(UserError, match=f"{model} must be one of deit_small"):
            benchmark.check(compose_config("benchmark", [f"models=[{model}]"]))


def test_too_little_text(stories, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("a b c")
    with pytest.raises(UserError, match="has too little text, none of 16 tokens is left"):
        run(tmp_path / "run", *stories, "router=tuning", f"data.root={tmp_path / 'texts'}")
    assert not (tmp_path / "run").exists()
