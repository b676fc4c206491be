"""From conf/ and the overrides of a command line to a config, Hydra's and OmegaConf's errors on one line."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from string import Template
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from amod.errors import UserError, did_you_mean
from amod.training.config import CONF, TrainConfig
from amod.training.rules import parse

# Settings that are handed to timm.create_model, timm's create_transform, Lightning's Trainer and Hydra as they are.
OPEN_GROUPS = ("model.kwargs.", "schedule.augment.", "trainer.", "hydra.")
# Where a run happens, how long it may take and what it prints: these may change when it is resumed.
FREE_TO_CHANGE = (
    "run_dir",
    "data.root",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.max_time",
    "checkpoint_every_steps",
)


def adapt(new: Any, old: Any, *, _root_: DictConfig) -> Any:
    """``${adapt:new,old}`` in a config: `old` when model.checkpoint is set (adapting), else `new` (from scratch)."""
    return old if _root_.model.checkpoint else new


def stamp() -> str:
    """``${stamp:}``: the SLURM job's id, so that all its processes and its requeued self agree, else the time."""
    return os.environ.get("SLURM_JOB_ID") or time.strftime("%Y%m%d-%H%M%S")


def digest(*, _root_: DictConfig) -> str:
    """``${digest:}``: hex digits of the settings that make a run what it is: no two jobs share a folder."""
    keys = [key for key in keys_of(_root_) if key not in FREE_TO_CHANGE and not key.startswith("hydra.")]
    pairs = [(key, OmegaConf.select(_root_, key)) for key in keys]
    text = "\n".join(f"{key}={value}" for key, value in pairs if not isinstance(value, DictConfig))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def amount(*, _root_: DictConfig) -> str:
    """``${amount:}``: what decides the compute: a capacity, a budget, or what the router has in its place."""
    router = _root_.router
    if router.name == "none":
        return "1.0"
    if router.get("depth"):
        return f"{router.depth}blocks"
    if _root_.budget is not None:
        return _root_.budget if isinstance(_root_.budget, str) else f"{_root_.budget}GFLOPs"
    if router.get("file"):
        return Path(str(router.file)).stem
    return str(router.get("r") or router.get("keep_rate") or _root_.capacity)


OmegaConf.register_new_resolver("adapt", adapt, replace=True)
OmegaConf.register_new_resolver("stamp", stamp, use_cache=True, replace=True)
OmegaConf.register_new_resolver("amount", amount, replace=True)
OmegaConf.register_new_resolver("digest", digest, replace=True)


def searched(own: Path | None) -> list[str]:
    """The override that has Hydra look into a folder beside conf/."""
    return [f"hydra.searchpath=['file://{own.absolute()}']"] if own else []


def compose_config(config_name: str, overrides: list[str], own: Path | None = None) -> DictConfig:
    """The composed config with everything resolved; ``own`` is a folder with files beside those of conf/."""
    for override in overrides:
        if override.startswith("~"):
            raise UserError(f"{override}: settings cannot be removed; set key=null where null is allowed")
    search = searched(own)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            cfg = compose(config_name, [*search, *overrides])
            OmegaConf.resolve(cfg)
            expand_paths(cfg)
            _check_additions(config_name, search, overrides, own)
        except OverrideParseException as error:
            raise UserError(explain_syntax(error)) from None
        except MissingConfigException as error:
            raise UserError(_explain_choice(error)) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain_key(config_name, [*search, *overrides], error)) from None
        except ValueError as error:
            raise UserError(_explain_group(overrides, error)) from None
    return cfg


def help_text(config_name: str, overrides: list[str], own: Path | None = None) -> str:
    """What --help prints: the config's own template, filled in. (Hydra's --help lists its own groups as well, twice,
    which takes twice the time of everything else and shows nowhere.)"""
    choices: dict[str, set[str]] = {}
    for file in (file for folder in (CONF, own) if folder for file in folder.glob("*/*.yaml")):
        choices.setdefault(file.parent.name, set()).add(file.stem)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name, [*searched(own), *overrides], return_hydra_config=True)
    template = Template(cfg.hydra.help.template)
    with open_dict(cfg):
        del cfg.hydra
    groups = "".join(f"{group}: {', '.join(sorted(choices[group]))}\n" for group in sorted(choices))
    return template.substitute(APP_CONFIG_GROUPS=groups, CONFIG=OmegaConf.to_yaml(cfg))


def train_config(overrides: list[str]) -> TrainConfig:
    """A training config, its files and what its settings must satisfy together not yet checked."""
    return parse(TrainConfig, compose_config("train", overrides))


def expand_paths(cfg: DictConfig) -> None:
    """``~`` in a path is the home folder. (data.root is expanded where it is read.)"""
    for key in ("run_dir", "run", "model.checkpoint", "model.name"):
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group) if group else cfg
        if isinstance(node, DictConfig) and isinstance(node.get(name), str):
            node[name] = os.path.expanduser(node[name])


def keys_of(cfg: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a nested mapping, groups included."""
    keys = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        value = cfg._get_node(key) if isinstance(cfg, DictConfig) else cfg[key]
        if isinstance(value, DictConfig) and not value._is_none():
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def key_of(override: str) -> str:
    """What an override sets: ``router`` of ``+router@encoder=linear``."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def settings_of(file: Path) -> Any:
    """What a file of a group sets in its group; one that also chooses in another group names its own in it."""
    found = OmegaConf.load(file)
    assert isinstance(found, DictConfig)
    return found.get(file.parent.name, found)


def _check_additions(config_name: str, search: list[str], overrides: list[str], own: Path | None) -> None:
    """A key added with + must be in a group that is passed on to a library: elsewhere it would be ignored silently."""
    for override in overrides:
        key = key_of(override)
        if not override.startswith("+") or key.startswith(OPEN_GROUPS) or (own and (own / key).is_dir()):
            continue
        if key not in _known_keys(config_name, [*search, *overrides]):
            raise UserError(f"{override}: there is no setting {key}; + adds to {', '.join(OPEN_GROUPS)} only")


def _known_keys(config_name: str, overrides: list[str]) -> list[str]:
    """The keys of the config with the choices of groups that `overrides` make."""
    choices = [
        o for o in overrides if "=" in o and ((CONF / o.partition("=")[0]).is_dir() or o.startswith("hydra.searchpath"))
    ]
    return keys_of(compose(config_name, choices))


QUOTING = """; a value with ~ = , or a bracket needs two pairs of quotes, as in 'run_dir="~/my runs, x=1"'"""


def explain_syntax(error: Exception) -> str:
    override = getattr(error, "override", None) or str(error)
    hint = QUOTING if re.search(r"=.*[~=,(){}\[\]]", override) else ""
    return f"{override!r} cannot be read as a setting; write key=value without spaces, as in capacity=0.125{hint}"


def _explain_group(overrides: list[str], error: ValueError) -> str:
    """Hydra: "Config group override must be a string or a list. Got float", without naming the override."""
    for override in overrides:
        group = CONF / override.partition("=")[0]
        if group.is_dir() and not re.search(r"=[A-Za-z_/]\w*$", override.replace("=null", "=")):
            choices = ", ".join(sorted(file.stem for file in group.glob("*.yaml")))
            return f"{override}: choose one of {choices}"
    return " ".join(str(error).split())


def _explain_choice(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = sorted(error.options or [])
    if not group or not options:
        return " ".join(str(error).split())
    return f"{group}={choice}: no such choice; choose one of {', '.join(options)}{did_you_mean(choice, options)}"


def _explain_key(config_name: str, overrides: list[str], error: Exception) -> str:
    text = str(error)
    if sweep := re.search(r"Ambiguous value for argument '(.+?)'\s", text):
        return f"{sweep.group(1)}: several values; -m runs one job for each, [a,b] is a list{QUOTING}"
    match = re.search(r"Could not (?:override|append[^']*) '([^']+)'", text)
    key = match.group(1) if match else ""
    override = next((o for o in overrides if key_of(o) == key), "")
    if not override:
        return " ".join(text.split())
    known = _known_keys(config_name, [o for o in overrides if o != override])  # it may be a group of other commands
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if parent and k.startswith(f"{parent}.")]
    reason = f"{override}: there is no setting {key}"
    if key.startswith(OPEN_GROUPS[:2]):
        return f"{reason} yet; add it as +{override}"
    if key in known:
        return f"{override}: {key} is there already; leave the + out"
    group, _, name = key.partition(".")
    others = [file for file in sorted((CONF / group).glob("*.yaml")) if "." not in name and name in settings_of(file)]
    if name and others:
        return f"{reason} here; it is of {', '.join(f'{group}={file.stem}' for file in others)}"
    hint = did_you_mean(key, known)
    if siblings and not hint:
        return f"{reason}; {parent} has {', '.join(k.removeprefix(f'{parent}.') for k in siblings)}"
    return f"{reason}{hint}; `--help` lists all settings"
