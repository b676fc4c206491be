"""See what routing does, as pictures and numbers: python src/explain.py --help"""

from __future__ import annotations

import glob
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from amod.errors import UserError, one_line
from amod.training import settings
from amod.training.settings import COUNT, Choice, Number, launch

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from amod.vit import RoutedViT

RULES: dict[str, settings.Text | Choice | Number] = {
    "images": settings.Text(optional=True),
    "split": Choice(("test", "val")),
    "images_max": COUNT,
    "tokens": Number(2, integer=True, optional=True),
    "shown": COUNT,
    "output": settings.Text(optional=True),
    "device": Choice(("auto", "cpu", "cuda")),
}
UNROUTED = ("none", "isoflop")


# --- the command line ---------------------------------------------------------------------------------------------


def check_explain(cfg: DictConfig) -> None:
    """Everything that is known without reading weights or images."""
    for key, rule in RULES.items():
        if not rule.allows(cfg[key]):
            raise UserError(f"{key}={cfg[key]}: must be {rule}")
    settings.check_values(cfg)
    runs, mods, denses = (folders(cfg, key) for key in ("run", "mod", "dense"))
    for key, others in (("mod", mods), ("dense", denses)):
        if others and len(others) != max(1, len(runs)):
            raise UserError(f"{key}={cfg[key]}: has {len(others)} folders for {max(1, len(runs))} of run; name as many")
    if runs:
        check_left_to_the_run(cfg, dense=saved(runs[0]).router.name in UNROUTED)
    else:
        settings.check_model(cfg.model)
        settings.check_placement(cfg)
        settings.check_budget(cfg)
        settings.check_tokens(cfg)
        if cfg.model.checkpoint is not None:
            settings.check_checkpoint(cfg.model.checkpoint)
        elif not cfg.model.pretrained:
            raise UserError("run: say which run folder, or model=... with model.checkpoint=... or pretrained weights")
    if cfg.router.name in UNROUTED:
        raise UserError(f"router={cfg.router.name}: routes nothing; choose attention, linear or random")
    if cfg.output is not None and Path(cfg.output).is_file():
        raise UserError(f"output={cfg.output}: is a file; name a folder")
    if cfg.images is not None and not Path(cfg.images).expanduser().is_dir():
        raise UserError(f"images={cfg.images}: is no folder; name one that holds pictures")
    if cfg.images is None:
        from amod.training.data import check_data

        check_data(data_config(cfg, saved(runs[0]) if runs else cfg))


def check_left_to_the_run(cfg: DictConfig, dense: bool) -> None:
    """With run=, its config decides the model and the data, and unless it is dense also the routing."""
    free = ("data.root", *(("router", "placement", "capacity", "budget") if dense else ()))
    plain = settings.compose_config("explain", [])
    for key in settings.keys_of(cfg):
        ours = key.startswith(("model", "data", "schedule", "router", "placement", "capacity", "budget"))
        value = OmegaConf.select(cfg, key)
        if ours and not key.startswith(free) and not OmegaConf.is_dict(value) and OmegaConf.select(plain, key) != value:
            raise UserError(f"{key}={value}: run={cfg.run} decides it; leave one of them out")


def folders(cfg: DictConfig, key: str) -> list[Path]:
    """The finished run folders that ``key`` names: one, a pattern's in order, or a list of these."""
    if cfg[key] is None:
        return []
    found: list[Path] = []
    for item in cfg[key] if OmegaConf.is_list(cfg[key]) else [cfg[key]]:
        matches = [match for match in sorted(glob.glob(os.path.expanduser(str(item)))) if os.path.isdir(match)]
        if not matches:
            raise UserError(f"{key}={item}: no such folder; name the folder of a run that src/train.py made")
        found += map(Path, matches)
    for folder in found:
        for file, what in (("config.yaml", "is no run"), ("weights.safetensors", "is not finished; resume it")):
            if not (folder / file).is_file():
                raise UserError(f"{key}={folder}: {what} (there is no {file})")
    return found


def saved(folder: Path) -> DictConfig:
    return settings.read_config(folder / "config.yaml")


def data_config(cfg: DictConfig, run: DictConfig) -> DictConfig:
    """The run's data, from this command's data.root where that is not the default."""
    merged = cast(DictConfig, OmegaConf.merge(run.data))
    if "root" in run.data and cfg.data.get("root", "data") != os.environ.get("AMOD_DATA", "data"):
        merged.root = cfg.data.root
    return merged


# --- models and images --------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """One seed: its config, the routed models by router, the dense one, and in words where that comes from."""

    config: DictConfig
    models: dict[str, RoutedViT]
    dense: VisionTransformer
    origin: str


def subjects(cfg: DictConfig, num_classes: int | None) -> list[Subject]:
    """What the command names, weights loaded, in evaluation mode on the device. ``num_classes`` None: the weights'."""
    import torch

    from amod.vit import dense

    runs, mods, denses = (folders(cfg, key) for key in ("run", "mod", "dense"))
    found = []
    for i in range(max(1, len(runs))):
        config = saved(runs[i]) if runs else cfg
        source = str(denses[i]) if denses else config.model.checkpoint
        model = load(config, runs[i] if runs else None, num_classes)
        vit = dense(model)
        if config.router.name in UNROUTED:
            routing = {key: cfg[key] for key in ("router", "placement", "capacity", "budget")}
            config = cast(DictConfig, OmegaConf.merge(config, routing))
            model, origin = adapt(vit, config), "the run itself"
        else:
            vit, origin = dense_model(config, source, vit)
        models = {config.router.name: model}
        if mods:
            other = saved(mods[i])
            if other.router.name in (*UNROUTED, config.router.name):
                raise UserError(f"mod={mods[i]}: its router is {other.router.name}; name a run of another router")
            models[other.router.name] = load(other, mods[i], num_classes)
        device = "cuda" if cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available()) else "cpu"
        for module in (vit, *models.values()):
            module.to(device).eval()
        found.append(Subject(config, models, vit, origin))
    same = ("model.name", "model.kwargs", "data.name")
    for subject in found[1:]:
        for key in same:
            if OmegaConf.select(subject.config, key) != OmegaConf.select(found[0].config, key):
                raise UserError(f"run={cfg.run}: the runs differ in {key}; name runs that differ in their seed only")
    return found


def load(config: DictConfig, folder: Path | None, num_classes: int | None) -> Any:
    """The model of a run folder, or of this command's own settings."""
    from amod.training.weights import build, read_state

    if folder is not None:
        source = {"model": {"checkpoint": str(folder), "pretrained": False}}
        config = cast(DictConfig, OmegaConf.merge(config, source))
        num_classes = len(read_state(folder)["head.weight"])
    if num_classes is None:
        raise UserError("data.num_classes: say how many classes the model has")
    built = build(config, num_classes)
    if not built.adapted:
        raise UserError(
            f"model={config.model.label}: its weights have no head for the {num_classes} classes of "
            f"data={config.data.name}, so nothing says what its tokens are worth; name run=, or the data it is for"
        )
    return built.model


def adapt(vit: VisionTransformer, config: DictConfig) -> RoutedViT:
    from amod.training.weights import variant

    return variant(vit, config)  # type: ignore[return-value]


def dense_model(config: DictConfig, source: str | None, own: VisionTransformer) -> tuple[VisionTransformer, str]:
    """The model before it was routed: what ``source`` or timm holds for the same classes, else the run's weights."""
    from amod.training.weights import build
    from amod.vit import dense

    if (source is not None and Path(source).exists()) or (source is None and config.model.pretrained):
        plain = {"router": {"name": "none"}, "budget": None, "model": {"checkpoint": source}}
        built = build(OmegaConf.merge(config, plain), own.num_classes)  # type: ignore[arg-type]
        if built.adapted:
            return dense(built.model), f"{source or config.model.name}"  # type: ignore[return-value]
    return own, "the routed run's own weights with all tokens in every block"


@dataclass
class Pictures:
    """``images`` (B, 3, H, W) as the model takes them, ``shown`` the same in [0, 1]; labels None: unknown."""

    images: Tensor
    shown: Tensor
    labels: Tensor | None
    classes: list[str] | None

    def names(self, predicted: Tensor, count: int) -> list[str]:
        def name(label: Any) -> str:
            return str(int(label)) if self.classes is None else self.classes[int(label)]

        if self.labels is None:
            return [f"read as {name(p)}" for p in predicted[:count]]
        pairs = zip(self.labels[:count], predicted[:count], strict=True)
        return [name(y) if y == p else f"{name(y)}, read\nas {name(p)}" for y, p in pairs]


def own_pictures(cfg: DictConfig, run: DictConfig) -> Pictures:
    """The first images_max pictures of images=, in the order of their names."""
    import torch
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from amod.training.loaders import open_rgb, transforms
    from amod.training.weights import input_config

    files = [f for f in sorted(Path(cfg.images).expanduser().rglob("*")) if f.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise UserError(f"images={cfg.images}: holds no picture ({', '.join(IMG_EXTENSIONS)})")
    inputs = input_config(run.model)
    transform = transforms(inputs, {}, run.data.get("crop_pct"))[1]
    images = []
    for file in files[: cfg.images_max]:
        try:
            images.append(transform(open_rgb(str(file))))
        except Exception as error:  # PIL's plugins raise whatever the bytes lead to
            raise UserError(f"images={file}: cannot be read ({one_line(error)})") from error
    batch = torch.stack(images)
    return Pictures(batch, displayed(batch, inputs), None, None)


def data_pictures(cfg: DictConfig, run: DictConfig) -> tuple[Pictures, int]:
    """images_max images of the split, drawn by the seed, different classes first; and the number of classes."""
    import numpy as np
    import torch
    from torch.utils.data import BatchSampler

    from amod.training.data import build_datamodule
    from amod.training.loaders import Loader, collate
    from amod.training.weights import input_config

    inputs = input_config(run.model)
    data = build_datamodule(data_config(cfg, run), inputs, {}, 1, 1, cfg.seed)
    split = data.splits[cfg.split]
    order = np.random.RandomState(cfg.seed).permutation(len(split))[: cfg.images_max]
    firsts = np.unique(split.labels[order], return_index=True)[1]
    order = np.concatenate([order[np.sort(firsts)], np.delete(order, firsts)])
    dataset: Any = (data.test_dataloader() if cfg.split == "test" else data.val_dataloader()).dataset
    keys: Any = [(0, int(position)) for position in order]
    loader = Loader(dataset, batch_sampler=BatchSampler(keys, 64, False), collate_fn=cast(Any, collate))
    batches = list(loader)
    images, labels = (torch.cat([batch[field] for batch in batches]) for field in (0, 1))
    return Pictures(images, displayed(images, inputs), labels, data.class_names), data.num_classes


def displayed(images: Tensor, inputs: dict[str, Any]) -> Tensor:
    import torch

    mean, std = (torch.tensor(inputs[key]).view(3, 1, 1) for key in ("mean", "std"))
    return images * std + mean


# --- the work -----------------------------------------------------------------------------------------------------


def job(cfg: DictConfig) -> None:
    from rich.progress import Progress, TimeRemainingColumn

    from amod.analysis.importance import cost
    from amod.analysis.measurement import blocks_of, grid_of, head_scores, measure
    from amod.analysis.routing_report import About, write_report
    from amod.flops import count_flops
    from amod.training.run import quiet, say

    quiet()
    runs = folders(cfg, "run")
    first = saved(runs[0]) if runs else cfg
    if cfg.images is None:
        pictures, classes = data_pictures(cfg, first)
    else:
        pictures, classes = own_pictures(cfg, first), cfg.data.get("num_classes")
    found = subjects(cfg, classes)

    dense, count = found[0].dense, len(pictures.images)
    grid, blocks, depth = grid_of(dense, pictures.images), blocks_of(found[0].models), len(dense.blocks)
    removed = min(grid[0] * grid[1], cfg.tokens or sys.maxsize)
    work = len(found) * cost(depth, blocks, count, removed)
    flops = work / depth * count_flops(dense, cast(Any, tuple(pictures.images.shape[1:]))) / 1e9
    runs_said = "1 run" if len(found) == 1 else f"{len(found)} runs"
    say(
        f"importance: {runs_said} x {count} images x {removed} patches x {len(blocks)} blocks cost as much as "
        f"{work / depth:,.0f} images through {first.model.label} ({flops:,.0f} GFLOPs); images_max=, tokens= bound it"
    )
    measured = []
    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn()) as progress:
        bar = progress.add_task("leaving tokens out", total=work)
        for subject in found:
            measured.append(
                measure(
                    subject.dense,
                    subject.models,
                    pictures.images,
                    pictures.labels,
                    tokens=cfg.tokens,
                    seed=cfg.seed,
                    done=lambda ran: progress.advance(bar, ran),
                )
            )
    config, run = found[0].config, measured[0]
    kept, tokens = run.routing[config.router.name][0].indices.shape[1], run.prefix + grid[0] * grid[1]
    about = About(
        subject=f"{config.model.label}, {'own pictures' if cfg.images else f'{config.data.name}, {cfg.split} images'}",
        amount=f"capacity {config.capacity:g} ({kept} of {tokens} tokens kept in a routed block)",
        seeds=[subject.config.seed for subject in found],
        dense="; ".join(dict.fromkeys(subject.origin for subject in found)),
        labelled=pictures.labels is not None,
        command=f"python src/explain.py {shlex.join(sys.argv[1:])}",
        provenance=provenance(),
    )
    output = Path(cfg.output or f"outputs/explain/{runs[0].resolve().name if runs else cfg.model.label}")
    shown = min(cfg.shown, count)
    heads = {}
    for router, model in found[0].models.items():
        with suppress(UserError):  # a block whose map cannot be read, which only attention routing needs
            heads[router] = head_scores(model, pictures.images[:shown].to(next(dense.parameters()).device))
    write_report(output, about, measured, pictures.shown[:shown], pictures.names(run.predicted, shown), heads)
    say(f"{output}/report.md")


def provenance() -> str:
    from amod.training.run import environment

    e = environment()
    changed = " with changes" if e["git_changed"] else ""
    return (
        f"Commit {(e['git_commit'] or 'unknown')[:12]}{changed}, torch {e['torch']}, timm {e['timm']}, {e['device']}."
    )


if __name__ == "__main__":
    launch(job, "explain", check_explain)
