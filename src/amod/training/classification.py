"""model.task=classification: images and their classes. A file of a task, see ``tasks.py``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from amod.entries import ClassOnly, Route
from amod.errors import UserError
from amod.families import default_tokens
from amod.flops import count_flops
from amod.gates import is_gated, penalty, share_kept
from amod.plan import Plan
from amod.timm_models import RoutedViT
from amod.training.config import Schedule, TrainConfig, Variant
from amod.training.costs import halting_cost
from amod.training.finished import classes_in, load_model, weights_of
from amod.training.loaders import ImageData, build_datamodule
from amod.training.methods import Recipe, make_recipe
from amod.training.module import Batch, TaskModule
from amod.training.record import about, read_record, say_origin
from amod.training.sources import load_one
from amod.training.splits import Split
from amod.training.tasks import CLASSIFICATION
from amod.training.terminal import say
from amod.training.weights import Built, input_config, teacher_of
from amod.training.weights import build as build_vit
from amod.vit import dense


class Classifier(TaskModule):
    """``model(images) -> logits``. A batch is images (B, 3, H, W), labels (B,), indices (B,)."""

    task = CLASSIFICATION

    def __init__(
        self, model: nn.Module, schedule: Schedule, num_classes: int, seed: int, recipe: Recipe | None = None
    ) -> None:
        self.num_classes = num_classes
        super().__init__(model, schedule, seed, recipe)
        self.mixup = None
        if schedule.mixup > 0 or schedule.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=schedule.mixup,
                cutmix_alpha=schedule.cutmix,
                label_smoothing=schedule.label_smoothing,
                num_classes=num_classes,
            )

    def own_metrics(self) -> dict[str, Metric]:
        classes = self.num_classes
        return {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
        }

    def loss(self, batch: Batch) -> Tensor:
        images, labels, _ = batch
        targets, smoothing = labels, self.schedule.label_smoothing
        if self.mixup is not None:
            (images, targets), smoothing = self.mixup(images, labels), 0.0
        if self.recipe is not None:
            logits, added = self.recipe(self.model, images, self.epoch)
        elif is_gated(self.model):
            logits, routing = self.model(images, return_routing=True)
            added = penalty(routing, cast(Any, self.model).plan)
        else:
            logits, added = self.model(images), None
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss if added is None else loss + added

    def measure(self, metrics: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels, _ = batch
        logits = self.evaluated(images).float()
        for name in ("top1", "top5"):
            metrics[name].update(logits, labels)
        return F.cross_entropy(logits, labels), logits

    def values(self, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accuracies in percent."""
        return {key: value if key == "loss" else 100 * value for key, value in computed.items()}


def read(cfg: TrainConfig) -> ImageData:
    schedule = cfg.schedule
    return build_datamodule(
        cfg.data,
        input_config(cfg.model),
        schedule.augment.arguments(),
        schedule.batch_size,
        schedule.eval_batch_size,
        cfg.seed,
    )


def build(cfg: Variant, data: ImageData) -> Built:
    return build_vit(cfg, data.num_classes, data.class_names)


def module(model: nn.Module, cfg: TrainConfig, data: ImageData) -> Classifier:
    teacher = partial(teacher_of, cfg, data.num_classes, data.class_names)
    return Classifier(
        model, cfg.schedule, data.num_classes, cfg.seed, make_recipe(model, cfg.router, cfg.distil, teacher)
    )


def cost(model: nn.Module, cfg: Variant) -> dict[str, Any]:
    """What the model costs at its own image size, and which blocks keep how many tokens."""
    vit: Any = model
    tokens = default_tokens(vit)
    kept: dict[int, int] = model.tokens_kept(tokens) if isinstance(model, RoutedViT) else {}
    size = (vit.in_chans, *vit.patch_embed.img_size)
    plan: Plan = vit.plan if kept else {}
    routed = [entry for entry in plan.values() if isinstance(entry, Route)]
    capacity: float | None = routed[0].capacity if routed else 1.0
    chosen = {i: count for i, count in kept.items() if not isinstance(plan[i], ClassOnly)}
    if cfg.router.name == "tuning":
        capacity = None
    if cfg.router.name == "isoflop":  # a budget or a depth leaves the capacity unused
        capacity = cfg.capacity if cfg.budget is None and cfg.router.depth is None else None
    return {
        "router": cfg.router.name,
        "budget": cfg.budget,
        "capacity": capacity,
        "capacity_granted": None if is_gated(model) else min(chosen.values(), default=tokens) / tokens,
        "tokens": tokens,
        "tokens_kept": {str(block): count for block, count in kept.items()},
        "blocks_routed": [*vit.blocks_routed] if is_gated(model) else [*chosen],
        "depth": len(vit.blocks),
        "gflops": count_flops(dense(model) if is_gated(model) else model, size) / 1e9,
        "params": sum(p.numel() for p in model.parameters()),
    }


def measured(model: nn.Module, data: ImageData) -> dict[str, Any]:
    """Where it is up to the image what is computed: with gates, the share kept on up to 256 test images, and the GFLOPs
    on 32 of them; where tokens halt, :func:`halting_cost`."""
    if not is_gated(model):
        alone = copy.copy(data)
        alone.trainer = None  # which would share the images among its processes
        return halting_cost(model, alone.test_dataloader())
    samples = data.samples("test", train=False)
    images, _ = samples.stacked(samples.drawn(256, 0))
    images = images.to(next(model.parameters()))  # trainer.precision=bf16-true has made it half
    model.eval()
    with torch.no_grad():
        parts = [cast(Any, model)(some, return_routing=True)[1] for some in images.split(64)]
    return {**share_kept(parts), "gflops": count_flops(model, images[:32]) / 1e9}


# --- finished runs --------------------------------------------------------------------------------------------------


def keep(cfg: TrainConfig, folder: Path) -> None:
    """Nothing: timm makes the model by its name."""


def load_measured(folder: Path, run: TrainConfig, split: str) -> tuple[nn.Module, ImageData]:
    """The model, and the images of ``split`` as the test images of a data module; what is odd about them is said."""
    count = classes_in(weights_of(folder))
    record = read_record(folder)
    classes = None if record is None else record["classes"]
    images, of = load_one(run.data, split, classes)
    known = len(images.source.classes)
    if known != count:
        raise UserError(
            f"data.root={run.data.root}: has {known} classes, the model of run={folder} {count}; name the data that it "
            "was trained on"
        )
    if record is None and run.data.name == "folder":
        say("the run folder does not name its classes (it is of before data.json); labels are taken in their order")
    place = "" if run.data.name == "digits" else f" in {run.data.root}"
    part = "" if split == "all" or len(images) == of else f" of the {of}{place}; split=all measures all"
    say(f"{split}: {len(images)} images{part}")
    if record is not None:
        origin(images, split, record, run)
    inputs = input_config(run.model)
    sizes = run.schedule.batch_size, run.schedule.eval_batch_size
    return load_model(folder, run, count), ImageData(run.data, {"test": images}, inputs, {}, *sizes, run.seed)


def origin(images: Split, split: str, record: Mapping[str, Any], run: TrainConfig) -> None:
    """Whether they are the run's own images."""
    now = images
    if split == "all":
        try:
            now, _ = load_one(run.data, "train", record["classes"])
        except UserError:  # no training images there
            return
    mixed = run.data.split_by == "order" and len(images) < len(images.source.labels)
    say_origin(split, about(now), record, ", and it may have been trained on some of them" if mixed else "")
