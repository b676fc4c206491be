"""How A-ViT's attention is fastest, whose images have different numbers of tokens: filled up to the longest, in groups
of images sorted by length, or as torch's nested tensors; and what src/amod/attention.py does, groups of four where the
lengths differ much. Prints medians and quartiles of filled / way within a round, the ways in turns, one thread.

    OMP_NUM_THREADS=1 python tools/packed_attention.py --rounds 30
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from amod.analysis.throughput.timing import alternate, paired
from amod.attention import attend_packed
from amod.reduce import pack

WAYS = ("2 groups", "4 groups", "8 groups", "nested", "ours")


def ours(q: Tensor, k: Tensor, v: Tensor, image: Tensor) -> Tensor:
    return attend_packed(q, k, v, pack(image))


def sorted_groups(q: Tensor, k: Tensor, v: Tensor, image: Tensor, groups: int) -> Tensor:
    """The images sorted by length, and as many of neighbouring lengths filled up to the longest among them."""
    counts = torch.bincount(image)
    starts = counts.cumsum(0) - counts
    out = torch.empty_like(q)
    for part in counts.argsort().chunk(groups):
        longest = int(counts[part].max())
        slots = starts[part].unsqueeze(1) + torch.arange(longest)
        real = torch.arange(longest) < counts[part].unsqueeze(1)
        at = slots.clamp(max=len(image) - 1)
        mine = [t[0].transpose(0, 1)[at].transpose(1, 2) for t in (q, k, v)]
        mask = None if bool(real.all()) else real[:, None, None, :]
        done = F.scaled_dot_product_attention(*mine, attn_mask=mask)
        out[0].transpose(0, 1)[slots[real]] = done.transpose(1, 2)[real]
    return out


def nested(q: Tensor, k: Tensor, v: Tensor, image: Tensor) -> Tensor:
    counts = torch.bincount(image)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    rows = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    jagged = [torch.nested.nested_tensor_from_jagged(t, offsets).transpose(1, 2) for t in rows]
    done = F.scaled_dot_product_attention(*jagged)
    return done.transpose(1, 2).values().transpose(0, 1).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| images | tokens left (shortest to longest) | " + " | ".join(WAYS) + " |")
    print("|---|---|" + "---|" * len(WAYS))
    for images, (least, most) in itertools.product((8, 32), ((180, 197), (100, 197), (10, 197), (10, 65))):
        torch.manual_seed(0)
        counts = torch.randint(least, most + 1, (images,))
        image = torch.arange(images).repeat_interleave(counts)
        q, k, v = torch.randn(3, 1, 6, len(image), 64).unbind()
        given = (q, k, v, image)
        ways = {"filled": partial(sorted_groups, *given, 1), "nested": partial(nested, *given)}
        ways["ours"] = partial(ours, *given)
        ways |= {f"{n} groups": partial(sorted_groups, *given, n) for n in (2, 4, 8)}
        with torch.inference_mode():
            for way in ways.values():
                torch.testing.assert_close(way(), ways["filled"]())
            seconds, _ = alternate(ways, rounds, fill=0.02)
        ratios = [paired(seconds["filled"], seconds[name]) for name in WAYS]
        row = [f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" for ratio in ratios]
        print(f"| {images} | {least} to {most} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
