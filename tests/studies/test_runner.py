"""The runs of a study as processes, with a small script in the place of src/train.py."""

from __future__ import annotations

import signal
import time
from dataclasses import replace

import pytest

from amod.errors import UserError
from amod.studies import runner
from amod.studies.plan import Run
from amod.studies.runner import command, execute, finished, how_to_run, to_run

SCRIPT = """
import json, os, pathlib, signal, sys, time
given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(given["run_dir"])
with open(folder.parent / "calls", "a") as calls:
    calls.write(folder.name + "\\n")
if given.get("stop") == "true" and not (folder.parent / "stopped").exists():
    (folder.parent / "stopped").touch()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if given.get("fail") == "true" and not (folder.parent / "mended").exists():
    sys.exit("error: it broke")
if "model.checkpoint" in given:
    assert (pathlib.Path(given["model.checkpoint"]) / "summary.json").exists()
folder.mkdir()
(folder / "summary.json").write_text(json.dumps({"seconds": 1.0}))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(runner, "SCRIPTS", tmp_path)
    return tmp_path / "runs"


def run(router, start=None, **settings):
    return Run(
        "finetune" if start else "dense",
        "",
        {"data": "digits", "model": "m", "seed": "0", "router": router} | settings,
        start,
    )


def calls(root):
    return (root / "calls").read_text().split()


def test_a_run_waits_for_its_start_and_a_finished_one_is_not_repeated(root, capsys):
    dense = run("none")
    runs = [dense, run("linear", dense), run("attention", dense)]
    failed: dict[str, str] = {}
    execute(runs, root, 2, [], failed)
    assert not failed
    assert all(finished(r, root) for r in runs)
    assert calls(root)[0] == dense.name
    assert len(calls(root)) == 3
    assert "3 done, 0 running, 0 left, 0 failed" in capsys.readouterr().out
    execute(runs, root, 2, [], failed)
    assert len(calls(root)) == 3


def test_what_a_report_knows_is_not_run_again_unless_an_unknown_run_starts_from_it(root):
    dense = run("none")
    runs = [dense, run("linear", dense), run("attention", dense)]
    names = [one.name for one in runs]
    assert to_run(runs, root, ()) == runs
    assert to_run(runs, root, names) == []
    assert to_run(runs, root, names[:2]) == [dense, runs[2]]
    execute([dense], root, 1, [], {})
    assert to_run(runs, root, names[:2]) == [runs[2]]


def test_a_failed_run_is_named_and_the_others_go_on(root, capsys):
    broken, whole = run("none", fail="true"), run("none", seed="1")
    after = run("attention", broken)
    failed: dict[str, str] = {}
    execute([broken, after, whole], root, 1, [], failed)
    assert finished(whole, root)
    assert not finished(after, root)
    assert failed == {broken.name: "error: it broke", after.name: f"not run: {broken.name} failed"}
    assert f"FAILED {broken.name}: error: it broke" in capsys.readouterr().out
    (root / "mended").touch()  # the same command tries again
    again: dict[str, str] = {}
    execute([broken, after, whole], root, 1, [], again)
    assert not again
    assert finished(after, root)


def test_a_stopped_study_goes_on(root, capsys):
    dense = run("none")
    runs = [dense, run("linear", dense, stop="true"), run("attention", dense)]
    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute(runs, root, 1, [], {})
    assert time.monotonic() - since < 30  # the run under way was ended, too
    assert [finished(r, root) for r in runs] == [True, False, False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    capsys.readouterr()
    failed: dict[str, str] = {}
    execute(runs, root, 1, [], failed)
    assert not failed
    assert all(finished(r, root) for r in runs)
    assert calls(root) == [runs[0].name, runs[1].name, runs[1].name, runs[2].name]
    assert capsys.readouterr().out.splitlines()[0].split("] ")[1].startswith("1 done, 1 running, 1 left, 0 failed")


def test_there_is_news_while_nothing_ends(root, capsys, monkeypatch):
    monkeypatch.setattr(runner, "QUIET", 0.0)
    execute([run("none")], root, 1, [], {})
    out = capsys.readouterr().out
    assert f"0 done, 1 running, 0 left, 0 failed, expected end not known yet: still running {run('none').name}" in out


def test_what_is_said_of_every_run(tmp_path):
    assert command(run("none"), tmp_path, how_to_run(None))[2].startswith("data=")
    extra = {"trainer": "slurm", "hydra.launcher.partition": "gpu"}
    line = command(run("none", trainer="ddp"), tmp_path, how_to_run("submitit_slurm", extra))
    assert line[:5] == ["python", "src/train.py", "-m", "hydra/launcher=submitit_slurm", "trainer=slurm"]
    assert line[5] == "hydra.launcher.partition=gpu"
    assert "trainer=ddp" not in line
    assert line[-1].startswith(f"run_dir={tmp_path}")


def test_what_a_data_set_has_no_setting_for_is_not_said_of_its_runs(tmp_path):
    how = how_to_run(None, {"data.root": "/photographs", "data.num_workers": 0})
    assert "data.root=/photographs" in command(run("none", data="imagenette"), tmp_path, how)
    digits = command(run("none", data="digits"), tmp_path, how)  # come with scikit-learn
    assert "data.num_workers=0" in digits
    assert not any(argument.startswith("data.root") for argument in digits)


def test_what_is_not_trained_has_no_logger(tmp_path):
    how = how_to_run(None, {"logger": "tensorboard"})
    assert "logger=tensorboard" in command(run("none"), tmp_path, how)
    assert "logger=tensorboard" not in command(replace(run("none"), script="untrained.py"), tmp_path, how)


@pytest.mark.parametrize(
    ("launcher", "extra", "said"),
    [
        ("lsf", None, "hydra/launcher=lsf: no such choice; choose one of basic, .*submitit_slurm"),
        (None, {"schedule.lr": 1}, "extra={schedule.lr:1}: might change what the runs find; extra takes data.root"),
        (None, {"trainer": "fast"}, "trainer=fast: no such choice"),
        (None, {"hydra.launcher.gpus_per_node": 4}, "hydra.launcher.gpus_per_node"),
        (None, ["trainer=slurm"], "must be like {data.root:/data,trainer:slurm}"),
    ],
)
def test_what_cannot_be_said_of_every_run(launcher, extra, said):
    with pytest.raises(UserError, match=said):
        how_to_run(launcher, extra)
