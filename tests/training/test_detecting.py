"""model.task=detection: COCO's layout, one-line errors, a run and its evaluation, weights from elsewhere."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import amod
from amod.analysis.detections import explain_detections
from amod.analysis.explain_checks import check_explain
from amod.training import coco, detecting
from amod.training.checks import check_evaluate, check_train
from amod.training.compose import compose_config
from amod.training.config import Augment, Data, TrainConfig
from amod.training.evaluation import evaluate
from amod.training.record import read_record
from amod.training.run import train
from processes import Forked, finish, hold_at, ranks, step_of, wait_for

MODEL = [
    "model=detr_pico", "model.kwargs.d_model=16", "model.kwargs.encoder_layers=2", "model.kwargs.decoder_layers=2",
    "model.kwargs.encoder_ffn_dim=32", "model.kwargs.decoder_ffn_dim=32", "model.kwargs.num_queries=6",
    "model.image_size=[32,64]", "schedule.batch_size=4", "schedule.eval_batch_size=4", "schedule.epochs=2",
    "data.val_fraction=0.3", "data.num_workers=0", "trainer.accelerator=cpu",
]  # fmt: skip


def make(root: Path, part: str, count: int, **changed) -> dict:
    """Images of 40 x 32 and 32 x 48 pixels with one box each, of two categories that COCO numbers 3 and 7."""
    folder = root / f"{part}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        width, height = [(40, 32), (32, 48)][i % 2]
        pixels = np.random.default_rng([i, part == "val"]).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height})
        box = [4.0 + i % 3, 6.0, 10.0, 20.0]
        annotations.append({"id": i, "image_id": 10 + i, "category_id": [3, 7][i % 2], "bbox": box, "iscrowd": 0})
    data = {"images": images, "annotations": annotations}
    data["categories"] = [{"id": 7, "name": "boot"}, {"id": 3, "name": "bag"}]
    data |= changed
    (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(data))
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "coco"
    make(root, "train", 14)
    make(root, "val", 5)
    return root


def checked(data: Path, folder: Path, *overrides: str) -> TrainConfig:
    return check_train(compose_config("train", [*MODEL, f"data.root={data}", f"run_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "detr"
    train(checked(data, folder, "router=attention"))
    return folder


def test_the_run(finished, data):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["router"], summary["capacity"], summary["blocks_routed"]) == ("attention", 0.5, [1])
    assert summary["test_images"] == 5
    assert 0 <= summary["test_map"] <= summary["test_map50"] <= 100
    assert 0 < summary["gflops_transformer"] < summary["gflops"]
    rows = [*csv.DictReader((finished / "metrics.csv").open())]
    assert [*rows[0]] == ["epoch", "step", "lr", "train/loss", "val/loss", "val/map", "val/map50"]
    record = json.loads((finished / "data.json").read_text())
    assert record["classes"] == ["bag", "boot"]
    assert record["splits"]["train"]["images"] + record["splits"]["val"]["images"] == 14


def test_evaluated_again_and_loaded(finished, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    cfg = check_evaluate(compose_config("evaluate", [f"run={finished}", "trainer.accelerator=cpu"]))
    assert evaluate(cfg)["test/map"] == pytest.approx(summary["test_map"], rel=1e-4)
    assert "they are not the run's own" not in capsys.readouterr().out
    model = amod.from_pretrained(finished)
    assert [*model.plan.encoder] == [*model.plan.queries] == [*model.plan.memory] == [1]
    with pytest.raises(amod.UserError, match=r"split=all"):
        detecting.load_measured(finished, cfg_of(finished), "all")
    detecting.say_origin("test", {"images": 3}, read_record(finished))
    assert "they are not the run's own test images (it had 5)" in capsys.readouterr().out


def cfg_of(folder: Path) -> TrainConfig:
    from amod.training.folder import read_config

    return read_config(folder / "config.yaml")


def test_explained(finished, tmp_path, capsys):
    said = [f"run={finished}", f"output={tmp_path}", "shown=3"]
    explain_detections(check_explain(compose_config("explain", said)))
    assert Image.open(tmp_path / "detections.png").width > 300
    assert "3 images, of each at most 15 image tokens, 3 queries" in capsys.readouterr().out
    with pytest.raises(amod.UserError, match=r"images=.*: is not for a detector's run"):
        check_explain(compose_config("explain", [*said, f"images={tmp_path}"]))


def test_adapted_from_a_run_and_its_routers_start_afresh(finished, data, tmp_path, caplog):
    cfg = checked(data, tmp_path / "linear", "router=linear", f"model.checkpoint={finished}")
    built = detecting.build(cfg, detecting.read(cfg))
    assert built.adapted
    ours, theirs = built.model.state_dict(), amod.from_pretrained(finished).state_dict()
    assert {*ours} - {*theirs} == {
        f"model.{at}" for at in (
            "encoder.layers.1.router.weight", "decoder.layers.1.router.weight", "decoder.layers.1.memory_router.weight"
        )
    }  # fmt: skip
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    again = checked(data, tmp_path / "again", f"model.checkpoint={finished}/checkpoints/last.ckpt")
    assert detecting.build(again, detecting.read(again)).adapted


def test_cocos_published_head_is_cut_to_the_categories(data, tmp_path):
    """It counts up to the highest number of a category: 7 here, so 8 rows and one for no object."""
    cfg = checked(data, tmp_path / "run", "router=none")
    state = detecting.create(cfg, 8).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "published.safetensors")
    cfg = checked(data, tmp_path / "run", "router=none", f"model.checkpoint={tmp_path}/published.safetensors")
    built = detecting.build(cfg, detecting.read(cfg))
    assert built.adapted
    key = "class_labels_classifier.weight"
    assert torch.equal(built.model.state_dict()[key], state[key][[3, 7, 8]])


def test_a_published_file_keeps_its_old_names(data, tmp_path, monkeypatch):
    """facebook/detr-resnet-50 on the hub has transformers' names of years ago, which its own conversion knows: as
    ``model.pretrained``, as a folder and as a file.
    """
    hub = tmp_path / "detr-resnet-50"
    cfg = checked(data, tmp_path / "run", "router=attention")
    dense = detecting.create(cfg, 8).eval()
    dense.save_pretrained(hub)
    kept = load_file(hub / "model.safetensors")
    assert {"model.encoder.layers.0.self_attn.out_proj.weight", "model.decoder.layers.1.fc1.bias"} <= {*kept}
    assert any(key.startswith("model.backbone.conv_encoder.model.") for key in kept)
    monkeypatch.setitem(detecting.PUBLISHED, cfg.model.name, str(hub))
    for asked in ("model.pretrained=true", f"model.checkpoint={hub}", f"model.checkpoint={hub}/model.safetensors"):
        built = detecting.build(checked(data, tmp_path / "run", "router=attention", asked), detecting.read(cfg))
        assert built.adapted
        state = built.model.state_dict()
        for key, value in dense.state_dict().items():  # the head is cut to categories 3 and 7 of 8
            wanted = value[[3, 7, 8]] if key.startswith("class_labels_classifier") else value
            assert torch.equal(state[key], wanted), key


# --- several processes, and one that was killed -----------------------------------------------------------------------


# 10 training images: 2 epochs of 5 steps of 2 images
STEPS = ["router=linear", "schedule.batch_size=2", "schedule.augment.hflip=0", "checkpoint_every_steps=1"]


def forked(data: Path, folder: Path, *overrides: str, **env: str) -> Forked:
    cfg = checked(data, folder, *overrides)
    return Forked(lambda: train(cfg), Path(f"{folder}.{env.get('LOCAL_RANK', 0)}.txt"), **env)


def test_a_killed_run_goes_on_exactly(data, tmp_path, monkeypatch):
    def last(folder: Path) -> dict:
        return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    finish([forked(data, tmp_path / "whole", *STEPS)])
    with monkeypatch.context() as patch:
        hold_at(patch, 8)
        killed = forked(data, tmp_path / "killed", *STEPS)
    wait_for(lambda: step_of(tmp_path / "killed") >= 2)
    killed.process.kill()
    killed.wait()
    assert 2 <= step_of(tmp_path / "killed") < 10
    finish([forked(data, tmp_path / "killed", *STEPS)])
    assert (tmp_path / "killed/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()
    whole, again = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("router", ["linear", "attention"])
def test_two_processes_make_one_run(data, tmp_path, router):
    """No parameter is left without a gradient, which DDP would stop at, and together they measure all images."""
    asked = [f"router={router}", "schedule.batch_size=2", "trainer=ddp_cpu", "trainer.devices=2"]
    finish([forked(data, tmp_path / "two", *asked, **env) for env in ranks(2)])
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert (summary["test_images"], summary["global_batch"]) == (5, 4)
    assert Path(f"{tmp_path}/two.1.txt").read_text() == ""

    def measure() -> None:  # in a process of its own, because strategy=ddp leaves a process group behind
        values = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'two'}", "trainer.devices=1"])))
        (tmp_path / "values.json").write_text(json.dumps(values))

    finish([Forked(measure, tmp_path / "alone.txt")])
    alone = json.loads((tmp_path / "values.json").read_text())
    assert alone["test/map"] == pytest.approx(summary["test_map"], abs=1e-3)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_boxes_follow_the_pixels(tmp_path):
    """A white rectangle is where its box is, flipped, resized and padded or not."""
    root = tmp_path / "coco"
    for part in ("train", "val"):
        data = make(root, part, 8)
        for i, (image, note) in enumerate(zip(data["images"], data["annotations"], strict=True)):
            pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
            x, y, w, h = (int(v) for v in note["bbox"])
            pixels[y : y + h, x : x + w] = 255
            Image.fromarray(pixels).save(root / f"{part}2017/{i}.png")
    splits = coco.load(Data(name="coco", root=str(root), val_fraction=0.4, split_by="name"))
    training, evaluation = coco.transforms([32, 64], Augment(hflip=0.5, sides=[32, 40]))
    for transform, seed in ((training, 0), (evaluation, None)):
        drawn = coco.Boxed(splits["test"], transform, seed, False, True)
        images, masks, targets, indices = coco.join([drawn[0, i] for i in range(8)])
        assert indices.tolist() == [*range(8)]
        for image, mask, target in zip(images, masks, targets, strict=True):
            height, width = mask.any(1).sum().item(), mask.any(0).sum().item()
            assert (image[:, mask == 0] == 0).all()
            lit = (image.amax(0) > 1) & (mask == 1)
            ys, xs = lit.nonzero().unbind(1)
            cx, cy, w, h = target["boxes"][0].tolist()
            assert xs.float().mean().item() + 0.5 == pytest.approx(cx * width, abs=1)
            assert ys.float().mean().item() + 0.5 == pytest.approx(cy * height, abs=1)
            assert lit.sum().item() == pytest.approx(w * h * height * width, rel=0.2)


def test_detections_are_in_pixels_of_the_image():
    out = type("Out", (), {})()
    out.logits = torch.tensor([[[0.0, 3.0, 1.0], [1.0, 0.0, 9.0]]])
    out.pred_boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.2, 0.4]]])
    (found,) = detecting.detections(out, [torch.tensor([100, 200])])
    assert found["labels"].tolist() == [1, 0]
    torch.testing.assert_close(found["boxes"], torch.tensor([[80.0, 30, 120, 70], [0, 0, 40, 40]]))
    torch.testing.assert_close(found["scores"], out.logits[0].softmax(-1)[..., :2].amax(-1))


def test_images_are_told_apart_in_half_precision():
    metric, boxes = detecting.MeanAP(), torch.tensor([[1.0, 1.0, 5.0, 5.0]]).bfloat16()
    for image in range(300, 303):
        found = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.5]).bfloat16()}
        target = {"xyxy": boxes, "kinds": torch.tensor([1]), "iscrowd": torch.tensor([0])}
        metric.update([found], [target], torch.tensor([image]))
    assert torch.stack(metric.found)[:, 0].tolist() == [300, 301, 302]
    assert metric.compute()["map"] == 1


def test_crowds_are_not_learnt_from_and_no_mistake(tmp_path):
    root = tmp_path / "coco"
    data = make(root, "val", 2)
    data["annotations"][0]["iscrowd"] = 1
    data["annotations"].append({"id": 99, "image_id": 11, "category_id": 3, "bbox": [5, 5, 0, 9], "iscrowd": 0})
    (root / "annotations/instances_val2017.json").write_text(json.dumps(data))
    split = coco.load(Data(name="coco", root=str(root)), only_test=True)["test"]
    drawn = coco.Boxed(split, coco.transforms([32, 64], Augment())[1], None, False, False)
    assert [len(drawn[0, i][1]["boxes"]) for i in range(2)] == [0, 1]  # a crowd; a box without an area beside another
    assert drawn[0, 0][1]["iscrowd"].tolist() == [True]


def test_boxes_are_of_the_pixels_as_they_are_stored(tmp_path):
    """EXIF data turn a classifier's image, and not one whose boxes are of what lies on disk."""
    root = tmp_path / "coco"
    data = make(root, "val", 1)
    image, file = data["images"][0], root / "val2017/0.png"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (image["width"], image["height"])).save(file, exif=turned)
    split = coco.load(Data(name="coco", root=str(root)), only_test=True)["test"]
    drawn = coco.Boxed(split, coco.transforms([32, 64], Augment())[1], None, False, False)
    assert drawn[0, 0][1]["size"].tolist() == [image["height"], image["width"]]
    Image.new("RGB", (64, 64)).save(file)
    with pytest.raises(amod.UserError, match=r"0.png: has 64 x 64 pixels and its annotation file says"):
        drawn[0, 0]


def test_the_backbone_has_its_own_rate(data, tmp_path):
    cfg = checked(data, tmp_path, "router=none", "schedule.lr=1e-3", "+schedule.backbone_lr=1e-4")
    model = detecting.build(cfg, detecting.read(cfg)).model
    transformer, backbone = detecting.module(model, cfg, None).make_optimizer(2e-3).param_groups
    assert (transformer["lr"], backbone["lr"]) == pytest.approx((2e-3, 2e-4))
    assert sum(p.numel() for p in backbone["params"]) == sum(p.numel() for p in model.model.backbone.parameters())


# --- what is wrong, on one line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"categories": [{"id": 3, "name": "bag"}]}, "annotation 1 has category_id 7"),
        ({"images": [{"id": 10, "file_name": "0.png", "width": 40, "height": 32}]}, "annotation 1 has image_id 11"),
        ({"images": [{"id": 1, "file_name": "no.png", "width": 1, "height": 1}]}, "names no.png, which val2017/ lacks"),
        ({"images": []}, "names no images"),
        ({"annotations": {}, "categories": 3}, "is no COCO annotation of boxes"),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [30, 6, 20, 20]}]},
            "annotation 5 has the box [30.0, 6.0, 20.0, 20.0] outside of 0.png, which is 40 x 32",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [3, 6, -2, 4]}]},
            "annotation 5 has the box [3.0, 6.0, -2.0, 4.0]; a box is [left, top, width, height]",
        ),
        (
            {"annotations": [{"id": 5, "image_id": 10, "category_id": 3, "bbox": [3, math.nan, 2, 4]}]},
            "annotation 5 has the box [3.0, nan, 2.0, 4.0]; a box is",
        ),
        ({"annotations": []}, "has no box with an area"),
        ({"annotations": [], "categories": []}, "has no box with an area"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, change, says):
    make(tmp_path / "coco", "val", 2, **change)
    with pytest.raises(amod.UserError) as error:
        coco.load(Data(name="coco", root=str(tmp_path)), only_test=True)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=folder"], "data=folder: is not for model=detr_pico, whose task is detection; choose one of coco"),
        (["data.root=nowhere"], "no data in"),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: a detector's boxes are compared in float32"),
        (["distil=1"], "distil=1.0: model=detr_pico is a detector, whose training has no such thing; leave it out"),
        (["schedule=finetune"], "schedule.mixup=0.8: model=detr_pico is a detector"),
        (["+schedule.augment.auto_augment=rand"], "set schedule.augment.auto_augment=null"),
        (["callbacks=early_stopping"], "callbacks.monitor=val/top1: detection measures val/loss, val/map"),
        (["model.image_size=[64,32]"], "model.image_size=[64,32]: must be two ascending numbers"),
    ],
)
def test_refused_before_anything_is_read(data, tmp_path, overrides, says):
    with pytest.raises(amod.UserError) as error:
        checked(data, tmp_path / "run", *overrides)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["router=tome"], "router=tome: not for a DETR"),
        (["router=class_attention"], "a DETR is served by"),
        (["budget=1"], "budget: a DETR does not have it"),
        (["model.kwargs.d_model=18"], "no DETR can be made of it"),
        (["model.kwargs.out_indices=[0,9]"], "no DETR can be made of it"),
        (["model.pretrained=true"], "published weights with the backbones resnet50, resnet101 alone"),
        (["capacity=0.1"], "keeps no token of 6"),
    ],
)
def test_refused_before_the_folder_is_made(data, tmp_path, overrides, says):
    with pytest.raises(amod.UserError) as error:
        train(checked(data, tmp_path / "run", *overrides))
    assert says in str(error.value)
    assert not (tmp_path / "run").exists()
