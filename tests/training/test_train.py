"""Train, resume, test and evaluate end to end, on digits with a model that a test can afford."""

from __future__ import annotations

import csv
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torchmetrics.classification import MulticlassConfusionMatrix

import fakes
from amod.errors import UserError
from amod.training import run as run_module
from amod.training.checks import check_evaluate, evaluation_config
from amod.training.classification import Classifier, cost
from amod.training.compose import compose_config, train_config
from amod.training.config import EvaluateConfig
from amod.training.evaluation import evaluate, picture
from amod.training.folder import check_run_dir, saved_config
from amod.training.loaders import DataModule, build_datamodule
from amod.training.loggers import WandbRows
from amod.training.module import lr_factor
from amod.training.rules import parse
from amod.training.run import train
from amod.training.weights import build, input_config
from tiny import DIGITS, MODEL, config, run

SRC = Path(__file__).parents[2] / "src"


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dense"
    return folder, run(folder, "router=none", "schedule.epochs=3")


def test_the_run_folder(dense):
    folder, summary = dense
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "config.yaml",
        "environment.json",
        "data.json",
        "metrics.csv",
        "summary.json",
        "curves.png",
        "weights.safetensors",
        ".lock",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "checkpoints/best.ckpt",
    }
    assert list(rows(folder)[0]) == ["epoch", "step", "lr", "train/loss", "val/loss", "val/top1", "val/top5"]
    assert [row["epoch"] for row in rows(folder)] == ["0", "1", "2"]
    assert (summary["router"], summary["capacity"], summary["tokens_kept"]) == ("none", 1.0, {})
    assert summary["params"] == sum(value.numel() for value in load_file(folder / "weights.safetensors").values())
    best = max(rows(folder), key=lambda row: float(row["val/top1"]))
    assert summary["val_top1"] == float(best["val/top1"])
    assert summary["best_epoch"] == int(best["epoch"])
    assert 0 < summary["test_top1"] < summary["test_top5"] <= 100
    assert summary["val_top1_untrained"] is None


def test_the_run_folder_names_no_machine_and_no_user(dense):
    folder, _ = dense
    text = (folder / "environment.json").read_text() + (folder / "config.yaml").read_text()
    for name in (socket.gethostname(), getpass.getuser(), "run_dir"):
        assert not re.search(rf"\b{name}\b", text)
    assert len(json.loads((folder / "environment.json").read_text())["git_commit"]) == 40


@pytest.mark.parametrize(("split", "batches"), [("test", 5), ("val", 3), ("all", None)])
def test_a_split_is_measured_as_far_as_in_the_run(tmp_path, split, batches):
    limits = ["trainer.limit_val_batches=3", "trainer.limit_test_batches=5"]
    cfg = config(*limits, f"run_dir={tmp_path}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved_config(cfg, whole=True)))
    asked = parse(EvaluateConfig, {"run": str(tmp_path), "split": split})
    assert evaluation_config(asked).trainer.limit_test_batches == batches


def test_the_learning_rate_of_a_row_is_the_one_of_its_last_step(dense):
    used = [2e-3 * lr_factor(step, 60, 20, 5e-3) for step in (19, 39, 59)]  # 3 epochs of 20 steps, the first warms up
    assert [float(row["lr"]) for row in rows(dense[0])] == pytest.approx(used, rel=1e-5)


def test_evaluate_gives_the_same_accuracy_from_the_folder_alone(dense, tmp_path):
    folder, summary = dense
    moved = folder.rename(tmp_path / "moved")
    try:
        tested = evaluate(check_evaluate(compose_config("evaluate", [f"run={moved}"])))
        validated = evaluate(check_evaluate(compose_config("evaluate", [f"run={moved}", "split=val"])))
    finally:
        moved.rename(folder)
    assert tested["test/top1"] == pytest.approx(summary["test_top1"], abs=1e-4)
    assert tested["test/top5"] == pytest.approx(summary["test_top5"], abs=1e-4)
    assert validated["val/top1"] == pytest.approx(summary["val_top1"], abs=1e-4)


@pytest.mark.parametrize("router", ["attention", "linear", "isoflop", "random"])
def test_adapted_variants_train_and_evaluate(dense, tmp_path, router):
    folder, before = dense
    extra = ["model.drop_path=0.1", "schedule.ema_decay=0.5"] if router == "linear" else []
    source = shutil.copy(folder / "weights.safetensors", tmp_path / "source.safetensors")
    summary = run(
        tmp_path / "run", f"router={router}", "capacity=0.5", f"model.checkpoint={source}", "schedule.epochs=1", *extra
    )
    source.unlink()  # the run folder is enough from here on
    assert summary["gflops"] < before["gflops"]
    assert 0 <= summary["val_top1_untrained"] <= 100
    if router == "isoflop":
        assert summary["depth"] < 4
    else:
        assert summary["tokens_kept"] == {"1": 13, "3": 13}  # floor(0.5 * 26)
        assert (summary["capacity"], summary["capacity_granted"]) == (0.5, 0.5)
    tested = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert tested["test/top1"] == pytest.approx(summary["test_top1"], abs=1e-4)


def test_a_taught_run_is_evaluated_without_its_teacher(dense, tmp_path):
    teacher = shutil.copytree(dense[0], tmp_path / "teacher")
    taught = ["router=dynamicvit", "router.keep_rate=0.7", "placement.blocks=[1,2]", f"model.checkpoint={teacher}"]
    summary = run(tmp_path / "run", *taught, "schedule.epochs=1")
    shutil.rmtree(teacher)
    tested = evaluate(check_evaluate(compose_config("evaluate", [f"run={tmp_path / 'run'}"])))
    assert tested["test/top1"] == pytest.approx(summary["test_top1"], abs=1e-4)


def test_a_run_of_two_nodes_that_tested_nothing_is_evaluated(dense, tmp_path):
    folder = shutil.copytree(dense[0], tmp_path / "run")
    saved = OmegaConf.load(folder / "config.yaml")
    saved.trainer.num_nodes, saved.trainer.limit_test_batches = 2, 0
    OmegaConf.save(saved, folder / "config.yaml")
    tested = evaluate(check_evaluate(compose_config("evaluate", [f"run={folder}"])))
    assert tested["test/top1"] == pytest.approx(dense[1]["test_top1"], abs=1e-4)


def test_a_class_may_cost_dollars(tmp_path):
    matrix = MulticlassConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert picture(matrix, ["$5_$10", "b"]).startswith(b"\x89PNG")


def test_capacity_one_starts_where_the_dense_model_ended(dense, tmp_path):
    folder, before = dense
    summary = run(tmp_path / "run", "router=attention", "capacity=1", f"model.checkpoint={folder}", "schedule.epochs=1")
    assert summary["val_top1_untrained"] == before["val_top1"]
    assert summary["gflops"] == before["gflops"]


def test_a_finished_run_is_not_repeated(dense, capsys):
    folder, summary = dense
    stamp = (folder / "weights.safetensors").stat().st_mtime_ns
    assert run(folder, "router=none", "schedule.epochs=3") == summary
    assert "is finished" in capsys.readouterr().out
    assert (folder / "weights.safetensors").stat().st_mtime_ns == stamp


def test_a_summary_that_is_none_is_one_line(dense, tmp_path):
    folder = shutil.copytree(dense[0], tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: is no run's summary; put the run's own file back"):
        run(folder, "router=none", "schedule.epochs=3")


@pytest.mark.parametrize("router", ["linear", "dynamicvit"])
def test_a_head_is_not_trained_above_routers_that_are_random(dense, tmp_path, router):
    asked = [f"router={router}", "schedule=probe", "schedule.epochs=1"]
    with pytest.raises(UserError, match=rf"schedule.train=head: .* router={router} would be random \(routers\."):
        run(tmp_path / "run", *asked, f"model.checkpoint={dense[0]}")
    assert not (tmp_path / "run").exists()


def test_a_finished_folder_of_another_config_is_not_taken_for_this_run(dense):
    folder, _ = dense
    with pytest.raises(UserError, match="seed=0, not 1"):
        train(config("router=none", "schedule.epochs=3", "seed=1", f"run_dir={folder}"))


def test_a_folder_of_another_config_is_refused(dense):
    folder, _ = dense
    with pytest.raises(UserError, match=r"schedule\.epochs=3, not 4"):
        check_run_dir(config("router=none", "schedule.epochs=4", f"run_dir={folder}"))
    with pytest.raises(UserError, match=r"router\.name=none, not linear"):
        check_run_dir(config("router=linear", "schedule.epochs=3", f"run_dir={folder}"))
    check_run_dir(config("router=none", "schedule.epochs=3", "data.num_workers=1", f"run_dir={folder}"))


def small_data(cfg: DictConfig, count: int = 64) -> DataModule:
    data = build_datamodule(cfg.data, input_config(cfg.model), {}, count, 256, cfg.seed)
    split = data.splits["train"]
    data.splits["train"] = data.splits["val"] = type(split)(split.source, split.indices[:count])
    return data


class AverageByHand(Callback):
    """w' <- d w' + (1 - d) w after every optimiser step; d grows to 0.75: 0, 1 - 2^(-2/3), 1 - 3^(-2/3), ..."""

    def on_train_batch_end(self, trainer, module, *_):
        decay = min(0.75, 1 - trainer.global_step ** (-2 / 3))
        self.average = decay * self.average + (1 - decay) * module.model.head.weight.detach()


def test_ema_is_the_moving_average_of_the_weights():
    cfg = config("router=none", "schedule.ema_decay=0.75", "schedule.lr=0.01")
    module = Classifier(build(cfg, 10).model, cfg.schedule, 10, seed=0)
    by_hand = AverageByHand()
    by_hand.average = module.model.head.weight.detach().clone()
    fit(module, small_data(cfg), epochs=3, callbacks=[by_hand])
    torch.testing.assert_close(module.evaluated.head.weight, by_hand.average)
    assert not torch.allclose(by_hand.average, module.model.head.weight, atol=1e-3)


def test_the_moving_average_of_a_short_training_leaves_its_first_weights():
    """Without a warm-up 0.9999^30 = 99.7 % of them would be left."""
    cfg = config("router=none", "schedule.ema_decay=0.9999", "schedule.lr=0.01")
    module = Classifier(build(cfg, 10).model, cfg.schedule, 10, seed=0)
    first = module.model.head.weight.detach().clone()
    fit(module, small_data(cfg), epochs=30)
    averaged, trained = (model.head.weight.detach() - first for model in (module.evaluated, module.model))
    assert averaged.norm() > 0.7 * trained.norm()


def fit(module: Classifier, data: DataModule, epochs: int, **arguments: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **arguments,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def test_in_half_precision_sums_do_not_stop_at_256(tmp_path):
    one_by_one = ["schedule.eval_batch_size=1", "schedule.epochs=1", "trainer.limit_train_batches=2"]
    whole = run(tmp_path / "whole", "router=none", *one_by_one)
    half = run(tmp_path / "half", "router=none", "trainer.precision=bf16-true", *one_by_one)
    assert half["test_images"] == whole["test_images"] > 256
    one, other = ([*csv.DictReader((tmp_path / name / "metrics.csv").open())] for name in ("whole", "half"))
    assert float(other[-1]["val/loss"]) == pytest.approx(float(one[-1]["val/loss"]), rel=0.02)


@pytest.mark.parametrize("router", ["none", "attention", "linear"])
def test_overfits_64_digits(router):
    wider = ["model.kwargs.embed_dim=64", "model.kwargs.depth=2", "schedule.epochs=150", "schedule.lr=3e-3"]
    cfg = config(f"router={router}", "capacity=0.5", *wider, "schedule.warmup_epochs=10")
    torch.manual_seed(0)
    module = Classifier(build(cfg, 10).model, cfg.schedule, 10, seed=0)
    trainer = fit(module, small_data(cfg), epochs=150)
    assert trainer.callback_metrics["val/top1"] > 98
    assert trainer.callback_metrics["val/loss"] < 0.1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    step = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            batch = (batch[0] * torch.nan, *batch[1:])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "router=none", "trainer.limit_train_batches=3")
    text = str(caught.value)
    assert "\n" not in text
    for word in ("loss is nan", "step 4", "epoch 1", "samples", "(64 in all)", "schedule.lr", "schedule.clip_grad"):
        assert word in text
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_gradient_that_is_not_finite_stops(tmp_path, monkeypatch):
    step = Classifier.training_step

    def poisoned(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss + (self.model.head.bias * 0).abs().sqrt().sum()  # sqrt'(0) = inf

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    with pytest.raises(UserError, match=r"gradient's norm is .* at step 0"):
        run(tmp_path / "run", "router=none", "trainer.limit_train_batches=3")


FAR = ["router=none", "schedule.lr=1e30", "schedule.warmup_epochs=0"]  # one step, and the weights are past all use


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.limit_train_batches=1"], ["validation loss is not finite at step 1 (epoch 0)", "not saved"]),
        (["trainer.limit_train_batches=1", "trainer.limit_val_batches=0"], ["weights' norm is inf at step 1"]),
        (["trainer.limit_train_batches=3", "checkpoint_every_steps=1"], ["weights' norm is inf at step 1"]),
    ],
    ids=["at the end of an epoch", "without validation", "inside an epoch"],
)
def test_diverged_weights_are_not_kept(tmp_path, overrides, words):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", *FAR, *overrides)
    for word in (*words, "schedule.lr than 1e+30"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/metrics.csv").exists()
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_one_validation_image_that_is_not_finite_stops(tmp_path, monkeypatch):
    step = Classifier.validation_step

    def poisoned(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            batch[0][0] = torch.nan
        step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "validation_step", poisoned)
    with pytest.raises(UserError, match=r"validation loss is not finite at step 4 \(epoch 1\)"):
        run(tmp_path / "run", "router=none", "trainer.limit_train_batches=2", "schedule.eval_batch_size=64")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0"]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_given_weights_that_are_not_finite_stop_before_training(dense, tmp_path):
    weights = load_file(dense[0] / "weights.safetensors")
    weights["head.bias"][0] = torch.nan
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"without any training; give other weights \(model\.checkpoint="):
        run(tmp_path / "run", "router=none", f"model.checkpoint={tmp_path / 'bad.safetensors'}")


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    summary = run(tmp_path / "run", "router=none", "trainer.limit_train_batches=2", "trainer.limit_val_batches=0")
    assert (summary["val_top1"], summary["best_epoch"]) == (None, 1)


def test_a_checkpoint_of_another_model_leaves_no_folder(dense, tmp_path):
    folder, _ = dense
    with pytest.raises(UserError, match="is no checkpoint of vit_pico"):
        run(tmp_path / "run", f"model.checkpoint={folder}", "model.kwargs.embed_dim=64")
    assert not (tmp_path / "run").exists()


def test_a_head_of_other_classes_has_no_untrained_accuracy(dense, tmp_path):
    folder, _ = dense
    fakes.image_folder(tmp_path / "data", classes=3)
    cfg = train_config(
        [
            *MODEL,
            "data=folder",
            f"data.root={tmp_path / 'data'}",
            "data.num_workers=0",
            "schedule.epochs=1",
            f"model.checkpoint={folder}",
            "capacity=0.5",
            f"run_dir={tmp_path / 'run'}",
            "trainer.accelerator=cpu",
        ],
    )
    train(cfg)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["val_top1_untrained"] is None
    assert summary["test_top5"] == 100  # of three classes
    assert load_file(tmp_path / "run/weights.safetensors")["head.weight"].shape == (3, 32)


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "some-user")
    monkeypatch.setattr(socket, "gethostname", lambda: "some-host")
    run(tmp_path / "run", "router=none", "trainer.limit_train_batches=2", "schedule.epochs=1", "logger=wandb")
    identity = (tmp_path / "run/wandb-id.txt").read_text().strip()
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert folder.name.endswith(identity)
    text = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    assert b"amod" in text
    assert b"val/top1" in text
    for name in (b"some-host", b"some-user", socket.gethostname().encode() + b"\n"):
        assert name not in text
    assert len(rows(tmp_path / "run")) == 1


def test_a_resumed_run_sends_all_its_rows_offline_too(monkeypatch):
    """Its new file begins empty, and what of the one before was on the disk nobody knows."""
    sent = []
    experiment = SimpleNamespace(offline=True, log=lambda row, **how: sent.append((row, how)))
    monkeypatch.setattr(WandbRows, "experiment", experiment)
    WandbRows.__new__(WandbRows).send_again([{"epoch": 0, "step": 20, "train/loss": 1.0}])
    assert sent == [({"epoch": 0, "train/loss": 1.0, "trainer/global_step": 19}, {"step": 19, "commit": True})]


def command(folder: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, SRC / script, *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


def test_the_commands_end_to_end(tmp_path):
    """As typed, in processes of their own: default run folder, plain lines, one error line after building."""
    done = command(tmp_path, "train.py", *DIGITS, "router=attention", "capacity=0.5", "trainer.limit_train_batches=2")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "digits: 1294 train, 144 val, 359 test images" in done.stdout
    assert "capacity=0.5 asked: 13 of 26 tokens (0.5000) in blocks 1, 3\n" in done.stdout
    assert done.stdout.count("\nepoch ") == 2
    assert "\r" not in done.stdout
    (folder,) = (tmp_path / "runs/digits").iterdir()
    assert folder.name.startswith("vit_pico-attention-0.5-seed0-")
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]
    again = command(tmp_path, "evaluate.py", f"run={folder}")
    summary = json.loads((folder / "summary.json").read_text())
    assert f"test top-1 {summary['test_top1']:.4f} %" in again.stdout, again.stderr


def test_a_sweep_leaves_one_run_for_each_job(tmp_path):
    """Inside a SLURM job too, where all jobs of the sweep share the stamp."""
    short = ["router=none", "schedule.epochs=1", "trainer.limit_train_batches=1"]
    done = command(tmp_path, "train.py", "-m", *DIGITS, *short, "seed=0,1", SLURM_JOB_ID="77")
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "runs/digits").iterdir())
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["test_top1"] != second["test_top1"]


# What shows only once the model or the data are there, or only to Lightning.
LATE = {
    "schedule.optimizer=adamm": "schedule.optimizer=adamm",
    "schedule.momentum=0.5": "schedule.momentum=0.5: adamw has none; leave it out",
    "schedule.optimizer=sgd schedule.momentum=0": "schedule.momentum=0: sgd is Nesterov's here",
    "schedule.accumulate=21": "schedule.accumulate=21: an epoch has 20 batches; choose at most that",
    "schedule.batch_size=2000 schedule.lr_reference_batch=256": "the only batch has 1294 images",
    "schedule.epochs=2 trainer.min_steps=41": "trainer.min_steps=41: schedule.epochs=2 are 40 steps",
    "trainer.precision=16-mixed": "trainer.precision=16-mixed: needs a GPU, here it would be bf16-mixed",
    "trainer.num_nodes=2 trainer.strategy=ddp": "trainer.num_nodes=2: nothing says where the first node is",
    "schedule.optimizer=adahessian": "schedule.optimizer=adahessian, schedule.lr=0.002: makes no step here",
    "schedule.lr=1e38 schedule.clip_grad=null": "schedule.lr=1e+38: makes no step here",
    "logger=wandb logger.project=a/b": "logger.project=a/b logger.run_name=None: refused by W&B",
    "trainer.max_time=5": "must be days:hours:minutes:seconds",
    "trainer.devices=[a]": "trainer: Lightning refuses",
    "trainer.limit_train_batches=0.001": "trainer.limit_train_batches=0.001: leaves none of 20 batches",
    "trainer.limit_val_batches=0.5": "trainer.limit_val_batches=0.5: leaves none of 1 batches",
    "trainer.val_check_interval=21": "trainer.val_check_interval=21: an epoch has 20 batches",
    "trainer.limit_train_batches=4 trainer.val_check_interval=5": "an epoch has 4 batches",
    "trainer.val_check_interval=3": "trainer.val_check_interval=3: an epoch has 20 batches",
    "trainer.val_check_interval=0.3": "trainer.val_check_interval=0.3: an epoch has 20 batches",
    "trainer.val_check_interval=3 trainer.check_val_every_n_epoch=null": "an epoch has 20 batches",
    "trainer=ddp_cpu data.val_fraction=0.001": "2 processes cannot share the 1 val images; use fewer, or a larger",
    "trainer=ddp_cpu data.test_fraction=0.0005 trainer.limit_val_batches=0": "cannot share the 1 test images",
    "data=folder data.root=FOLDER schedule.mixup=1": "the only batch has 15 images",
    "router=attention budget=9": "budget of 9 GFLOPs",
    "+model.kwargs.foo=1": "foo",
    "+model.kwargs.drop_rate=2": "timm refuses: ValueError: dropout probability",
    "+model.kwargs.mlp_ratio=-1": "timm refuses: RuntimeError",
    "+model.kwargs.act_layer=foo": "timm refuses: KeyError",
}


@pytest.mark.parametrize("overrides", LATE)
def test_a_mistake_leaves_no_folder(tmp_path, overrides):
    fakes.image_folder(tmp_path / "data", classes=3, per_class=5, parts=("train", "val", "test"))
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", "router=none", *overrides.replace("FOLDER", str(tmp_path / "data")).split())
    assert LATE[overrides] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", ["interval=5", "interval=0.25", "interval=20", "interval=3 limit_val_batches=0"])
def test_an_epoch_may_end_with_its_last_validation_or_have_none(overrides):
    cfg = config(*[f"trainer.{override}" for override in overrides.replace("interval", "val_check_interval").split()])
    data = build_datamodule(cfg.data, input_config(cfg.model), {}, 64, 64, cfg.seed)
    run_module.check_batches(run_module.make_trainer(cfg.trainer), data, cfg.schedule)


def test_wandb_without_an_account_leaves_nothing(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = command(tmp_path, "train.py", *DIGITS, "router=none", "logger=wandb", "run_dir=run", **home)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: logger=wandb: ")
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def compute(*overrides: str) -> dict[str, Any]:
    cfg = config(*overrides)
    return cost(build(cfg, 10).model, cfg)


def test_what_a_budget_buys_is_reported():
    half = compute("router=attention", "capacity=0.5")
    budget = half["gflops"] * 1.001
    bought = compute("router=attention", f"budget={budget}")
    assert half["budget"] is None
    assert (bought["budget"], bought["capacity"], bought["tokens_kept"]) == (budget, 0.5, {"1": 13, "3": 13})
    assert [compute("router=isoflop", f"budget={budget}")[key] for key in ("capacity", "depth")] == [None, 2]
    assert [compute("router=isoflop", "router.depth=3")[key] for key in ("capacity", "depth")] == [None, 3]
    assert compute("router=isoflop", "capacity=0.5")["capacity"] == 0.5


@pytest.mark.parametrize(
    ("router", "granted", "blocks"), [("attention", 0.5, [1]), ("none", 1.0, []), ("tuning", None, [1, 2])]
)
def test_the_class_token_alone_is_no_capacity(router, granted, blocks):
    found = compute(f"router={router}", "capacity=0.5", "placement.last=class")
    assert (found["capacity_granted"], found["blocks_routed"], found["tokens_kept"]["3"]) == (granted, blocks, 1)


def test_the_saved_config_is_resolved(dense):
    folder, _ = dense
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.trainer.max_epochs == 3
    assert "${" not in (folder / "config.yaml").read_text()
    assert OmegaConf.create(saved_config(config("router=none", "schedule.epochs=3"))) == saved
