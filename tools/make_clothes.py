"""A small detection set that needs no download of photographs: Fashion-MNIST's clothes, coloured, on noise.

    python tools/make_clothes.py --out data/clothes            # 20,000 and 1,000 images of 64 x 64 pixels, a minute
    python src/train.py model=detr_pico data=coco data.root=data/clothes

Each image has one to three clothes, their sides 0.28 to 0.5 of its own, that hide at most a tenth of each other; a box
is where a garment has pixels. The files lie as COCO's do: train2017/, val2017/, annotations/instances_*.json. val2017
shows Fashion-MNIST's test images, train2017 its training images, so no garment is in both. Fashion-MNIST is looked for
as data=fashion_mnist does it: under --root (FashionMNIST/raw), then where Debian's package has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from amod.training.config import CONF, Data
from amod.training.sources import load_one
from amod.training.splits import Source

LEAST, MOST = 0.28, 0.5
"""Side of a garment's picture (28 x 28 in Fashion-MNIST), as a share of the image's."""
HIDDEN = 0.1
"""Largest share of the smaller of two boxes that the other may cover."""


def background(random: np.random.Generator, size: int) -> np.ndarray:
    """Light from the right and from below, soft clouds and fine noise, (size, size, 3) float.

    The light tells where in the image one is. A plain DETR of this size needs it: its values have no positions, so it
    must read them off what it sees, which takes a small backbone far longer.
    """
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
    image = 0.2 * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    ramp = np.linspace(0, 110, size, dtype=np.float32)
    image[..., 0] += ramp[None, :]
    image[..., 1] += ramp[:, None]
    return image + random.normal(0, 12, (size, size, 3))


def box_of(mask: np.ndarray, x: int, y: int) -> tuple[int, int, int, int]:
    """Left, top, width, height of what is True, placed at (x, y)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return x + columns[0], y + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


def covers(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the boxes overlap by more than ``HIDDEN`` of the smaller."""
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0) > HIDDEN * min(one[2] * one[3], other[2] * other[3])


def picture(random: np.random.Generator, source: Source, size: int) -> tuple[np.ndarray, list[tuple[int, tuple]]]:
    """(image (size, size, 3) uint8, [(label, box)])."""
    image, found = background(random, size), []
    for _ in range(random.integers(1, 4)):
        index = int(random.integers(len(source.labels)))
        side = int(random.integers(round(LEAST * size), round(MOST * size) + 1))
        grey = np.asarray(Image.fromarray(source.images[index]).resize((side, side), Image.Resampling.BILINEAR))
        mask = grey > 12
        if random.random() < 0.5:
            grey, mask = grey[:, ::-1], mask[:, ::-1]
        colour = 0.55 + 0.45 * random.random(3, np.float32)
        for _ in range(20):  # where there is room
            x, y = (int(v) for v in random.integers(0, size - side + 1, 2))
            box = box_of(mask, x, y)
            if not any(covers(box, other) for _, other in found):
                place = image[y : y + side, x : x + side]
                place[mask] = (grey[..., None] * colour)[mask]
                found.append((int(source.labels[index]), box))
                break
    return image.clip(0, 255).astype(np.uint8), found


def write(out: Path, part: str, source: Source, count: int, size: int, seed: int) -> None:
    folder = out / f"{part}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        pixels, found = picture(np.random.default_rng([seed, part == "val", i]), source, size)
        name = f"{i:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        images.append({"id": i, "file_name": name, "height": size, "width": size})
        for label, box in found:
            x, y, width, height = (int(v) for v in box)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": i, "category_id": label + 1,
                    "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0,
                }
            )  # fmt: skip
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(source.classes)]
    (out / "annotations").mkdir(exist_ok=True)
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (out / f"annotations/instances_{part}2017.json").write_text(text)
    print(f"{part}2017: {count} images, {len(annotations)} boxes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", default="data", help="the folder with FashionMNIST/raw")
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--val", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from omegaconf import OmegaConf

    usual = OmegaConf.load(CONF / "data/fashion_mnist.yaml")
    fallback = OmegaConf.to_container(usual.fallback)
    cfg = Data(name="fashion_mnist", root=given.root, fallback=fallback, download=True)
    if given.out.exists():
        parser.error(f"--out {given.out} is there already; remove it or name another folder")
    clothes = {key: load_one(cfg, key, None)[0] for key in ("val", "test")}
    half = given.out.with_name(f".{given.out.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    write(half, "train", clothes["val"].source, given.train, given.size, given.seed)  # of the 60,000
    write(half, "val", clothes["test"].source, given.val, given.size, given.seed)
    half.rename(given.out)


if __name__ == "__main__":
    main()
