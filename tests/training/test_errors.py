"""A mistake in what is asked: one line that names the value and the remedy, exit status 2, and nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import fakes
from amod.errors import UserError
from amod.training.checks import check_checkpoint, check_evaluate, check_train
from amod.training.command import check_job, jobs_of, message_of
from amod.training.compose import compose_config, train_config
from amod.training.config import Data
from amod.training.data import check_data
from amod.training.folder import RunLock, check_run_dir, start_folder
from amod.training.run import train
from amod.training.weights import build
from processes import Forked, wait_for
from tiny import MODEL

SRC = Path(__file__).parents[2] / "src"
TINY = ["model=vit_pico", "data=digits"]

# overrides -> words that the message must hold
TABLE = [
    # groups
    (["router=attenton"], ["router=attenton", "linear", "did you mean attention?"]),
    (["routr=attention"], ["routr", "did you mean router?"]),
    (["router=0.5"], ["router=0.5", "attention"]),
    (["data=flowrs"], ["data=flowrs", "fashion_mnist", "did you mean flowers?"]),
    (["data=null"], ["data=null", "digits"]),
    (["model=deit_smal"], ["did you mean deit_small?"]),
    (["schedule=5"], ["schedule=5", "transfer"]),
    (["trainer=dpp"], ["ddp_cpu"]),
    (["placement=alternatve"], ["alternate, few, last8"]),
    (["logger=mlflow"], ["csv, tensorboard, wandb"]),
    # keys
    (["schedul.lr=1"], ["did you mean schedule.lr?"]),
    (["schedule.lrr=1"], ["did you mean schedule.lr?"]),
    (["data=flowers", "data.rot=x"], ["did you mean data.root?"]),
    (["trainer.limit_train_batchs=2"], ["did you mean trainer.limit_train_batches?"]),
    (["router=attention", "router.depth=9"], ["router.depth", "here; it is of router=isoflop"]),
    (["schedule.lora=8"], ["no setting schedule.lora here; it is of schedule=router_tuning"]),
    (["router=random", "router.memory=0.5"], ["no setting router.memory here; it is of router="]),
    (["router=plan", "router.plan={}"], ["router.plan={}: names no block; the dense model is router=none"]),
    (
        ["router=plan", "router.plan=[]"],
        ["router.plan=[]: must be a mapping such as {1:{Route:{capacity:0.5}}} or null"],
    ),
    (["router=plan", "router.plan={1:{Rout:{capacity:0.5}}}"], ["plan: block 1 has {'Rout': {'capacity': 0.5}}"]),
    (["model.kwargs.foo=1"], ["+model.kwargs.foo=1"]),
    (["+schedule.foo=1"], ["schedule.foo"]),
    (["~schedule.lr"], ["cannot be removed"]),
    (["data.name=cars"], ["data.name=cars", "data=cars"]),
    (["logger.name=wandb"], ["logger.name=wandb", "logger=wandb"]),
    (["router.name=attn"], ["router.name=attn", "attention_weighted"]),
    (["placement.name=foo"], ["placement.name=foo", "alternate, last8"]),
    (["logger.name=foo"], ["logger.name=foo", "csv, tensorboard, wandb"]),
    (["+trainer.callbacks=[1]"], ["trainer.callbacks=[1]", "run folder decides"]),
    (["+trainer.logger=true"], ["trainer.logger=true", "run folder decides"]),
    # syntax
    (["run_dir=~/x"], ["run_dir=~/x", "quotes", """'run_dir="~/"""]),
    (["run_dir=a=b"], ["run_dir=a=b", "quotes"]),
    (["run_dir=a,b"], ["run_dir=a,b", "-m", "quotes"]),
    (["capacity"], ["'capacity'", "key=value"]),
    (["capacity==0.3"], ["capacity==0.3", "key=value"]),
    (["placement.blocks=[1"], ["placement.blocks=[1"]),
    # values
    (["capacity=0"], ["capacity=0", "(0, 1]"]),
    (["capacity=-1"], ["capacity=-1", "(0, 1]"]),
    (["capacity=2"], ["capacity=2", "(0, 1]"]),
    (["capacity=abc"], ["capacity=abc", "(0, 1]"]),
    (["capacity=nan"], ["capacity=nan", "(0, 1]"]),
    (["capacity=inf"], ["capacity=inf", "(0, 1]"]),
    (["capacity=true"], ["capacity=true", "(0, 1]"]),
    (["capacity="], ["capacity=", "(0, 1]"]),
    (["capacity=null"], ["capacity=null", "(0, 1]"]),
    (["capacity=0.019"], ["capacity=0.019", "50 tokens", "0.02"]),
    (["model=deit_small", "capacity=0.005"], ["197 tokens", "0.0051"]),
    (["budget=0"], ["budget=0"]),
    (["budget=120%"], ["budget=120%", "75%"]),
    (["budget=much"], ["budget=much", "75%"]),
    (["seed=-1"], ["seed=-1", "4294967295"]),
    (["seed=1.5"], ["seed=1.5", "whole number"]),
    (["run_dir="], ["run_dir="]),
    (["checkpoint_every_steps=0"], ["checkpoint_every_steps=0"]),
    (["schedule.epochs=abc"], ["schedule.epochs=abc", "whole number"]),
    (["schedule.epochs=0"], ["schedule.epochs=0"]),
    (["schedule.epochs=1.5"], ["schedule.epochs=1.5"]),
    (["schedule.lr=-1"], ["schedule.lr=-1", "above 0"]),
    (["schedule.lr=0"], ["schedule.lr=0"]),
    (["schedule.lr=null"], ["schedule.lr=null"]),
    (["schedule.lr_reference_batch=0"], ["schedule.lr_reference_batch=0", "null"]),
    (["schedule.batch_size=0"], ["schedule.batch_size=0"]),
    (["schedule.min_lr=1"], ["schedule.min_lr=1", "schedule.lr"]),
    (["schedule.label_smoothing=2"], ["schedule.label_smoothing=2"]),
    (["schedule.mixup=-1"], ["schedule.mixup=-1"]),
    (["schedule.mixup=1", "schedule.batch_size=33"], ["schedule.batch_size=33", "even"]),
    (["schedule.ema_decay=1.5"], ["schedule.ema_decay=1.5"]),
    (["schedule.clip_grad=0"], ["schedule.clip_grad=0"]),
    (["schedule.augment=3"], ["schedule.augment=3"]),
    (["trainer.precision=99"], ["trainer.precision=99", "bf16-mixed"]),
    (["trainer.accelerator=foo"], ["trainer.accelerator=foo", "cpu"]),
    (["trainer.limit_train_batches=0"], ["trainer.limit_train_batches=0", "above 0"]),
    (["trainer.max_steps=7"], ["trainer.max_steps=7", "-1", "schedule.epochs", "trainer.limit_train_batches"]),
    (["trainer.max_steps=null"], ["trainer.max_steps=null", "-1"]),
    (["trainer.max_time=00:00:00:00"], ["trainer.max_time=00:00:00:00", "days"]),
    (["trainer.max_time={hours:abc}"], ["trainer.max_time={'hours': 'abc'}", "days"]),
    (["trainer.max_time={hour:1}"], ["trainer.max_time={'hour': 1}", "days"]),
    (["trainer.max_time=02:00:00"], ["trainer.max_time=02:00:00", "days:hours:minutes:seconds"]),
    (["schedule=detr_small", "schedule.backbone_lr=1e-5"], ["schedule.backbone_lr=1e-05", "is of detection"]),
    (["schedule=probe"], ["schedule.train=head", "model.checkpoint=RUN_FOLDER"]),
    (["trainer.min_epochs=-3"], ["trainer.min_epochs=-3"]),
    (["trainer.check_val_every_n_epoch=9", "schedule.epochs=2"], ["check_val_every_n_epoch=9", "schedule.epochs=2"]),
    (["trainer.min_epochs=9", "schedule.epochs=2"], ["trainer.min_epochs=9", "schedule.epochs=2"]),
    (["+schedule.augment.crop_pct=0.3"], ["schedule.augment.crop_pct=0.3", "not of training images"]),
    (["+schedule.augment.no_aug=true"], ["schedule.augment.no_aug=true", "leave it out"]),
    (["data=folder", 'data.root="~nobody-of-that-name/x"'], ["no data in", "~nobody-of-that-name/x"]),
    (["trainer.min_steps=abc"], ["trainer.min_steps=abc"]),
    (["trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches=0", "at least 1"]),
    (["trainer.accumulate_grad_batches=1.5"], ["trainer.accumulate_grad_batches=1.5", "whole number"]),
    (["trainer.accumulate_grad_batches=null"], ["trainer.accumulate_grad_batches=null"]),
    (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "or null"]),
    (["trainer.val_check_interval=0"], ["trainer.val_check_interval=0", "above 0"]),
    (["trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch=0"]),
    (["trainer.num_sanity_val_steps=abc"], ["trainer.num_sanity_val_steps=abc"]),
    (["trainer.log_every_n_steps=abc"], ["trainer.log_every_n_steps=abc"]),
    (["trainer.deterministic=abc"], ["trainer.deterministic=abc", "true, false, warn, null"]),
    (["trainer.benchmark=abc"], ["trainer.benchmark=abc", "null"]),
    (["trainer.inference_mode=abc"], ["trainer.inference_mode=abc", "true or false"]),
    (["trainer.use_distributed_sampler=true"], ["trainer.use_distributed_sampler=true", "must be false"]),
    (["+model.kwargs.in_chans=1"], ["model.kwargs.in_chans=1", "must be 3"]),
    (["model.kwargs.img_size=abc"], ["model.kwargs.img_size=abc", "whole number"]),
    (["model.name=deit_tiny_patch16_224"], ["model.name=deit_tiny_patch16_224", "model=deit_small model.name="]),
    (["schedule.augment.scale=[2,3]"], ["schedule.augment.scale=[2,3]", "at most 1"]),
    (["schedule.augment.ratio=[2,1]"], ["schedule.augment.ratio=[2,1]", "ascending"]),
    (["router=none", "budget=1"], ["budget=1", "router=none"]),
    (["router=merge", "router.r=5", "budget=75%"], ["budget=75%", "router.r=5"]),
    (["router=plan", "router.file=nowhere.yaml"], ["nowhere.yaml: no such file"]),
    (["router=attention", "router.skip=norm"], ["router.skip=norm", "attention, mlp"]),
    (["router=isoflop", "router.depth=3", "budget=1"], ["budget=1", "router.depth=3"]),
    (["trainer.limit_train_batches=-1"], ["trainer.limit_train_batches=-1"]),
    (["model.pretrained=maybe"], ["model.pretrained=maybe", "true or false"]),
    (["model.drop_path=2"], ["model.drop_path=2"]),
    (["router=linear", "router.activation=relu"], ["router.activation=relu", "sigmoid"]),
    # placement and depth
    (["placement.blocks=[0,2]"], ["placement.blocks=[0,2]", "block 0", "router=linear"]),
    (["placement.blocks=[1,12]"], ["placement.blocks=[1,12]", "block 12", "0 to 11"]),
    (["placement.blocks=[-1]"], ["block -1"]),
    (["placement.blocks=[1,11]", "placement.last=class"], ["placement.blocks=[1,11]", "block 11", "placement.last"]),
    (["router=tuning", "router.layers=[5,11]", "placement.last=class"], ["router.layers=[5,11]", "block 11", ".last"]),
    (["placement.blocks=[1,1]"], ["twice"]),
    (["placement.blocks=[]"], ["placement.blocks=[]"]),
    (["placement.blocks=3"], ["placement.blocks=3", "[1,4,7]"]),
    (["placement.blocks=[a]"], ["'a'"]),
    (["router=isoflop", "router.depth=99"], ["router.depth=99", "1 to 12"]),
    (["router=isoflop", "router.depth=0"], ["router.depth=0"]),
    (["model.kwargs.depth=8", "placement=last8"], ["placement=last8", "block 0"]),
    (["model.kwargs.depth=abc", "placement.blocks=[1]"], ["model.kwargs.depth=abc", "whole number"]),
    # files
    (["model.checkpoint=/no/such.pth"], ["/no/such.pth", "no such file", ".safetensors"]),
    (["model.checkpoint=/etc/hostname"], ["/etc/hostname", ".safetensors"]),
    (["model.checkpoint=/etc"], ["/etc", "weights.safetensors"]),
    (["data=flowers", "data.root=/no/such"], ["/no/such", "download"]),
    (["data=flowers", "data.root=null"], ["data.root=null", "path"]),
    (["logger=wandb", "logger.project=3"], ["logger.project=3", "name"]),
    (["logger=wandb", "logger.run_name=5"], ["logger.run_name=5", "name"]),
    (["data=cars", "data.root=/no/such"], ["/no/such", "by hand"]),
    (["run_dir=/etc/hostname"], ["run_dir=/etc/hostname", "file"]),
    (["run_dir=/etc"], ["run_dir=/etc", "new folder"]),
    ([f"run_dir=/etc/{'x' * 300}"], ["run_dir=/etc/xxx", "File name too long", "name a place"]),
]


def message(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        check_train(compose_config("train", [*TINY, *overrides]))
    return message_of(caught.value)


@pytest.mark.parametrize(("overrides", "words"), TABLE, ids=lambda value: " ".join(value)[:40])
def test_message_names_the_value_and_the_remedy(overrides, words):
    text = message(overrides)
    assert "\n" not in text
    for word in words:
        assert word in text


# --- files: what is wrong (a function of the test's folder), overrides, words of the message ---


def jpegs(root: Path, spoil) -> None:
    for part in ("train", "val", "test"):
        for number in range(8):
            fakes.image(root / part / f"class_{number % 2}/{number}.jpg", seed=number)
    spoil(root / "train")


def fashion(root: Path, labels: bytes) -> None:
    fakes.fashion_mnist(root, train=20, test=10)
    (root / "FashionMNIST/raw/t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10]) + labels)


def run_folder(root: Path, config: str) -> None:
    (root / "run").mkdir()
    (root / "run/config.yaml").write_text(config)


def routed(width: int) -> dict[str, torch.Tensor]:
    """Weights of the model with linear routers, whose router of block 1 has another width."""
    cfg = train_config([*RUN, "data=digits", "router=linear"])
    return {**build(cfg, 10).model.state_dict(), "routers.1.weight": torch.zeros(1, width)}


def locked(root: Path) -> None:
    """By another process, for as long as the test."""
    cfg = train_config([*MODEL, "data=digits", "router=none", "trainer.accelerator=cpu", f"run_dir={root / 'run'}"])
    lock = RunLock(root / "run")

    def hold() -> None:
        start_folder(cfg, root / "run", lock, None, {})
        (root / "held").touch()
        time.sleep(20)

    Forked(hold, root / "output.txt")
    wait_for((root / "held").exists)


RUN = [*MODEL, "router=none", "trainer.accelerator=cpu"]
FOLDER = ["data=folder", "data.root=ROOT", "schedule.batch_size=4", "data.num_workers=0"]
FASHION = ["data=fashion_mnist", "data.root=ROOT", "data.fallback=[]"]
GIVEN = ["data=digits", "model.checkpoint=ROOT/given.pth"]
FILES = {
    "truncated JPEG": (
        lambda root: jpegs(root, lambda train: [fakes.truncate(file) for file in train.rglob("*.jpg")]),
        FOLDER,
        [".jpg: cannot be read (OSError: ", "truncated", "data.on_error=skip"],
    ),
    "PNG bomb": (
        lambda root: jpegs(root, lambda train: [fakes.png_bomb(file) for file in train.rglob("*.jpg")]),
        FOLDER,
        [".jpg: cannot be read (DecompressionBomb", "data.on_error=skip"],
    ),
    "text for an image": (
        lambda root: jpegs(root, lambda train: [file.write_text("no image") for file in train.rglob("*.jpg")]),
        FOLDER,
        [".jpg: cannot be read (UnidentifiedImageError", "data.on_error=skip"],
    ),
    "empty class folder": (
        lambda root: jpegs(root, lambda train: (train / "class_2").mkdir()),
        FOLDER,
        ["ROOT/train", "class_2", "every class needs a folder with at least one image"],
    ),
    "classes of train and test differ": (
        lambda root: jpegs(root, lambda train: fakes.image(train / "class_9/1.jpg")),
        FOLDER,
        ["the class folders of train and val differ", "class_9"],
    ),
    "wrong .mat": (
        lambda root: [
            fakes.flowers(root),
            (root / "flowers-102/imagelabels.mat").write_bytes(b"not a mat file" * 20),
        ],
        ["data=flowers", "data.root=ROOT"],
        ["ROOT/flowers-102/imagelabels.mat: not the file it should be", "get it again"],
    ),
    "label out of range": (
        lambda root: fashion(root, bytes([0, 1, 2, 200, 4, 5, 6, 7, 8, 9])),
        FASHION,
        ["data=fashion_mnist: image 3 has label 200, outside 0..9"],
    ),
    "truncated labels": (
        lambda root: fashion(root, bytes([0, 1, 2])),
        FASHION,
        ["ROOT/FashionMNIST/raw/t10k-labels-idx1-ubyte: not an idx file"],
    ),
    "checkpoint of another model": (
        lambda root: torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), root / "given.pth"),
        GIVEN,
        ["model.checkpoint=ROOT/given.pth: is no checkpoint of vit_pico", "choose the model="],
    ),
    "checkpoint without tensors": (
        lambda root: torch.save([1, 2], root / "given.pth"),
        GIVEN,
        ["model.checkpoint=ROOT/given.pth: "],
    ),
    "text for a checkpoint": (
        lambda root: (root / "given.pth").write_text("no checkpoint"),
        GIVEN,
        ["model.checkpoint=ROOT/given.pth: "],
    ),
    "empty checkpoint": (lambda root: (root / "given.pth").touch(), GIVEN, ["model.checkpoint=ROOT/given.pth: "]),
    "truncated safetensors": (
        lambda root: [
            save_file({"head.weight": torch.zeros(9)}, root / "a.safetensors"),
            fakes.truncate(root / "a.safetensors"),
        ],
        ["data=digits", "model.checkpoint=ROOT/a.safetensors"],
        ["model.checkpoint=ROOT/a.safetensors: cannot be read as a checkpoint"],
    ),
    "a router of another width": (
        lambda root: save_file(routed(width=7), root / "a.safetensors"),
        ["data=digits", "router=linear", "model.checkpoint=ROOT/a.safetensors"],
        ["model.checkpoint=ROOT/a.safetensors: routers.1.weight", "another shape", "choose the model="],
    ),
    "a run of another config": (
        lambda root: run_folder(root, OmegaConf.to_yaml(compose_config("train", [*RUN, "seed=7"]))),
        ["data=digits"],
        ["run_dir=ROOT/run: holds a run with ", "or another run_dir"],
    ),
    "a config that is none": (
        lambda root: run_folder(root, "]["),
        ["data=digits"],
        ["ROOT/run/config.yaml: is no run's config", "name another folder"],
    ),
    "a config of something else": (
        lambda root: run_folder(root, "{model: 5}"),
        ["data=digits"],
        ["ROOT/run/config.yaml: is no run's config", "name another folder"],
    ),
    "two runs in one folder at the same time": (
        locked,
        ["data=digits"],
        ["run_dir=ROOT/run: another process is writing this run", "name another run_dir"],
    ),
}


def run(overrides: list[str]) -> None:
    train(check_train(compose_config("train", [*RUN, *overrides])))


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file_is_one_line_and_leaves_no_result(tmp_path, what):
    spoil, overrides, words = FILES[what]
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    overrides = [override.replace("ROOT", str(tmp_path)) for override in overrides]
    with pytest.raises(UserError) as caught:
        run([*overrides, f"run_dir={tmp_path / 'run'}"])
    text = message_of(caught.value)
    assert "\n" not in text
    for word in words:
        assert word.replace("ROOT", str(tmp_path)) in text
    left = {file.name for file in set(tmp_path.rglob("*")) - set(before)}
    begun = {"run", ".lock", "config.yaml", "environment.json", "data.json", "checkpoints"}
    begun = begun if "on_error" in text else set()
    assert left <= begun


GOOD = [
    [],
    ["capacity=1"],
    ["capacity=0.02"],
    ["router=linear", "placement.blocks=[0,2]"],
    ["seed=0"],
    ["model=deit_small", "model.name=vit_small_patch16_18x2_224", "router=linear", "placement.blocks=[13,15]"],
    ["router=none", "model.kwargs.depth=8", "placement=last8"],
    ["model.kwargs.img_size=[28,32]"],
    ["trainer.max_time=00:01:00:00", "trainer.max_steps=-1"],
    ["trainer.max_time={hours:1.5}", "trainer.deterministic=warn", "trainer.val_check_interval=0.5"],
    ["model.label=../train"],
    ["router=plan", "router.plan={1:{Route:{capacity:0.5}},3:ClassOnly}"],
]


@pytest.mark.parametrize("overrides", GOOD, ids=" ".join)
def test_good_configs_pass(overrides):
    check_train(compose_config("train", [*TINY, *overrides]))


@pytest.mark.parametrize(
    ("config_name", "key"),
    [("train", "run_dir"), ("train", "model.checkpoint"), ("train", "model.name"), ("evaluate", "run")],
)
def test_home_is_expanded(monkeypatch, config_name, key):
    monkeypatch.setenv("HOME", "/home/someone")
    assert OmegaConf.select(compose_config(config_name, [f"{key}='~/x'"]), key) == "/home/someone/x"


def test_a_closed_folder_is_one_line(tmp_path):
    """As a user who may not look into it; root, who may, becomes nobody."""
    (tmp_path / "closed").mkdir(mode=0)
    closed = tmp_path / "closed/x"
    config = train_config(TINY)
    looks = {
        f"run_dir={closed.parent}": lambda: check_run_dir(config.model_copy(update={"run_dir": str(closed.parent)})),
        f"run_dir={closed}": lambda: check_run_dir(config.model_copy(update={"run_dir": str(closed)})),
        f"model.checkpoint={closed}": lambda: check_checkpoint(str(closed)),
        f"data.root={closed}": lambda: check_data(Data(name="folder", root=str(closed))),
        f"run={closed}": lambda: check_evaluate(OmegaConf.create({"run": str(closed)})),
    }

    def look() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        for check in looks.values():
            with pytest.raises(UserError) as caught:
                check()
            print(message_of(caught.value))

    looked = Forked(look, tmp_path / "output.txt")
    assert looked.wait() == 0, looked.text
    closed.parent.chmod(0o700)
    said = [f"{place}: cannot be looked at (Permission denied); name a place that you may read" for place in looks]
    assert looked.text.splitlines() == said


def test_a_sweep_is_checked_job_by_job():
    jobs = jobs_of(["capacity=0.1,2", "router=linear,attention"], multirun=True)
    assert sorted(jobs) == sorted(
        [f"capacity={c}", f"router={r}"] for c in ("0.1", "2") for r in ("linear", "attention")
    )


def test_jobs_have_a_folder_each_by_the_time_or_are_refused(monkeypatch):
    cfg, folders = OmegaConf.create({"run_dir": "runs/x"}), {"runs/x"}
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    check_job(cfg, folders, typed=False)  # the job has its own stamp, once it begins
    with pytest.raises(UserError, match="two jobs have run_dir=runs/x"):
        check_job(cfg, folders, typed=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="two jobs have run_dir=runs/x"):
        check_job(cfg, folders, typed=False)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([], "run=runs/"),
        (["run=/no/such"], "/no/such"),
        (["run=FOLDER", "split=tets"], "split=tets"),
        (["run=FOLDER", "data.num_workers=-1"], "data.num_workers=-1"),
        (["run=FOLDER"], "config.yaml: is no run's config"),
        (["rum=x"], "did you mean run?"),
    ],
)
def test_evaluate_says_what_is_wrong(tmp_path, overrides, word):
    (tmp_path / "config.yaml").write_text("data: {name: digits}\ntrainer: {}\n")
    with pytest.raises(UserError) as caught:
        check_evaluate(compose_config("evaluate", [o.replace("FOLDER", str(tmp_path)) for o in overrides]))
    assert word in message_of(caught.value)


def test_a_workers_error_is_one_line():
    trace = "Original Traceback (most recent call last):\n  File x"
    text = f"Caught UserError in worker 0.\n{trace}\namod.errors.UserError: a.jpg: broken\n"
    assert message_of(UserError(text)) == "a.jpg: broken"


def command(script: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SRC / script, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


WRONG = [
    ("train.py", "router=attenton"),
    ("train.py", *TINY, "capacity=0"),
    ("train.py", "data=flowers", "data.root=/no/such"),
    ("train.py", "-m", *TINY, "capacity=0.1,2"),
    ("train.py", "-m", *TINY, "seed=0,1", "run_dir=x"),
    ("train.py", "-m", *TINY, "seed=0,1", "--cfg", "job"),
    ("untrained.py", *TINY, "logger=wandb"),
    ("untrained.py", *TINY, "trainer.max_time=00:01:00:00"),
    ("train.py", "--foo"),
    ("train.py", *TINY, "router=tome", "capacity=0.3"),
    ("train.py", *TINY, "router=evit", "router.keep_rate=0.3", "budget=70%"),
    ("train.py", *TINY, "router=attention", "capacity=0.3", "budget=70%"),
    ("untrained.py", *TINY, "router=tome", "router.r=2", "budget=70%", "model.checkpoint=."),
    ("train.py", "--cfg", "job", "capcity=1"),
    ("evaluate.py", "run=/no/such"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_commands_answer_at_once(tmp_path, arguments, at_once):
    done = command(*arguments, cwd=tmp_path, env=at_once)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


HELP = {
    ("train.py", "--help"): "router: attention, attention_weighted",
    ("train.py", "--cfg", "job", "capacity=0.3"): "capacity: 0.3",
    ("evaluate.py", "--help"): "evaluate.py run=",
}


@pytest.mark.parametrize(("arguments", "word"), HELP.items())
def test_help_answers_at_once(tmp_path, arguments, word, at_once):
    done = command(*arguments, cwd=tmp_path, env=at_once)
    assert done.returncode == 0
    assert word in done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # the seconds of a machine that does something else say nothing
@pytest.mark.parametrize("arguments", [*WRONG, *HELP], ids=" ".join)
def test_an_answer_takes_two_seconds_of_processor_time(tmp_path, arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command(*arguments, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
