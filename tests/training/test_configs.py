"""Every file in conf/ composes, and what it describes can be made."""

from __future__ import annotations

import inspect
import math
import re
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from omegaconf import OmegaConf

from amod.training import detecting
from amod.training.classification import Classifier
from amod.training.compose import compose_config, keys_of, train_config
from amod.training.config import CONF
from amod.training.folder import GROUPS as GROUPS_OF_A_RUN
from amod.training.folder import read_config, saved_config
from amod.training.module import lr_factor
from amod.training.weights import build, create_vit, input_config, weightless
from tiny import config

GROUPS = (*GROUPS_OF_A_RUN, "callbacks")
FILES = sorted((group, file.stem) for group in GROUPS for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_choice_composes(group, choice):
    cfg = train_config([f"{group}={choice}"])
    assert "${" not in str(saved_config(cfg))


def test_a_saved_config_names_no_home_and_is_read_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = config("model.checkpoint=/home/somebody/dense.safetensors")
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(saved_config(given))))
    assert "somebody" not in file.read_text()
    assert read_config(file).model.checkpoint == "/home/somebody/dense.safetensors"


def test_trainer_settings_are_lightnings():
    known = set(inspect.signature(lightning.Trainer).parameters)
    for choice in (file.stem for file in (CONF / "trainer").glob("*.yaml")):
        assert set(train_config([f"trainer={choice}"]).trainer.model_dump()) <= known
    lightning.Trainer(**train_config([]).trainer.model_dump(), logger=False)


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
def test_every_model_is_made(choice):
    cfg = train_config([f"model={choice}"])
    model = cfg.model
    if model.task == "language":  # a folder that tools/stories.py makes
        assert model.name.startswith("models/")
        return
    if model.task == "detection":
        with torch.device("meta"):
            detr = detecting.build_detr(weightless(cfg), ["thing"] * 80, range(80)).model
        assert sum(p.numel() for p in detr.parameters()) == {"detr": 41_521_941, "detr_pico": 308_597}[choice]
        return
    with torch.device("meta"):
        vit = create_vit(model, num_classes=7)
    inputs = input_config(model)
    size = 28 if choice == "vit_pico" else 224
    assert inputs["input_size"] == (3, size, size)
    assert vit.num_classes == 7
    if choice == "vit_pico":
        assert vit.patch_embed.num_patches + 1 == 50
        assert inputs["crop_pct"] == 1.0
        assert 0.55e6 < sum(p.numel() for p in vit.parameters()) < 0.65e6


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "router").glob("*.yaml")))
def test_every_router_is_built(choice, tmp_path):
    (tmp_path / "plan.yaml").write_text("1: {Route: {capacity: 0.5}}\n3: ClassOnly\n")
    own = {"tome": ["router.r=3"], "merge": ["router.r=3"], "plan": [f"router.file={tmp_path / 'plan.yaml'}"]}.get(
        choice, []
    )
    model = build(config(f"router={choice}", "capacity=0.5", *own), num_classes=10).model
    assert model(torch.zeros(2, 3, 10, 10)).shape == (2, 10)


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "placement").glob("*.yaml")))
def test_every_placement_is_built(choice):
    cfg = train_config(["model=vit_pico", f"placement={choice}"])
    blocks = build(cfg, num_classes=10).model.blocks_routed
    own = (1, 3, 5, 7, 9, 11)
    assert (
        blocks
        == {"alternate": own, "last8": (4, 6, 8, 10), "few": (2, 5, 8), "late": (6, 7, 8, 9, 10, 11), "own": own}[
            choice
        ]
    )


def trainer(epochs: int, batches: int, accumulate: int, world: int) -> Any:
    """What configure_optimizers asks a Trainer."""
    return SimpleNamespace(
        datamodule=SimpleNamespace(train_dataloader=lambda: range(batches)),
        limit_train_batches=1.0,
        accumulate_grad_batches=accumulate,
        max_epochs=epochs,
        world_size=world,
    )


def rates(cfg: Any, epochs: int, batches: int, accumulate: int = 1, world: int = 1) -> list[float]:
    """The learning rate of every optimiser step, and after the last."""
    module = Classifier(torch.nn.Linear(3, 2), cfg.schedule, num_classes=2, seed=0)
    module._trainer = trainer(epochs, batches, accumulate, world)
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for _ in range(math.ceil(batches / accumulate) * epochs + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "schedule").glob("*.yaml")))
def test_every_schedule_warms_up_and_follows_a_cosine(choice):
    cfg = config(f"schedule={choice}", "schedule.epochs=20", "schedule.warmup_epochs=5")
    lr, least = cfg.schedule.lr, cfg.schedule.min_lr
    found = rates(cfg, epochs=20, batches=10, accumulate=2)  # 100 steps, 25 of them warm-up
    assert found[0] == pytest.approx(lr / 25)
    assert found[24] == pytest.approx(lr)
    assert found[62] == pytest.approx(least + (lr - least) * 0.5 * (1 + math.cos(math.pi * 37 / 75)))
    assert found[100] == pytest.approx(least, abs=1e-12)


def test_a_warmup_longer_than_the_training_is_shortened_and_said(caplog):
    caplog.set_level("INFO")
    cfg = config("schedule.epochs=1", "schedule.warmup_epochs=5", "schedule.lr=1")
    found = rates(cfg, epochs=1, batches=8)
    assert found[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert "shortened to half of the training: 4 of 8 steps" in caplog.text


def test_the_learning_rate_follows_the_global_batch_only_when_asked():
    """32 images x 2 accumulated x 4 processes = 256, half of the reference: half of lr and of min_lr."""
    asked = ["schedule.lr=0.1", "schedule.min_lr=0.02", "schedule.batch_size=32", "schedule.warmup_epochs=0"]
    as_it_is = rates(config(*asked), epochs=2, batches=10, accumulate=2, world=4)
    scaled = rates(config(*asked, "schedule.lr_reference_batch=512"), epochs=2, batches=10, accumulate=2, world=4)
    assert (as_it_is[0], as_it_is[-1]) == pytest.approx((0.1, 0.02))
    assert scaled == pytest.approx([rate / 2 for rate in as_it_is])


def test_lr_factor_by_hand():
    # 2 warm-up steps of 6: 1/2, 1, then half a cosine over 4 steps from 1 to 0.1
    assert [round(lr_factor(step, 6, 2, 0.1), 4) for step in range(7)] == [0.5, 1.0, 1.0, 0.8682, 0.55, 0.2318, 0.1]


def test_model_brings_its_schedule_and_the_command_line_wins():
    assert train_config([]).schedule.optimizer == "sgd"
    pico = train_config(["model=vit_pico"])
    assert (pico.schedule.optimizer, pico.schedule.epochs) == ("adamw", 10)
    assert train_config(["model=vit_pico", "schedule=scratch"]).schedule.epochs == 300


def test_small_is_shorter_and_gentler_when_adapting():
    new = train_config(["model=vit_pico"]).schedule
    old = train_config(["model=vit_pico", "model.checkpoint=x.pth"]).schedule
    assert (new.epochs, old.epochs) == (10, 3)
    assert old.lr < new.lr
    assert train_config(["model=vit_pico", "model.checkpoint=x", "schedule.epochs=7"]).schedule.epochs == 7


def test_the_keys_others_rely_on():
    keys = keys_of(compose_config("train", []))
    names = (
        "capacity seed run_dir data.root data.num_workers schedule.epochs schedule.lr schedule.batch_size "
        "model.name model.pretrained model.checkpoint placement.blocks trainer.limit_train_batches"
    )
    for key in names.split():
        assert key in keys


def test_run_dir_names_the_run(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    overrides = ["model=vit_pico", "data=digits", "router=linear", "capacity=0.3"]
    folder = train_config(overrides).run_dir
    assert re.fullmatch(r"runs/digits/vit_pico-linear-0\.3-seed0-4711-[0-9a-f]{8}", folder)
    others = ["schedule.lr=1", "seed=1", "+model.kwargs.qkv_bias=false", "placement.blocks=[1]", "schedule.epochs=9"]
    folders = {train_config([*overrides, other]).run_dir for other in others}
    assert len({folder, *folders}) == 1 + len(others)
    budget = train_config([*overrides, "budget=1.5"]).run_dir
    assert budget.startswith("runs/digits/vit_pico-linear-1.5GFLOPs-seed0-4711-")
    # what may change when a run is resumed
    assert train_config([*overrides, "data.num_workers=3"]).run_dir == folder
