"""The ways to score tokens. A new router is one small class here, its name in ``ROUTERS``, and one YAML file.

A router sees the tokens that enter its block, x (B, N, D), and, if it is listed in ``entries.READS_ATTENTION``, what
the attention of the block before left of it (B, N); it returns scores (B, N) in float32. Only their order decides
which tokens are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amod.routing import no_autocast, wide


class Router(nn.Module):
    """Base: no parameters, and the kept tokens' update is not weighted."""

    differentiable = False
    """Whether a gradient flows back through what it reads of the attention before."""

    def forward(self, x: Tensor, attention: Tensor | None) -> Tensor:
        """(B, N, D), (B, N) or None -> (B, N) float32."""
        raise NotImplementedError

    def multiplier(self, scores: Tensor) -> Tensor | None:
        """(B, N) -> r (B, N), the factor on a kept token's update f(x); None stands for 1."""
        return None


class AttentionRouter(Router):
    """A-MoD (Eq. 4 and 5): R_j is the column mean of the previous block's attention; nothing multiplies.

    The same class serves ``class_attention``, which reads the class token's row instead (EViT's score), and
    ``class_attention_value``, that row times the norm of the values.
    """

    def forward(self, x: Tensor, attention: Tensor | None) -> Tensor:
        assert attention is not None, "convert() refuses a block that has no attention before it"
        return attention


class AttentionWeightedRouter(AttentionRouter):
    """A.5's ablation: A-MoD's scores, used as in Eq. 2, so that they multiply and carry a gradient."""

    differentiable = True

    def multiplier(self, scores: Tensor) -> Tensor:
        return scores


class ReversedRouter(AttentionRouter):
    """The other control: the tokens that the others look at least. A score that means something must beat it."""

    def forward(self, x: Tensor, attention: Tensor | None) -> Tensor:
        return -super().forward(x, attention)


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """w . x, (B, N, D) and (D,) -> (B, N), in float32 or the wider of the two types."""
    x = wide(x)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return x.to(dtype) @ weight.to(x.device, dtype)


class LinearRouter(Router):
    """Standard MoD (Eq. 1 and 2): r_i = w . x_i, no bias, and x'_i = r_i f(x_i) + x_i gives w its gradient.

    Args:
        activation: ``none`` as in the paper, or ``sigmoid`` on the score.
    """

    def __init__(self, dim: int, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)  # nn.Linear's own default

    def forward(self, x: Tensor, attention: Tensor | None) -> Tensor:
        with no_autocast(x.device.type):
            scores = projected(x, self.weight)
        return scores.sigmoid() if self.activation == "sigmoid" else scores

    def multiplier(self, scores: Tensor) -> Tensor:
        return scores


class GateRouter(nn.Module):
    """Router-Tuning's: w . x of a layer's normalised input, without a bias; zero at first, so that every gate is open.

    Args:
        per_sequence: of the mean of x over the tokens.
    """

    def __init__(self, dim: int, per_sequence: bool) -> None:
        super().__init__()
        self.per_sequence = per_sequence
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, N, D) -> logits (B, N), or (B, 1), in float32. ``real`` (B, N): which tokens a mean is of."""
        with no_autocast(x.device.type):
            logits = projected(x, self.weight)
            if not self.per_sequence:
                return logits
            if real is None:
                return logits.mean(dim=1, keepdim=True)
            return (logits * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)


class RandomRouter(Router):
    """The control that the paper lacks: uniform scores, new at every call, from torch's global generator."""

    def forward(self, x: Tensor, attention: Tensor | None) -> Tensor:
        return torch.rand(x.shape[:2], device=x.device)


class Predictor(nn.Module):
    """DynamicViT's: for every patch, the log-probabilities of staying and of going.

    Half of what it makes of a patch stays the patch's own, half becomes the mean over the patches that are still there.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.output = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, n, D), and (B, n) of 1 for those that are still there, None for all -> (B, n, 2)."""
        own, others = self.input(patches).chunk(2, dim=-1)
        if kept is None:
            mean = others.mean(dim=1, keepdim=True)
        else:
            kept = kept.unsqueeze(-1).to(others.dtype)
            mean = (others * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        return self.output(torch.cat([own, mean.expand_as(others)], dim=-1)).log_softmax(dim=-1)


ROUTERS: dict[str, type[Router]] = {
    "attention": AttentionRouter,
    "attention_weighted": AttentionWeightedRouter,
    "class_attention": AttentionRouter,
    "class_attention_value": AttentionRouter,
    "linear": LinearRouter,
    "random": RandomRouter,
    "reversed": ReversedRouter,
}


def make_router(name: str, dim: int, activation: str = "none") -> Router:
    """The router of a plan's entry, for tokens of width ``dim``."""
    return LinearRouter(dim, activation) if ROUTERS[name] is LinearRouter else ROUTERS[name]()
