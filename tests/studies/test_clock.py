"""Models of a study in turns, with two that are no models: one takes twice as long as the other, on a clock of ours."""

from __future__ import annotations

from functools import partial

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
from amod.studies.rows import rows_of


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
            return torch.zeros(len(positions), 3, 16, 16), None

    now = 0.0

    def model(folder, *_):
        def run(images):
            nonlocal now
            now += 0.02 if "none" in folder.name else 0.01

        return run

    monkeypatch.setattr(timing, "alternate", partial(timing.alternate, clock=lambda: now))
    monkeypatch.setattr("amod.training.finished.load_run", lambda folder: (None, model(folder), Data()))
    monkeypatch.setattr("amod.training.finished.load_model", model)
    monkeypatch.setattr("amod.training.folder.read_config", lambda file: None)
    return study, runs, tmp_path / "runs", tmp_path / "results"


def test_models_of_the_first_seed_are_timed_once_against_the_dense_one(timed, monkeypatch):
    _, runs, root, output = timed
    clock.measure(runs, root, output)
    found = clock.read(output).set_index("run")["speedup"]
    assert len(found) == 3
    assert all("seed0" in name for name in found.index)
    assert found[[name for name in found.index if "none" in name]].item() == 1
    assert all(value == pytest.approx(2) for name, value in found.items() if "none" not in name)
    monkeypatch.setattr("amod.training.finished.load_run", None)
    clock.measure(runs, root, output)


def test_a_report_shows_them(timed):
    study, runs, root, output = timed
    study |= {"metrics": ["speedup", "test_top1"], "with_start": True}
    clock.measure(runs, root, output)
    text = write_report(study, SCALE, *rows_of(runs, root, {}), output).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 0.5 | A-MoD"))
    assert float(line.split("|")[5]) == pytest.approx(2)
    assert (output / "figure.png").stat().st_size > 5000


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
