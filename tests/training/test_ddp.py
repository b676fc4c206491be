"""Two processes on the CPU (gloo): what they leave, and that it is what one process makes of the same batches."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import fakes
from amod.errors import UserError
from amod.training import classification
from amod.training.callbacks import RunRecorder
from amod.training.checks import check_evaluate
from amod.training.classification import Classifier
from amod.training.compose import compose_config
from amod.training.evaluation import evaluate
from amod.training.loaders import build_datamodule
from amod.training.run import make_trainer, train
from amod.training.weights import build, create_vit, input_config
from processes import Forked, finish, free_port, hold_at, ranks, run_forked, run_ranks, step_of, wait_for
from tiny import DIGITS, MODEL, config

SRC = Path(__file__).parents[2] / "src"
# Nothing that each process draws for itself (drop path, Mixup, a random router): 2 epochs of 6 steps of 64 images.
SAME = ["router=linear", "capacity=0.5", "schedule.ema_decay=0.9", "trainer.limit_train_batches=6", "schedule.lr=0.01"]
HALF = ["schedule.batch_size=32"]  # for each of two processes


def rows(folder: Path) -> list[dict[str, float]]:
    return [
        {key: float(value) for key, value in row.items()} for row in csv.DictReader((folder / "metrics.csv").open())
    ]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    finish(run_ranks(folder, *SAME, *HALF))
    return folder


def test_two_processes_leave_one_run(two):
    names = {str(file.relative_to(two)) for file in two.rglob("*") if file.is_file()}
    assert names == {
        ".lock",
        "config.yaml",
        "environment.json",
        "data.json",
        "metrics.csv",
        "summary.json",
        "curves.png",
        "weights.safetensors",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "checkpoints/best.ckpt",
    }
    first, second = (Path(f"{two}.{rank}.txt").read_text() for rank in (0, 1))
    assert first.count("epoch 2/2") == 1
    assert second == ""


def test_two_processes_learn_what_one_does(two, tmp_path):
    """The same samples in every step: losses to 1e-4 (float32 sums in another order), the learning rate exactly."""
    train(config(*SAME, f"run_dir={tmp_path / 'one'}"))
    for mine, theirs in zip(rows(two), rows(tmp_path / "one"), strict=True):
        assert (mine["epoch"], mine["step"], mine["lr"]) == (theirs["epoch"], theirs["step"], theirs["lr"])
        for key in ("train/loss", "val/loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
    assert (summary(two)["global_batch"], summary(two)["lr"]) == (64, 0.01)


def test_the_test_accuracy_counts_every_image_once(two, tmp_path):
    """359 images do not divide by two; one process measures the same weights again, from a config of before
    schedule.lr_reference_batch.
    """
    older = shutil.copytree(two, tmp_path / "older")
    saved = (older / "config.yaml").read_text().splitlines(True)
    (older / "config.yaml").write_text("".join(line for line in saved if "lr_reference_batch" not in line))

    def measure() -> None:  # in a process of its own, because strategy=ddp leaves a process group behind
        values = evaluate(check_evaluate(compose_config("evaluate", [f"run={older}", "trainer.devices=1"])))
        (tmp_path / "values.json").write_text(json.dumps(values))

    finish([Forked(measure, tmp_path / "out.txt")])
    again = json.loads((tmp_path / "values.json").read_text())
    assert again["test/top1"] == pytest.approx(summary(two)["test_top1"], abs=1e-4)
    assert again["test/top5"] == pytest.approx(summary(two)["test_top5"], abs=1e-4)


def test_two_processes_write_the_predictions_of_all_images(two, tmp_path):
    asked = [f"run={two}", "trainer.devices=2", f"output={tmp_path / 'out'}"]

    def measure() -> None:
        evaluate(check_evaluate(compose_config("evaluate", asked)))

    both = [Forked(measure, tmp_path / f"{env['LOCAL_RANK']}.txt", **env) for env in ranks(2)]
    finish(both)
    predictions = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert len({row["image"] for row in predictions}) == len(predictions) == 359
    right = sum(row["class"] == row["predicted"] for row in predictions)
    assert 100 * right / 359 == pytest.approx(summary(two)["test_top1"], abs=1e-3)
    assert both[0].text.count("measured on 359 images") == 1
    assert both[1].text == ""


def test_killed_inside_an_epoch_both_go_on_exactly(two, tmp_path, monkeypatch):
    """The epoch's mean loss too, of which each process holds a part."""
    folder = tmp_path / "run"
    every = [*SAME, *HALF, "checkpoint_every_steps=1"]
    with monkeypatch.context() as patch:
        hold_at(patch, 5)
        processes = run_ranks(folder, *every)
    wait_for(lambda: step_of(folder) >= 3)
    for process in processes:
        process.process.kill()
    assert [process.wait() for process in processes] == [-9, -9]
    assert step_of(folder) < 6
    finish(run_ranks(folder, *every))
    assert (folder / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    assert (folder / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


def test_a_run_of_two_processes_does_not_go_on_in_one():
    """Its batches would be half as large, and a part of the epoch would be given out twice (trainer.devices=-1)."""
    module = Classifier(torch.nn.Linear(3, 2), config().schedule, num_classes=2, seed=0)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, ckpt_path="run/checkpoints/last.ckpt")
    saved = {"state_dict": module.state_dict(), "train_loss": torch.tensor([[5.0, 10.0], [45.0, 30.0]])}
    with pytest.raises(UserError, match=r"last.ckpt: was saved by a run of 2 process.*here are 1; .*trainer.devices"):
        module.on_load_checkpoint(saved)
    module._trainer.world_size, module._trainer.global_rank = 2, 1
    module.on_load_checkpoint(saved)
    assert module.train_loss.compute() == 1.5


def test_a_signal_to_one_process_stops_both_after_the_same_step(two, tmp_path, monkeypatch):
    after = RunRecorder.on_train_batch_end

    def signalled(self, trainer, *arguments):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        after(self, trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "on_train_batch_end", signalled)
        first, second = run_ranks(tmp_path / "run", *SAME, *HALF)
        assert (first.wait(), second.wait()) == (143, 0)
    assert "after step 2, with a checkpoint; resume with the same command" in first.text
    assert second.text == ""
    assert step_of(tmp_path / "run") == 2
    finish(run_ranks(tmp_path / "run", *SAME, *HALF))
    assert (tmp_path / "run/metrics.csv").read_text() == (two / "metrics.csv").read_text()
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


def test_no_router_leaves_a_parameter_unused(tmp_path):
    """DDP stops at the second step where a parameter got no gradient at the first."""
    routers = ["attention", "attention_weighted", "isoflop", "linear", "none", "random", "tome", "evit", "avit"]
    short = [
        "capacity=0.5",
        "schedule.epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=0",
        "trainer=ddp_cpu",
    ]
    # both have a teacher: any dense model of this shape
    save_file(create_vit(config().model, num_classes=10).state_dict(), tmp_path / "dense.safetensors")
    taught = [f"model.checkpoint={tmp_path / 'dense.safetensors'}"]
    asked = [[f"router={router}"] for router in routers]
    asked += [["router=tuning"], ["router=dynamicvit", *taught], ["router=attention", "distil=0.5", *taught]]
    configs = [config(*overrides, *short) for overrides in asked]

    def every_router() -> None:
        for cfg in configs:
            data = build_datamodule(cfg.data, input_config(cfg.model), {}, 8, 8, seed=0)
            trainer = make_trainer(cfg.trainer, enable_checkpointing=False)
            trainer.fit(classification.module(build(cfg, 10).model, cfg, data), datamodule=data)
            print(cfg.router.name, cfg.distil, trainer.world_size, trainer.global_step)

    both = [Forked(every_router, tmp_path / f"{env['LOCAL_RANK']}.txt", **env) for env in ranks(2)]
    finish(both)
    assert all(f"{cfg.router.name} {cfg.distil} 2 2\n" in process.text for cfg in configs for process in both)


def test_tasks_of_a_slurm_job(two, tmp_path):
    """trainer=slurm: the processes are SLURM's, known by its variables (set here by hand; there is no SLURM)."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "MASTER_PORT": str(free_port()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in shared.items():
            patch.setenv(key, value)
        finish(
            [
                run_forked(
                    tmp_path / "run",
                    "trainer=slurm",
                    "trainer.accelerator=cpu",
                    *SAME,
                    *HALF,
                    SLURM_PROCID=str(rank),
                    SLURM_LOCALID=str(rank),
                )
                for rank in (0, 1)
            ]
        )
    assert (tmp_path / "run/weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()


# --- as typed -----------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, SRC / "train.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


SECRETS = ("some-user", "some-host", "0123456789abcdef0123456789abcdef01234567")
SHORT = ["router=none", "schedule.epochs=1", "trainer.limit_train_batches=3", "schedule.batch_size=8"]
TWO = ["trainer=ddp_cpu", "trainer.devices=2"]


@pytest.mark.slow
def test_one_wandb_run_and_no_secret(tmp_path):
    """The command itself with two processes, started in the home folder of a user with an account at W&B."""
    home = tmp_path / SECRETS[0]
    home.mkdir()
    account = {
        "HOME": str(home),
        "USER": SECRETS[0],
        "LOGNAME": SECRETS[0],
        "HOSTNAME": SECRETS[1],
        "WANDB_API_KEY": SECRETS[2],
        "WANDB_MODE": "offline",
    }
    fakes.image_folder(home / "data", per_class=20)
    arguments = ["data=folder", f"data.root={home}/data", "logger=wandb", f"run_dir={home}/run"]
    process = start(home, *MODEL, *SHORT, *TWO, *arguments, **account)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("epoch 1/1") == 1
    (offline,) = (home / "run/wandb").glob("offline-run-*")
    assert offline.name.endswith((home / "run/wandb-id.txt").read_text().strip())
    (record,) = offline.glob("*.wandb")
    assert b"val/top1" in record.read_bytes()
    assert OmegaConf.load(home / "run/config.yaml").data.root == "~/data"
    for file in (home / "run").rglob("*"):
        text = file.read_bytes() if file.is_file() else b""
        assert not [secret for secret in SECRETS if secret.encode() in text], file


@pytest.mark.slow
def test_every_job_of_a_sweep_runs_on_two_processes(tmp_path):
    """The first fails (an image is broken); the other runs, and the sweep says so in the end."""
    fakes.image_folder(tmp_path / "data", per_class=20)
    fakes.truncate(tmp_path / "data/class_1/7.png")
    arguments = ["-m", *MODEL, *SHORT, *TWO, "data=folder,digits"]
    process = start(tmp_path, *arguments, AMOD_DATA=str(tmp_path / "data"))
    out, err = process.communicate()
    assert process.returncode == 1
    assert len(list((tmp_path / "runs").glob("digits/*/summary.json"))) == 1
    assert out.count("] python ") == 2
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "error: 1 of 2 jobs failed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_command_goes_on_after_a_signal(tmp_path, number):
    """Two processes that Lightning starts, one W&B id, the first process signalled alone."""
    run = tmp_path / "run"
    arguments = [*DIGITS, *TWO, *SAME, *HALF, "schedule.epochs=8", "logger=wandb", "checkpoint_every_steps=1"]
    process = start(tmp_path, *arguments, f"run_dir={run}", WANDB_MODE="offline")
    wait_for(lambda: step_of(run) >= 3, 900)
    process.send_signal(number)
    _, err = process.communicate()
    assert not (run / "summary.json").exists()
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM after step" in err
        assert "Traceback" not in err
    again = start(tmp_path, *arguments, f"run_dir={run}", WANDB_MODE="offline")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resuming" in out
    identity = (run / "wandb-id.txt").read_text().strip()
    assert [folder.name.endswith(identity) for folder in (run / "wandb").glob("offline-run-*")] == [True, True]
    whole = tmp_path / "whole"
    finish(run_ranks(whole, *SAME, *HALF, "schedule.epochs=8"))
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (run / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_process_is_one_line(tmp_path, rank):
    """A broken image in the share of one of them."""
    fakes.image_folder(tmp_path / "data", parts=("train", "val", "test"))
    images = sorted((tmp_path / "data/test").rglob("*.png"))
    fakes.truncate(images[rank])  # evaluation gives image r to process r
    arguments = [*MODEL, *SHORT, *TWO, "data=folder", f"data.root={tmp_path / 'data'}", "run_dir=run"]
    process = start(tmp_path, *arguments)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.count("error: ") == 1, err
    assert str(images[rank]) in err
    assert "Traceback" not in err
