"""What several settings must satisfy together, and the files that they name; torch is not needed for it.

``check_train`` and ``check_evaluate`` are what the commands ask before anything heavy is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from amod.entries import ClassOnly, Halt, Predict, Prune
from amod.errors import UserError, reachable, shown
from amod.files import WEIGHTS
from amod.plan import LANGUAGE_MODELS
from amod.training.compose import settings_of
from amod.training.config import (
    CONF,
    EvaluateConfig,
    TrainConfig,
    TrainerArguments,
    UntrainedConfig,
    check_classifier,
)
from amod.training.data import check_data, moved
from amod.training.folder import check_run_dir, read_config
from amod.training.rules import parse
from amod.training.tasks import TASKS
from amod.training.variants import check_gates, check_variant, from_weights

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
WITH_WEIGHTS = ("tuning", "linear", "plan")
"""The routers that have weights which can be trained alone, or may have some."""
TRAINED_BY = {
    Predict: ("ratio_weight", "distil_tokens", "backbone_lr", "frozen"),
    Halt: ("ponder", "distribution"),
    Prune: ("warmup",),
}
"""The settings of a router by which such entries of a plan are trained."""
# One fact, two names: Lightning's argument, and the setting that decides it.
TWICE = {"max_epochs": "epochs", "accumulate_grad_batches": "accumulate", "gradient_clip_val": "clip_grad"}


def check_train(composed: Any) -> TrainConfig:
    """Everything about a training config that is known without building the model or reading the data."""
    if isinstance(composed, DictConfig):
        check_names(composed)
    kind = UntrainedConfig if isinstance(composed, DictConfig) and "images" in composed else TrainConfig
    cfg = composed if isinstance(composed, TrainConfig) else parse(kind, composed)
    if kind is UntrainedConfig:
        check_classifier(cfg.model, f"model={cfg.model.label}")
        if cfg.trainer.limit_test_batches == 0:
            raise UserError("trainer.limit_test_batches=0: leaves nothing to measure; leave it out")
    check_task(cfg)
    if cfg.model.task == "language":
        check_language(cfg)
    else:
        check_variant(cfg)
    if cfg.model.task == "detection":
        check_detection(cfg)
    elif cfg.schedule.backbone_lr is not None:
        raise UserError(f"schedule.backbone_lr={cfg.schedule.backbone_lr:g}: is of detection; leave it out")
    check_trainer(cfg.trainer)
    schedule = cfg.schedule
    for theirs, ours in TWICE.items():
        value, wanted = getattr(cfg.trainer, theirs), getattr(schedule, ours)
        if value != wanted:
            raise UserError(
                f"trainer.{theirs}={shown(value)}: must be schedule.{ours}={shown(wanted)}, which other settings "
                f"follow too; set schedule.{ours}={shown(value)} in its place"
            )
    if schedule.lora is not None and schedule.train != "routers":
        raise UserError(
            f"schedule.lora={schedule.lora}: is for weights that stay as they are, beside trained routers; with "
            f"schedule.train={schedule.train} choose schedule.lora=null, or choose schedule.train=routers"
        )
    if schedule.train == "routers" and schedule.lora is None and cfg.router.name not in WITH_WEIGHTS:
        raise UserError(
            f"schedule.train=routers: router={cfg.router.name} has no weights that are trained alone, so nothing would "
            "be trained; choose router=tuning or linear, schedule.lora=8, or schedule.train=all"
        )
    if schedule.train == "head" and cfg.model.task == "classification" and not from_weights(cfg.model):
        raise UserError(
            "schedule.train=head: all other weights stay as they are, and they would be random; give "
            "model.checkpoint=RUN_FOLDER, or model.pretrained=true"
        )
    for key in ("crop_pct", "crop_mode", "crop_border_pixels", "no_aug"):
        if (value := dict(schedule.augment).get(key)) not in (None, False):
            raise UserError(f"schedule.augment.{key}={shown(value)}: is not of training images; leave it out")
    if cfg.trainer.gradient_clip_algorithm == "value" and not schedule.clip_grad:
        raise UserError("trainer.gradient_clip_algorithm=value: needs schedule.clip_grad, the value; leave it out")
    if (least := cfg.trainer.min_epochs) is not None and least > schedule.epochs:
        raise UserError(f"trainer.min_epochs={least}: schedule.epochs={schedule.epochs} are fewer; raise them")
    if (every := cfg.trainer.check_val_every_n_epoch or 1) > schedule.epochs:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every}: schedule.epochs={schedule.epochs} end before the first "
            "validation, which says what the best epoch is; choose at most that"
        )
    if schedule.min_lr > schedule.lr:
        raise UserError(f"schedule.min_lr={schedule.min_lr}: must not exceed schedule.lr={schedule.lr}")
    if (schedule.mixup or schedule.cutmix) and schedule.batch_size % 2:
        raise UserError(
            f"schedule.batch_size={schedule.batch_size}: must be even, because mixup and cutmix pair the images; "
            "or set schedule.mixup=0 schedule.cutmix=0"
        )
    if cfg.callbacks.name == "early_stopping":
        for key, usual in (("limit_val_batches", None), ("val_check_interval", None)):
            if (value := getattr(cfg.trainer, key)) != usual and (value == 0 or key == "val_check_interval"):
                raise UserError(
                    f"trainer.{key}={shown(value)}: callbacks=early_stopping needs a validation at the end of an epoch "
                    "and none before; leave one of them out"
                )
    check_method(cfg)
    check_run_dir(cfg)
    if cfg.model.checkpoint is not None and not any(Path(cfg.run_dir).glob("checkpoints/*.ckpt")):
        check_checkpoint(cfg.model.checkpoint)
    check_data(cfg.data)
    return cfg


def check_task(cfg: TrainConfig) -> None:
    """The data must be of the model's task, and early stopping watch what it measures."""
    task = TASKS[cfg.model.task]
    if cfg.data.name not in task.data:
        raise UserError(
            f"data={cfg.data.name}: is not for model={cfg.model.label}, whose task is {task.name}; choose one of "
            f"{', '.join(task.data)}"
        )
    known = [name for name in task.columns if name.startswith("val/")]
    if cfg.callbacks.name == "early_stopping" and cfg.callbacks.monitor not in known:
        measures = f"{task.name} measures {', '.join(known)}; choose one of them"
        raise UserError(f"callbacks.monitor={cfg.callbacks.monitor}: {measures}")


def check_unused(unused: dict[str, Any], why: str) -> None:
    """UserError for the first of the settings that asks for something."""
    for key, value in unused.items():
        if value:
            other = f"set {key}=null" if "augment" in key else "leave it out"
            raise UserError(f"{key}={shown(value)}: {why}; {other}")


def check_detection(cfg: TrainConfig) -> None:
    schedule, used = cfg.schedule, ("hflip", "sides", "crop")
    unused = {"distil": cfg.distil, "model.drop_path": cfg.model.drop_path}
    unused |= {f"schedule.{key}": getattr(schedule, key) for key in ("mixup", "cutmix", "label_smoothing")}
    unused |= {f"schedule.augment.{key}": value for key, value in schedule.augment if key not in used}
    check_unused(unused, f"model={cfg.model.label} is a detector, whose training has no such thing")
    check_whole_boxes(cfg)


def check_whole_boxes(cfg: TrainConfig) -> None:
    if cfg.trainer.precision in ("16-true", "bf16-true"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision}: a detector's boxes are compared in float32; choose 32-true or "
            "bf16-mixed"
        )


def check_language(cfg: TrainConfig) -> None:
    """A model of transformers' in a folder, dense or with gates."""
    name, router, schedule = cfg.model.name, cfg.router, cfg.schedule
    if router.name not in ("none", "tuning"):
        raise UserError(f"router={router.name}: model={cfg.model.label} is a language model; choose none or tuning")
    file = Path(name) / "config.json"
    with reachable(f"model.name={name}"):
        if not file.is_file():
            raise UserError(
                f"model.name={name}: no config.json there; name a folder of a causal language model of transformers "
                "(tools/stories.py makes one)"
            )
    unused = {f"model.{key}": getattr(cfg.model, key) for key in ("checkpoint", "pretrained", "drop_path")}
    unused |= {"budget": cfg.budget, "distil": cfg.distil}
    unused |= {f"placement.{key}": getattr(cfg.placement, key) for key in ("blocks", "last")}
    unused |= {f"schedule.{key}": getattr(schedule, key) for key in ("mixup", "cutmix", "label_smoothing")}
    unused |= {f"schedule.augment.{key}": value for key, value in schedule.augment}
    if cfg.data.on_error != "stop":
        unused["data.on_error"] = cfg.data.on_error
    check_unused(unused, f"model={cfg.model.label} is a language model")
    try:
        said = json.loads(file.read_text())
        kind, depth = said["model_type"], int(said["num_hidden_layers"])
        longest = int(said.get("max_position_embeddings") or cfg.data.length)
    except (ValueError, KeyError, TypeError):
        kind, depth, longest = None, 0, 0
    if kind not in LANGUAGE_MODELS:
        raise UserError(
            f"model.name={name}: its config.json is of {kind or 'no model of transformers'}; choose a causal language "
            f"model of these: {', '.join(LANGUAGE_MODELS)}"
        )
    if cfg.data.length > longest:
        raise UserError(f"data.length={cfg.data.length}: this model reads at most {longest} tokens; choose fewer")
    if router.name == "tuning":
        check_gates(cfg, depth)


def check_method(cfg: TrainConfig) -> None:
    """What a method's training needs: a teacher to start from, time to warm up, tokens to compare."""
    router = cfg.router
    if router.name == "plan":
        usual = settings_of(CONF / "router" / "plan.yaml")
        for entry, names in TRAINED_BY.items():
            for name in names if not router.has(entry) else ():
                if name in router.model_fields_set and (value := getattr(router, name)) != usual[name]:
                    raise UserError(f"router.{name}={shown(value)}: the plan has no {entry.__name__}; leave it out")
    tokens = router.has(Predict) and router.distil_tokens > 0
    if (cfg.distil or tokens) and not from_weights(cfg.model):
        said = f"distil={cfg.distil:g}" if cfg.distil else f"router.distil_tokens={router.distil_tokens:g}"
        off = "distil=0 router.distil_tokens=0" if router.has(Predict) else "distil=0"
        raise UserError(
            f"{said}: the teacher is the dense model that the run starts from; give model.checkpoint=RUN_FOLDER, or "
            f"train without one: {off}"
        )
    if tokens and (cfg.placement.last is not None or router.has(ClassOnly)):
        alone = "the plan's ClassOnly" if router.has(ClassOnly) else "placement.last=class"
        raise UserError(
            f"router.distil_tokens={router.distil_tokens:g}: {alone} leaves no patches to compare with the teacher's; "
            "set router.distil_tokens=0"
        )
    if router.warmup is not None and router.warmup[1] > cfg.schedule.epochs:
        raise UserError(
            f"router.warmup={shown(router.warmup)}: ends behind the last of schedule.epochs={cfg.schedule.epochs}; the "
            "model would never train at its keep rate"
        )


def check_evaluate(composed: Any) -> EvaluateConfig:
    cfg = parse(EvaluateConfig, composed)
    if cfg.run is None:
        raise UserError("run: say which run folder, as in run=runs/digits/some-run")
    with reachable(f"run={cfg.run}"):
        exists = (Path(cfg.run) / "config.yaml").exists()
    if not exists:
        raise UserError(f"run={cfg.run}: no config.yaml there; name the folder of a run that src/train.py made")
    run = evaluation_config(cfg)
    check_data(run.data, test_only=cfg.split == "test")
    if run.model.task == "detection":
        check_whole_boxes(run)
    if cfg.output is not None and run.model.task != "classification":
        raise UserError(
            f"output={cfg.output}: tells classes apart, which a run of {run.model.task} has none of; leave it out"
        )
    if cfg.output is not None and Path(cfg.output).is_file():
        raise UserError(f"output={cfg.output}: is a file; name a folder")
    return cfg


def evaluation_config(cfg: EvaluateConfig) -> TrainConfig:
    """The run's own config with the evaluation's non-null settings over it."""
    run = read_config(Path(cfg.run or "") / "config.yaml")
    run.data = moved(run.data, cfg.data.root)
    for group in ("data", "trainer"):
        for key, value in getattr(cfg, group):
            if value is not None:
                setattr(getattr(run, group), key, value)
    if cfg.split != "test":
        run.trainer.limit_test_batches = run.trainer.limit_val_batches if cfg.split == "val" else None
    run.trainer.num_nodes = 1  # however many it was trained on
    if run.trainer.limit_test_batches == 0:
        run.trainer.limit_test_batches = None
    return run


def check_names(cfg: DictConfig) -> None:
    """A name brings its file's other settings, and no others, only where the file is chosen."""
    for group in ("router", "data", "logger", "callbacks"):
        settings = cfg.get(group)
        name = settings.get("name") if isinstance(settings, DictConfig) else None
        file = CONF / group / f"{name}.yaml"
        if not isinstance(settings, DictConfig) or not file.is_file():
            continue
        known = set(settings_of(file))
        if not known <= set(settings):
            raise UserError(f"{group}.name={name}: has settings of its own; choose it with {group}={name}")
        if odd := sorted(map(str, set(settings) - known)):
            raise UserError(f"{group}.{odd[0]}={shown(settings[odd[0]])}: {group}={name} has no such setting")


# --- Lightning's part, and files ----------------------------------------------------------------------------------


def check_trainer(trainer: TrainerArguments) -> None:
    if trainer.max_steps != -1:  # Lightning would take every resume for one inside an epoch
        raise UserError(
            f"trainer.max_steps={shown(trainer.max_steps)}: must stay -1; say how long to train by schedule.epochs and "
            "trainer.limit_train_batches"
        )
    if trainer.log_every_n_steps != 50:
        raise UserError(
            f"trainer.log_every_n_steps={shown(trainer.log_every_n_steps)}: has no effect, metrics are logged once an "
            "epoch; leave it out"
        )
    for key in ("limit_train_batches", "limit_val_batches") if trainer.overfit_batches else ():
        if (value := getattr(trainer, key)) is not None:
            raise UserError(
                f"trainer.{key}={shown(value)}: trainer.overfit_batches={shown(trainer.overfit_batches)} is instead of "
                "it; leave one of them out"
            )
    limit = trainer.max_time
    if isinstance(limit, dict):
        known = {*limit} <= {"weeks", "days", "hours", "minutes", "seconds"}
        numbers = all(
            isinstance(part, (int, float)) and not isinstance(part, bool) and part >= 0 for part in limit.values()
        )
        time = known and numbers and any(limit.values())
    else:
        time = bool(re.fullmatch(r"\d+(:\d+){3}", str(limit))) and any(map(int, str(limit).split(":")))
    if limit is not None and not time:
        raise UserError(f"trainer.max_time={shown(limit)}: must be days:hours:minutes:seconds and above zero, or null")
    if re.search("spawn|fork|notebook|fsdp|deepspeed", trainer.strategy):
        raise UserError(
            f"trainer.strategy={trainer.strategy}: the trained weights would not come back whole to the process that "
            "keeps them; choose auto or ddp (trainer=ddp, trainer=ddp_cpu)"
        )


def check_checkpoint(path: str) -> None:
    file = Path(path)
    with reachable(f"model.checkpoint={path}"):
        if file.is_dir() and any((file / name).exists() for name in ("weights.safetensors", "checkpoints", WEIGHTS)):
            return
        found = file.exists()
    if not found:
        raise UserError(f"model.checkpoint={path}: no such file; give {', '.join(CHECKPOINT_SUFFIXES)} or a run folder")
    if file.is_dir():
        raise UserError(
            f"model.checkpoint={path}: has no weights.safetensors, as a run has, and no {WEIGHTS}; name the file"
        )
    if file.suffix not in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"model.checkpoint={path}: not a kind of checkpoint known here; give {', '.join(CHECKPOINT_SUFFIXES)} "
            "or a run folder"
        )
