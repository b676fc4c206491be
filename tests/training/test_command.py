"""What the command line accepts acts, or is refused; the rest of its mistakes are in test_errors.py."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_errors import command

from amod.errors import UserError
from amod.training.checks import check_train
from amod.training.command import check_acts, check_hydra
from amod.training.compose import compose_config
from amod.training.config import Data, TrainConfig
from amod.training.rules import in_words
from tiny import DIGITS, run

SHORT = ["router=none", "schedule.epochs=2", "trainer.limit_train_batches=2"]


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with settings of one's own, outside the checkout."""
    (tmp_path / "own/experiment").mkdir(parents=True)
    (tmp_path / "own/data").mkdir()
    (tmp_path / "own/experiment/mine.yaml").write_text("# @package _global_\nseed: 5\nschedule:\n  lr: 0.003\n")
    (tmp_path / "own/experiment/typo.yaml").write_text("# @package _global_\nschedule:\n  lrr: 0.003\n")
    (tmp_path / "own/experiment/idle.yaml").write_text("# @package _global_\nrouter:\n  depth: 3\n")
    (tmp_path / "own/data/mine.yaml").write_text("name: folder\nroot: /mine\n")
    return tmp_path / "own"


def composed(own: Path, *overrides: str) -> TrainConfig:
    return check_train(compose_config("train", [*DIGITS, *overrides], own))


def test_files_in_a_folder_of_ones_own_act(own):
    cfg = composed(own, "+experiment=mine")
    assert (cfg.seed, cfg.schedule.lr) == (5, 0.003)
    assert composed(own, "+experiment=mine", "seed=7").seed == 7  # the command line wins
    assert compose_config("train", ["data=mine"], own).data.root == "/mine"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+experiment=typo", ["schedule.lrr=0.003: there is no setting schedule.lrr", "did you mean lr?"]),
        ("+experiment=idle", ["router.depth=3: router=attention has no such setting"]),
        ("+experiment=mien", ["no such choice", "did you mean mine?"]),
    ],
)
def test_mistakes_in_them_are_one_line(own, override, words):
    with pytest.raises(UserError) as caught:
        composed(own, override)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("arguments", [(), ("-m",)], ids=["one job", "several"])
def test_the_command_takes_them(own, tmp_path, arguments, at_once):
    own.joinpath("experiment/wrong.yaml").write_text("# @package _global_\nseed: -5\n")
    given = ("--config-dir", "own", *arguments, *DIGITS, "+experiment=wrong")
    done = command("train.py", *given, cwd=tmp_path, env=at_once)
    assert (done.returncode, done.stderr) == (2, "error: seed=-5: must be a whole number in [0, 4294967295]\n")


@pytest.mark.parametrize(
    ("program", "override", "words"),
    [
        ("evaluate.py", "router=attention", "there is no setting router"),
        ("search.py", "data=pets", "run=some-run decides it"),
        ("export.py", "router=attention", "run=some-run decides it"),
        ("export.py", "+model.kwargs.img_size=32", "run=some-run decides it"),
    ],
)
def test_what_the_run_decides_is_refused_beside_it(tmp_path, program, override, words):
    done = command(program, "run=some-run", override, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["--config-name", "evaluate"], "this command has one config; put settings of your own into DIR/experiment"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: has no effect here; the run folder is run_dir=FOLDER"),
    ],
)
def test_what_would_pass_without_effect_is_refused(tmp_path, arguments, words):
    done = command("train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "multirun", "words"),
    [
        ("hydra.output_subdir=x", False, "has no effect"),
        ("hydra.job.chdir=true", True, "has no effect"),
        ("hydra.mode=MULTIRUN", False, "-m runs several"),
        ("hydra.sweep.dir=x", True, "with hydra/launcher= or hydra/sweeper= only"),
        ("hydra/launcher=joblib", False, "acts with -m only"),
        ("hydra/sweeper=optuna", False, "acts with -m only"),
        ("hydra.launcher.n_jobs=2", False, "acts with -m only"),
    ],
)
def test_settings_of_hydra_that_would_do_nothing(override, multirun, words):
    with pytest.raises(UserError, match=re.escape(override) + f": .*{re.escape(words)}"):
        check_hydra([override], multirun)
    check_hydra(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x"], True)


@pytest.mark.parametrize("override", ["capacity=0.5", "placement=late", "placement.blocks=[1]"])
def test_what_a_depth_decides_is_refused_beside_it(override):
    asked = ["model=vit_pico", "data=digits", "router=isoflop", "router.depth=2"]
    check_acts(compose_config("train", asked), asked)
    with pytest.raises(UserError, match=rf"{re.escape(override)}: router.depth=2 says the depth; leave one"):
        check_acts(compose_config("train", [*asked, override]), [*asked, override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_epochs=1", "must be schedule.epochs=2, which other settings follow too"),
        ("trainer.accumulate_grad_batches=2", "must be schedule.accumulate=1"),
        ("trainer.gradient_clip_val=0.5", "must be schedule.clip_grad=1.0"),
        ("+trainer.log_every_n_steps=5", "trainer.log_every_n_steps=5: has no effect"),
        ("+trainer.fast_dev_run=true", "such a run would pass for a finished one"),
        ("+trainer.barebones=true", "there is no setting trainer.barebones"),
        ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: the trained weights would not come back"),
        ("trainer.strategy=ddp_notebook", "choose auto or ddp"),
        ("trainer.profiler=foo", "trainer.profiler=foo: must be one of simple, advanced, pytorch, null"),
        ("callbacks=early_stop", "callbacks=early_stop: no such choice; choose one of early_stopping, none"),
        ("callbacks=early_stopping callbacks.patience=0", "callbacks.patience=0: must be a whole number of at least 1"),
        (
            "callbacks=early_stopping callbacks.monitor=loss",
            "classification measures val/loss, val/top1, val/top5; choose one of them",
        ),
        (
            "callbacks=early_stopping callbacks.monitor=epoch",
            "callbacks.monitor=epoch: classification measures val/loss",
        ),
        (
            "trainer.gradient_clip_algorithm=value schedule.clip_grad=null trainer.gradient_clip_val=null",
            "needs schedule.clip_grad",
        ),
        ("callbacks=early_stopping trainer.limit_val_batches=0", "needs a validation at the end of an epoch"),
        ("callbacks=early_stopping trainer.val_check_interval=0.5", "needs a validation at the end of an epoch"),
        ("callbacks=early_stopping trainer.check_val_every_n_epoch=3", "=3: schedule.epochs=2 end before the first"),
        ("trainer.overfit_batches=2 trainer.limit_train_batches=5", "overfit_batches=2 is instead of it; leave one"),
        ("callbacks.name=early_stopping", "has settings of its own; choose it with callbacks=early_stopping"),
    ],
)
def test_arguments_of_lightning_act_or_are_refused(override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check_train(compose_config("train", [*DIGITS, *SHORT, *override.split()]))


def test_tensorboard_and_the_profiler_write_into_the_run_folder(tmp_path, capsys):
    extra = ["logger=tensorboard", "trainer.profiler=simple", "trainer.enable_model_summary=true"]
    run(tmp_path / "run", *SHORT, *extra)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("val/top1")] == [1, 3]
    assert "run_training_epoch" in (tmp_path / "run/fit-profile.txt").read_text()
    assert "Trainable params" in capsys.readouterr().out
    names = [file.name for file in (tmp_path / "run/tensorboard").iterdir()]
    assert not [name for name in names if socket.gethostname() in name.split(".")]


def test_a_field_says_in_words_what_it_takes():
    fields = {**TrainConfig.model_fields, **Data.model_fields}
    words = {
        name: in_words(fields[name].annotation, fields[name].metadata) for name in ("capacity", "budget", "download")
    }
    assert words == {
        "capacity": "a number in (0, 1]",
        "budget": "a number of GFLOPs above 0, or a share of the dense model's such as 75% or null",
        "download": "true or false",
    }
