"""What is wrong with a config of src/explain.py, as far as it is known without reading weights or images."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amod.entries import READS_ATTENTION
from amod.errors import UserError, one_line, shown
from amod.files import expanded
from amod.training.checks import check_checkpoint
from amod.training.command import is_among
from amod.training.compose import compose_config
from amod.training.config import UNROUTED, Data, ExplainConfig, TrainConfig, check_classifier
from amod.training.data import check_data, moved, typed_root
from amod.training.folder import flat, read_config
from amod.training.rules import parse
from amod.training.variants import check_variant

ROUTING = ("router", "placement", "capacity", "budget")
ROUTED = (*READS_ATTENTION, "random")
"""What an untrained model of text can be routed by."""
MEASURING = ("split", "images_max", "tokens", "device")
"""Of measuring what tokens are worth, which needs a run of a classifier."""


def check_explain(composed: Any) -> ExplainConfig:
    cfg = parse(ExplainConfig, composed)
    if cfg.text is not None:
        return check_text(cfg)
    if is_saved_model(cfg.run):
        return check_saved(cfg)
    runs, mods, denses = (folders(cfg, key) for key in ("run", "mod", "dense"))
    if is_detection(cfg):
        return check_detection(cfg, runs)
    for folder in runs:
        check_classifier(saved(folder).model, f"run={folder}")
    check_classifier(cfg.model, f"model={cfg.model.label}")
    for key, others in (("mod", mods), ("dense", denses)):
        if others and len(others) != max(1, len(runs)):
            given = shown(getattr(cfg, key))
            raise UserError(f"{key}={given}: has {len(others)} folders for {max(1, len(runs))} of run; name as many")
    for key, these in (("run", runs), ("mod", mods), ("dense", denses)):
        if len({folder.resolve() for folder in these}) < len(these):
            raise UserError(f"{key}={shown(getattr(cfg, key))}: names a folder twice; runs are of different seeds")
    for folder in denses:
        if (router := saved(folder).router.name) not in UNROUTED:
            raise UserError(f"dense={folder}: its router is {router}; name a run of router=none")
    if runs:
        check_left_to_the_run(cfg, dense=saved(runs[0]).router.name in UNROUTED)
    else:
        check_variant(cfg)
        if cfg.model.checkpoint is not None:
            check_checkpoint(cfg.model.checkpoint)
        elif not cfg.model.pretrained:
            raise UserError("run: say which run folder, or model=... with model.checkpoint=... or pretrained weights")
    check_output(cfg)
    if cfg.images is not None and not expanded(cfg.images).is_dir():
        raise UserError(f"images={cfg.images}: is no folder; name one that holds pictures")
    if cfg.images is None:
        check_data(data_config(cfg, saved(runs[0]) if runs else cfg), test_only=cfg.split == "test")
    return cfg


def is_saved_model(run: str | list[str] | None) -> bool:
    """Whether it is a folder of save_pretrained, and no run's."""
    folder = expanded(run) if isinstance(run, str) else None
    return folder is not None and (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def check_saved(cfg: ExplainConfig) -> ExplainConfig:
    for key in ("mod", "dense"):
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}={shown(getattr(cfg, key))}: is for run folders of src/train.py; leave it out")
    if cfg.images is None or not expanded(cfg.images).is_dir():
        raise UserError(
            f"images={shown(cfg.images)}: run={cfg.run} is a saved model without data; name a folder of pictures"
        )
    check_idle(cfg, (*MEASURING, "data.root"), f"of pictures of your own through run={cfg.run}")
    check_output(cfg)
    return cfg


def is_detection(cfg: ExplainConfig) -> bool:
    """Whether run= names runs of detectors."""
    runs = folders(cfg, "run")
    return (saved(runs[0]) if runs else cfg).model.task == "detection"


def check_detection(cfg: ExplainConfig, runs: list[Path]) -> ExplainConfig:
    if len(runs) != 1:
        raise UserError(f"run={shown(cfg.run)}: name the folder of one detector's run")
    for key in ("mod", "dense", "images"):
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}={shown(getattr(cfg, key))}: is not for a detector's run; leave it out")
    run = saved(runs[0])
    check_left_to_the_run(cfg, dense=run.router.name in UNROUTED)
    check_idle(cfg, MEASURING[1:], "of a detector's run")
    check_output(cfg)
    check_data(data_config(cfg, run), test_only=cfg.split == "test")
    return cfg


def check_output(cfg: ExplainConfig) -> None:
    if cfg.router.name in UNROUTED:
        raise UserError(f"router={cfg.router.name}: routes nothing; choose attention, linear or random")
    if cfg.output is not None and Path(cfg.output).is_file():
        raise UserError(f"output={cfg.output}: is a file; name a folder")


def check_text(cfg: ExplainConfig) -> ExplainConfig:
    """With text=, run= is the one folder that a text model of transformers' and its tokenizer were saved into."""
    for key in ("mod", "dense", "images"):
        if getattr(cfg, key) is not None:
            raise UserError(f"{key}={shown(getattr(cfg, key))}: is of images, text= of words; leave one of them out")
    if not isinstance(cfg.run, str) or not (expanded(cfg.run) / "config.json").is_file():
        raise UserError(f"run={shown(cfg.run)}: name the folder of a text model of transformers', with its tokenizer")
    if cfg.router.name not in ROUTED:
        raise UserError(f"router={cfg.router.name}: keeps no words; choose one of {', '.join(ROUTED)}")
    check_idle(cfg, (*MEASURING, "shown", "output"), "of text=, whose words are printed")
    return cfg


def check_left_to_the_run(cfg: ExplainConfig, dense: bool) -> None:
    for key, value in changed(cfg, of_run(dense)):
        raise UserError(f"{key}={shown(value)}: run={shown(cfg.run)} decides it; leave one of them out")


def check_idle(cfg: ExplainConfig, keys: Sequence[str], what: str) -> None:
    for key, value in changed(cfg, keys):
        if (key, value) != ("device", "cpu"):  # where it is shown
            raise UserError(f"{key}={shown(value)}: does nothing to what is shown {what}; leave it out")


def changed(cfg: ExplainConfig, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Which of the keys and groups are set otherwise than by default, typed or in a file of one's own, and to what."""
    plain = flat(parse(ExplainConfig, compose_config("explain", [])).model_dump())
    for key, value in flat(cfg.model_dump()).items():
        if is_among(key, keys) and plain.get(key) != value:
            yield key, value


def of_run(dense: bool) -> tuple[str, ...]:
    """With run=, its config decides the model and the data, and unless it is dense also the routing."""
    return ("model", "data", "not data.root", "schedule", *(() if dense else ROUTING))


def decided(composed: Any) -> tuple[str, ...]:
    """What run= decides, for the settings that were typed with their default."""
    cfg = parse(ExplainConfig, composed)
    if cfg.text is not None:
        return ("model", "data", "schedule")
    if is_saved_model(cfg.run):
        try:
            about = json.loads((expanded(str(cfg.run)) / "config.json").read_text(encoding="utf-8"))
            return of_run(dense=not about.get("amod", {}).get("plan"))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"run={cfg.run}: no saved model (config.json: {one_line(error)})") from None
    return of_run(dense=saved(folders(cfg, "run")[0]).router.name in UNROUTED)


def folders(cfg: ExplainConfig, key: str) -> list[Path]:
    """The finished run folders that ``key`` names: one, a pattern's in order, or a list of these."""
    given = getattr(cfg, key)
    if given is None:
        return []
    if not given:
        raise UserError(f"{key}=[]: names no folder; leave it out, or name the folder of a run")
    found: list[Path] = []
    for item in given if isinstance(given, list) else [given]:
        name = os.path.expanduser(item)
        matches = [name] if os.path.isdir(name) else [*filter(os.path.isdir, sorted(glob.glob(name)))]
        if not matches:
            raise UserError(f"{key}={item}: no such folder; name the folder of a run that src/train.py made")
        found += map(Path, matches)
    for folder in found:
        for file, what in (("config.yaml", "is no run"), ("weights.safetensors", "is not finished; resume it")):
            if not (folder / file).is_file():
                raise UserError(f"{key}={folder}: {what} (there is no {file})")
    return found


def saved(folder: Path) -> TrainConfig:
    return read_config(folder / "config.yaml")


def data_config(cfg: ExplainConfig, run: TrainConfig | ExplainConfig) -> Data:
    """The data of the run, or of this command itself."""
    return cfg.data if run is cfg else moved(run.data, typed_root(cfg.data))
