"""A model as a file for onnxruntime, OpenVINO or torch: python src/export.py --help"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from amod.errors import UserError
from amod.files import expanded
from amod.runtimes import SUFFIXES, format_of
from amod.training.checks import check_checkpoint
from amod.training.command import launch
from amod.training.config import ExportConfig
from amod.training.rules import parse
from amod.training.variants import check_variant


def check(composed: DictConfig) -> ExportConfig:
    """Everything that is known without reading weights or images."""
    cfg = parse(ExportConfig, composed)
    if cfg.run is None:
        check_variant(cfg)
        if cfg.model.checkpoint is not None:
            check_checkpoint(cfg.model.checkpoint)
    if cfg.output is not None:
        format_of(Path(cfg.output), cfg.format, f"output={cfg.output}")
    if cfg.images is not None and not expanded(cfg.images).is_dir():
        raise UserError(f"images={cfg.images}: is no folder; name one that holds pictures")
    if cfg.int8 and cfg.images is None:
        raise UserError("int8=true: needs images=FOLDER to calibrate on, pictures like those that the model will see")
    if cfg.int8 and cfg.format == "torch":
        raise UserError("int8=true: format=torch has no quantiser here; choose onnx or openvino")
    if cfg.example is not None and not expanded(cfg.example).is_file():
        raise UserError(f"example={cfg.example}: no such file; name a picture")
    return cfg


def job(cfg: ExportConfig) -> None:
    from amod.deploy import calibration_images, latency, picture, predict
    from amod.exporting import export
    from amod.runtimes import needed, open_session

    needed(cfg.format, cfg.int8)
    if cfg.example is not None:
        picture(expanded(cfg.example), lambda image: image)  # it can be read
    model = model_of(cfg)
    images = None if cfg.images is None else calibration_images(model, expanded(cfg.images), cfg.images_max)
    path = output_of(cfg)
    files = [(path, False), *([(path.with_stem(f"{path.stem}-int8"), True)] if cfg.int8 else [])]
    for file, int8 in files:
        print(f"{file}: {export(model, file, cfg.format, images=images, int8=int8)}", flush=True)
    named: dict[str, Any] = {"torch": model}
    named |= {("int8" if int8 else cfg.format): open_session(file, batch=1) for file, int8 in files}
    for line in latency(named, cfg.rounds):
        print(line)
    if cfg.example is not None:
        print(f"{cfg.example}, by {files[-1][0]}:")
        for name, share in predict(open_session(files[-1][0], batch=1), expanded(cfg.example)):
            print(f"  {share:{'.4g' if name == 'the output' else '6.1%'}}  {name}")


def model_of(cfg: ExportConfig) -> Any:
    from amod.hub import from_pretrained, head_size, prepared_as

    if cfg.run is not None:
        return from_pretrained(cfg.run)
    import torch

    from amod.training.weights import build, read_state

    classes = cfg.data.num_classes
    if cfg.model.checkpoint is not None:
        classes = head_size(read_state(Path(cfg.model.checkpoint)), cfg.model.checkpoint)
    random = cfg.model.checkpoint is None and not cfg.model.pretrained
    if random:
        print("model.pretrained=false: the weights are random; the file is good for timing alone")
    torch.manual_seed(cfg.seed)
    built = build(cfg, classes or 1000)
    if cfg.model.checkpoint is not None:
        prepared_as(built.model, Path(cfg.model.checkpoint))
    if not (random or built.adapted):
        raise UserError(f"model={cfg.model.label}: its weights have no trained head; name a run, or weights with one")
    return built.model.eval()


def output_of(cfg: ExportConfig) -> Path:
    suffix = SUFFIXES[cfg.format]
    if cfg.output is not None:
        return Path(cfg.output)
    if cfg.run is not None and Path(cfg.run).is_dir():
        return Path(cfg.run) / f"model{suffix}"
    name = Path(cfg.run).name if cfg.run else f"{cfg.model.label}-{cfg.router.name}-{digest_of(cfg)}"
    return Path("exports") / f"{name}{suffix}"


def digest_of(cfg: ExportConfig) -> str:
    """Hex digits of the settings that make the model what it is."""
    whole = dict.fromkeys(("model", "router", "placement", "capacity", "budget", "seed"), True)
    made_of = cfg.model_dump_json(include={**whole, "data": {"num_classes"}})
    return hashlib.blake2b(made_of.encode(), digest_size=4).hexdigest()


if __name__ == "__main__":
    launch(job, "export", check, ("model", "router", "placement", "capacity", "budget", "data"), idle=("schedule",))
