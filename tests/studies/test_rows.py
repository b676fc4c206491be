"""Rows of run folders and of files, and what they are called."""

from __future__ import annotations

import math
import shutil

import pandas as pd
import pytest
from fakes_studies import SCALE, STUDY, finish, finished, rows
from pandas.testing import assert_frame_equal

from amod.errors import UserError
from amod.studies import clock
from amod.studies.plan import runs_of
from amod.studies.rows import (
    COLUMNS,
    CURVES,
    curves_of,
    describe,
    epochs_to_peak,
    known_in,
    measured,
    placed,
    read,
    reported,
    rows_of,
    setting_of,
    with_own,
    write,
)


def test_epochs_to_within_one_percent_of_the_peak():
    assert epochs_to_peak([(0, 50.0), (1, 79.1), (2, 79.2), (3, 80.0), (4, 79.9)]) == 2  # 0.99 * 80 = 79.2
    assert epochs_to_peak([(0, 80.0), (1, 70.0)]) == 0
    assert epochs_to_peak([]) is None


def test_what_a_run_folder_says(tmp_path):
    runs = finish(tmp_path, {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    (tmp_path / runs[1].name / "summary.json").unlink()
    found, curves = rows_of(runs, tmp_path, {runs[1].name: "error: no room"})
    assert list(found["status"]) == ["finished", "failed", "finished", "finished"]
    assert list(found["note"]) == ["", "error: no room", "", ""]
    assert list(found["test_top1"].astype(float).fillna(-1)) == [70, -1, 71, 73]
    assert list(found["seed"]) == [0, 0, 1, 1]
    assert list(found["epochs_to_peak"].dropna()) == [2, 2, 2]  # 65 and then 70: 0.99 * 70 = 69.3
    assert list(curves.columns) == list(CURVES)
    assert list(curves[curves["run"] == runs[0].name]["val_top1"]) == [65.0, 70.0]


def test_rows_are_read_as_they_were_written_and_written_the_same(tmp_path):
    known = rows(linear=[70, 71.25], attention=[72])
    known.loc[0, ["status", "note", "lr"]] = ["failed", 'error: "no", he said', "5e-05"]
    known.loc[0, ["test_top1", "gflops"]] = pd.NA
    write(known, tmp_path / "runs.csv")
    again = read(tmp_path / "runs.csv")
    assert list(again.columns) == list(COLUMNS)
    assert_frame_equal(again, known)
    write(again, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "runs.csv").read_bytes()
    assert read(tmp_path / "nowhere.csv").empty


def test_a_report_is_read_again_without_its_run_folders(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    found, curves = rows_of(runs, tmp_path / "runs", {})
    (tmp_path / "results/other/toy").mkdir(parents=True)  # another study's, which shares them
    write(found[:3], tmp_path / "results/other/toy/runs.csv")
    write(curves[:6], tmp_path / "results/other/toy/curves.csv")
    known = known_in(tmp_path / "results", "toy")
    rows_again, curves_again = reported(runs[:3], tmp_path / "nowhere", known)
    assert_frame_equal(rows_again, found[:3])
    assert_frame_equal(curves_again, curves[:6])
    rows_again, curves_again = reported(runs, tmp_path / "runs", known)  # what is in folders, and one run more
    assert_frame_equal(rows_again, found)
    assert_frame_equal(curves_again, curves)
    rows_again, _ = reported(runs, tmp_path / "nowhere", known)
    assert list(rows_again["status"]) == ["finished"] * 3 + ["not run"]
    assert list(rows_again["seed"]) == [0, 0, 1, 1]
    rows_again, _ = reported(runs, tmp_path / "nowhere", known, {runs[0].name: "error: no room"})
    assert list(rows_again["status"]) == ["failed", "finished", "finished", "not run"]
    assert known_in(tmp_path / "results", "small")[0] == {}


def test_a_study_keeps_its_own_dense_model(tmp_path):
    """Another study trained the same run again elsewhere, and found something else."""
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    found, curves = rows_of(runs, tmp_path / "runs", {})
    for study, accuracy, value in (("a", 60.0, 50.0), ("b", 61.0, 51.0), ("c", 62.0, 52.0)):
        (tmp_path / f"results/{study}/toy").mkdir(parents=True)
        write(found.assign(test_top1=accuracy), tmp_path / f"results/{study}/toy/runs.csv")
        write(curves.assign(val_top1=value), tmp_path / f"results/{study}/toy/curves.csv")
    for study, accuracy, value in (("a", 60.0, 50.0), ("b", 61.0, 51.0), ("c", 62.0, 52.0), ("d", 62.0, 52.0)):
        rows_again, curves_again = with_own(known_in(tmp_path / "results", "toy"), tmp_path / f"results/{study}/toy")
        assert {row["test_top1"] for row in rows_again.values()} == {accuracy}
        assert set(curves_again["val_top1"]) == {value}
        assert len(curves_again) == len(curves)


def test_a_dense_model_trained_again_is_not_that_of_runs_before(tmp_path):
    """Two of four runs are in a report alone, and their dense model of seed 0 was another one."""
    study = {**STUDY, "stage": "finetune", "claims": []}
    scale = {**SCALE, "stages": {"dense": {"settings": []}, "finetune": {"start": "dense", "settings": []}}}
    runs = runs_of(study, scale)  # of each seed the dense one, MoD, A-MoD
    for run, accuracy in zip(runs, (88.0, 70.0, 71.0, 87.0, 72.0, 73.0), strict=True):
        finished(tmp_path / run.name, accuracy)
    before, curves = rows_of(runs, tmp_path, {})
    assert before["start_accuracy"].fillna(0).tolist() == [0, 88, 88, 0, 87, 87]
    (tmp_path / "results/toy/toy").mkdir(parents=True)
    write(before, tmp_path / "results/toy/toy/runs.csv")
    write(curves, tmp_path / "results/toy/toy/curves.csv")
    shutil.rmtree(tmp_path / runs[1].name)
    for run, accuracy in ((runs[0], 88.5), (runs[2], 71.5), (runs[3], 87.5), (runs[4], 72.5), (runs[5], 73.5)):
        shutil.rmtree(tmp_path / run.name)
        finished(tmp_path / run.name, accuracy)
    now, _ = reported(runs, tmp_path, known_in(tmp_path / "results", "toy"))
    assert now["test_top1"].tolist() == [88, 70, 71.5, 87.5, 72.5, 73.5]
    assert now["start_accuracy"].fillna(0).tolist() == [0, 88, 88.5, 0, 87.5, 87.5]


@pytest.mark.parametrize(
    "damage", ["", "run,seed\n", "a,b\n1,2\n", 'run,"seed', "run,test_top1\nx,many\n", "run,seed\nx,0\ny,1,2,3\n"]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "toy/small/runs.csv"
    file.parent.mkdir(parents=True)
    file.write_text(damage)
    if damage == "run,seed\n":
        assert read(file).empty
        return
    said = f"{file}: cannot be read .*; bring it back from version control, or delete it"
    with pytest.raises(UserError, match=said) as error:
        known_in(tmp_path, "small")
    assert str(error.value).count("cannot be read") == 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("environment.json", "{"),
        ("environment.json", "[]"),
        ("metrics.csv", ""),
        ("metrics.csv", "epoch\n0\n"),
        ("metrics.csv", "epoch,val/top1\n0,many\n"),
        ("summary.json", "{"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, damage):
    runs = finish(tmp_path, {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    (tmp_path / runs[0].name / name).write_text(damage)
    with pytest.raises(UserError, match=rf"{runs[0].name}/{name}: ") as error:
        rows_of(runs, tmp_path, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("curves.csv", "run,epoch\nx,0\n"),
        ("curves.csv", "run,epoch,val_top1\nx,0.5,70\n"),
        ("speed.csv", "run,speedup\nx,fast\n"),
        ("speed.csv", f"{','.join(clock.COLUMNS)}\n" + f"x{',1' * 7}\n" * 2),
        ("halting.csv", "run,image,time\nx,0,1\n"),
        ("halting.csv", "run,image,flops,time\nx,0,few,1\n"),
    ],
)
def test_a_damaged_file_beside_a_report_is_named(tmp_path, name, damage):
    (tmp_path / name).write_text(damage)
    readers = {
        "curves.csv": lambda: curves_of(tmp_path / name),
        "speed.csv": lambda: clock.with_speeds(rows(linear=[70]), tmp_path),
        "halting.csv": lambda: clock.halting_section(rows(linear=[70]), tmp_path),
    }
    with pytest.raises(
        UserError, match=rf"{name}: cannot be read .*; bring it back from version control, or delete it"
    ):
        readers[name]()


def test_what_failed_is_not_measured():
    known = rows(linear=[70, math.nan])
    known.loc[0, "status"] = "failed"
    assert measured(known, "test_top1").empty


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"placement": "alternate", "keep_prefix": "false", "capacity": 0.5}, "C = 0.5"),
        ({"placement": "last8", "variant": "registers", "capacity": 0.125}, "last8, registers, C = 0.125"),
        ({"placement": "[6,7,8,9]", "keep_prefix": "true", "router": "linear"}, "blocks 6-9, class token kept, MoD"),
        (
            {"capacity": 1.0, "budget": "60%", "router": "tome", "setting": "distilled"},
            "60 % of dense, ToMe, distilled",
        ),
        ({"data": "digits", "lr": "0.0001", "variant": ""}, "digits, lr 0.0001"),
    ],
)
def test_labels_in_words(labels, said):
    assert describe(labels) == said


def test_blocks_in_words():
    assert [placed(p) for p in ("last8", "[1,4,7]", "[3]", "[2,3]")] == [
        *("last8", "blocks 1, 4, 7", "blocks 3", "blocks 2, 3")
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"router": "attention"}, ""),
        ({"router": "tuning"}, "attention per token"),
        ({"router": "tuning", "router.skip": "mlp", "router.per": "sequence"}, "mlp per sequence"),
        ({"router": "avit", "router.ponder": "0.05"}, "ponder 0.05"),
        ({"router": "tome", "distil": "0.5"}, "distilled"),
        ({"router": "dynamicvit", "router.backbone_lr": "1", "distil": "0"}, "backbone rate x 1, no teacher"),
    ],
)
def test_what_tells_runs_of_a_router_apart(settings, said):
    assert setting_of(settings) == said
