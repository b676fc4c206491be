"""The runs of a study as processes, with a small script in the place of src/train.py."""

from __future__ import annotations

import pytest

from amod.errors import UserError
from amod.studies import runner
from amod.studies.plan import Run
from amod.studies.runner import check_launcher, command, execute, finished

SCRIPT = """
import json, pathlib, sys
given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(given["run_dir"])
with open(folder.parent / "calls", "a") as calls:
    calls.write(folder.name + "\\n")
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
    monkeypatch.setattr(runner, "TRAIN", script)
    return tmp_path / "runs"


def run(router, start=None, **settings):
    return Run(
        "finetune" if start else "dense",
        "",
        {"data": "d", "model": "m", "seed": "0", "router": router} | settings,
        start,
    )


def calls(root):
    return (root / "calls").read_text().split()


def test_a_run_waits_for_its_start_and_a_finished_one_is_not_repeated(root, capsys):
    dense = run("none")
    runs = [dense, run("linear", dense), run("attention", dense)]
    failed: dict[str, str] = {}
    execute(runs, root, 2, None, failed)
    assert not failed
    assert all(finished(r, root) for r in runs)
    assert calls(root)[0] == dense.name
    assert len(calls(root)) == 3
    assert "3 done, 0 running, 0 left, 0 failed" in capsys.readouterr().out
    execute(runs, root, 2, None, failed)
    assert len(calls(root)) == 3


def test_a_failed_run_is_named_and_the_others_go_on(root, capsys):
    broken, whole = run("none", fail="true"), run("none", seed="1")
    after = run("attention", broken)
    failed: dict[str, str] = {}
    execute([broken, after, whole], root, 1, None, failed)
    assert finished(whole, root)
    assert not finished(after, root)
    assert failed == {broken.name: "error: it broke", after.name: f"not run: {broken.name} failed"}
    assert f"FAILED {broken.name}: error: it broke" in capsys.readouterr().out
    (root / "mended").touch()  # the same command tries again
    again: dict[str, str] = {}
    execute([broken, after, whole], root, 1, None, again)
    assert not again
    assert finished(after, root)


def test_a_launcher_of_hydra_is_asked_for_in_the_command(tmp_path):
    line = command(run("none"), tmp_path, "submitit_slurm")
    assert line[:4] == ["python", "src/train.py", "-m", "hydra/launcher=submitit_slurm"]
    assert command(run("none"), tmp_path, None)[2].startswith("data=")


def test_a_launcher_that_is_not_there():
    check_launcher(None)
    check_launcher("submitit_slurm")
    with pytest.raises(UserError, match=r"hydra/launcher=lsf: no such choice; choose one of basic, .*submitit_slurm"):
        check_launcher("lsf")
