"""timm's blocks with one half silent: how tokens leave a block between its attention and its MLP.

A block of timm's is ``x = x + attention half(x)``, ``x = x + MLP half(x)``, with norms, scales and drop paths where its
class has them. Its own forward is called with a stand-in for ``self`` that answers everything from the block except
for the parts of one half, which give zeros: x + 0 is x to the last bit. So no block's forward is written again here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from amod.attention import request_in
from amod.dress import Dressed

ATTENTION_HALF = ("norm1", "attn", "ls1", "drop_path1")
MLP_HALF = ("norm2", "mlp", "ls2", "drop_path2")


class CutBlock(Dressed):
    """Over any block of timm's with norm1, attn, norm2 and mlp: answers ``reduce`` and ``rows`` of a request."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, D) -> (B, n, D); without a request, or with one for the attention alone, timm's own forward."""
        request = request_in(args, kwargs)
        forward = self.undressed.forward
        if request is not None and request.halves is not None:
            return request.halves(Halves(self), x)
        if request is not None and request.reduce is not None:
            x = forward(_Silent(self, MLP_HALF), x, *args, **kwargs)
            return forward(_Silent(self, ATTENTION_HALF), request.reduce(x, request.left))
        if request is not None and request.rows is not None:
            return forward(_Asking(self, x), x[:, : request.rows], *args, **kwargs)
        return forward(self, x, *args, **kwargs)


class Halves:
    """The two halves of a block, each for the tokens that it is given: x -> x + half(x)."""

    def __init__(self, block: CutBlock) -> None:
        self.block = block

    def norm(self, x: Tensor, of: str) -> Tensor:
        """What the ``attention`` or ``mlp`` half makes of x first."""
        return (self.block.norm2 if of == "mlp" else self.block.norm1)(x)  # type: ignore[operator]

    def attention(self, x: Tensor, normed: Tensor | None = None, **inputs: Any) -> Tensor:
        """(B, n, D), and its norm where that is there already."""
        return self.block.undressed.forward(_Silent(self.block, MLP_HALF, "norm1", normed), x, **inputs)

    def mlp(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        return self.block.undressed.forward(_Silent(self.block, ATTENTION_HALF, "norm2", normed), x)


def zeros(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_zeros(x.shape[0], 1, 1)


class _Silent:
    """The block without the parts named, and with ``normed`` in the place of what its norm ``known`` would give."""

    def __init__(self, block: Any, parts: tuple[str, ...], known: str = "", normed: Tensor | None = None) -> None:
        self.block, self.parts = block, parts
        if normed is not None:
            setattr(self, known, lambda x: normed)

    def __getattr__(self, name: str) -> Any:
        return zeros if name in self.parts else getattr(self.block, name)


class _Asking:
    """The block on a few rows, whose attention half looks at all of ``tokens``."""

    def __init__(self, block: Any, tokens: Tensor) -> None:
        self.block, self.tokens, self.whole = block, tokens, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def norm1(self, x: Tensor) -> Tensor:
        return self.block.norm1(self._first(x))

    def attn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block.attn(self._first(x), *args, **kwargs)

    def _first(self, x: Tensor) -> Tensor:
        """All tokens to whichever of the two comes first: the norm, or in post-norm blocks the attention."""
        first, self.whole = not self.whole, True
        return self.tokens if first else x


class Steps:
    """The steps in the place of timm's ``blocks``: they are counted, sliced, walked through, or called in a row.

    Args:
        blocks: the module that they are in the place of, whose own hooks are called where timm calls it as a whole.
    """

    def __init__(self, steps: list[Callable[..., Tensor]], blocks: nn.Module | None = None) -> None:
        self.steps, self.blocks = steps, blocks

    def __bool__(self) -> bool:
        return True  # for torch.compile before 2.14, which asks this of an instance without attributes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter(self.steps)

    def __getitem__(self, at: slice) -> Steps:
        return Steps(self.steps[at])

    def __call__(self, x: Tensor) -> Tensor:
        if self.blocks is not None and (self.blocks._forward_hooks or self.blocks._forward_pre_hooks):
            watched = copy.copy(self.blocks)
            watched.forward = self.in_a_row  # type: ignore[method-assign]
            return watched(x)
        return self.in_a_row(x)

    def in_a_row(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x
