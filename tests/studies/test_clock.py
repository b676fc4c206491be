"""Models of a study in turns, with two that are no models: on a clock of ours the dense one takes twice as long as the
other, and four times as long to train."""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from fakes_studies import SCALE, STUDY, finish

import amod
from amod.analysis.throughput import timing
from amod.studies import clock
from amod.studies.plan import runs_of
from amod.studies.report import write_report
from amod.studies.rows import read, rows_of
from amod.training.compose import compose_config
from amod.training.config import TrainConfig
from amod.training.rules import parse


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """(study, its runs, folder of runs, folder of results); the dense model takes 20 ms and the others 10."""
    study = {**STUDY, "runs": [{"router": ["none"]}, *STUDY["runs"]], "figure": "pareto"}
    runs = runs_of(study, SCALE)
    monkeypatch.setattr("fakes_studies.runs_of", lambda *_: runs)
    finish(tmp_path / "runs", {"none": [73.0, 74.0], "linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    monkeypatch.setattr(clock, "ROUNDS", 3)

    class Data:
        num_classes = 10

        def samples(self, split, train):
            return self

        def drawn(self, most, seed):
            return range(most)

        def stacked(self, positions):
            return torch.zeros(len(positions), 3, 16, 16), torch.zeros(len(positions), dtype=torch.int64)

    now = 0.0

    def model(folder, *_):
        def run(images):
            nonlocal now
            now += 0.02 if "none" in folder.name else 0.01

        run.dense = "none" in folder.name
        return run

    class TrainingStep:
        def __init__(self, model, cfg, data, batch):
            self.dense = model.dense
            assert cfg.schedule.train == ("all" if model.dense else "routers")

        def __call__(self):
            nonlocal now
            now += 0.4 if self.dense else 0.1

        def mebibytes(self):
            return 30.0 if self.dense else 20.0

    monkeypatch.setattr(timing, "alternate", partial(timing.alternate, clock=lambda: now))
    monkeypatch.setattr("amod.training.finished.load_run", lambda folder: (None, model(folder), Data()))
    monkeypatch.setattr("amod.training.finished.load_model", model)

    def config(file):
        return parse(TrainConfig, compose_config("train", ["schedule=router_tuning"]))

    monkeypatch.setattr("amod.training.folder.read_config", config)
    monkeypatch.setattr(clock, "TrainingStep", TrainingStep)
    return study, runs, tmp_path / "runs", tmp_path / "results"


def test_models_of_the_first_seed_are_timed_once_against_the_dense_one(timed, monkeypatch):
    _, runs, root, output = timed
    clock.measure(runs, root, output)
    found = clock.read(output).set_index("run")
    assert len(found) == 3
    assert all("seed0" in name for name in found.index)
    for column, times in (("speedup", 2), ("training_speedup", 4)):
        values = {name: float(value) for name, value in found[column].items()}
        assert values == {name: pytest.approx(1 if "none" in name else times) for name in values}
    assert set(found["training_mib"]) == {20, 30}
    monkeypatch.setattr("amod.training.finished.load_run", None)
    clock.measure(runs, root, output)


def test_a_report_shows_them(timed):
    study, runs, root, output = timed
    study |= {"metrics": ["speedup", "training_speedup", "training_mib", "test_top1"], "with_start": True}
    clock.measure(runs, root, output)
    text = write_report(study, SCALE, *rows_of(runs, root, {}), output).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 0.5 | A-MoD"))
    assert [float(cell) for cell in line.split("|")[5:8]] == pytest.approx([2, 4, 20])
    assert (output / "figure.png").stat().st_size > 5000


def test_times_of_runs_that_are_not_here_stay(timed, capsys):
    """And are not mixed with those of another day: the first seed that is here is timed where none was."""
    _, runs, root, output = timed
    clock.measure(runs, root, output)
    before = (output / "speed.csv").read_bytes()
    for run in runs:
        if run.settings["seed"] == "0":
            shutil.rmtree(root / run.name)
    clock.measure(runs, root, output)
    assert (output / "speed.csv").read_bytes() == before
    assert "has times of runs that are not here and stays; delete it to time those here" in capsys.readouterr().out
    (output / "speed.csv").unlink()
    clock.measure(runs, root, output)
    assert all("seed1" in name for name in clock.read(output)["run"])
    after = clock.with_speeds(rows_of(runs, root, {})[0], output)
    assert after["speedup"].notna().tolist() == [row == 1 for row in after["seed"]]


def test_a_part_that_goes_beside_the_report_has_no_times_of_it(timed):
    study, runs, root, output = timed
    clock.measure(runs, root, output)
    write_report(study, SCALE, *rows_of(runs, root, {}), output)
    part = write_report(study, SCALE, *rows_of(runs[:2], root, {}), output)
    assert read(part.with_name("runs.csv"))["speedup"].isna().all()


@pytest.fixture
def tuning():
    """(a tiny model, the config of its training): gates alone are trained."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    words = ["router=tuning", "router.target=0.5", "schedule=router_tuning"]
    return amod.convert(vit, "tuning", target=0.5), parse(TrainConfig, compose_config("train", words))


def test_a_training_step_is_the_runs_own_and_leaves_the_weights(tuning):
    model, cfg = tuning
    batch = torch.randn(4, 3, 16, 16), torch.arange(4), torch.arange(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = clock.TrainingStep(model, cfg, SimpleNamespace(num_classes=5, class_names=[]), batch)
    step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None} == {"routers"}
    gates = step.mebibytes()
    cfg.schedule = cfg.schedule.model_copy(update={"train": "all"})
    model.requires_grad_(True)
    whole = clock.TrainingStep(model, cfg, SimpleNamespace(num_classes=5, class_names=[]), batch)
    whole()
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("routers")) / 2**20
    assert whole.mebibytes() - gates > 2.9 * weights  # a gradient, and the optimiser's two


def test_what_halts_is_timed_image_by_image():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5
    ).eval()
    model = amod.convert(vit, "avit", halt_scale=3.0, halt_shift=0.0).eval()
    images = torch.randn(3, 3, 16, 16)
    assert clock.halting({"dense": vit, "avit": model}) == [("avit", model)]
    found = clock.image_by_image("avit", model, vit, images)
    costs = [amod.count_flops(model, image[None]) / amod.count_flops(vit, (3, 16, 16)) for image in images]
    assert found["flops"].tolist() == pytest.approx(costs)
    assert (found["time"] > 0).all()


def test_their_mean_and_spread_by_hand(tmp_path):
    (tmp_path / "halting.csv").write_text("run,image,flops,time\na,0,0.2,0.5\na,1,0.4,0.6\na,2,0.6,0.4\n")
    runs = pd.DataFrame({"run": ["a"], "setting": ["ponder 0.05"]})
    assert clock.halting_section(runs, tmp_path).splitlines()[-1] == (
        "| ponder 0.05 | 40.0 ± 20.0 | 20.0 to 60.0 | 50.0 ± 10.0 | 40.0 to 60.0 | -0.50 |"
    )
    assert clock.halting_section(runs, tmp_path / "none") == ""
