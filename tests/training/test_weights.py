"""Weights from files and from the hub's cache: what fits is loaded, what does not is said or refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.layers import DropPath

import amod
import fakes
from amod.errors import UserError
from amod.training.checks import check_checkpoint
from amod.training.compose import train_config
from amod.training.folder import read_config, saved_config
from amod.training.module import freeze
from amod.training.weights import build, create_vit, head_classes, head_is_pretrained, isoflop_blocks, read_state
from tiny import config

SRC = Path(__file__).parents[2] / "src"
IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense():
    torch.manual_seed(1)
    return create_vit(config().model, num_classes=10).eval()


@pytest.fixture
def checkpoint(dense, tmp_path):
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def built(checkpoint: Path, *overrides: str, classes: int = 10):
    return build(config(f"model.checkpoint={checkpoint}", *overrides), classes)


def test_safetensors_into_the_dense_model(dense, checkpoint):
    made = built(checkpoint, "router=none")
    assert made.adapted
    torch.testing.assert_close(made.model.eval()(IMAGES), dense(IMAGES))


@pytest.mark.parametrize("wrap", ["model", "state_dict", "state_dict_ema", "model_ema", None])
@pytest.mark.parametrize("suffix", ["pth", "pt"])
def test_timm_wrappers(dense, tmp_path, wrap, suffix):
    state = {f"module.{key}": value for key, value in dense.state_dict().items()}
    other = {"state_dict": {"wrong": torch.zeros(1)}} if wrap in ("state_dict_ema", "model_ema") else {}
    torch.save({wrap: state, **other, "epoch": 3} if wrap else state, tmp_path / f"timm.{suffix}")
    made = built(tmp_path / f"timm.{suffix}", "router=none")
    torch.testing.assert_close(made.model.eval()(IMAGES), dense(IMAGES))


@pytest.mark.parametrize("router", ["attention", "linear", "random", "attention_weighted"])
def test_capacity_one_keeps_the_dense_weights(dense, checkpoint, router, caplog):
    caplog.set_level("INFO")
    model = built(checkpoint, f"router={router}", "capacity=1").model
    for key, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert ("routers that start from fresh weights: routers.1" in caplog.text) == (router == "linear")


def test_linear_router_weights_come_back(dense, checkpoint, tmp_path):
    first = built(checkpoint, "router=linear").model
    save_file(first.state_dict(), tmp_path / "mod.safetensors")
    torch.manual_seed(99)
    again = built(tmp_path / "mod.safetensors", "router=linear").model
    assert [key for key in first.state_dict() if key.startswith("routers.")]
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_folder_of_a_saved_model_is_a_checkpoint(dense, tmp_path):
    """Its routers too, and it knows the classes of its head."""
    model = amod.convert(dense, router="linear", capacity=0.5).eval()
    names = [f"digit {i}" for i in range(10)]
    dense.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    folder = amod.save_pretrained(model, tmp_path / "saved", class_names=names)
    assert head_classes(folder) == names
    given = ["router=linear", "capacity=0.5", f"model.checkpoint={folder}"]
    check_checkpoint(str(folder))
    torch.testing.assert_close(build(config(*given), 10, names).model.eval()(IMAGES), model(IMAGES))
    assert not build(config(*given), 10, [*names[1:], "ten"]).adapted
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"saved: has no weights.safetensors, as a run has, and no model.safetensors"):
        check_checkpoint(str(folder))


def test_router_weights_that_the_variant_lacks_are_dropped_and_said(checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    save_file(built(checkpoint, "router=linear").model.state_dict(), tmp_path / "mod.safetensors")
    built(tmp_path / "mod.safetensors", "router=attention")
    assert "does not use: routers.1" in caplog.text


def test_isoflop_is_the_loaded_model_truncated(dense, checkpoint):
    short = built(checkpoint, "router=isoflop", "router.depth=3").model
    assert len(short.blocks) == 3
    for key, value in short.state_dict().items():
        assert torch.equal(value, dense.state_dict()[key]), key


def test_isoflop_loads_its_own_checkpoint(checkpoint, tmp_path):
    short = built(checkpoint, "router=isoflop", "router.depth=3").model
    save_file(short.state_dict(), tmp_path / "short.safetensors")
    again = built(tmp_path / "short.safetensors", "router=isoflop", "router.depth=3").model
    assert torch.equal(again.head.weight, short.head.weight)
    with pytest.raises(UserError, match=r"blocks\.3\..* is missing"):
        built(tmp_path / "short.safetensors", "router=isoflop", "router.depth=2")


@pytest.mark.parametrize(("capacity", "depth"), [(0.125, 6), (0.5, 9)])
def test_isoflop_depths_of_the_paper_are_pinned(capacity, depth):
    cfg = train_config(["router=isoflop", f"capacity={capacity}"])
    with torch.device("meta"):
        vit = create_vit(cfg.model, 1000)
    assert isoflop_blocks(vit, cfg) == depth


def test_isoflop_by_budget():
    cfg = train_config(["router=isoflop", "budget=2.4"])  # one block of DeiT-S: (4.608 - 0.058) / 12 = 0.379
    with torch.device("meta"):
        vit = create_vit(cfg.model, 1000)
    assert isoflop_blocks(vit, cfg) == 6
    cfg.budget = "52.1%"  # 2.4 of 4.608
    assert isoflop_blocks(vit, cfg) == 6
    cfg.budget = 0.1
    with pytest.raises(UserError, match=r"budget=0\.1"):
        isoflop_blocks(vit, cfg)


def test_a_head_of_other_classes_is_replaced_and_said(dense, checkpoint, caplog):
    caplog.set_level("INFO")
    made = built(checkpoint, "router=attention", classes=7)
    assert not made.adapted
    assert made.model(IMAGES).shape == (2, 7)
    assert "head has 10 classes: a new head of 7 classes" in caplog.text
    assert torch.equal(made.model.blocks[0].attn.qkv.weight, dense.blocks[0].attn.qkv.weight)


def test_position_embeddings_of_another_size_are_resized_and_said(dense, checkpoint, caplog):
    caplog.set_level("INFO")
    made = built(checkpoint, "router=none", "model.kwargs.img_size=12")
    assert "position embeddings resized from 26 to 37 tokens" in caplog.text
    assert made.model(torch.zeros(1, 3, 12, 12)).shape == (1, 10)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("model.kwargs.embed_dim=64", ["cls_token is (1, 1, 32), not (1, 1, 64)", "more"]),
        ("model.kwargs.depth=6", ["blocks.4.norm1.weight is missing", "more"]),
        ("model.kwargs.depth=2", ["blocks.2.", "is not of this model", "more"]),
        ("model.kwargs.patch_size=5", ["patch_embed.proj.weight"]),
    ],
)
def test_another_models_checkpoint_is_refused_by_its_keys(checkpoint, other, words):
    with pytest.raises(UserError) as caught:
        built(checkpoint, other)
    text = str(caught.value)
    assert "\n" not in text
    assert str(checkpoint) in text
    for word in [*words, "choose the model="]:
        assert word in text


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pth", "ckpt"])
def test_a_pickle_payload_is_refused_and_does_not_run(dense, tmp_path, suffix):
    file, trace = tmp_path / f"evil.{suffix}", tmp_path / "ran"
    torch.save({"state_dict": dense.state_dict(), "extra": Payload(trace)}, file)
    with pytest.raises(UserError, match="more than tensors"):
        read_state(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the payload is a real one
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(3), b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
@pytest.mark.parametrize("suffix", ["pth", "ckpt", "safetensors"])
def test_a_broken_file_is_refused(tmp_path, content, suffix):
    file = tmp_path / f"broken.{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_state(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=vit_smal_patch16_224"], ["vit_smal_patch16_224", "did you mean vit_small_patch16_224"]),
        (["model.name=resnet18"], ["ResNet", "VisionTransformer"]),
        (["+model.kwargs.foo=1"], ["foo"]),
    ],
)
def test_models_that_timm_does_not_have(overrides, words):
    with pytest.raises(UserError) as caught:
        create_vit(train_config(overrides).model, 10)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_every_family_that_convert_serves_can_be_trained(name, tmp_path):
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = ["model=deit_tiny", f"model.name={name}", *(f"+model.kwargs.{key}={value}" for key, value in small.items())]
    dense = build(train_config([*model, "router=none", "model.pretrained=false"]), 10).model
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    larger = [*model[:2], "+model.kwargs.img_size=24", *model[3:], f"model.checkpoint={tmp_path}/dense.safetensors"]
    for router in ("attention", "isoflop"):
        made = build(train_config([*larger, f"router={router}", "capacity=0.5"]), 10)
        assert made.adapted
        assert made.model(torch.randn(2, 3, 24, 24)).shape == (2, 10)


@pytest.mark.parametrize(("schedule", "train"), [("probe", "head"), ("finetune", "all")])
def test_both_heads_of_a_distilled_model_are_a_head(schedule, train):
    cfg = train_config(["model=deit_tiny", "model.name=deit_tiny_distilled_patch16_224", f"schedule={schedule}"])
    with torch.device("meta"):
        model = create_vit(cfg.model, 10)
    freeze(model, cfg.schedule)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {"head", "head_dist"} <= trained
    assert (trained == {"head", "head_dist"}) == (train == "head")
    dropped = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert any(dropped) == (train == "all")  # a frozen model's features stay as they are


# --- the hub's cache: each in a process of its own, because the hub reads its settings when it is imported

BUILD = """
import sys
from amod.training.command import one_line_errors
from amod.training.compose import compose_config, train_config
with one_line_errors():
    from amod.training.weights import build
    made = build(train_config(sys.argv[1:]), 1000)
    vit = made.model
    print(made.adapted, float(vit.head.bias.sum()), float(vit.blocks[0].attn.qkv.weight.sum()), len(vit.pos_embed[0]))
"""


def in_hub(home: Path, *overrides: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run([sys.executable, "-c", BUILD, *overrides], env=env, capture_output=True, text=True)


def hub_cache(home: Path, name: str) -> dict[str, torch.Tensor]:
    """A local hub cache with random weights of a timm model, in the hub's own layout; returns the weights."""
    torch.manual_seed(5)
    model = timm.create_model(name, pretrained=False)
    if model.num_classes:
        torch.nn.init.normal_(model.head.bias)
    repo, commit = home / "hub" / f"models--timm--{name}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    config = {"architecture": name.partition(".")[0], "num_classes": model.num_classes}
    (snapshot / "config.json").write_text(json.dumps(config))
    return model.state_dict()


def test_pretrained_weights_from_a_local_hub_cache_offline(tmp_path):
    """Of weights that were published as .npz, which timm reads in another way; below DeiT's own."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    state = hub_cache(tmp_path, name)
    done = in_hub(tmp_path, "model=deit_tiny", f"model.name={name}", "router=attention")
    assert done.returncode == 0, done.stderr
    adapted, bias = done.stdout.split()[:2]
    assert adapted == "True"
    assert float(bias) == pytest.approx(float(state["head.bias"].sum()))


def test_dinov2_from_the_hubs_cache_at_another_image_size_has_a_new_head(tmp_path):
    state = hub_cache(tmp_path, "vit_small_patch14_dinov2.lvd142m")
    done = in_hub(tmp_path, "model=dinov2_small", "model.kwargs.img_size=112", "router=attention")
    assert done.returncode == 0, done.stderr
    adapted, _, weight, tokens = done.stdout.split()
    assert (adapted, tokens) == ("False", "65")
    assert float(weight) == pytest.approx(float(state["blocks.0.attn.qkv.weight"].sum()), rel=1e-3)


def test_flowers_from_pretrained_weights_as_typed(tmp_path):
    """DeiT-S to Flowers-102 at 12.5 %, offline: the data in its own format, the weights in the hub's cache."""
    fakes.flowers(tmp_path / "data")
    hub_cache(tmp_path / "home", "deit_small_patch16_224.fb_in1k")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home/hub"), "HF_HUB_OFFLINE": "1"}
    env = {**fakes.fake_flowers_env(tmp_path), **home, "OMP_NUM_THREADS": "1"}
    short = [f"trainer.limit_{split}_batches=1" for split in ("train", "val", "test")]
    small = ["schedule.epochs=1", "schedule.batch_size=2", "schedule.eval_batch_size=2", "data.num_workers=0"]
    paths = [f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"]
    asked = ["router=attention", "capacity=0.125", "data=flowers", *paths, "trainer.accelerator=cpu", *short, *small]
    done = subprocess.run([sys.executable, SRC / "train.py", *asked], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "capacity=0.125 asked: 24 of 197 tokens (0.1218) in blocks 1, 3, 5, 7, 9, 11\n" in done.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tokens_kept"] == {str(block): 24 for block in range(1, 12, 2)}
    assert round(summary["gflops"], 4) == 2.5911
    assert 0 <= summary["test_top1"] <= summary["test_top5"] <= 100


def test_pretrained_weights_that_are_nowhere(tmp_path):
    done = in_hub(tmp_path, "model=deit_tiny")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for word in (
        "error: model.pretrained=true",
        f"{tmp_path}/hub/models--timm--deit_tiny_patch16_224.fb_in1k",
        "HF_HOME",
        "model.checkpoint=FILE",
    ):
        assert word in done.stderr


def test_a_float16_checkpoint_of_another_image_size_without_a_head(tmp_path, caplog):
    """As DINOv2's weights come: the position embedding is resampled, the head is new, the model is float32."""
    caplog.set_level("INFO")
    small = ["model=dinov2_small", "+model.kwargs.depth=2", "+model.kwargs.embed_dim=12", "+model.kwargs.num_heads=2"]
    whole = train_config([*small, "model.kwargs.img_size=224"])
    torch.manual_seed(0)
    state = {k: v.half() for k, v in create_vit(whole.model, 0).state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    overrides = ["model.kwargs.img_size=112", f"model.checkpoint={tmp_path / 'half.safetensors'}", "router=none"]
    made = build(train_config([*small, *overrides]), num_classes=3)
    vit = made.model
    assert not made.adapted
    assert "position embeddings resized from 257 to 65 tokens" in caplog.text
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    assert vit.pos_embed.shape == (1, 65, 12)
    assert torch.equal(vit.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"].float())
    assert made.model(torch.zeros(1, 3, 112, 112)).shape == (1, 3)


@pytest.mark.skipif("AMOD_DINOV2" not in os.environ, reason="AMOD_DINOV2 names no file of ViT-S/14's weights")
def test_the_real_weights():
    """Real features: the class tokens of an image and of its mirror image are close, those of noise are not."""
    overrides = ["model=dinov2_small", "model.kwargs.img_size=112", f"model.checkpoint={os.environ['AMOD_DINOV2']}"]
    vit = build(train_config([*overrides, "router=none"]), num_classes=3).model.eval()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 112), torch.linspace(-1, 1, 112), indexing="ij")
    disc = ((x - 0.3) ** 2 + y**2 < 0.2).float().expand(3, 112, 112)
    images = torch.stack([disc, disc.flip(-1), torch.randn(3, 112, 112)])
    with torch.no_grad():
        token = torch.nn.functional.normalize(vit.forward_features(images)[:, 0], dim=-1)
    assert token[0] @ token[1] > token[0] @ token[2] + 0.2


def test_saved_weights_load_into_plain_timm(checkpoint, tmp_path):
    made = built(checkpoint, "router=attention").model
    save_file(made.state_dict(), tmp_path / "amod.safetensors")
    vit = create_vit(config().model, num_classes=10)
    vit.load_state_dict(load_file(tmp_path / "amod.safetensors"))


def test_timms_head_is_reused_for_its_own_classes_only():
    """As many classes are not the same classes."""
    cfg = train_config(["model=deit_tiny", "data=folder"])
    synsets = ImageNetInfo().label_names()
    assert head_is_pretrained(cfg, 1000, synsets)
    assert not head_is_pretrained(cfg, 1000, [f"species {i}" for i in range(1000)])
    assert not head_is_pretrained(cfg, 1000, synsets[::-1])
    assert not head_is_pretrained(cfg, 7, synsets[:7])
    assert head_is_pretrained(train_config(["model=deit_tiny", "data=imagenet"]), 1000, ["tench"] * 1000)


def test_a_run_keeps_its_plan_whatever_becomes_of_the_file(tmp_path):
    """Moved or edited behind the run, the file changes nothing of what evaluates, resumes or loads."""
    file, text = tmp_path / "plan.yaml", "1: {Route: {capacity: 0.5}}\n2: {Merge: {r: 4}}\n3: ClassOnly\n"
    file.write_text(text)
    cfg = config("router=plan", f"router.file={file}")
    saved = OmegaConf.to_yaml(OmegaConf.create(saved_config(cfg)))
    plan = build(cfg, 10).model.plan
    assert plan == {1: amod.Route(0.5), 2: amod.Merge(4), 3: amod.ClassOnly()}
    for change in (lambda: file.write_text(text.replace("4", "9")), file.unlink):
        change()
        (tmp_path / "config.yaml").write_text(saved)
        assert build(read_config(tmp_path / "config.yaml"), 10).model.plan == plan
