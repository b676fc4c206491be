"""What a method's training has beside the cross-entropy: its losses, its teacher, its schedule, its learning rates.

DynamicViT: w mean_s (mean keep - rho^s)^2 over its stages and images, and the kept tokens' features near the teacher's.
A-ViT: the ponder loss mean(N_k + R_k), and the KL of where tokens halt from a target. EViT: a keep rate that falls from
1. Any model: the KL of its classes from a teacher's. The constants are the papers', by way of conf/router.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from amod.entries import Halt, Predict, Prune
from amod.gates import is_gated, penalty
from amod.plan import Plan, entries_of
from amod.timm_models import RoutedViT
from amod.training.config import Router
from amod.walk import Walk


class Recipe(nn.Module):
    """The training of ``model`` by its method.

    Args:
        router: its settings.
        distil: weight of the KL of the model's classes from the teacher's.
        teacher: the dense model, which stays as it is; its weights are in the run's checkpoints.
    """

    def __init__(self, model: nn.Module, router: Router, distil: float = 0.0, teacher: nn.Module | None = None) -> None:
        super().__init__()
        plan: Plan = model.plan if isinstance(model, RoutedViT) else {}
        self.router, self.distil = router, distil
        self.ratios = [entry.keep for _, entry in sorted(plan.items()) if isinstance(entry, Predict)]
        routers: Any = getattr(model, "routers", None)
        self.leads = bool(self.ratios) and any(p.requires_grad for p in routers.parameters())
        """Whether predictors are trained, whom the other weights follow."""
        self.teacher = teacher if teacher is None else teacher.requires_grad_(False).eval()
        if self.ratios:
            for name in ("cls_token", "pos_embed", "dist_token"):  # DynamicViT never trains them
                if isinstance(parameter := getattr(model, name, None), nn.Parameter):
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Recipe:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, model: Any, images: Tensor, epoch: float) -> tuple[Tensor, Tensor]:
        """(logits, what is added to the cross-entropy) of images (B, 3, H, W), ``epoch`` epochs into the training."""
        with scheduled(model, self.router, epoch):
            walk: Any = Walk(model) if isinstance(model, RoutedViT) else model
            features = walk.forward_features(images)
            logits = walk.forward_head(features)
        added = logits.new_zeros((), dtype=torch.float32)
        if self.teacher is not None:
            with torch.no_grad():
                wanted: Any = self.teacher.forward_features(images)  # type: ignore[operator]
                classes = self.teacher.forward_head(wanted)  # type: ignore[operator]
            added = added + self.distil * divergence(classes, logits)
            if self.ratios and self.router.distil_tokens and walk.keep is not None:
                added = added + self.router.distil_tokens * kept_difference(features, wanted, walk.keep, model)
        if is_gated(model):
            added = added + penalty(walk.routing, model.plan)
        if isinstance(walk, Walk) and walk.decisions:
            added = added + self.router.ratio_weight * ratio_loss(walk.decisions, self.ratios)
        if isinstance(walk, Walk) and walk.going is not None:
            added = added + self.router.ponder * walk.going.ponder.mean()
            added = added + self.router.distribution * distribution_loss(torch.stack(walk.going.means))
        return logits, added

    def groups(self, model: Any, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters to be optimised as two or four groups, DynamicViT's predictors first; ``part`` says whose."""
        never: Any = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        own = {id(p) for p in model.routers.parameters()} if self.ratios else set()
        found = []
        for part, wanted in (("predictors", True), ("backbone", False)):
            for group in param_groups_weight_decay(model, weight_decay, never):
                parameters = [p for p in group["params"] if (id(p) in own) == wanted]
                found += [{**group, "params": parameters, "part": part}] if parameters else []
        return found

    def factor(self, part: str, share: float) -> float:
        """Of the learning rate of a group, ``share`` (0 to 1) into the training: the backbone's is lower and waits."""
        if not self.leads or part == "predictors":
            return 1.0
        return 0.0 if share < self.router.frozen else self.router.backbone_lr


def needs_recipe(model: nn.Module, router: Router, distil: float) -> bool:
    """Whether cross-entropy on ``model(images)`` is not all of the training."""
    learned = any(isinstance(entry, Predict | Halt) for entry in entries_of(model))
    return learned or distil > 0 or router.warmup is not None


def make_recipe(
    model: nn.Module, router: Router, distil: float, dense: Callable[[], nn.Module] | None
) -> Recipe | None:
    """``dense`` gives the teacher where one is asked for."""
    if not needs_recipe(model, router, distil):
        return None
    taught = has_teacher(router, distil)
    return Recipe(model, router, distil, dense() if taught and dense is not None else None)


def has_teacher(router: Router, distil: float) -> bool:
    return distil > 0 or (router.has(Predict) and router.distil_tokens > 0)


# --- schedules ----------------------------------------------------------------------------------------------------


@contextmanager
def scheduled(model: Any, router: Router, epoch: float) -> Iterator[None]:
    """While EViT warms up, more patches stay than its plan says; evaluation has the plan as it is."""
    if router.warmup is None:
        yield
        return
    plan = model.plan
    begin, end = router.warmup
    try:
        model.plan = {
            i: replace(entry, keep=warm_keep(entry.keep, epoch, begin, end)) if isinstance(entry, Prune) else entry
            for i, entry in plan.items()
        }
        yield
    finally:
        model.plan = plan


def warm_keep(keep: float, epoch: float, begin: float, end: float) -> float:
    """The keep rate: 1 until epoch ``begin``, then a half cosine to ``keep`` at epoch ``end``."""
    progress = min(1.0, max(0.0, (epoch - begin) / (end - begin)))
    return keep + (1 - keep) * 0.5 * (1 + math.cos(math.pi * progress))


# --- losses -------------------------------------------------------------------------------------------------------


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits (B, C), in nats, the mean over the images."""
    wanted, found = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def kept_difference(features: Tensor, wanted: Tensor, keep: Tensor, model: Any) -> Tensor:
    """Mean squared difference (B, N, D) of the patches that are still kept (B, N)."""
    prefix = model.num_prefix_tokens
    kept = keep[:, prefix:].detach().unsqueeze(-1)
    squares = (features[:, prefix:].float() - wanted[:, prefix:].float()).square() * kept
    return squares.sum() / (kept.sum() * features.shape[-1]).clamp(min=1)


def ratio_loss(decisions: list[Tensor], ratios: list[float]) -> Tensor:
    """DynamicViT: (mean keep - ratio)^2, a mean over the stages and the images. ``decisions``: (B, patches) each."""
    means = torch.stack([kept.float().mean(dim=1) for kept in decisions])  # (stages, B)
    return (means - means.new_tensor(ratios).unsqueeze(1)).square().mean()


def halting_target(depth: int) -> Tensor:
    """A-ViT's (depth,): a normal density of one block's width around two thirds of the depth, times 3.2609."""
    blocks = torch.arange(depth, dtype=torch.float32)
    return 3.2609 * torch.distributions.Normal(round(2 * depth / 3), 1.0).log_prob(blocks).exp()


def distribution_loss(means: Tensor) -> Tensor:
    """A-ViT: max(0, mean over the blocks of T (log T - log h)), h the mean halting scores (depth,) divided by their sum
    and clamped to [.01, .99]."""
    target = halting_target(len(means)).to(means)
    h = (means / means.sum().clamp(min=torch.finfo(means.dtype).tiny)).clamp(0.01, 0.99)
    return (torch.xlogy(target, target) - target * h.log()).mean().clamp(min=0)
