"""From a study (conf/study) and a scale (conf/scale) to the runs of src/train.py that it consists of.

A run is what its overrides of conf/ say: two studies that ask for the same share the run, its folder is named after
them, and a recipe changed in conf/scale or conf/study makes new folders. One changed in conf/schedule, conf/model or
conf/data does not: delete the folders of the runs that it concerns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from amod.errors import UserError

WEIGHTS = "weights"  # a stage's start that is no stage


@dataclass(frozen=True)
class Run:
    """One run of src/train.py, or of another ``script`` there that takes the same settings.

    ``settings`` are its overrides without run_dir and model.checkpoint, ``start`` is the run whose weights it begins
    with, ``weights`` a file to begin with instead, ``variant`` the study's name for a change of the model itself.
    """

    stage: str
    variant: str
    settings: Mapping[str, str] = field(hash=False)
    start: Run | None = None
    weights: str | None = None
    script: str = "train.py"

    @property
    def digest(self) -> str:
        """Hex digits of all that makes the run what it is, the run or the name of the file it starts from included."""
        text = "\n".join(f"{key}={value}" for key, value in sorted(self.settings.items()))
        start = Path(self.weights).name if self.weights else self.start and self.start.digest
        return hashlib.blake2b(f"{text}\n{start}".encode(), digest_size=4).hexdigest()

    @property
    def name(self) -> str:
        """The run's folder: readable, and unique by its digest."""
        parts = [self.stage, self.settings["data"], self.settings["model"]]
        parts += [self.variant] if self.variant else []
        parts += [self.settings["router"]]
        parts += [self.settings["capacity"]] if "capacity" in self.settings else []
        return "-".join([*parts, f"seed{self.settings['seed']}", self.digest])

    def arguments(self, root: Path) -> list[str]:
        """The arguments of the script."""
        given = [f"{key}={value}" for key, value in self.settings.items()]
        source = root / self.start.name if self.start else self.weights
        start = [f"model.checkpoint={source}"] if source else []
        return [*given, *start, f"run_dir={root / self.name}"]


def at_scale(study: Mapping[str, Any], scale: Mapping[str, Any]) -> dict[str, Any]:
    """The study with what it changes at this scale, and its metric `untrained` as the scale measures it."""
    here = {**study, **study.get("at", {}).get(scale["name"], {})}

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(inner) for inner in value]
        return scale["untrained"] if value == "untrained" else value

    def measured(part: Mapping[str, Any]) -> dict[str, Any]:
        return {key: named(value) if key in ("metric", "metrics") else value for key, value in part.items()}

    return measured(here) | {"claims": [measured(claim) for claim in here.get("claims", [])]}


def runs_of(here: Mapping[str, Any], scale: Mapping[str, Any]) -> list[Run]:
    """The runs of a study (of ``at_scale``), each after the run that it starts from, none twice; the last seed last.

    A study's ``settings`` are those of its own runs, over their stage's; its ``seeds`` stand in the place of the
    scale's, unless ``scale.seeds`` was typed. A scale's ``routers`` are settings of the runs
    with a router of that name, or by model. A stage's ``start`` is another stage, whose run of the same seed and
    variant is run first, or ``weights``: the scale's file of that name, and where it has none the model's own
    pretrained weights.
    """
    stages = scale["stages"]
    if here["stage"] not in stages:
        raise UserError(
            f"study={here['name']}: needs the stage {here['stage']}, but scale={scale['name']} has {', '.join(stages)}"
        )
    stage, recipe = stages[here["stage"]], recipe_of(here, scale)
    usual = scale["transfer"] if here["stage"] == "transfer" else [stage.get("data", scale["data"])]
    data = here.get("data") or usual
    variants = here.get("variants") or {"": []}
    said = any(item.startswith("scale.seeds=") for item in scale.get("typed", ()))
    seeds = scale["seeds"] if said else here.get("seeds") or scale["seeds"]
    ordered: dict[str, Run] = {}

    def add(name: str, variant: str, settings: Iterable[str], start: Run | None = None) -> Run:
        weights = scale.get("weights") if stages[name].get("start") == WEIGHTS else None
        run = Run(name, variant, _merged(settings), start, weights, stages[name].get("script", "train.py"))
        return ordered.setdefault(run.name, run)

    for seed, model, (variant, changes) in product(seeds, here.get("models") or scale["models"], variants.items()):
        common = [f"model={model}", f"seed={seed}", *scale.get("settings", []), *changes]
        start = None
        if stage.get("start", WEIGHTS) != WEIGHTS:
            first = stages[stage["start"]]
            chosen = [f"data={first.get('data', scale['data'])}", "router=none", *common, *first["settings"]]
            start = add(stage["start"], variant, chosen)
        for name, given in product(data, here.get("runs", [])):
            axes = {key: values for key, values in given.items() if key != "not_with"}
            for values in [] if variant in given.get("not_with", []) else product(*axes.values()):
                picked = dict(zip(axes, values, strict=True))
                of_router = scale.get("routers", {}).get(picked.get("router"), [])
                of_router = of_router.get(model, []) if isinstance(of_router, Mapping) else of_router
                own = [f"{key}={value}" for key, value in picked.items()]
                add(here["stage"], variant, [f"data={name}", *common, *recipe, *of_router, *own], start)
    return list(ordered.values())


def recipe_of(here: Mapping[str, Any], scale: Mapping[str, Any]) -> list[str]:
    """The settings of a study's own runs: its stage's at this scale, and over them the study's own."""
    settings = [*scale["stages"][here["stage"]]["settings"], *here.get("settings", [])]
    return list({setting.partition("=")[0]: setting for setting in settings}.values())


def _merged(settings: Iterable[str]) -> dict[str, str]:
    """Later settings win; numbers are written one way, so that 5e-4 and 0.0005 are one run."""
    merged: dict[str, str] = {}
    for setting in settings:
        key, equals, value = str(setting).partition("=")
        if not equals:
            raise UserError(f"{setting}: a setting of a study is written key=value")
        merged[key] = _plain(value)
    return merged


def _plain(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value.lower() if value in ("True", "False") else value
    return str(int(number)) if number.is_integer() else repr(number)
