"""The sweep files, and what `make sweep` does with them."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from amod.analysis.stability import draw_stability
from amod.errors import UserError
from amod.studies.runner import arguments as arguments_of
from amod.studies.runner import execute
from amod.sweeps import arguments, combinations, fixed_arguments, read_sweep, runs_of, sample, write_report
from amod.training.checks import check_train
from amod.training.compose import compose_config
from tiny import DIGITS

FILES = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))
A = "command: ['${args_no_hyphens}']\n"
MISTAKES = [
    (f"{A}method: grid\nparameters: {{run_dir: {{values: [a, b]}}}}", "run_dir: each run of a sweep has a folder"),
    (f"{A}method: grid\nparameters: {{1: {{values: [1]}}}}", "1: is no setting of src/train.py"),
    (f"{A}method: grid\nparameters: {{seed: {{value: 3, values: [1]}}}}", "seed: has value and values; leave one"),
    (f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{values: [1], min: 3, max: 4}}}}", "has values and min"),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{distribution: int_uniform, min: 0.5, max: 2.9}}}}",
        "seed: min=0.5, max=2.9: must be whole numbers",
    ),
    ("command: ${args_no_hyphens}\nmethod: grid\nparameters: {seed: {value: 1}}", "command: must be a list of words"),
    (f"{A}method: grid\nrun_cap: true\nparameters: {{seed: {{value: 1}}}}", "run_cap=True: must be a whole number"),
    ("parameters: []", "has no parameters"),
    ("command: [a]\nparameters: {seed: {value: 1}}", "needs ${args_no_hyphens}"),
    ("command: ['${args_no_hyphens}']\nparameters: {schedule: {parameters: {lr: {value: 1}}}}", "write them flat"),
    ("command: ['${args_no_hyphens}']\nparameters: {budget: {values: [null, 1]}}", "write 'null', with its quotes"),
    ("command: ['${args_no_hyphens}']\nmethod: bayes\nparameters: {seed: {value: 1}}", "method=bayes needs W&B"),
    ("command: ['${args_no_hyphens}']\nmethod: random\nparameters: {seed: {value: 1}}", "needs run_cap"),
    ("command: ['${args_no_hyphens}']\nmethod: grid\nparameters: {seed: {min: 1, max: 2}}", "a grid needs values"),
    (
        "command: ['${args_no_hyphens}']\nmethod: random\nrun_cap: 1\nparameters: {schedule.lr: {min: 1e-5, max: 1}}",
        "in YAML 1e-5 is a word",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{distribution: int_uniform, min: 10, max: 1}}}}",
        "seed: min=10: is above max=1",
    ),
    (f"{A}method: grid\nprogram: src/untrained.py\nparameters: {{seed: {{value: 1}}}}", "a sweep is of src/train.py"),
    (
        "command: [python, src/untrained.py, '${args_no_hyphens}']\nparameters: {seed: {value: 1}}",
        "program: src/untrained.py",
    ),
    (f"{A}method: random\nrun_cap: 1\nparametrs: 1\nparameters: {{seed: {{value: 1}}}}", "did you mean parameters?"),
    (
        f"{A}method: grid\nearly_terminate: {{type: hyperband}}\nparameters: {{seed: {{value: 1}}}}",
        "without W&B a file has",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{vals: [1]}}}}",
        "seed: vals: is not known here; did you mean va",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{schedule.lr: {{mu: 1, sigma: 2}}}}",
        "schedule.lr: mu: is not known here",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{values: [1, 2], distribution: normal}}}}",
        "distribution=normal needs W&B; here: uniform",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{distribution: categorical, min: 1, max: 2}}}}",
        "distribution=categorical needs values",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{values: [1, 2], probabilities: [0.5]}}}}",
        "probabilities=[0.5]: must be one number for each of values, 1 together",
    ),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: {{seed: {{values: [1, 2], probabilities: [0.5, 0.1]}}}}",
        "1 together",
    ),
    (f"{A}method: random\nrun_cap: 0\nparameters: {{seed: {{value: 1}}}}", "run_cap=0: must be a whole number"),
    (
        f"{A}method: grid\nparameters: {{seed: {{values: [1, 2], probabilities: [0.5, 0.5]}}}}",
        "a grid takes every value once",
    ),
    (f"{A}method: grid\nparameters: {{seed: {{values: 3}}}}", "seed: values=3: must be a list"),
    ("command: null\nmethod: grid\nparameters: {seed: {values: [3]}}", "the command needs ${args_no_hyphens}"),
    (
        f"{A}method: random\nrun_cap: 1\nparameters: "
        "{schedule.lr: {distribution: log_uniform_values, min: 0.0, max: 1.0}}",
        "min=0.0: must be above 0",
    ),
]


def through_the_agent(sweep, values):
    """The arguments of src/train.py in the command that W&B's agent runs, by its own code."""
    args = json.loads(json.dumps({key: {"value": value} for key, value in values.items()}))
    macros = create_sweep_command_args({"args": args})
    command = create_sweep_command(copy.deepcopy(sweep["command"]))
    return [part for c in command for part in (macros.get(c[2:-1], []) if c.startswith("${") else [c])]


def wandbs_own_check(sweep):
    try:
        from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as check
    except ImportError:  # where it was before 0.25
        from wandb.sdk.internal.internal_api import Api

        check = Api._validate_config_and_fill_distribution
    return check(sweep)


def test_there_are_the_four():
    assert [file.stem for file in FILES] == ["bayes", "capacity", "lr", "placement"]


def kinds(found):
    """Of the combinations that differ in numbers alone, the last."""
    return {tuple(v if isinstance(v, str) else "" for v in values.values()): values for values in found}.values()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_kind_of_combination_as_the_agent_types_it_is_a_run(file, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "xyz")
    sweep = read_sweep(file)
    assert wandbs_own_check(sweep) == sweep
    assert sweep["project"] == "amod"
    assert sweep["program"] == "src/train.py"
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}
    if sweep["method"] == "bayes":  # the optimiser's choices are not known; draws from its ranges stand for them
        draw = random.Random(0)
        found = [{k: sample(p, draw, k) for k, p in sweep["parameters"].items()} for _ in range(10)]
    else:
        found = combinations(sweep, file)
    for values in kinds(found):
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in values.items()}
        typed = through_the_agent(sweep, whole)
        assert typed[-len(values) :] == [f"{key}={value}" for key, value in arguments(values).items()]
        cfg = compose_config("train", [*typed, "data=digits"])
        check_train(cfg)
        assert cfg.logger.name == "wandb"
        assert cfg.run_dir == "runs/sweeps/abc/xyz"
        for key, value in values.items():  # nothing arrives as a string that was a number
            node = cfg[key] if key in ("router", "placement") else None
            got = node.name if node is not None else cfg[key] if "." not in key else cfg.schedule[key.split(".")[1]]
            assert got == value
            assert isinstance(got, str) == isinstance(value, str)


def test_what_the_client_does_to_null():
    """Hydra takes None for a word. It is refused in a file, and a run that gets it is not started."""
    typed = create_sweep_command_args({"args": {"schedule.clip_grad": {"value": None}}})["args_no_hyphens"]
    assert typed == ["schedule.clip_grad=None"]
    with pytest.raises(UserError, match=r"schedule\.clip_grad=None: must be"):
        check_train(compose_config("train", ["data=digits", *typed]))
    with pytest.raises(UserError, match=r"model\.checkpoint=None: no such file"):
        check_train(compose_config("train", ["data=digits", "model.checkpoint=None"]))
    check_train(compose_config("train", ["data=digits", "model=vit_pico", "schedule.clip_grad=null"]))


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_a_mistake_in_a_file_is_named(tmp_path, text, said):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        runs_of(file, {})
    assert said in str(error.value)


def test_a_file_that_is_no_text_and_a_place_that_is_no_folder(tmp_path, monkeypatch):
    file = tmp_path / "sweep.yaml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        runs_of(file, {})
    command = "[python, src/train.py, logger=wandb, logger.project=mine, router=none, '${args_no_hyphens}']"
    file.write_text(f"command: {command}\nmethod: grid\nparameters: {{seed: {{value: 1}}}}\n")
    (one,) = runs_of(file, {})
    assert one.settings == {"router": "none", "seed": "1"}
    assert "router=none" in arguments_of(one, tmp_path, [])  # without data=, which has a default
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken: cannot be written"):
        execute([one], tmp_path / "taken", 1, [], {})


def test_probabilities_are_those_of_the_draws(tmp_path):
    """W&B draws 38 of 40 for 0.95; an even draw 20."""
    parameters = {
        "router": {"values": ["linear", "attention"], "probabilities": [0.95, 0.05]},
        "seed": {"min": 0, "max": 10**6},
    }
    sweep = {"command": ["${args_no_hyphens}"], "method": "random", "run_cap": 200, "parameters": parameters}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep))
    drawn = [run.values["router"] for run in runs_of(file, {"data": "digits"})]
    assert 180 <= drawn.count("linear") <= 198


def test_random_draws_are_the_same_every_time(tmp_path):
    file = tmp_path / "sweep.yaml"
    parameters = {
        "schedule.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "seed": {"min": 0, "max": 9},
        "capacity": {"min": 0.1, "max": 1.0},
        "router": {"values": ["linear", "attention"]},
    }
    command = ["${args_no_hyphens}"]
    file.write_text(yaml.safe_dump({"command": command, "method": "random", "run_cap": 50, "parameters": parameters}))
    runs = runs_of(file, {"data": "digits"})
    assert [run.name for run in runs] == [run.name for run in runs_of(file, {"data": "digits"})]
    assert len(runs) == 50
    lrs = [run.values["schedule.lr"] for run in runs]
    assert all(1e-5 <= lr <= 1e-2 for lr in lrs)
    assert 15 < sum(lr < 10**-3.5 for lr in lrs) < 35  # half of the draws are below the middle of the logarithms
    assert {run.values["router"] for run in runs} == {"linear", "attention"}
    assert all(isinstance(run.values["seed"], int) for run in runs)


@pytest.mark.parametrize(
    "launcher", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local"))]
)
def test_a_local_sweep_to_its_end(tmp_path, launcher):
    sweep = yaml.safe_load(FILES[2].read_text())
    sweep["command"] = ["${program}", "logger=wandb", "data=flowers", *DIGITS[:-3], "${args_no_hyphens}"]
    lrs = [1.0e-3, 1.0e9]
    sweep["parameters"] = {"router": {"values": ["attention"]}, "schedule.lr": {"values": lrs}}
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    program = Path(__file__).parents[1] / "src/sweep.py"
    typed = [
        sys.executable,
        str(program),
        "lr.yaml",
        "data=digits",
        "schedule.epochs=1",
        "trainer.accelerator=cpu",
        "jobs=1",
        *([f"hydra/launcher={launcher}"] if launcher else []),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(typed, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    root = tmp_path / "runs/sweeps/lr"
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: 1 of 2 runs failed")
    good, bad = csv.DictReader((root / "runs.csv").open())
    assert (good["schedule.lr"], good["state"]) == ("0.001", "finished")
    summary = json.loads((root / good["run"] / "summary.json").read_text())
    assert float(good["val_top1"]) == summary["val_top1"]
    assert bad["state"] == "failed"
    report = (root / "report.md").read_text()
    assert "1 of 2 runs finished" in report
    assert f"`{bad['run']}`: error: the loss is nan" in report
    assert (root / "stability.png").stat().st_size > 10_000

    # The same again: the finished run is not repeated. A file without the failed one then ends well.
    sweep["parameters"]["schedule.lr"]["values"] = lrs[:1]
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    written = (root / good["run"] / "summary.json").stat().st_mtime_ns
    done = subprocess.run(typed, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "started" not in done.stdout
    assert (root / good["run"] / "summary.json").stat().st_mtime_ns == written


def test_the_report_by_hand(tmp_path):
    file = tmp_path / "sweep.yaml"
    parameters = {"capacity": {"values": [0.5, 1.0]}, "seed": {"values": [0, 1, 2]}}
    command = ["model=vit_pico", "${args_no_hyphens}"]
    file.write_text(yaml.safe_dump({"command": command, "method": "grid", "parameters": parameters}))
    runs = runs_of(file, {"data": "digits"})
    assert fixed_arguments(read_sweep(file)) == {"model": "vit_pico"}
    for run, top1 in zip(runs[:4], (50.0, 52.0, 57.0, 60.0), strict=True):
        (tmp_path / run.name).mkdir()
        summary = {"gflops": 0.025, "val_top1": top1, "test_top1": top1 - 1, "epochs": 3, "seconds": 9.5}
        (tmp_path / run.name / "summary.json").write_text(json.dumps(summary))
    text = write_report(runs, tmp_path, {runs[4].name: "error: too hot"}, "it").read_text()
    assert "4 of 6 runs finished" in text
    assert "| 0.5 | 3 | 0.0250 | 53.00 (50.00 to 57.00) | 52.00 (49.00 to 56.00) |" in text
    assert "| 1.0 | 1 of 3 | 0.0250 | 60.00 | 59.00 |" in text
    assert f"- `{runs[4].name}`: error: too hot" in text
    assert "stability" not in text  # the learning rate is not swept
    states = [row["state"] for row in csv.DictReader((tmp_path / "runs.csv").open())]
    assert states == ["finished"] * 4 + ["failed", "not run"]


def test_a_sweep_over_seeds_alone(tmp_path):
    file = tmp_path / "sweep.yaml"
    sweep = {"command": ["python", "src/train.py", "model=vit_pico", "${args_no_hyphens}"], "method": "grid"}
    sweep |= {"run_cap": 2, "parameters": {"seed": {"values": [0, 1, 2]}}}
    file.write_text(yaml.safe_dump(sweep))
    with pytest.raises(UserError, match="run_dir=mine: each run of a sweep has a folder of its own; leave it out"):
        runs_of(file, {"run_dir": "mine"})
    runs = runs_of(file, {"data": "digits"})
    assert [run.settings["seed"] for run in runs] == ["0", "1"]
    for run in runs:
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "summary.json").write_text('{"gflops": 0.025, "val_top1": 50.0, "test_top1": 49.0}')
    text = write_report(runs, tmp_path, {}, "it").read_text()
    assert "| runs | GFLOPs | validation | test |\n|---|---|---|---|\n| 2 | 0.0250 | 50.00 (50.00 to 50.00) |" in text


def test_the_report_of_language_models(tmp_path):
    file = tmp_path / "sweep.yaml"
    parameters = {"schedule.lr": {"values": [0.001, 0.01]}}
    file.write_text(yaml.safe_dump({"command": ["${args_no_hyphens}"], "method": "grid", "parameters": parameters}))
    runs = runs_of(file, {"data": "text", "model": "stories"})
    (tmp_path / runs[0].name).mkdir()
    summary = {"gflops": 0.025, "val_loss": 2.5, "test_loss": 2.4, "test_perplexity": 11.0, "epochs": 3, "seconds": 9.5}
    (tmp_path / runs[0].name / "summary.json").write_text(json.dumps(summary))
    text = write_report(runs, tmp_path, {}, "it").read_text()
    assert "Loss of each run's best epoch" in text
    assert "| 0.001 | 1 | 0.0250 | 2.50 | 2.40 |" in text
    assert (tmp_path / "runs.csv").read_text().startswith("schedule.lr,state,gflops,val_loss,test_loss,")


def test_the_stability_picture(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, words = {}, []
    errorbar, text = Axes.errorbar, Axes.text
    monkeypatch.setattr(
        Axes, "errorbar", lambda *a, **k: drawn.setdefault(k["label"], (a[1:], k)) and errorbar(*a, **k)
    )
    monkeypatch.setattr(Axes, "text", lambda *a, **k: words.append(a[3]) or text(*a, **k))
    hollow, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, **k: (k.get("markerfacecolor") and hollow.append((a[2], k))) or plot(*a, **k)
    )
    top1 = {
        ("linear", 1e-3): (70, 72, 77),
        ("linear", 1e-2): (60, None, float("nan")),
        ("attention", 1e-3): (80, 80, 83),
    }
    rows = [
        {"router": router, "lr": lr, "seed": seed, "top1": value}
        for (router, lr), values in top1.items()
        for seed, value in enumerate(values)
    ]
    draw_stability([{**rows[0], "router": "mine"}, *rows], tmp_path / "mine.png", "title", "caption")
    assert list(drawn) == ["MoD", "A-MoD", "mine"]
    drawn.clear(), words.clear(), hollow.clear()
    draw_stability(rows, tmp_path / "new/picture.png", "title", "caption")
    assert (tmp_path / "new/picture.png").stat().st_size > 10_000
    assert list(drawn) == ["MoD", "A-MoD"]
    (rates, means), style = drawn["MoD"]
    assert rates == pytest.approx([1e-3, 1e-2], rel=0.5)
    assert means == [73, 60]  # failed runs enter no mean
    assert style["yerr"] == [[3, 0], [4, 0]]
    assert words == ["× MoD (2)"]
    assert [(means, style["zorder"]) for means, style in hollow] == [([60], 3)]  # one seed, above its own line
    styles = [(style["marker"], str(style["linestyle"]), style["color"]) for _, style in drawn.values()]
    assert all(a != b for a, b in zip(*styles, strict=True))
