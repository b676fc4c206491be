"""Which blocks are routed. Pure Python, so that a command can check it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

from amod.errors import UserError

PLACEMENTS = {
    "alternate": "every second block, the first one dense: 1, 3, 5, ... (the paper)",
    "last8": "every second of the last eight blocks: 4, 6, 8, 10 of 12, the first four dense (Sec. 4.5)",
}


def routed_blocks(placement: str | Sequence[int], depth: int, reads_attention: bool) -> tuple[int, ...]:
    """Ascending 0-based indices of the routed blocks of a model of ``depth`` blocks.

    Raises:
        UserError: an unknown name; an index twice, outside the model, or 0 with a router that reads the
            attention of the block before.
    """
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise UserError(
                f"placement={placement!r}: choose one of {', '.join(PLACEMENTS)}, or a list of block indices"
            )
        start = 1 if placement == "alternate" else max(depth - 8, 0)
        blocks: Sequence[int] = range(start, depth, 2)
    elif isinstance(placement, Iterable):
        blocks = [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in placement]
    else:
        raise UserError(f"placement={placement!r}: must be one of {', '.join(PLACEMENTS)}, or a list of block indices")
    if not blocks:
        raise UserError(f"placement={placement!r}: routes none of this model's {depth} blocks; router=none is dense")
    for i in blocks:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < depth:
            raise UserError(f"placement: block {i!r} is not one of 0 to {depth - 1}, the blocks of this model")
        if i == 0 and reads_attention:
            raise UserError(
                "placement: block 0 has no block before it whose attention could route it; start at block 1, "
                "or use router=linear or random"
            )
    if len(set(blocks)) != len(blocks):
        raise UserError(f"placement: a block is listed twice in {list(blocks)}; list each block once")
    return tuple(sorted(blocks))
