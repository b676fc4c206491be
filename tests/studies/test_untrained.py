"""A model that is adapted without training is measured as src/train.py measures it before the first step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amod.errors import UserError
from amod.routers import ROUTERS
from amod.routing import top_k
from amod.studies.untrained import measure
from amod.training.checks import check_train
from amod.training.compose import compose_config
from tiny import DIGITS, run

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    run(folder, "router=none", "schedule.epochs=1")
    return folder


def measured(folder, dense, *overrides):
    cfg = compose_config("untrained", [*DIGITS, f"model.checkpoint={dense}", f"run_dir={folder}", *overrides])
    measure(check_train(cfg))
    return json.loads((folder / "summary.json").read_text())


def test_the_dense_model_keeps_its_accuracy_and_routing_at_capacity_one_too(dense, tmp_path):
    trained = json.loads((dense / "summary.json").read_text())["test_top1"]
    assert measured(tmp_path / "none", dense, "router=none")["test_top1_untrained"] == trained
    whole = measured(tmp_path / "whole", dense, "router=attention", "capacity=1")
    assert whole["test_top1_untrained"] == trained
    assert whole["images"] == 359


@pytest.mark.parametrize("router", ["attention", "random", "linear", "isoflop", "evit"])
def test_it_is_what_training_would_start_from(dense, tmp_path, router):
    routing = [f"router={router}", "capacity=0.3", "seed=3", "schedule.epochs=1"]
    started = run(tmp_path / "trained", f"model.checkpoint={dense}", *routing)
    alone = measured(tmp_path / "measured", dense, *routing)
    for key in ("test_top1_untrained", "gflops", "tokens_kept", "depth"):
        assert alone[key] == started[key], key


def test_some_of_the_images_of_each_class(dense, tmp_path, capsys):
    assert measured(tmp_path / "some", dense, "images=40")["images"] == 40
    assert measured(tmp_path / "some", dense, "images=40")["images"] == 40
    assert "is finished and is not repeated" in capsys.readouterr().out
    with pytest.raises(UserError, match="images=400: there are 359 test images; choose at most that"):
        measured(tmp_path / "many", dense, "images=400")


def test_the_summary_says_how_many_images_were_measured(dense, tmp_path):
    short = ["schedule.eval_batch_size=20", "trainer.limit_test_batches=1"]
    assert measured(tmp_path / "one", dense, "images=40", *short)["images"] == 20


def test_a_folder_is_of_one_command(dense, tmp_path):
    measured(tmp_path / "run", dense, "router=attention")
    asked = [*DIGITS, f"model.checkpoint={dense}", f"run_dir={tmp_path / 'run'}", "router=attention"]
    with pytest.raises(UserError, match=r"holds a run of src/untrained\.py; name another folder"):
        check_train(compose_config("train", asked))
    stopped = shutil.copytree(dense, tmp_path / "stopped")
    (stopped / "summary.json").unlink()
    with pytest.raises(UserError, match=r"holds a run of src/train\.py; name another folder"):
        measured(stopped, dense, "router=none", "schedule.epochs=1")
    assert not (stopped / "summary.json").exists()


def test_halting_tokens_cost_what_they_cost_on_images(dense, tmp_path):
    whole = measured(tmp_path / "whole", dense, "router=avit", "router.halt_shift=75")
    early = measured(tmp_path / "early", dense, "router=avit", "router.halt_shift=-75")
    assert early["gflops"] < whole["gflops"] / 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.limit_test_batches=0"], "leaves nothing to measure"),
        (["model=stories"], "is a model of language"),
    ],
)
def test_what_it_cannot_measure_is_said(overrides, words):
    with pytest.raises(UserError, match=words):
        check_train(compose_config("untrained", overrides))


def test_a_place_that_cannot_be_written_is_one_line(dense, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        measured(tmp_path / "file/run", dense, "router=attention")


def test_weights_without_a_head_are_refused(dense, tmp_path):
    cfg = compose_config("untrained", [*DIGITS, "router=random", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="no head for the 10 classes"):
        measure(check_train(cfg))
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_images_is_one_line():
    line = [sys.executable, SRC / "untrained.py", "images=0"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: images=0: must be a whole number of at least 1 or null\n")


def test_reversed_keeps_what_attention_would_drop():
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    kept = {name: top_k(ROUTERS[name]()(scores[..., None], scores), 2).tolist() for name in ("attention", "reversed")}
    assert kept == {"attention": [[0, 2]], "reversed": [[1, 3]]}
