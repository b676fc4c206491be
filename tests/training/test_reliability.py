"""Kills, signals, damaged files, full disks, rivals and hostile checkpoints: what docs/reliability.md promises."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file

from amod.errors import UserError
from amod.files import write_atomically
from amod.training import command
from amod.training import run as run_module
from amod.training.callbacks import RunRecorder, restored_signals
from amod.training.checkpoints import is_whole
from amod.training.checks import check_train
from amod.training.config import CONF
from amod.training.folder import RunLock, start_folder
from amod.training.module import TaskModule
from amod.training.run import train
from processes import Forked, hold_at, run_forked, step_of, wait_for
from tiny import DIGITS, config, run

SRC = Path(__file__).parents[2] / "src"
# Everything whose state a resumed run must bring back: 2 epochs of 3 optimiser steps.
STATEFUL = [
    "router=linear",
    "capacity=0.5",
    "model.drop_path=0.2",
    "schedule.mixup=0.5",
    "schedule.cutmix=0.5",
    "schedule.ema_decay=0.5",
    "schedule.lr=0.01",
    "schedule.accumulate=2",
    "trainer.limit_train_batches=6",
    "data.num_workers=0",
]
SHORT = ["router=none", "trainer.limit_train_batches=3"]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, *STATEFUL)
    return folder


def assert_same(folder: Path, other: Path) -> None:
    """The rows, and bit for bit the weights and what the optimiser and the moving average hold in the end."""
    assert (folder / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert (folder / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    ends = [torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, other)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(*(end[key] for end in ends), rtol=0, atol=0)
    assert sorted(os.listdir(folder / "checkpoints")) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_ema_is_what_is_evaluated_and_kept(never_killed):
    state = torch.load(never_killed / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    kept = load_file(never_killed / "weights.safetensors")
    assert all(torch.equal(kept[key], state[f"ema.module.{key}"]) for key in kept)
    assert not torch.equal(kept["head.weight"], state["model.head.weight"])


# --- kills --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


# The n-th save of 2 epochs of 3 optimiser steps, saved every step and at the end of an epoch, is
# 1, 2: inside epoch 0; 3, 4: its end (best, last); 5, 6: inside epoch 1; then its end.
@pytest.mark.parametrize(("saves", "torn"), [(1, False), (2, True), (3, False), (4, False), (5, False), (6, True)])
def test_a_killed_run_goes_on_exactly(never_killed, tmp_path, monkeypatch, saves, torn):
    folder, left = tmp_path / "killed", [saves]
    save = RunRecorder._save

    def save_and_die(self, trainer, name):
        if torn and left[0] == 1:
            raise Killed  # before the file is written: the one before must do
        save(self, trainer, name)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(RunRecorder, "_save", save_and_die)
    with pytest.raises(Killed):
        run(folder, *STATEFUL, "checkpoint_every_steps=1")
    assert not (folder / "summary.json").exists()
    monkeypatch.undo()
    run(folder, *STATEFUL, "checkpoint_every_steps=1")

    assert_same(folder, never_killed)
    mine, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, never_killed))
    apart = ("seconds", "step_seconds", "peak_mib")  # the clock and the process
    assert all(mine[key] == theirs[key] for key in mine if key not in apart)
    assert mine.keys() == theirs.keys()


def test_a_run_goes_on_without_the_checkpoint_it_started_from(never_killed, tmp_path, monkeypatch):
    source = shutil.copy(never_killed / "weights.safetensors", tmp_path / "source.safetensors")
    overrides = ["router=linear", "capacity=0.5", f"model.checkpoint={source}", "trainer.limit_train_batches=1"]
    save = RunRecorder._save

    def save_and_die(self, trainer, name):
        save(self, trainer, name)
        if name == "last":
            raise Killed

    monkeypatch.setattr(RunRecorder, "_save", save_and_die)
    with pytest.raises(Killed):
        run(tmp_path / "run", *overrides)
    monkeypatch.undo()
    source.unlink()
    run(tmp_path / "run", *overrides)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["val_top1_untrained"] is not None


def test_sigkill_at_several_steps_changes_nothing(never_killed, tmp_path, monkeypatch):
    """Of the process alone, whose loader workers it leaves behind."""
    command = [*STATEFUL, "checkpoint_every_steps=1", "data.num_workers=2"]
    for step in (1, 4):
        with monkeypatch.context() as patch:
            hold_at(patch, step + 1)
            process = run_forked(tmp_path / "run", *command)
        wait_for(lambda step=step: step_of(tmp_path / "run") >= step)
        process.process.kill()
        assert process.wait() == -9
    assert not (tmp_path / "run/summary.json").exists()
    last = run_forked(tmp_path / "run", *command)
    assert last.wait() == 0, last.text
    assert "resuming" in last.text
    assert_same(tmp_path / "run", never_killed)


@pytest.mark.slow
def test_sigkill_of_the_command_at_several_steps_changes_nothing(never_killed, tmp_path):
    """As typed, the whole process group."""
    arguments = [*DIGITS, *STATEFUL, "checkpoint_every_steps=1", "data.num_workers=2", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, SRC / "train.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for step in (1, 2, 3, 4, 5):
        process = subprocess.Popen(command, env=env, start_new_session=True)
        wait_for(lambda step=step: step_of(tmp_path / "run") >= step, 900)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -9
    subprocess.run(command, env=env, check=True)
    assert_same(tmp_path / "run", never_killed)


def test_a_run_killed_before_its_config_was_written_starts(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", "environment.json", ".config.yaml.tmp"):
        (folder / name).touch()
    run(folder, *SHORT, "schedule.epochs=1")
    assert (folder / "summary.json").exists()


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_to_every_process_ends_with_a_checkpoint(never_killed, tmp_path, monkeypatch, name):
    """As SLURM and a terminal do (Ctrl-C; it is closed): the loader workers get it too."""
    number = signal.Signals[name]
    after = RunRecorder.on_train_batch_end
    workers = tmp_path / "workers.json"

    def wait_at_step_two(self, trainer, *arguments):
        if trainer.global_step == 2 and not workers.exists():
            pids = [child.pid for child in multiprocessing.active_children()]
            (tmp_path / "new").write_text(json.dumps(pids))
            (tmp_path / "new").rename(workers)
            wait_for(lambda: self._signal is not None)
        after(self, trainer, *arguments)

    monkeypatch.setattr(RunRecorder, "on_train_batch_end", wait_at_step_two)
    command = [*STATEFUL, "data.num_workers=2"]
    stopped = run_forked(tmp_path / "run", *command)
    wait_for(workers.exists)
    pids = json.loads(workers.read_text())
    assert len(pids) >= 2
    for pid in (*pids, stopped.process.pid):
        os.kill(pid, number)
    assert stopped.wait() == (130 if name == "SIGINT" else 143), stopped.text
    line = stopped.text.splitlines()[-1]
    assert line.startswith(f"stopped by {name} after step 2, with a checkpoint; resume with the same command")
    assert "Traceback" not in stopped.text
    assert step_of(tmp_path / "run") == 2
    monkeypatch.undo()
    run(tmp_path / "run", *command)
    assert_same(tmp_path / "run", never_killed)


def test_a_signal_during_validation_is_answered_at_the_epochs_end(never_killed, tmp_path, monkeypatch):
    validate = TaskModule.validation_step

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        validate(self, *arguments)

    monkeypatch.setattr(TaskModule, "validation_step", signalled)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *STATEFUL)
    assert caught.value.code == 143
    assert step_of(tmp_path / "run") == 3
    monkeypatch.undo()
    run(tmp_path / "run", *STATEFUL)
    assert_same(tmp_path / "run", never_killed)


@pytest.mark.parametrize("where", ["check_batches", "best_checkpoint"])
def test_a_signal_outside_training_ends_at_once(tmp_path, monkeypatch, capsys, where):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run_module, where, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *SHORT)
    assert caught.value.code == 143
    assert "stopped by SIGTERM outside training; resume with" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_after_the_last_epoch_is_answered(tmp_path, monkeypatch, capsys):
    end = RunRecorder.on_train_end

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        end(self, *arguments)

    monkeypatch.setattr(RunRecorder, "on_train_end", signalled)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *SHORT)
    assert caught.value.code == 143
    assert "stopped by SIGTERM after step 6, with a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run/summary.json").exists()


def test_a_signal_outside_training_reaches_the_processes_that_lightning_started(tmp_path, monkeypatch):
    passed = []
    launcher = SimpleNamespace(
        procs=[], kill=passed.append, launch=lambda function, *given, trainer, **named: function(*given, **named)
    )
    monkeypatch.setattr(SingleDeviceStrategy, "launcher", launcher)
    monkeypatch.setattr(run_module, "best_checkpoint", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *SHORT, "schedule.epochs=1")
    assert (caught.value.code, passed) == (143, [signal.SIGUSR1])


# --- damaged files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Killed inside epoch 1, right after its first step was saved: best.ckpt is epoch 0's."""
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    save = RunRecorder._save

    def save_and_die(self, trainer, name):
        save(self, trainer, name)
        if trainer.global_step == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "_save", save_and_die)
        with pytest.raises(Killed):
            run(folder, *STATEFUL, "checkpoint_every_steps=1")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def blank_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, blank_a_page, Path.unlink], ids=lambda damage: damage.__name__)
def test_a_damaged_last_checkpoint_is_noticed_and_the_one_before_is_used(
    interrupted, never_killed, tmp_path, capsys, damage
):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    last = folder / "checkpoints/last.ckpt"
    assert is_whole(last)
    assert (step_of(folder), torch.load(last.with_name("previous.ckpt"), weights_only=True)["global_step"]) == (4, 3)
    damage(last)
    assert not is_whole(last)
    run(folder, *STATEFUL, "checkpoint_every_steps=1")
    text = capsys.readouterr().out
    assert ("last.ckpt is damaged; the run goes on from before it" in text) == (damage is not Path.unlink)
    assert "resuming" in text
    assert_same(folder, never_killed)


def test_with_both_damaged_the_run_begins_anew(interrupted, never_killed, tmp_path, capsys):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    for name in ("last", "previous"):
        cut(folder / f"checkpoints/{name}.ckpt")
    run(folder, *STATEFUL, "checkpoint_every_steps=1")
    assert "resuming" not in capsys.readouterr().out
    assert_same(folder, never_killed)


def older(checkpoint):
    return {key: value for key, value in checkpoint.items() if key != "train_loss"}


def without_a_weight(checkpoint):
    return {**checkpoint, "state_dict": dict(list(checkpoint["state_dict"].items())[1:])}


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (older, "is no checkpoint of this version, it lacks train_loss; "),
        (lambda _: [1, 2], "is no checkpoint of this version, it lacks state_dict, "),
        (without_a_weight, r"does not fit this run's model \(model.cls_token\); put the run's own file back"),
    ],
)
def test_a_whole_but_foreign_checkpoint_is_one_line(interrupted, never_killed, tmp_path, name, change, words):
    folder = shutil.copytree(interrupted if name == "last" else never_killed, tmp_path / "run")
    (folder / "summary.json").unlink(missing_ok=True)
    file = folder / f"checkpoints/{name}.ckpt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(UserError, match=rf"{name}\.ckpt: {words}"):
        run(folder, *STATEFUL, "checkpoint_every_steps=1")


@pytest.mark.parametrize("best", [0, 1])
def test_a_damaged_best_checkpoint(never_killed, tmp_path, monkeypatch, capsys, best):
    """Where the last epoch is the best, last.ckpt has its weights; otherwise the run says what is lost."""
    folder = shutil.copytree(never_killed, tmp_path / "run")
    (folder / "summary.json").unlink()
    cut(folder / "checkpoints/best.ckpt")
    load = RunRecorder.load_state_dict

    def load_and_rank(self, state):
        load(self, state)
        self.rows[best]["val/top1"] = 100.0

    monkeypatch.setattr(RunRecorder, "load_state_dict", load_and_rank)
    if best == 0:
        (folder / "checkpoints/previous.ckpt").unlink()
        with pytest.raises(UserError, match=r"best\.ckpt: is damaged, and no other .*; delete the folder"):
            run(folder, *STATEFUL)
        (folder / "checkpoints/best.ckpt").unlink()  # nothing is damaged, and nothing is to be deleted
        with pytest.raises(UserError, match=r"best\.ckpt: is missing, and no other .*; put it back, or see to it that"):
            run(folder, *STATEFUL)
    else:
        run(folder, *STATEFUL)
        assert "best.ckpt is damaged; " in capsys.readouterr().out
        kept = load_file(folder / "weights.safetensors")
        last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(value, last[f"ema.module.{key}"]) for key, value in kept.items())


def test_a_whole_best_checkpoint_of_another_epoch_is_taken_and_said(never_killed, tmp_path, monkeypatch, capsys):
    """An epoch that was cut off behind best.ckpt and repeated a little worse: nothing has the best row's weights."""
    folder = shutil.copytree(never_killed, tmp_path / "run")
    for name in ("summary.json", "checkpoints/previous.ckpt"):
        (folder / name).unlink()
    shutil.copy(folder / "checkpoints/last.ckpt", folder / "checkpoints/best.ckpt")
    load = RunRecorder.load_state_dict

    def load_and_rank(self, state):
        load(self, state)
        self.rows[0]["val/top1"] = 100.0

    monkeypatch.setattr(RunRecorder, "load_state_dict", load_and_rank)
    run(folder, *STATEFUL)
    assert "no checkpoint has the weights of step" in capsys.readouterr().out
    assert json.loads((folder / "summary.json").read_text())["best_epoch"] == 1


# --- disks --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(never_killed, tmp_path, monkeypatch):
    """The kernel's own refusal: no file may grow beyond 100 kB from the second checkpoint on."""
    save = RunRecorder._save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, trainer, name):
        if trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(self, trainer, name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(RunRecorder, "_save", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", *STATEFUL, "checkpoint_every_steps=1")
    text = str(caught.value)
    for word in ("checkpoints/last.ckpt: cannot be written (File too large)", "make room", "same command", "intact"):
        assert word in text
    assert os.listdir(tmp_path / "run/checkpoints") == ["last.ckpt"]
    assert step_of(tmp_path / "run") == 1
    monkeypatch.undo()
    run(tmp_path / "run", *STATEFUL, "checkpoint_every_steps=1")
    assert_same(tmp_path / "run", never_killed)


@pytest.mark.parametrize("name", ["environment.json", "metrics.csv", "weights.safetensors", "curves.png"])
def test_a_full_disk_anywhere_is_one_line(tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=f"{name}: cannot be written \\(No space left on device\\)"):
        run(tmp_path / "run", *SHORT, "schedule.epochs=1")
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_disk_that_became_read_only_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=r"metrics\.csv: cannot be written \(Read-only file system\)"):
        write_atomically(tmp_path / "metrics.csv", b"")


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/run", tmp_path / "file/run"):
        with pytest.raises(UserError, match=rf"run_dir={folder}: cannot be written .*; choose another folder"):
            run(folder, *SHORT)


# --- two runs in one folder ---------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(interrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    go = tmp_path / "go"
    monkeypatch.setattr(run_module, "newest_checkpoint", lambda folder: wait_for(go.exists))
    first = run_forked(folder, *STATEFUL)
    wait_for(lambda: (folder / ".lock").exists() and first.output.exists())
    time.sleep(0.2)
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    second = run_forked(folder, *STATEFUL)
    assert second.wait() == 2
    assert second.text == (
        f"error: run_dir={folder}: another process is writing this run; wait until it ends, or name another run_dir\n"
    )
    assert files == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    first.process.kill()  # its lock ends with it
    assert first.wait() == -9
    monkeypatch.undo()
    run(folder, *STATEFUL)
    assert (folder / "summary.json").exists()


def test_two_runs_that_begin_at_the_same_moment(tmp_path):
    """Neither finds a folder; the second to make it gives way."""
    folder = tmp_path / "run"
    cfg = config(*SHORT, f"run_dir={folder}")
    late, first = RunLock(folder), RunLock(folder)

    def hold() -> None:
        start_folder(cfg, folder, first, None, {})
        (tmp_path / "held").touch()
        time.sleep(60)

    rival = Forked(hold, tmp_path / "rival.txt")
    wait_for((tmp_path / "held").exists)
    with pytest.raises(UserError, match="another process is writing"):
        start_folder(cfg, folder, late, None, {})
    rival.process.kill()
    rival.wait()
    late.release()
    with pytest.raises(UserError, match="another process is writing"):  # it had begun, and must be resumed, not begun
        start_folder(cfg, folder, late, None, {})


# --- pickled code -------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it runs a shell command that leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


def write_payload(path: Path, mark: Path, form: str) -> Path:
    content = {"state_dict": {"weight": torch.zeros(2)}, "code": Payload(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def test_the_payload_works(tmp_path):
    path = write_payload(tmp_path / "bad.pth", tmp_path / "mark", "zip")
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_pickled_code_in_a_given_checkpoint_does_not_run(tmp_path, suffix, form):
    path = write_payload(tmp_path / f"bad{suffix}", tmp_path / "mark", form)
    with pytest.raises(UserError, match=rf"model\.checkpoint={path}: (refused|cannot be read)"):
        run(tmp_path / "run", *SHORT, f"model.checkpoint={path}")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "run").exists()


def test_pickled_code_in_a_run_folder_does_not_run(interrupted, never_killed, tmp_path):
    mark = tmp_path / "mark"
    folder = shutil.copytree(interrupted, tmp_path / "run")
    write_payload(folder / "checkpoints/last.ckpt", mark, "zip")
    with pytest.raises(UserError, match=r"last\.ckpt: refused \(it holds pickled code, which is not run\)"):
        run(folder, *STATEFUL)

    ended = shutil.copytree(never_killed, tmp_path / "ended")
    (ended / "summary.json").unlink()
    write_payload(ended / "checkpoints/best.ckpt", mark, "zip")
    with pytest.raises(UserError, match=r"best\.ckpt: refused \(it holds pickled code"):
        run(ended, *STATEFUL)

    source = shutil.copytree(interrupted, tmp_path / "source")
    write_payload(source / "checkpoints/best.ckpt", mark, "zip")
    with pytest.raises(UserError, match=r"model\.checkpoint=.*: refused"):
        run(tmp_path / "new", *SHORT, f"model.checkpoint={source}")
    assert not mark.exists()


# --- several jobs -------------------------------------------------------------------------------------------------


def sweep(folder: Path, jobs: list[list[str]]) -> subprocess.Popen:
    """run_jobs over a command that writes its first argument down and ends as its second says."""
    (folder / "job.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "open('done.txt', 'a').write(sys.argv[1] + chr(10))\n"
        "if sys.argv[2] == 'wait': time.sleep(60)\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    source = (
        f"import sys; sys.path.insert(0, {str(SRC)!r}); sys.argv = ['job.py']\n"
        f"from amod.training.command import run_jobs\nsys.exit(run_jobs({jobs!r}))"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", source], cwd=folder, stdout=pipe, stderr=pipe, text=True)


def test_a_failing_job_does_not_keep_the_others_from_running(tmp_path):
    process = sweep(tmp_path, [["a=1", "0"], ["a=2", "2"], ["a=3", "0"]])
    out, err = process.communicate()
    assert process.returncode == 1
    assert (tmp_path / "done.txt").read_text().split() == ["a=1", "a=2", "a=3"]
    assert out.splitlines()[1] == "[2/3] python job.py a=2 2"
    assert err == "failed: python job.py a=2 2 (exit status 2)\nerror: 1 of 3 jobs failed\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_sweep(tmp_path, number, status):
    process = sweep(tmp_path, [["a=1", "wait"], ["a=2", "0"]])
    wait_for(lambda: (tmp_path / "done.txt").exists() and (tmp_path / "done.txt").read_text())
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in err
    assert (tmp_path / "done.txt").read_text() == "a=1\n"


@pytest.mark.parametrize("moment", ["between two jobs", "while a job starts", "while a job ends"])
def test_a_signal_that_no_job_answers_ends_the_sweep(monkeypatch, moment):
    begun: list[Any] = []
    told: list[int] = []

    def interrupt(now: str) -> None:
        if now == moment and len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def start(line: list[Any]) -> SimpleNamespace:
        begun.append(line)
        interrupt("while a job starts")
        return SimpleNamespace(send_signal=told.append, wait=wait)  # it ends with 0, whatever it is told

    def join(words: list[str]) -> str:
        interrupt("between two jobs")
        return " ".join(words)

    def wait() -> int:
        interrupt("while a job ends")
        return 0

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(command, "shlex", SimpleNamespace(join=join))
    with restored_signals():
        assert command.run_jobs([["seed=0"], ["seed=1"], ["seed=2"]]) == 143
    assert len(begun) == 1
    if moment == "while a job starts":
        assert told == [signal.SIGTERM]


# --- SLURM by submitit --------------------------------------------------------------------------------------------


def test_the_launcher_for_slurm_composes():
    overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.max_num_timeout=5"]
    check_train(config("trainer=slurm", "trainer.accelerator=cpu", *overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [*DIGITS, "trainer=slurm", *overrides], return_hydra_config=True)
    assert composed.hydra.launcher._target_.endswith("SlurmLauncher")
    assert composed.hydra.launcher.partition == "gpu"


@pytest.mark.slow
def test_a_preempted_job_of_submitit_is_requeued_and_goes_on(tmp_path):
    """With submitit's executor for this machine: its signal, its requeueing and its second start are the real ones."""
    arguments = [*DIGITS, *STATEFUL, "schedule.epochs=8", "trainer=slurm", "trainer.accelerator=cpu"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30", "hydra.sweep.dir=sweep"]
    every = [*arguments, "data.num_workers=2"]
    command = [sys.executable, SRC / "train.py", "-m", *every, "checkpoint_every_steps=1", "run_dir=run", *launcher]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    wait_for(lambda: step_of(tmp_path / "run") >= 2, 900)
    (job,) = [pid for pid in descendants(process.pid) if b"submitit.core._submit" in command_line(pid)]
    os.kill(job, signal.SIGUSR2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    logs = "".join(file.read_text() for file in (tmp_path / "sweep").rglob("*_log.*"))
    assert "stopped by SIGUSR2 after step" in logs
    assert logs.count("Starting with JobEnvironment") == 2  # of the same job
    assert "resuming run" in logs
    train(config(*arguments, f"run_dir={tmp_path / 'whole'}"))
    assert_same(tmp_path / "run", tmp_path / "whole")


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {child for child in found - {pid} if parents.get(child) not in job_children(found)}


def job_children(found: set[int]) -> set[int]:
    """The jobs themselves, whose forked loader workers have the same command line."""
    return {pid for pid in found if b"submitit.core._submit" in command_line(pid)}
