"""The notebooks run from clean, in their order, and what is committed of them is small and names no machine."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from omegaconf import OmegaConf

from amod.studies.plan import runs_of
from amod.studies.rows import rows_of, table_of, write
from amod.training.config import CONF

ROOT = CONF.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def study_rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows like those of Table 1 at the small scale, made up; one run failed."""
    study, scale = (OmegaConf.to_container(OmegaConf.load(CONF / f)) for f in ("study/table1.yaml", "scale/small.yaml"))
    rows, _ = rows_of(runs_of(study, scale), Path("nowhere"), {})  # type: ignore[arg-type]
    top1 = 80.0 + 10 * rows["capacity"] + rows["seed"]
    rows = rows.assign(status="finished", gflops=0.02 + 0.01 * rows["capacity"], val_top1_untrained=0.5 * top1)
    rows = rows.assign(val_top1=top1, test_top1=top1 - 1, epochs_to_peak=2)
    rows.loc[3, ["status", "note"]] = ["failed", "stopped"]
    curves = [
        {"run": run, "epoch": epoch, "val_top1": value - 2 + epoch}
        for run, value in zip(rows["run"], top1, strict=True)
        for epoch in range(3)
    ]
    return table_of(rows), pd.DataFrame(curves)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like a fresh clone: the notebooks, the settings, and a study's results (the committed ones if any)."""
    root = tmp_path_factory.mktemp("clone")
    (root / "notebooks").mkdir()
    (root / "conf").symlink_to(CONF)
    if (ROOT / "results/table1/small/runs.csv").exists():
        (root / "results").symlink_to(ROOT / "results")
    else:
        rows, curves = study_rows()
        small = root / "results/table1/small"
        small.mkdir(parents=True)
        write(rows, small / "runs.csv")
        write(curves, small / "curves.csv")
    return root


def test_they_run_from_clean(place, monkeypatch):
    """One after the other in one kernel, emptied in between: it imports torch once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress")  # tqdm's, without ipywidgets
    whole, ends = nbformat.v4.new_notebook(), []
    for path in NOTEBOOKS:
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        whole.cells += [nbformat.v4.new_code_cell(cell.source) for cell in cells]
        ends.append(len(whole.cells))
        whole.cells.append(nbformat.v4.new_code_cell("%reset -f"))
    where = {"metadata": {"path": str(place / "notebooks")}}
    NotebookClient(whole, timeout=900, kernel_name="python3", resources=where).execute()
    printed = [json.dumps(cell.outputs) for cell in whole.cells]
    assert not any('"name": "stderr"' in one for one in printed)
    # it learned something, or the other notebooks show noise
    assert json.loads((place / "runs/notebooks/dense/summary.json").read_text())["test_top1"] > 80
    for start, end in pairwise(ends):
        assert "image/png" in "".join(printed[start:end])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_and_in_order(path):
    text = path.read_text()
    assert len(text) < 400_000
    assert not re.search(r"/home/|/root/|/work/|/Users/|/tmp/", text)
    counts = [cell.execution_count for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed top to bottom, once
