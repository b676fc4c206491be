"""A run folder knows its data: labels by name, splits by each file's own name, every mismatch refused or said."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import fakes
from amod.analysis.explain_checks import check_explain
from amod.analysis.subjects import data_pictures
from amod.errors import UserError
from amod.training.checks import check_evaluate, check_train
from amod.training.classification import Classifier
from amod.training.compose import compose_config
from amod.training.config import Data
from amod.training.evaluation import evaluate
from amod.training.loaders import build_datamodule
from amod.training.record import about, check_same, read_record, record_of
from amod.training.run import train
from amod.training.sources import load, load_one
from amod.training.weights import head_classes
from tiny import MODEL, config

SHADES = {"ant": 30, "bee": 120, "cat": 210}  # classes that a tiny model tells apart in a few steps
SHORT = ["schedule.epochs=3", "schedule.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "router=none"]
SHORT += ["schedule.lr=5e-3", "schedule.warmup_epochs=0"]


def shades(root: Path, classes: dict[str, int], per_class: int = 20, first: int = 0) -> Path:
    from PIL import Image

    for name, shade in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + per_class):
            noise = np.random.RandomState(number).randint(-20, 20, (12, 12, 3))
            Image.fromarray(np.uint8(shade + noise)).save(root / name / f"{number}.png")
    return root


def run(folder: Path, root: Path, *overrides: str) -> dict:
    arguments = [*MODEL, "data=folder", f"data.root={root}", *SHORT, *overrides, f"run_dir={folder}"]
    train(check_train(compose_config("train", arguments)))
    return json.loads((folder / "summary.json").read_text())


def measured(folder: Path, *overrides: str) -> dict:
    return dict(evaluate(check_evaluate(compose_config("evaluate", [f"run={folder}", *overrides]))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, its data): ant, bee and cat, class folders alone."""
    root = tmp_path_factory.mktemp("data")
    shades(root / "images", SHADES)
    summary = run(root / "run", root / "images")
    assert summary["test_top1"] > 90
    return root / "run", root / "images"


def test_the_record_names_classes_counts_and_files(trained):
    folder, root = trained
    record = read_record(folder)
    assert record["classes"] == ["ant", "bee", "cat"]
    splits = load(Data(name="folder", root=str(root), split_by="name"))
    assert record == record_of(splits)
    assert sum(split["images"] for split in record["splits"].values()) == 60
    assert head_classes(folder / "weights.safetensors") == head_classes(folder) == ["ant", "bee", "cat"]
    assert head_classes(folder / "checkpoints/best.ckpt") == ["ant", "bee", "cat"]


# --- labels by name -----------------------------------------------------------------------------------------------


def test_labels_follow_the_names_and_not_the_places(trained, tmp_path, capsys):
    """By position, cat = 0 would be read as ant."""
    folder, _ = trained
    other = shades(tmp_path / "other", {"bee": 120, "cat": 210}, 5, first=100)
    assert measured(folder, f"data.root={other}", "split=all")["all/top1"] > 90
    said = capsys.readouterr().out
    assert "all: 10 images\n" in said
    assert "measured on 10 images" in said


@pytest.mark.parametrize("classes", [("ant", "bee", "dog"), ("ant", "dog"), ("ant", "bee", "cat", "dog")])
def test_classes_that_the_model_does_not_know_are_refused(trained, tmp_path, classes):
    folder, _ = trained
    other = shades(tmp_path / "other", dict.fromkeys(classes, 50), 2)
    with pytest.raises(
        UserError, match=r"data\.root: .*classes that the model does not know \(dog\); it knows ant, bee, cat"
    ):
        measured(folder, f"data.root={other}", "split=all")


def test_explain_takes_labels_by_name_too(trained, tmp_path):
    folder, _ = trained
    other = shades(tmp_path / "other/test", {"cat": 210}, 3).parent
    cfg = check_explain(compose_config("explain", [f"run={folder}", f"data.root={other}"]))
    pictures, classes = data_pictures(cfg, config().model_copy(update={"data": Data(name="folder")}), [*SHADES])
    assert classes == 3
    assert pictures.labels.tolist() == [2, 2, 2]


def test_a_folder_of_before_the_record_is_measured_by_places_and_said(trained, tmp_path, capsys):
    old = shutil.copytree(trained[0], tmp_path / "old")
    (old / "data.json").unlink()
    weights = load_file(old / "weights.safetensors")
    save_file(weights, old / "weights.safetensors")
    settings = OmegaConf.load(old / "config.yaml")
    del settings.data.split_by, settings.callbacks
    OmegaConf.save(settings, old / "config.yaml")
    assert measured(old)["test/top1"] > 90
    assert "does not name its classes" in capsys.readouterr().out
    two = shades(tmp_path / "two", {"ant": 30, "bee": 120}, 3)
    with pytest.raises(UserError, match=r"has 2 classes, the model of run=.* 3; name the data that it was trained on"):
        measured(old, f"data.root={two}", "split=all")


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "weights.safetensors", "checkpoints/best.ckpt"])
def test_a_head_is_reused_for_the_same_names_only(trained, tmp_path, capsys, source):
    folder, root = trained
    weights = folder / source if source else folder
    short = [f"model.checkpoint={weights}", "schedule.epochs=1", "trainer.limit_train_batches=1"]
    others = shades(tmp_path / "others", {"dog": 60, "eel": 120, "fox": 180}, 10)
    assert run(tmp_path / "new", others, *short)["val_top1_untrained"] is None
    assert "head is for other classes than the data's (ant, bee, cat, dog, eel)" in capsys.readouterr().out
    assert run(tmp_path / "same", root, *short)["val_top1_untrained"] > 90


# --- resuming -----------------------------------------------------------------------------------------------------


def changed_pixels(root: Path) -> None:
    fakes.image(root / "ant/0.png", (12, 12))


def added(root: Path) -> None:
    shutil.copy(root / "ant/0.png", root / "ant/new.png")


def renamed_class(root: Path) -> None:
    (root / "ant").rename(root / "asp")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_pixels, r"begun with other \w+ images \(as many\)"),
        (added, r"begun with other \w+ images \(\d+ then, \d+ now\)"),
        (renamed_class, r"begun with other classes \(ant, asp\)"),
    ],
)
def test_a_run_goes_on_with_its_own_data_only(trained, tmp_path, change, words):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / "summary.json").unlink()
    root = shutil.copytree(trained[1], tmp_path / "moved")
    run(folder, root)  # the same images elsewhere
    (folder / "summary.json").unlink()
    finished = shutil.copytree(trained[0], tmp_path / "finished")
    run(finished, root)
    change(root)
    for began in (folder, finished):
        with pytest.raises(UserError, match=rf"data\.root={root}: the run in {began} was {words}; put them back"):
            run(began, root)


def test_a_record_that_is_none_is_one_line(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json: is no record of a run's data"):
        measured(folder)


def test_arrays_have_a_fingerprint_too():
    splits = load(Data(name="digits"))
    record = record_of(splits)
    check_same(record, record_of(splits), Path(), "")
    splits["val"].source.images[splits["val"].indices[0]] += 1
    with pytest.raises(UserError, match="other val images"):
        check_same(record, record_of(splits), Path(), "")


# --- splits -------------------------------------------------------------------------------------------------------


def parts(root: Path, **values) -> dict[str, set[str]]:
    data = build_datamodule(Data(name="folder", root=str(root), split_by="name", **values), INPUT, {}, 8, 8, 0)
    return {key: {s.source.name(i) for i in s.indices.tolist()} for key, s in data.splits.items()}


INPUT = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def test_an_added_image_moves_no_other(tmp_path):
    before = parts(fakes.image_folder(tmp_path / "data", per_class=40))
    assert 15 <= len(before["test"]) <= 33  # a fifth of 120
    fakes.image_folder(tmp_path / "data", classes=4, per_class=41)  # one more in each class, and a new class
    (tmp_path / "data/class_1/7.png").unlink()
    after = parts(tmp_path / "data")
    for key, names in before.items():
        assert names - after[key] <= {"class_1/7.png"}
        assert all(name.endswith("/40.png") or "class_3" in name for name in after[key] - names)
    assert parts(tmp_path / "data", split_seed=1) != after


def test_by_order_is_the_split_of_before(tmp_path):
    """Runs of before data.split_by are measured on the images that they were measured on."""
    fakes.image_folder(tmp_path)
    data = load(Data(name="folder", root=str(tmp_path)))
    assert {key: len(split) for key, split in data.items()} == {"train": 22, "val": 2, "test": 6}
    assert data["test"].indices.tolist() == [7, 8, 11, 19, 24, 29]


# --- what is measured ---------------------------------------------------------------------------------------------


def test_a_part_of_a_folder_is_said_and_all_of_it_can_be_measured(trained, capsys):
    folder, root = trained
    record = read_record(folder)["splits"]
    measured(folder)
    assert (
        f"test: {record['test']['images']} images of the 60 in {root}; split=all measures all"
        in capsys.readouterr().out
    )
    assert measured(folder, "split=all")["all/images"] == 60
    assert f"warning: it was trained on {record['train']['images']} of these images" in capsys.readouterr().out


def test_other_images_of_the_same_classes_are_said(trained, tmp_path, capsys):
    folder, _ = trained
    other = shades(tmp_path / "other", SHADES, 30, first=100)
    measured(folder, f"data.root={other}")
    assert "they are not the run's own test images (it had " in capsys.readouterr().out


def test_images_of_its_training_among_others_are_said(trained, tmp_path, capsys):
    folder, root = trained
    more = shutil.copytree(root, tmp_path / "more")
    shades(more, SHADES, 1, first=100)
    measured(folder, f"data.root={more}", "split=all")
    assert "warning: it may have been trained on some of these images" in capsys.readouterr().out


def test_a_folder_with_test_alone_is_measured(trained, tmp_path):
    folder, _ = trained
    shades(tmp_path / "other/test", SHADES, 4, first=100)
    assert measured(folder, f"data.root={tmp_path / 'other'}")["test/images"] == 12
    with pytest.raises(UserError, match=r"split=val: .* has test only; choose that, or split=all"):
        measured(folder, f"data.root={tmp_path / 'other'}", "split=val")


def test_imagenet_is_measured_on_val_alone(tmp_path):
    fakes.imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet/train")
    split, of = load_one(Data(name="imagenet", root=str(tmp_path)), "test", None)
    assert len(split) == of == 8


def test_accuracy_by_class_confusion_and_predictions(trained, tmp_path):
    folder, _ = trained
    other = shades(tmp_path / "other", {**SHADES, "cat": 30}, 5, first=100)  # every cat looks like an ant
    values = measured(folder, f"data.root={other}", "split=all", f"output={tmp_path / 'out'}")
    tables = {
        name: list(csv.reader((tmp_path / f"out/{name}.csv").open()))
        for name in ("per_class", "confusion", "predictions")
    }
    assert tables["per_class"][1:] == [
        ["ant", "5", "5", "100.00"],
        ["bee", "5", "5", "100.00"],
        ["cat", "5", "0", "0.00"],
    ]
    assert tables["confusion"][3] == ["cat", "5", "0", "0"]
    assert tables["predictions"][0] == ["image", "class", "predicted", "probability"]
    assert [row[:3] for row in tables["predictions"][11:13]] == [
        ["cat/100.png", "cat", "ant"],
        ["cat/101.png", "cat", "ant"],
    ]
    right = sum(row[1] == row[2] for row in tables["predictions"][1:])
    assert 100 * right / 15 == pytest.approx(values["all/top1"], abs=1e-4)
    assert (tmp_path / "out/confusion.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_none_and_names_that_are_no_text(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    measure = Classifier.measure

    def none_of_the_first(self, metrics, batch):
        loss, logits = measure(self, metrics, batch)
        logits[0] = float("nan")
        return loss * float("nan"), logits

    monkeypatch.setattr(Classifier, "measure", none_of_the_first)
    monkeypatch.setattr("amod.training.loaders.ImageData.class_names", ["ant", "gr\udcfcn", "cat"])
    measured(folder, f"output={tmp_path / 'out'}")
    assert "warning: the test loss is not finite" in capsys.readouterr().out
    predictions = [*csv.reader((tmp_path / "out/predictions.csv").open(errors="surrogateescape"))]
    assert [row[3] for row in predictions].count("nan") == 1
    assert (tmp_path / "out/confusion.png").is_file()


def test_a_place_for_the_details_that_cannot_be_written_is_said_before_the_measurement(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("amod.training.evaluation.Trainer.test", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output={tmp_path}/file/x: cannot be written"):
        measured(trained[0], f"output={tmp_path}/file/x")


def test_about_counts_each_class(trained):
    split = load(Data(name="folder", root=str(trained[1]), split_by="name"))["train"]
    assert about(split)["of_each_class"] == np.bincount(split.labels).tolist()
