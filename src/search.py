"""The plan for a budget, found on unlabelled images: python src/search.py --help"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from amod.errors import UserError, one_line
from amod.files import check_model_folder, check_place, expanded
from amod.training.checks import check_checkpoint
from amod.training.command import launch
from amod.training.config import SearchConfig, check_classifier
from amod.training.data import check_data, typed_root
from amod.training.rules import parse
from amod.training.variants import check_model


def check(composed: DictConfig) -> SearchConfig:
    """Everything that is known without reading weights or images."""
    cfg = parse(SearchConfig, composed)
    if cfg.texts is not None:
        check_texts(cfg)
    elif cfg.run is None:
        check_classifier(cfg.model, f"model={cfg.model.label}")
        check_model(cfg.model)
        if cfg.model.checkpoint is not None:
            check_checkpoint(cfg.model.checkpoint)
        if cfg.images is None:
            check_data(cfg.data)
    elif cfg.images is None and not (Path(cfg.run) / "config.yaml").is_file():
        raise UserError(
            f"run={cfg.run}: is no run of src/train.py, whose images could be had; name images=FOLDER, or for a "
            "model of text texts=FILE"
        )
    if cfg.images is not None and not expanded(cfg.images).is_dir():
        raise UserError(f"images={cfg.images}: is no folder; name one that holds pictures")
    output = output_of(cfg)
    if output.is_dir() or output.suffix not in (".yaml", ".yml"):
        raise UserError(f"output={output}: must be a file that ends in .yaml")
    if cfg.save is not None:
        check_model_folder(expanded(cfg.save), f"save={cfg.save}")
    return cfg


def check_texts(cfg: SearchConfig) -> None:
    if cfg.run is None or cfg.images is not None or cfg.runtime != "flops":
        raise UserError(
            f"texts={cfg.texts}: goes with run=FOLDER, where transformers saved a model and its tokenizer, without "
            "images= and runtime="
        )
    file = expanded(cfg.texts or "")
    if not file.is_file():
        raise UserError(f"texts={cfg.texts}: is no file; name one with a text in each line")


def job(cfg: SearchConfig) -> None:
    from amod.searching import search

    if cfg.save is not None:  # before the minutes of a search
        check_place(expanded(cfg.save))
    model, images, tokenizer = read_texts(cfg) if cfg.texts is not None else (*read_images(cfg), None)
    gflops = cfg.runtime == "flops" and cfg.budget >= 1
    output = output_of(cfg)
    found = search(
        model,
        images,
        cfg.budget * 1e9 if gflops else cfg.budget,
        cfg.runtime,
        seed=cfg.seed,
        effort=cfg.effort,
        ledger=output.with_suffix(".jsonl"),
        progress=sys.stdout.isatty(),
    )
    found.save(output)
    for block, entry in sorted(found.plan.items()):
        print(f"  {block}: {entry}")
    print(f"{output}: {found}", flush=True)
    if cfg.save is not None:
        if tokenizer is None:
            save(cfg, model, found, images)
        else:
            save_with_words(cfg, model, found, tokenizer)


def save(cfg: SearchConfig, model: Any, found: Any, images: Any) -> None:
    """The model that the plan makes, its head, if it has one, fitted to the dense model's classes."""
    from amod.hub import from_pretrained, save_pretrained
    from amod.refit import give_head, head_fit, outputs_of
    from amod.vit import convert, dense

    named = from_pretrained(cfg.run) if cfg.run is not None else model  # with the names of its classes
    fast = convert(dense(named), plan=found.plan)
    learned = {"search": str(found)}
    if fast.num_classes:
        try:
            fit = head_fit(fast, images, outputs_of(model, images))
            give_head(fast, fit)
            learned["head"] = f"{fit}, {len(images)} images without labels"
        except UserError as error:  # two heads
            learned["head"] = str(error)
        print(learned["head"])
    folder = save_pretrained(fast, expanded(str(cfg.save)), training=learned)
    print(f"{folder}: the model, for amod.from_pretrained and src/export.py run={cfg.save}")


def save_with_words(cfg: SearchConfig, model: Any, found: Any, tokenizer: Any) -> None:
    """The model that the plan makes, and its tokenizer."""
    from amod.hub import save_pretrained
    from amod.vit import convert

    folder = save_pretrained(convert(model, plan=found.plan), expanded(str(cfg.save)))
    tokenizer.save_pretrained(folder)
    print(f"{folder}: the model and its tokenizer, for amod.from_pretrained")


def read_texts(cfg: SearchConfig) -> tuple[Any, Any, Any]:
    """The model in the folder ``run``, what its tokenizer gives of lines drawn by the seed, and the tokenizer."""
    import random

    from amod.analysis.words import tokenizer_of
    from amod.hub import from_pretrained
    from amod.training.terminal import quiet
    from amod.vit import dense

    quiet()
    file = expanded(str(cfg.texts))
    try:
        lines = sorted({line.strip() for line in file.read_text(encoding="utf-8").splitlines()} - {""})
    except (OSError, UnicodeError) as error:
        raise UserError(f"texts={cfg.texts}: cannot be read as UTF-8 ({one_line(error)})") from error
    if len(lines) < 8:
        raise UserError(f"texts={cfg.texts}: has {len(lines)} different lines; at least 8 are needed, a text in each")
    tokenizer = tokenizer_of(Path(str(cfg.run)))
    model = from_pretrained(str(cfg.run))
    if getattr(model, "main_input_name", None) != "input_ids":
        raise UserError(f"run={cfg.run}: its {type(model).__name__} reads no text; leave texts= out")
    if tokenizer.pad_token is None:
        raise UserError(
            f"run={cfg.run}: its tokenizer has no padding token; set tokenizer.pad_token, and save it again"
        )
    drawn = random.Random(cfg.seed).sample(lines, min(cfg.images_max, len(lines)))
    inputs = tokenizer(drawn, padding=True, truncation=True, return_tensors="pt")
    return dense(model) if hasattr(model, "plan") else model, inputs, tokenizer


def read_images(cfg: SearchConfig) -> tuple[Any, Any]:
    from amod.deploy import calibration_images
    from amod.dress import of_transformers
    from amod.training.loaders import Samples

    model, split, transform = subject(cfg)
    if of_transformers(model):
        raise UserError(
            f"run={cfg.run}: is of transformers'; name texts=FILE; of pictures take timm's model, or amod.search "
            "in Python"
        )
    if cfg.images is not None:
        return model, calibration_images(model, expanded(cfg.images), cfg.images_max, least=8)
    samples = Samples(split, transform, None, False, False)
    images, _ = samples.stacked(samples.drawn(cfg.images_max, cfg.seed))
    return model, images


def subject(cfg: SearchConfig) -> tuple[Any, Any, Any]:
    """The model in evaluation mode, and the training images and how they are prepared where ``images`` names none."""
    import timm

    from amod.hub import classes_in, from_pretrained, prepared_as
    from amod.timm_models import RoutedViT
    from amod.training.config import Placement, Router, Variant
    from amod.training.finished import load_run
    from amod.training.loaders import build_datamodule
    from amod.training.weights import build, input_config, read_state
    from amod.vit import dense

    data: Any = None
    if cfg.run is not None and cfg.images is not None:
        model = from_pretrained(cfg.run)
    elif cfg.run is not None:
        _, model, data = load_run(Path(cfg.run), typed_root(cfg.data))
    else:
        if cfg.images is None:
            data = build_datamodule(cfg.data, input_config(cfg.model), {}, 32, 32, cfg.seed)
        variant = Variant(
            capacity=1.0, model=cfg.model, router=Router(name="none"), placement=Placement(name="own"), data=cfg.data
        )
        known = timm.get_pretrained_cfg(cfg.model.name)
        classes = cfg.data.num_classes if known is None else known.num_classes
        if cfg.model.checkpoint is not None:
            classes = classes_in(read_state(Path(cfg.model.checkpoint)))
        elif not cfg.model.pretrained:
            raise UserError(f"model={cfg.model.label}: has random weights; name a run=, or model.checkpoint=")
        model = build(variant, classes or 0).model
        if cfg.model.checkpoint is not None:
            prepared_as(model, Path(cfg.model.checkpoint))
        if not classes:
            print("the weights have no head: agreement is that of the features")
    model = dense(model) if isinstance(model, RoutedViT) else model
    return model.eval(), data and data.splits["train"], data and data.eval_transform


def of_run(cfg: DictConfig) -> tuple[str, ...]:
    """What a run has already; its images may have moved."""
    return ("model", "data", "not data.root") if cfg.images is None and cfg.texts is None else ("model", "data")


def output_of(cfg: SearchConfig) -> Path:
    if cfg.output is not None:
        return expanded(cfg.output)
    unit = "" if cfg.budget < 1 else "GFLOPs" if cfg.runtime == "flops" else "ms"
    runtime = "" if cfg.runtime == "flops" else f"-{cfg.runtime}"
    return Path("plans") / f"{Path(cfg.run).name if cfg.run else cfg.model.label}-{cfg.budget:g}{unit}{runtime}.yaml"


if __name__ == "__main__":
    launch(job, "search", check, of_run, idle=("schedule",))
