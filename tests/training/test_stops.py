"""Work that was done is not lost: interrupts, readers that go away, time limits, and the way back to a stopped run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Timer

from amod.errors import UserError
from amod.training import command
from amod.training.callbacks import RunRecorder
from amod.training.checks import check_train
from amod.training.compose import compose_config
from amod.training.folder import grows, unfinished_twin
from amod.training.run import train
from processes import ranks, run_forked, step_of, wait_for
from tiny import DIGITS, config, run

SRC = Path(__file__).parents[2] / "src"
SHORT = ["router=none", "trainer.limit_train_batches=4"]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """Kill a run when its checkpoint after so many steps is written."""
    save = RunRecorder._save

    def killing(step: int) -> None:
        def save_and_die(self, trainer, name):
            save(self, trainer, name)
            if trainer.global_step >= step and name == "last":
                raise Killed

        monkeypatch.setattr(RunRecorder, "_save", save_and_die)

    return killing


# --- the way back -------------------------------------------------------------------------------------------------


def test_the_folder_is_said_first_and_an_unfinished_run_of_these_settings_is_named(
    tmp_path, monkeypatch, capsys, kill_at
):
    monkeypatch.chdir(tmp_path)
    digest = config(*SHORT).run_dir[-8:]
    old, new = (f"runs/digits/vit_pico-none-{when}-{digest}" for when in ("yesterday", "today"))
    kill_at(4)
    with pytest.raises(Killed):
        run(Path(old), *SHORT)
    assert capsys.readouterr().out.splitlines()[0] == f"run folder: {old}"
    other = config(*SHORT, "seed=1", f"run_dir=runs/digits/x-{digest}")
    assert unfinished_twin(other) is None  # of other settings
    assert unfinished_twin(config(*SHORT, f"run_dir={new}")) == Path(old)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(Path(new), *SHORT)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"an unfinished run of these settings is in {old}; to go on with it, add run_dir={old}"
    assert second == f"run folder: {new}"
    run(Path(old), *SHORT)
    assert unfinished_twin(config(*SHORT, f"run_dir=runs/digits/z-{digest}")) is None  # finished


def test_a_run_that_is_going_on_is_no_unfinished_one(tmp_path):
    digest = config(*SHORT).run_dir[-8:]
    held = run_forked(tmp_path / f"a-{digest}", *SHORT, "schedule.epochs=200", "checkpoint_every_steps=1")
    wait_for(lambda: step_of(tmp_path / f"a-{digest}") > 0)
    asked = config(*SHORT, "schedule.epochs=200", f"run_dir={tmp_path}/b-{digest}")
    assert unfinished_twin(asked) is None
    held.process.kill()
    held.wait()
    assert unfinished_twin(asked) == tmp_path / f"a-{digest}"


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [0.0, 0.8], ids=["passed on twice", "a second one"])
def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch, pause):
    after = RunRecorder.on_train_batch_end

    def slow(self, trainer, *arguments):
        if trainer.global_step == 2:
            (tmp_path / "there").touch()
            time.sleep(3)
        after(self, trainer, *arguments)

    monkeypatch.setattr(RunRecorder, "on_train_batch_end", slow)
    process = run_forked(tmp_path / "run", *SHORT, "checkpoint_every_steps=1")
    wait_for((tmp_path / "there").exists)
    os.kill(process.process.pid, signal.SIGINT)
    time.sleep(pause)
    os.kill(process.process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert step_of(tmp_path / "run") == (1 if pause else 2)
    assert ("with a checkpoint; resume with" in process.text) == (not pause)
    assert "Traceback" not in process.text


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As nohup has SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        recorder = RunRecorder(tmp_path, None, print_rows=False)
        handlers = {number: signal.getsignal(number) for number in command.SIGNALS}
        recorder.listen()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in {**handlers, signal.SIGHUP: before}.items():
            signal.signal(number, handler)


def start(folder: Path, script: str, *arguments: str, **how) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([sys.executable, SRC / script, *arguments], cwd=folder, env=env, text=True, **how)


def test_ctrl_c_before_the_training_is_one_line(tmp_path):
    process = start(tmp_path, "train.py", *DIGITS, "router=none", "run_dir=run")
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "torch" in maps.read_text() if maps.exists() else time.sleep(1.5) or True)  # it is being loaded
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.startswith("stopped by ")
    assert err.count("\n") == 1


# --- nobody reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["head", "full disk"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, reader):
    arguments = [*DIGITS, *SHORT, "run_dir=run"]
    if reader == "head":
        process = start(tmp_path, "train.py", *arguments)
        assert process.stdout.readline() == "run folder: run\n"
        process.stdout.close()
    else:
        process = start(tmp_path, "train.py", *arguments, stdout=open("/dev/full", "w"))  # noqa: SIM115
    err = process.stderr.read()
    assert process.wait() == 0, err
    assert err == ""
    assert summary_of(tmp_path / "run")["epochs"] == 2


def test_an_epoch_is_saved_before_it_is_printed(tmp_path, monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr("amod.training.callbacks.line_of", fail)
    with pytest.raises(BrokenPipeError):
        run(tmp_path / "run", *SHORT)
    assert step_of(tmp_path / "run") == 4
    assert (tmp_path / "run/metrics.csv").exists()


# --- limits that may grow -----------------------------------------------------------------------------------------


def time_up_at(step: int, monkeypatch) -> None:
    def check(self, trainer):
        trainer.should_stop = trainer.should_stop or (self._duration == 9 and trainer.global_step >= step)

    monkeypatch.setattr(Timer, "_check_time_remaining", check)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_max_time_ended_goes_on_exactly(tmp_path, monkeypatch, capsys, accumulate):
    settings = [*SHORT, "schedule.epochs=3", f"schedule.accumulate={accumulate}"]
    run(tmp_path / "whole", *settings)
    time_up_at(5 // accumulate + 1, monkeypatch)  # inside the second epoch
    folder = tmp_path / "run"
    ended = run(folder, *settings, "trainer.max_time=00:00:00:09")
    assert (ended["epochs"], ended["ended_by"]) == (1, "trainer.max_time")
    assert run(folder, *settings, "trainer.max_time=00:00:00:09") == ended
    assert "with a longer one it goes on" in capsys.readouterr().out
    more = run(folder, *settings)
    assert (more["epochs"], more["ended_by"]) == (3, None)
    for name in ("metrics.csv", "weights.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_time_that_ends_inside_the_first_epoch_is_not_lost(tmp_path, monkeypatch):
    time_up_at(2, monkeypatch)
    with pytest.raises(UserError, match="inside the first epoch, with a checkpoint; the same command with a longer"):
        run(tmp_path / "run", *SHORT, "trainer.max_time=00:00:00:09")
    assert step_of(tmp_path / "run") == 2
    assert run(tmp_path / "run", *SHORT)["epochs"] == 2


CONSTANT = ["schedule.min_lr=2e-3", "schedule.lr=2e-3", "schedule.warmup_epochs=1"]


def test_epochs_may_grow_where_the_learning_rate_is_constant(tmp_path):
    folder = tmp_path / "run"
    run(folder, *SHORT, *CONSTANT)
    assert run(folder, *SHORT, *CONSTANT, "schedule.epochs=3")["epochs"] == 3
    run(tmp_path / "whole", *SHORT, *CONSTANT, "schedule.epochs=3")
    for name in ("metrics.csv", "weights.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match=r"schedule\.epochs=3, not 2; use the same settings"):
        check_train(compose_config("train", [*DIGITS, *SHORT, *CONSTANT, f"run_dir={folder}"]))


def test_nor_where_a_method_waits_for_a_share_of_the_training():
    shared = [*SHORT, *CONSTANT, "router=dynamicvit", "distil=0", "router.distil_tokens=0"]
    for frozen, may in ((0.2, False), (0, True)):
        longer = config(*shared, "schedule.epochs=6", f"router.frozen={frozen}")
        assert grows(config(*shared, f"router.frozen={frozen}"), longer) == may


def test_else_the_line_names_the_way(tmp_path):
    run(tmp_path / "run", *SHORT)
    with pytest.raises(
        UserError, match=rf"start a new run with model\.checkpoint={tmp_path / 'run'} and another run_dir"
    ):
        run(tmp_path / "run", *SHORT, "schedule.epochs=3")


# --- early stopping -----------------------------------------------------------------------------------------------

STOPPING = [*SHORT, "schedule.epochs=9", "callbacks=early_stopping", "callbacks.patience=1", "callbacks.min_delta=100"]


def test_early_stopping_ends_a_run_that_is_then_finished(tmp_path, kill_at, monkeypatch):
    summary = run(tmp_path / "run", *STOPPING)  # nothing is better by 100 points: after the first epoch and one more
    assert (summary["epochs"], summary["ended_by"]) == (2, "callbacks=early_stopping")
    assert run(tmp_path / "run", *STOPPING) == summary
    kill_at(8)
    with pytest.raises(Killed):  # it had stopped, and was killed before the end
        run(tmp_path / "killed", *STOPPING)
    monkeypatch.undo()
    assert run(tmp_path / "killed", *STOPPING)["epochs"] == 2


# --- sweepers, processes ------------------------------------------------------------------------------------------


def test_a_job_returns_the_best_validation_accuracy(tmp_path):
    asked = [*DIGITS, *SHORT, f"run_dir={tmp_path / 'run'}"]
    value = train(check_train(compose_config("train", asked)))
    assert value == summary_of(tmp_path / "run")["val_top1"]
    assert train(check_train(compose_config("train", asked))) == value  # a sweeper may ask for the same twice


SWEEPER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Small(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config)
    def sweep(self, arguments):
        for seed in (0, 1):
            (job,) = self.launcher.launch([[*arguments, f"seed={seed}"]], seed)
            try:
                print("value", seed, job.return_value)
            except Exception as error:
                print("failed", seed, type(error).__name__)

ConfigStore.instance().store(group="hydra/sweeper", name="small", node={"_target_": f"{__name__}.Small"})
"""


def test_a_sweeper_gets_a_value_of_each_job_and_a_failed_one_is_its_affair(tmp_path):
    (tmp_path / "plugins/hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins/hydra_plugins/small.py").write_text(SWEEPER)
    (tmp_path / "seed0").write_text("a file")
    path = os.pathsep.join([str(tmp_path / "plugins"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    arguments = ["-m", "hydra/sweeper=small", *DIGITS, *SHORT, "run_dir='seed${seed}'"]
    line = [sys.executable, SRC / "train.py", *arguments]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "failed 0 UserError" in done.stdout, done.stderr
    assert "error: run_dir=seed0: is a file; name a folder" in done.stderr
    assert f"value 1 {summary_of(tmp_path / 'seed1')['val_top1']}" in done.stdout


def test_a_folder_named_by_the_time_is_the_same_for_all_processes(monkeypatch):
    """Lightning starts the others with this command line."""
    given = ["capacity=0.5", "run_dir=runs/${now:%f}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    command.pin_run_dir(given, "runs/123")
    assert sys.argv == ["train.py", "capacity=0.5", "run_dir='runs/123'"]


def test_processes_with_different_settings_stop_before_training(tmp_path):
    """Where a batch system starts them, each makes its own of a name with the time in it."""
    two = ranks(2)
    shared = ["trainer=ddp_cpu", "trainer.devices=2", *SHORT]
    first, second = (run_forked(tmp_path / name, *shared, **env) for name, env in zip("ab", two, strict=True))
    assert (first.wait(), second.wait()) == (2, 2)
    assert "the processes of this run have been given different settings" in first.text
    assert not (tmp_path / "a/metrics.csv").exists()
