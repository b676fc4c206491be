"""The training and evaluation steps of one model, whatever its task.

Everything random in a training step (Mixup, drop path, a random router) is drawn from (seed, epoch, batch, process),
never from a generator that runs on. A run that was killed and goes on therefore repeats exactly what it would have
done, and needs no saved generator state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric

from amod.errors import UserError, one_line
from amod.training.config import Schedule
from amod.training.lora import add_lora
from amod.training.methods import Recipe
from amod.training.tasks import Task
from amod.training.weights import shortened

log = logging.getLogger(__name__)
LOSS_SUMS = ("mean_value", "weight")  # torchmetrics MeanMetric's state
Batch = tuple[Any, ...]  # what the task reads, and last the indices of its samples (B,)


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the full learning rate at optimiser step `step` (0-based) of `steps`.

    Linear from 1 / warmup to 1, then a half cosine from 1 to `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def limited(batches: int, limit: float) -> int:
    """How many of `batches` Lightning's limit_*_batches leaves: a number of them, or a share."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def training_steps(trainer: Trainer) -> int:
    """Optimiser steps of the whole training.

    Lightning's ``estimated_stepping_batches`` would set the loader up before a checkpoint is restored, and the place
    in the epoch would be lost.
    """
    loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    batches = limited(len(loader), trainer.limit_train_batches)
    return math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs  # type: ignore[operator]


def global_batch(trainer: Trainer, schedule: Schedule) -> int:
    """Images of one optimiser step, over all processes."""
    return schedule.batch_size * trainer.accumulate_grad_batches * trainer.world_size


def peak_lr(schedule: Schedule, images: int) -> float:
    """The highest learning rate of a run whose optimiser steps see so many images (lr_reference_batch scales it)."""
    reference = schedule.lr_reference_batch
    return schedule.lr if reference is None else schedule.lr * images / reference


def make_optimizer(
    model: nn.Module, schedule: Schedule, lr: float, recipe: Recipe | None = None
) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        recipe.groups(model, schedule.weight_decay) if recipe is not None and recipe.ratios else model,
        opt=schedule.optimizer,
        lr=lr,
        weight_decay=schedule.weight_decay,
        momentum=schedule.momentum,
    )


def freeze(model: nn.Module, schedule: Schedule) -> int:
    """Leave only the routers (and a LoRA), or the head, trainable, if the schedule says so; how many weights it is."""
    if schedule.train == "routers":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("router" in name.rpartition(".")[0].replace("routers", "router").split("."))
        if schedule.lora is not None:
            add_lora(model, schedule.lora)
    if schedule.train != "all":  # what is frozen stays as it is; without training, depth is not dropped
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    if schedule.train == "head":
        model.requires_grad_(False)
        classifier: Any = getattr(model, "get_classifier", None)  # timm's models have it
        if classifier is not None:
            heads = classifier()  # two, of a distilled DeiT
            for head in heads if isinstance(heads, tuple) else (heads,):
                head.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not count:
        other = "choose router=tuning or linear" if schedule.train == "routers" else "choose schedule.train=all"
        raise UserError(f"schedule.train={schedule.train}: there are no such weights; {other}")
    return count


def check_optimizer(schedule: Schedule, lr: float, device: torch.device) -> None:
    """Let it make a step: only then is seen what some of timm's need (another package, a GPU, second derivatives)."""
    name = schedule.optimizer
    if name not in list_optimizers():
        raise UserError(f"schedule.optimizer={name}: timm has none of that name; try adamw or sgd")
    if schedule.momentum != Schedule.model_fields["momentum"].default and not get_optimizer_info(name).has_momentum:
        raise UserError(f"schedule.momentum={schedule.momentum:g}: {name} has none; leave it out")
    if not schedule.momentum and name in ("sgd", "nesterov"):
        raise UserError(
            f"schedule.momentum=0: {name} is Nesterov's here, which needs it; schedule.optimizer=momentum does without"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            small = nn.Linear(4, 4).to(device)
            optimizer = make_optimizer(small, schedule, lr)
            small(torch.ones(1, 4, device=device)).sum().backward()
            optimizer.step()
    except Exception as error:  # whatever its package raises
        raise UserError(
            f"schedule.optimizer={name}, schedule.lr={schedule.lr:g}: makes no step here ({one_line(error)}); try "
            "adamw or sgd, or a lower schedule.lr"
        ) from error


def exact(metrics: nn.Module) -> None:
    """Sums of the metrics in float32, where ``trainer.precision=bf16-true`` has made them half: they would stop growing
    at 256."""
    for metric in metrics.modules():
        if isinstance(metric, MeanMetric | SumMetric):
            states: dict[str, Any] = metric.metric_state
            if any(state.dtype.itemsize < 4 for state in states.values()):
                metric.set_dtype(torch.float32)


class TaskModule(LightningModule):
    """Trains `model` by the settings of ``schedule``.

    A task's subclass has its ``loss`` of a batch, the ``own_metrics`` of a split, and ``measure``, which runs the
    evaluated model on a batch and updates them.
    """

    task: Task

    def __init__(self, model: nn.Module, schedule: Schedule, seed: int, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.schedule = schedule
        self.seed = seed
        self.lr = 0.0
        decay = schedule.ema_decay
        # with timm's warm-up: the average of a short training would else be mostly the weights that it began with
        self.ema = None
        if decay is not None:
            self.ema = ModelEmaV3(model, decay=decay, use_warmup=True).requires_grad_(False)
        self.train_loss = MeanMetric()
        self.metrics = nn.ModuleDict(
            {
                split: MetricCollection(
                    {
                        "loss": MeanMetric(nan_strategy=math.inf),  # by default it leaves nan out of the mean
                        **self.own_metrics(),
                        self.task.samples: SumMetric(),  # that were measured
                        "unreadable": SumMetric(),  # and left out, as data.on_error=skip asks
                    },
                    compute_groups=False,
                )
                for split in ("val", "test")
            }
        )

    def own_metrics(self) -> dict[str, Metric]:
        """The metrics beside the loss."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Of a training batch: a mean over its samples."""
        raise NotImplementedError

    def measure(self, metrics: Any, batch: Batch) -> tuple[Tensor, Any]:
        """(loss, outputs) of an evaluation batch, once ``own_metrics`` have been updated with it."""
        raise NotImplementedError

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Of all parameters; the rate of its first group is the one that is reported."""
        return make_optimizer(self.model, self.schedule, lr, self.recipe)

    def values(self, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """The numbers of ``task.shown`` from the loss and the computed ``own_metrics``."""
        return computed

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    # --- training

    def on_train_start(self) -> None:
        exact(self.train_loss)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._seed(self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.indices = batch[-1]
        self.epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            self._stop(f"the loss is {loss.item()}", self.indices)
        self.train_loss.update(loss.detach(), len(self.indices))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision == "16-mixed":
            return  # its scaler skips steps whose gradient overflows
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            self._stop(f"the gradient's norm is {norm.item()}", self.indices)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, self.global_step + 1)  # Lightning counts this step later

    def on_train_epoch_end(self) -> None:
        self._check_finite()
        self.log("lr", self.lr)  # of the epoch's last step; the scheduler has moved on
        self.log("train/loss", self.train_loss.compute())
        self.train_loss.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Each process's sums of the epoch so far, so that a run resumed inside it reports the whole epoch's mean."""
        self._check_finite()
        sums = torch.stack([getattr(self.train_loss, name) for name in LOSS_SUMS])
        checkpoint["train_loss"] = cast(Tensor, self.all_gather(sums)).reshape(-1, 2).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_weights(checkpoint["state_dict"], self.trainer.ckpt_path)
        rows = checkpoint["train_loss"]
        if len(rows) != self.trainer.world_size:  # another global batch, learning rate and share of the epoch
            raise UserError(
                f"{self.trainer.ckpt_path}: was saved by a run of {len(rows)} process(es), and here are "
                f"{self.trainer.world_size}; go on with as many (trainer.devices), or begin in another run_dir"
            )
        for name, value in zip(LOSS_SUMS, rows[self.global_rank], strict=True):
            setattr(self.train_loss, name, value.to(self.device))

    def check_weights(self, state: Mapping[str, Any], file: Any) -> None:
        """UserError unless these are weights of this very model."""
        wanted, given = ({k: getattr(v, "shape", None) for k, v in s.items()} for s in (self.state_dict(), state))
        if odd := sorted(key for key in {*wanted, *given} if wanted.get(key) != given.get(key)):
            raise UserError(
                f"{file}: does not fit this run's model ({shortened(odd)}); put the run's own file back, or "
                "delete the folder"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        lr = peak_lr(self.schedule, global_batch(self.trainer, self.schedule))
        optimizer = self.make_optimizer(lr)
        steps = training_steps(self.trainer)
        warmup = round(self.schedule.warmup_epochs / self.schedule.epochs * steps)
        if warmup > steps // 2:
            log.info("the warm-up is shortened to half of the training: %d of %d steps", steps // 2, steps)
            warmup = steps // 2
        floor = self.schedule.min_lr / self.schedule.lr
        recipe = self.recipe

        def factor(part: str, step: int) -> float:
            return lr_factor(step, steps, warmup, floor) * (recipe.factor(part, step / steps) if recipe else 1.0)

        parts = [group.get("part", "backbone") for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(factor, part) for part in parts])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _seed(self, *key: int) -> None:
        torch_seed, numpy_seed = np.random.SeedSequence([self.seed, *key]).generate_state(2)
        torch.manual_seed(int(torch_seed))
        np.random.seed(int(numpy_seed))

    def _check_finite(self) -> None:
        """Before they are saved: no loss and no gradient has seen yet what the last step made of them."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])
        if not torch.isfinite(norm):
            self._stop(f"the weights' norm is {norm.item()}")

    def _stop(self, what: str, indices: Tensor | None = None, kept: str = "the last checkpoint is as it was") -> None:
        samples = ""
        if indices is not None:
            samples = f", samples {', '.join(map(str, indices[:8].tolist()))}"
            samples += f", ... ({len(indices)} in all)" if len(indices) > 8 else ""
        raise UserError(
            f"{what} at step {self.global_step} (epoch {self.current_epoch}{samples}); try a lower schedule.lr than "
            f"{self.schedule.lr:g}, schedule.clip_grad=1, or trainer.precision=32-true; {kept}"
        )

    # --- evaluation

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        return self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _start(self, split: str) -> None:
        self._seed()  # a random router draws the same every time
        exact(self.metrics[split])
        self.metrics[split].reset()  # type: ignore[operator]

    def _evaluate(self, split: str, batch: Batch) -> Any:
        metrics: Any = self.metrics[split]
        loss, outputs = self.measure(metrics, batch)
        metrics["loss"].update(loss, len(batch[-1]))
        metrics[self.task.samples].update(len(batch[-1]))
        return outputs

    def _report(self, split: str) -> None:
        """Logs SPLIT/loss and the task's other numbers, and of how many samples they are."""
        loader = self.trainer.val_dataloaders if split == "val" else self.trainer.test_dataloaders
        self.metrics[split]["unreadable"].update(getattr(loader, "skipped", 0))  # type: ignore[index]
        values = self.metrics[split].compute()  # type: ignore[operator]
        if split == "val" and not torch.isfinite(values["loss"]):
            if not self.global_step:
                raise UserError(
                    "the validation loss is not finite without any training; give other weights (model.checkpoint=), "
                    "or try trainer.precision=32-true"
                )
            self._stop("the validation loss is not finite", kept="the end of this epoch is not saved")
        counts = {f"{split}/{key}": values.pop(key) for key in (self.task.samples, "unreadable")}
        self.log_dict(counts, logger=False)
        self.log_dict({f"{split}/{key}": value for key, value in self.values(values).items()})
