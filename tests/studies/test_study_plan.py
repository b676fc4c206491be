"""From a study and a scale to runs: what is shared, what starts from what, and that src/train.py takes every one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from amod.errors import UserError
from amod.studies.plan import at_scale, runs_of
from amod.training.checks import check_train
from amod.training.compose import compose_config
from amod.training.config import CONF

SCALE = {
    "name": "toy",
    "seeds": [0, 1],
    "models": ["vit_pico"],
    "data": "fashion_mnist",
    "transfer": ["digits"],
    "stages": {
        "dense": {"settings": ["schedule.epochs=9"]},
        "finetune": {"start": "dense", "settings": ["schedule.lr=5e-4"]},
        "transfer": {"start": "dense", "settings": []},
        "scratch": {"settings": []},
    },
}
STUDIES = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def load(group, name):
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))


def plan(**study):
    return runs_of({"stage": "finetune", **study}, SCALE)


def test_a_run_for_each_combination_and_seed_after_the_dense_run_that_it_starts_from():
    runs = plan(runs=[{"router": ["linear", "attention"], "capacity": [0.125, 0.5]}])
    assert len(runs) == 2 * (1 + 4)
    for number, run in enumerate(runs):
        if run.start is None:
            assert run.stage == "dense"
            assert run.settings["router"] == "none"
            assert run.settings["schedule.epochs"] == "9"
        else:
            assert run.start in runs[:number]
            assert run.start.settings["seed"] == run.settings["seed"]
    root = Path("runs/toy")
    arguments = runs[1].arguments(root)
    assert f"model.checkpoint={root / runs[0].name}" in arguments
    assert f"run_dir={root / runs[1].name}" in arguments
    assert "capacity=0.125" in arguments
    assert "router=linear" in arguments
    assert "schedule.lr=0.0005" in arguments


def test_equal_settings_are_one_run_however_they_are_written():
    table = plan(runs=[{"router": ["attention"], "capacity": [0.5]}])
    sweep = plan(runs=[{"router": ["attention"], "capacity": [0.50], "schedule.lr": [1e-4, 5e-4]}])
    assert [run.name for run in table] == [run.name for run in sweep if run.settings.get("schedule.lr") != "0.0001"]


def test_runs_that_a_variant_does_not_have():
    runs = plan(
        seeds=[0],
        variants={"": [], "average": ["+model.kwargs.global_pool=avg"]},
        runs=[{"router": ["attention"], "capacity": [0.125, 0.5], "not_with": ["average"]}, {"router": ["linear"]}],
    )
    made = [(run.variant, run.settings["router"]) for run in runs]
    assert made == [("", "none"), *[("", "attention")] * 2, ("", "linear"), ("average", "none"), ("average", "linear")]
    assert not any("not_with" in run.settings for run in runs)


@pytest.mark.parametrize(
    ("written", "read"),
    [("5e-4", "0.0005"), ("0.50", "0.5"), ("1234567", "1234567"), ("2.0", "2"), ("[1e-4]", "[1e-4]")],
)
def test_a_number_loses_no_digit(written, read):
    (_, run, *_) = plan(runs=[{"schedule.lr": [written], "router": ["attention"]}])
    assert run.settings["schedule.lr"] == read


def test_another_recipe_of_the_dense_run_makes_other_runs_of_all_that_start_from_it():
    before = plan(runs=[{"router": ["attention"]}])
    stages = {**SCALE["stages"], "dense": {"settings": ["schedule.epochs=10"]}}
    after = runs_of({"stage": "finetune", "runs": [{"router": ["attention"]}]}, {**SCALE, "stages": stages})
    assert not {run.name for run in before} & {run.name for run in after}


def test_transfer_goes_to_the_other_data_from_a_dense_run_on_the_first():
    runs = plan(stage="transfer", runs=[{"router": ["attention"]}])
    assert [run.settings["data"] for run in runs] == ["fashion_mnist", "digits"] * 2
    assert runs[1].start == runs[0]


def test_a_stage_may_start_from_a_file_of_weights_that_its_runs_are_named_after():
    stages = {"dense": {"start": "weights", "settings": []}, "transfer": {"start": "weights", "settings": []}}
    scale = {**SCALE, "stages": {**SCALE["stages"], **stages}}
    study = {"stage": "finetune", "runs": [{"router": ["attention"]}]}

    def arguments(weights, study=study):
        runs = runs_of(study, {**scale, "seeds": [0], "weights": weights})
        return {run.name: [a for a in run.arguments(Path("runs")) if "checkpoint" in a] for run in runs}

    plain, here, there, other = map(arguments, (None, "/a/vit.pth", "/b/vit.pth", "/a/other.pth"))
    assert list(here) == list(there)  # wherever the file lies
    assert not set(plain) & set(here) | set(here) & set(other)
    (dense, finetuned) = here
    assert here == {dense: ["model.checkpoint=/a/vit.pth"], finetuned: [f"model.checkpoint=runs/{dense}"]}
    assert next(iter(plain.values())) == []
    (transferred,) = arguments("/a/vit.pth", {**study, "stage": "transfer"}).values()
    assert transferred == ["model.checkpoint=/a/vit.pth"]


def test_settings_of_the_scale_are_in_every_run_and_the_stages_win():
    scale = {**SCALE, "settings": ["schedule.lr=1", "schedule.batch_size=8"]}
    runs = runs_of({"stage": "finetune", "runs": [{"router": ["attention"]}]}, scale)
    assert {run.settings["schedule.batch_size"] for run in runs} == {"8"}
    assert [run.settings["schedule.lr"] for run in runs[:2]] == ["1", "0.0005"]


def test_settings_of_the_study_are_in_its_own_runs_alone():
    stages = {"dense": {"settings": []}, "finetune": {"start": "dense", "settings": ["schedule.epochs=2"]}}
    runs = runs_of(
        {"name": "s", "stage": "finetune", "settings": ["schedule.epochs=1"], "runs": [{"router": ["attention"]}]},
        {"name": "x", "seeds": [0], "models": ["vit_pico"], "data": "digits", "stages": stages},
    )
    assert [run.settings.get("schedule.epochs") for run in runs] == [None, "1"]


def test_a_scale_has_settings_for_the_runs_of_a_router():
    scale = {**SCALE, "routers": {"avit": ["router.halt_shift=5"]}}
    runs = runs_of({"stage": "finetune", "runs": [{"router": ["attention", "avit"]}]}, scale)
    assert {run.settings["router"]: run.settings.get("router.halt_shift") for run in runs} == {
        **{"none": None, "attention": None, "avit": "5"}
    }
    scale |= {"routers": {"avit": {"vit_pico": ["router.halt_shift=7"]}}, "models": ["vit_pico", "deit_tiny"]}
    runs = runs_of({"stage": "finetune", "runs": [{"router": ["avit"]}]}, scale)
    assert {
        run.settings["model"]: run.settings.get("router.halt_shift") for run in runs if run.settings["router"] == "avit"
    } == {"vit_pico": "7", "deit_tiny": None}


def test_a_stage_that_the_scale_does_not_have():
    with pytest.raises(UserError, match="study=table8: needs the stage soup, but scale=toy has dense, finetune"):
        runs_of({"name": "table8", "stage": "soup"}, SCALE)


def test_from_scratch_there_is_no_dense_run():
    assert [run.start for run in plan(stage="scratch", runs=[{"router": ["attention"]}])] == [None, None]


def test_a_variant_changes_the_dense_run_too():
    runs = plan(variants={"": [], "registers": ["+model.kwargs.reg_tokens=4"]}, runs=[{"router": ["attention"]}])
    changed = [run for run in runs if run.variant == "registers"]
    assert len(runs) == 8
    assert len(changed) == 4
    assert all(run.settings["+model.kwargs.reg_tokens"] == "4" for run in changed)


def test_a_scale_may_narrow_a_study():
    study = {"stage": "finetune", "runs": [{"router": ["attention"], "capacity": [0.125, 0.5]}]}
    here = at_scale({**study, "at": {"toy": {"seeds": [7]}, "other": {"seeds": [8]}}}, SCALE)
    runs = runs_of(here, SCALE)
    assert {run.settings["seed"] for run in runs} == {"7"}
    assert len(runs) == 3
    typed = runs_of(here, {**SCALE, "seeds": [1], "typed": ["scale.seeds=[1]"]})
    assert {run.settings["seed"] for run in typed} == {"1"}


def test_untrained_is_what_the_scale_measures():
    claims = [{"metric": "untrained", "higher": "attention"}, {"lower": "linear"}]
    study = {"metric": "untrained", "metrics": ["untrained", "test_top1"], "claims": claims}
    here = at_scale(study, {"name": "toy", "untrained": "test_top1_untrained"})
    assert here["metric"] == "test_top1_untrained"
    assert here["metrics"] == ["test_top1_untrained", "test_top1"]
    assert here["claims"] == [{"metric": "test_top1_untrained", "higher": "attention"}, {"lower": "linear"}]


@pytest.fixture(scope="module")
def accepted():
    return set()


@pytest.mark.parametrize("scale", sorted(path.stem for path in (CONF / "scale").glob("*.yaml")))
@pytest.mark.parametrize("study", STUDIES)
def test_every_run_of_every_study_is_accepted(study, scale, accepted, tmp_path, monkeypatch):
    """Everything that src/train.py checks before it touches data or weights, for the first seed and model."""
    monkeypatch.setattr("amod.training.checks.check_data", lambda data: None)
    monkeypatch.setattr("amod.training.checks.check_checkpoint", lambda path: None)
    content, at = load("study", study), load("scale", scale)
    if "studies" in content:
        assert set(content["studies"]) == set(STUDIES) - {"all"}
        return
    assert content["name"] == study
    if scale not in content.get("scales", [scale]):
        return
    if "benchmark" in content:
        assert content["at"][scale]["benchmark"]
        return
    at |= {"seeds": at["seeds"][:1], "models": at["models"][:1]}
    runs = runs_of(at_scale(content, at), at)
    assert runs
    for run in runs:
        settings = {key: re.sub(r"^-?\d[\d.e-]*$", "a number", value) for key, value in run.settings.items()}
        kind = f"{run.script} {run.start is None} {sorted(settings.items())}"
        if kind not in accepted:  # studies share runs, and other numbers pass the same checks
            check_train(compose_config(Path(run.script).stem, run.arguments(tmp_path)))
            accepted.add(kind)
