"""What goes wrong on the machine is one line: what it is, what to try, and the command that goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from amod.errors import UserError
from amod.training import run as run_module
from amod.training.classification import Classifier
from amod.training.loaders import Samples
from amod.training.run import make_trainer
from amod.training.troubles import known_troubles, trouble
from processes import run_forked, step_of
from tiny import config, run

SHORT = ["router=none", "trainer.limit_train_batches=3"]
# As torch and the systems word them.
ERRORS = {
    "killed worker": (RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly"), "data.num_workers=0 or fewer"),
    "signalled worker": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "data.num_workers=0"),
    "bus error": (
        RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers"
        ),
        "a larger /dev/shm",
    ),
    "full shared memory": (
        RuntimeError("unable to write to file </torch_77_1_0>: No space left on device (28)"),
        "a larger /dev/shm",
    ),
    "descriptors": (OSError(24, "Too many open files"), "ulimit -n"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "a smaller schedule.batch_size"),
    "cpu": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        "a smaller schedule.batch_size",
    ),
    "python": (MemoryError(), "a smaller schedule.batch_size"),
    "fork": (OSError(12, "Cannot allocate memory"), "data.num_workers=0"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_trouble_is_one_line_with_a_remedy(kind):
    error, remedy = ERRORS[kind]
    with pytest.raises(UserError) as caught, known_troubles("the same command goes on"):
        raise error
    assert "\n" not in str(caught.value)
    assert "; try " in str(caught.value)
    assert remedy in str(caught.value)
    assert str(caught.value).endswith("; the same command goes on")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), UserError("out of memory"), KeyError("memory")])
def test_what_is_not_known_keeps_its_own_words(error):
    assert trouble(error) is None


def test_a_run_out_of_memory_says_how_it_goes_on(tmp_path, monkeypatch):
    """The allocator's own refusal, at the second step."""
    step = Classifier.training_step

    def greedy(self, batch, batch_idx):
        if self.global_step == 1:
            torch.empty(10**15)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", greedy)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", *SHORT, "checkpoint_every_steps=1")
    text = str(caught.value)
    for word in ("out of memory", "schedule.batch_size", f"the same command and run_dir={tmp_path / 'run'} go on"):
        assert word in text
    assert "\n" not in text
    assert step_of(tmp_path / "run") == 1
    monkeypatch.undo()
    assert run(tmp_path / "run", *SHORT, "checkpoint_every_steps=1")["epochs"] == 2


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    draw = Samples.__getitems__
    main = os.getpid()

    def die(self, keys):
        if (tmp_path / "die").exists() and os.getpid() != main and os.getppid() != main:
            (tmp_path / "die").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, keys)

    (tmp_path / "die").touch()
    monkeypatch.setattr(Samples, "__getitems__", die)
    process = run_forked(tmp_path / "run", *SHORT, "data.num_workers=1")
    assert process.wait() == 2, process.text
    line = process.text.splitlines()[-1]
    assert line.startswith("error: a worker of the data loader was killed")
    assert "data.num_workers=0" in line
    assert "Traceback" not in process.text


SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "3", "SLURM_STEP_ID": "0"}, "Lightning refuses"),
        ({"SLURM_NTASKS": "2"}, "Lightning refuses"),
        (
            {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
            "would wait for the others",
        ),
    ],
    ids=["another number", "by --ntasks", "without srun"],
)
def test_tasks_that_do_not_fit_are_one_line(monkeypatch, variables, words):
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(name, value)
    cfg = config("trainer=ddp_cpu", "trainer.devices=2")
    with pytest.raises(UserError) as caught:
        make_trainer(cfg.trainer)
    assert words in str(caught.value)
    assert str(caught.value).endswith("with srun --ntasks-per-node")
    assert "\n" not in str(caught.value)


def test_unreadable_test_images_are_in_the_summary(tmp_path, capsys):
    import json

    import fakes
    from amod.training.checks import check_train
    from amod.training.compose import compose_config
    from tiny import MODEL

    fakes.image_folder(tmp_path / "data", classes=2, per_class=9, parts=("train", "val", "test"))
    for number in range(3):
        fakes.truncate(tmp_path / f"data/test/class_0/{number}.png")
        fakes.truncate(tmp_path / f"data/test/class_1/{number}.png")
    settings = [*MODEL, "data=folder", f"data.root={tmp_path / 'data'}", "data.on_error=skip", "schedule.epochs=1"]
    settings += ["trainer.accelerator=cpu", "router=none", "schedule.batch_size=4", f"run_dir={tmp_path / 'run'}"]
    run_module.train(check_train(compose_config("train", settings)))
    summary = json.loads((Path(tmp_path) / "run/summary.json").read_text())
    assert (summary["test_images"], summary["test_images_unreadable"]) == (12, 6)
    assert "warning: 6 of 18 test images could not be read; the accuracy is of the other 12" in capsys.readouterr().out
