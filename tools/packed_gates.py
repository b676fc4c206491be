"""How the attention of kept tokens is fastest, whose number differs from image to image, in a whole model: in one row,
or filled up to the most that an image keeps. ViT-S, batch 32, gates in six of twelve blocks that are open for 0.45 of
an image's tokens, with a spread over images of 0.2. Prints medians and quartiles of dense / way within a round.

    OMP_NUM_THREADS=1 python tools/packed_gates.py --rounds 15
"""

from __future__ import annotations

import argparse
import itertools

import timm
import torch
from torch import Tensor, nn

import amod
from amod.analysis.throughput.timing import alternate, paired
from amod.walk import Walk

PACKS = Walk.packs


class Drawn(nn.Module):
    """In a router's place: the same gates at every call."""

    def forward(self, x: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        share = (0.45 + 0.2 * torch.randn(len(x), 1, generator=draw)).clamp(0.05, 0.95)
        return share - torch.rand(x.shape[:2], generator=draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for size, skip in itertools.product((128, 224), ("attention", "block")):
        vit = timm.create_model("vit_small_patch16_224", img_size=size).eval()
        model = amod.convert(vit, "tuning", skip=skip, layers=range(5, 11))
        model.routers = nn.ModuleDict({i: Drawn() for i in model.routers})
        images = torch.randn(32, 3, size, size)

        def run(packs: bool, model=model, images=images) -> Tensor:
            Walk.packs = PACKS if packs else lambda *_: False
            return model(images)

        ways = {
            "dense": lambda vit=vit, images=images: vit(images),
            "in a row": lambda run=run: run(True),
            "filled up": lambda run=run: run(False),
        }
        with torch.inference_mode():
            torch.testing.assert_close(ways["in a row"](), ways["filled up"](), atol=1e-4, rtol=1e-4)
            seconds, _ = alternate(ways, rounds, fill=0.02)
        for way in ("in a row", "filled up"):
            found = paired(seconds["dense"], seconds[way])
            print(f"{size} pixels, {skip}, {way}: {found.median:.2f} [{found.low:.2f}, {found.high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
