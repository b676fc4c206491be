"""Whose routing is looked at, and on which pictures: models from run folders, images as the model takes them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import BatchSampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from amod.analysis.explain_checks import data_config, folders, saved
from amod.analysis.measurement import blocks_of
from amod.errors import UserError, one_line, shown
from amod.files import check_place, expanded
from amod.gates import is_gated
from amod.image_files import files_below, is_image, open_rgb
from amod.timm_models import RoutedViT
from amod.training.config import UNROUTED, ExplainConfig, Router, TrainConfig
from amod.training.finished import classes_in, weights_of
from amod.training.images import transforms
from amod.training.loaders import ImageData, Loader, collate
from amod.training.sources import load_one
from amod.training.weights import build, input_config, variant
from amod.vit import dense

log = logging.getLogger(__name__)
Trained = TrainConfig | ExplainConfig  # of a run folder, or of the command itself

MODEL_AND_DATA = ("model.name", "model.kwargs", "data.name", "data.crop_pct")
COMPARED = ("capacity", "budget", "placement", "router.keep_prefix", "seed")
"""What two routers that are compared must have in common; captions say it once."""

# --- models and images --------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """One seed: its config, the routed models by router, the dense one, and in words where that comes from."""

    config: Trained
    models: dict[str, RoutedViT]
    dense: VisionTransformer
    origin: str


def subjects(cfg: ExplainConfig, num_classes: int | None) -> list[Subject]:
    """What the command names, weights loaded, in evaluation mode on the device. ``num_classes`` None: the weights'."""
    runs, mods, denses = (folders(cfg, key) for key in ("run", "mod", "dense"))
    found, others, device = [], [], device_of(cfg)
    for i in range(max(1, len(runs))):
        config = saved(runs[i]) if runs else cfg
        source = str(denses[i]) if denses else config.model.checkpoint
        model = load(config, runs[i] if runs else None, num_classes)
        vit = dense(model)
        if config.router.name in UNROUTED:
            routing = {key: getattr(cfg, key) for key in ("router", "placement", "capacity", "budget")}
            config = config.model_copy(update=routing)
            model, origin = variant(vit, config), "the run itself"
        else:
            vit, origin = dense_model(config, source, vit)
        models = {config.router.name: model}
        if mods:
            other = saved(mods[i])
            if other.router.name in (*UNROUTED, config.router.name):
                raise UserError(f"mod={mods[i]}: its router is {other.router.name}; name a run of another router")
            for key in (*MODEL_AND_DATA, *COMPARED) if runs else ():
                theirs, ours = attrgetter(key)(other), attrgetter(key)(config)
                if theirs != ours:
                    said = f" ({theirs} and {ours})" if key in COMPARED and key != "placement" else ""
                    raise UserError(
                        f"mod={mods[i]}: differs from run= in {key}{said}; name a run of the same model and data, "
                        "that routes as much, in the same blocks, of the same seed"
                    )
            models[other.router.name] = load(other, mods[i], num_classes)
            others.append((other.router.name, other.capacity))
            if others[i] != others[0]:
                raise UserError(f"mod={shown(cfg.mod)}: the runs differ in router or capacity; name runs of one kind")
        for router, routed in models.items():
            check_served(router, routed)
        for module in (vit, *models.values()):
            module.to(device).eval()
        found.append(Subject(config, models, vit, origin))
    for subject in found[1:]:
        for key in (*MODEL_AND_DATA, "router.name", "router", "placement", "capacity", "budget"):
            one, other = (attrgetter(key)(s.config) for s in (found[0], subject))
            if one != other:
                raise UserError(
                    f"run={shown(cfg.run)}: the runs differ in {key}; name runs that differ in their seed only"
                )
    return found


def device_of(cfg: ExplainConfig) -> str:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; use device=cpu or auto")
    return "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"


def output_of(cfg: ExplainConfig, name: str) -> Path:
    """Where the report goes; UserError, before anything is measured, where nothing can be written."""
    folder = Path(cfg.output or f"outputs/explain/{name}")
    check_place(folder)
    return folder


def check_served(router: str, model: RoutedViT) -> None:
    if is_gated(model):
        raise UserError(f"router={router}: explain compares tokens kept by their score, and a gate has no such number")
    if not blocks_of({router: model}):
        raise UserError(f"router={router}: no block of its plan chooses among its tokens; explain one that does")


def load(config: Trained, folder: Path | None, num_classes: int | None) -> Any:
    """The model of a run folder, or of this command's own settings."""
    if folder is not None:
        config = from_weights(config, str(folder))
        num_classes = classes_in(weights_of(folder))
    if num_classes is None:
        raise UserError("data.num_classes: say how many classes the model has")
    built = build(config, num_classes)
    if not built.adapted:
        raise UserError(
            f"model={config.model.label}: its weights have no head for the {num_classes} classes of "
            f"data={config.data.name}, so nothing says what its tokens are worth; name run=, or the data it is for"
        )
    return built.model


def from_weights(config: Any, source: str | None) -> Any:
    """The config with another source of the weights; None: timm's."""
    change = {"checkpoint": source} if source is None else {"checkpoint": source, "pretrained": False}
    return config.model_copy(update={"model": config.model.model_copy(update=change)})


def dense_model(config: Trained, source: str | None, own: VisionTransformer) -> tuple[VisionTransformer, str]:
    """The model before it was routed: what ``source`` or timm holds for the same classes, else the run's weights."""
    if (source is not None and Path(source).exists()) or (source is None and config.model.pretrained):
        plain = from_weights(config, source).model_copy(update={"router": Router(name="none"), "budget": None})
        built = build(plain, own.num_classes)
        if built.adapted:
            return dense(built.model), short_name(source) if source else config.model.name  # type: ignore[return-value]
    return own, "the routed run's own weights with all tokens in every block"


def short_name(source: str) -> str:
    """A run folder's name, or a file's with its folder's: reports are read where other paths hold."""
    path = Path(source).absolute()
    return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"


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


def own_pictures(cfg: ExplainConfig, run: Trained) -> Pictures:
    """The first images_max pictures of images=, in the order of their names."""
    folder = expanded(cfg.images or "")
    files = files_below(folder)
    others = [file for file in files if not is_image(file.name)]
    files = [file for file in files if is_image(file.name)]
    if not files:
        raise UserError(f"images={cfg.images}: holds no picture ({', '.join(IMG_EXTENSIONS)})")
    if others:
        log.warning("%s: %d files are no pictures by their ending and are left out", folder, len(others))
    inputs = input_config(run.model)
    transform = transforms(inputs, {}, run.data.crop_pct)[1]
    images = []
    for file in files[: cfg.images_max]:
        try:
            images.append(transform(open_rgb(str(file))))
        except Exception as error:  # PIL's plugins raise whatever the bytes lead to
            raise UserError(f"images={file}: cannot be read ({one_line(error)})") from error
    batch = torch.stack(images)
    return Pictures(batch, displayed(batch, inputs), None, None)


def data_pictures(cfg: ExplainConfig, run: Trained, classes: list[str] | None) -> tuple[Pictures, int]:
    """images_max images of the split, drawn by the seed, different classes first; and the number of classes, which is
    that of ``classes`` where the run folder names them.
    """
    inputs, data_cfg = input_config(run.model), data_config(cfg, run)
    split, _ = load_one(data_cfg, cfg.split, classes)
    data = ImageData(data_cfg, {"test": split}, inputs, {}, 1, 1, cfg.seed)
    order = np.random.RandomState(cfg.seed).permutation(len(split))[: cfg.images_max]
    firsts = np.unique(split.labels[order], return_index=True)[1]
    order = np.concatenate([order[np.sort(firsts)], np.delete(order, firsts)])
    keys: Any = [(0, int(position)) for position in order]
    dataset: Any = data.test_dataloader().dataset
    batches = list(Loader(dataset, batch_sampler=BatchSampler(keys, 64, False), collate_fn=cast(Any, collate)))
    images, labels = (torch.cat([batch[field] for batch in batches]) for field in (0, 1))
    return Pictures(images, displayed(images, inputs), labels, data.class_names), data.num_classes


def displayed(images: Tensor, inputs: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(inputs[key]).view(3, 1, 1) for key in ("mean", "std"))
    return images * std + mean
