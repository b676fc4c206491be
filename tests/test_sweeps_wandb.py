"""The sweep files with W&B's real client and a small server of our own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fake_wandb import FakeWandb, served
from tiny import DIGITS

ROOT = Path(__file__).parents[1]
# The client's command, except that the agent looks every 0.2 s instead of every 5 whether a run has ended.
WANDB = "from wandb import wandb_agent; wandb_agent.Agent.POLL_INTERVAL = 0.2; from wandb.cli.cli import cli; cli()"


def wandb(fake: FakeWandb, folder: Path, *arguments: str) -> str:
    """What ``wandb ARGUMENTS`` prints, in `folder`, with the server `fake`."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("WANDB")},
        "WANDB_BASE_URL": fake.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1",
        "HOME": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def small(folder: Path) -> None:
    """sweeps/lr.yaml with a tiny model, in `folder`, beside a link to src."""
    sweep = yaml.safe_load((ROOT / "sweeps/lr.yaml").read_text())
    at = sweep["command"].index("data=fashion_mnist")
    sweep["command"][at:-1] = DIGITS
    (folder / "lr.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    (folder / "src").symlink_to(ROOT / "src")


def test_the_real_client_fails_is_killed_and_resumes(tmp_path):
    """A run that diverges, and one whose agent dies and which W&B then hands out again."""
    bad = {"router": "none", "schedule.lr": 10**9, "seed": 0}
    good = {"router": "attention", "schedule.lr": 1e-05, "seed": 1, "capacity": 1, "schedule.epochs": 5}
    small(tmp_path)
    folder = tmp_path / "runs/sweeps/sweep1"
    fake = FakeWandb([("bad", bad), ("good", good)], kill_when=folder / "good/checkpoints/last.ckpt")
    with served(fake):
        assert "wandb agent someone/amod/sweep1" in wandb(fake, tmp_path, "sweep", "lr.yaml")
        said = wandb(fake, tmp_path, "agent", "someone/amod/sweep1")
        assert "router=attention schedule.lr=1e-05 seed=1 capacity=1" in said
        assert not (folder / "good/summary.json").exists()
        fake.queue.append(("good", good))
        assert "resuming runs/sweeps/sweep1/good" in wandb(fake, tmp_path, "agent", "someone/amod/sweep1")
    assert not fake.unknown
    assert set(fake.runs) == {"bad", "good"}  # the agent's ids, and no run beside them
    assert all(run.sweeps[0] == "sweep1" for run in fake.runs.values())
    assert fake.runs["bad"].exit_codes == [2]

    run, kept = fake.runs["good"], folder / "good"
    assert (kept / "wandb-id.txt").read_text().strip() == "good"
    assert {key: run.config[key]["value"] for key in good} == good
    assert run.config["amod"]["value"]["router"]["name"] == "attention"  # not replaced by the swept string
    rows = list(csv.DictReader((kept / "metrics.csv").open()))
    epochs = [row for row in run.history if "val/top1" in row]
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3, 4]  # each once, though the client had not sent all
    for key in ("val/top1", "train/loss", "lr"):
        assert [row[key] for row in epochs] == pytest.approx([float(row[key]) for row in rows], rel=1e-5)
    summary = json.loads((kept / "summary.json").read_text())
    assert run.summary["val_top1"] == summary["val_top1"] == max(float(row["val/top1"]) for row in rows)
    assert run.summary["test_top1"] == summary["test_top1"]
    assert run.exit_codes == [0]
