"""Models of a study in turns, with two that are no models: one takes twice as long as the other."""

from __future__ import annotations

import time

import pytest
from fakes_studies import SCALE, STUDY, finish

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
            return len(positions), None

    def model(folder, *_):
        return lambda images: time.sleep(0.02 if "none" in folder.name else 0.01)

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
    assert all(1.7 < value < 2.1 for name, value in found.items() if "none" not in name)
    monkeypatch.setattr("amod.training.finished.load_run", None)
    clock.measure(runs, root, output)


def test_a_report_shows_them(timed):
    study, runs, root, output = timed
    study |= {"metrics": ["speedup", "test_top1"], "with_start": True}
    clock.measure(runs, root, output)
    text = write_report(study, SCALE, *rows_of(runs, root, {}), output).read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 0.5 | A-MoD"))
    assert float(line.split("|")[5]) == pytest.approx(2, abs=0.3)
    assert (output / "figure.png").stat().st_size > 5000
