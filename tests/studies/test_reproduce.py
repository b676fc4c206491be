"""The command around the studies: what it refuses, what it lists, and reports written again from their rows."""

from __future__ import annotations

import shutil

import pytest
from omegaconf import OmegaConf

from amod.errors import UserError
from amod.studies.command import check_reproduce, reproduce, studies_of
from amod.studies.plan import runs_of
from amod.studies.rows import read, row_of, table_of, write
from amod.training.compose import compose_config
from amod.training.config import CONF


def command(*overrides):
    cfg = compose_config("reproduce", list(overrides))
    check_reproduce(cfg)
    reproduce(cfg)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["report_only=7"], "report_only=7: must be true or false"),
        (["scale=medium", "scale.weights=[1]"], r"scale.weights=\[1\]: must be a file of the model's weights, or null"),
        (["scale.seeds=[a]"], r"scale.seeds=\['a'\]: must be a list of whole numbers"),
        (["study=table8", "scale=medium"], "scale=medium: study=table8 is of scale small, paper; choose that"),
        (["study=table99"], "study=table99: no such choice"),
        (["study=fig28", "scale=medium"], "scale=medium: study=fig28 is of scale small, paper"),
        (["scale.name=foo"], "scale.name=foo: must be one of medium, paper, small"),
        (["jobs=true"], "jobs=True: must be a whole number"),
        (["results=null"], "results=null: must be the name of a folder"),
        (["study=table5", "study.metric=foo"], "study.metric=foo: no report has it; choose one of test_top1"),
        (["study=fig28", "jobs=2"], "jobs=2: study=fig28 is timed in one process here; leave it out"),
        (["dry=true", "report_only=true"], "leave one of them out"),
        (["results=README.md/x", "report_only=true"], "README.md/x: cannot be written"),
        (["results=README.md"], "results=README.md: is a file; name a folder"),
        (["scale=medium", "scale.weights=none.pth"], "model.checkpoint=none.pth: no such file"),
    ],
)
def test_a_mistake_is_one_line(overrides, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        command(f"runs={tmp_path}/runs", f"results={tmp_path}/results", *overrides)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_would_be_run_is_listed_with_its_script(tmp_path, capsys):
    command("study=untrained", "scale=medium", "scale.seeds=[0]", "dry=true", f"runs={tmp_path}")
    listed = capsys.readouterr().out
    assert "# 1.4367 GFLOPs, 3 epochs, to run\npython src/train.py data=imagenette router=none" in listed
    assert "# 1.0708 GFLOPs, no training, to run\npython src/untrained.py" in listed
    assert "placement.blocks=[6,7,8,9,10,11]" in listed


def test_all_leaves_out_what_is_not_for_the_scale():
    whole = OmegaConf.to_container(OmegaConf.load(CONF / "study/all.yaml"))
    names = [study["name"] for study in studies_of(whole, "medium")]
    assert "untrained224" in names
    assert not {"table8", "fig28"} & {*names}  # from scratch, throughput
    assert {*names} < {study["name"] for study in studies_of(whole)}


def test_reports_are_written_again_from_their_rows(tmp_path, capsys):
    study, scale = (OmegaConf.to_container(OmegaConf.load(CONF / f)) for f in ("study/table5.yaml", "scale/small.yaml"))
    rows = [
        row_of(run) | {"status": "finished", "test_top1": 80.0 + 3 * (run.settings["router"] == "attention")}
        for run in runs_of(study, scale)
    ]
    (tmp_path / "table5/small").mkdir(parents=True)
    write(table_of(rows[:-1]), tmp_path / "table5/small/runs.csv")  # the last run is not there yet
    command("study=all", "report_only=true", f"results={tmp_path}", f"runs={tmp_path}/nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "claims.md",
        "table5",
    ]  # not sec45, which shares its runs
    assert "none of these runs" not in capsys.readouterr().out
    command("study=table5", "scale=medium", "report_only=true", f"results={tmp_path}", f"runs={tmp_path}/nowhere")
    assert "none of these runs" not in capsys.readouterr().out  # nor are there others at that scale
    (tmp_path / "table5/medium").mkdir()
    write(table_of(rows[:1]), tmp_path / "table5/medium/runs.csv")
    command("study=table5", "scale=medium", "report_only=true", f"results={tmp_path}", f"runs={tmp_path}/nowhere")
    assert "none of these runs is in " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "table5/medium")
    report = (tmp_path / "table5/small/report.md").read_text()
    assert "14 runs finished, 1 runs not run" in report
    assert "Not run: 1 runs of seed 2." in report
    assert list(read(tmp_path / "table5/small/runs.csv")["status"]).count("finished") == 14
    assert "[table5](table5/small/report.md)" in (tmp_path / "claims.md").read_text()
