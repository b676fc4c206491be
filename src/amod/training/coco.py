"""Images and boxes as COCO has them: train2017/, val2017/, annotations/instances_*.json -> splits, samples, batches.

val2017 is the test split, as papers report it; a part of train2017 (``data.val_fraction``, by each file's own name) is
the validation split, which chooses the epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from amod.errors import UserError, one_line
from amod.training.config import Augment, Data, Schedule
from amod.training.data import check_data, locate
from amod.training.loaders import DataModule, Samples
from amod.training.splits import Source, Split

SLACK = 1.0
"""Pixels by which a box may stand out of its image: rounding. It is cut off."""


@dataclass(frozen=True)
class Annotated(Source):
    """Images as paths, with boxes; ``labels`` is how many boxes each has."""

    boxes: Sequence[np.ndarray] = ()
    """Of each image (n, 4): left, top, right, bottom in pixels."""
    kinds: Sequence[np.ndarray] = ()
    """(n,), places in ``classes``."""
    crowds: Sequence[np.ndarray] = ()
    """(n,) bool: a crowd in one box, which is not learnt from, and no mistake to find."""
    sizes: Sequence[tuple[int, int]] = ()
    """Of each image its height and width in pixels, as the annotation file has them."""
    ids: Sequence[int] = ()
    """Of each class its number in the annotation file."""


def read_part(folder: Path, part: str) -> Annotated:
    """``part`` is train or val. UserError for a file that does not fit: what, where, how many more."""
    file = folder / f"annotations/instances_{part}2017.json"
    try:
        data = json.loads(file.read_text())
        categories = {int(kind["id"]): str(kind["name"]) for kind in data["categories"]}
        images = {int(i["id"]): (str(i["file_name"]), float(i["width"]), float(i["height"])) for i in data["images"]}
        found = [
            (n["id"], int(n["image_id"]), int(n["category_id"]), [float(v) for v in n["bbox"]], bool(n.get("iscrowd")))
            for n in data["annotations"]
        ]
    except Exception as error:  # whatever the bytes make the reader raise
        raise UserError(f"{file}: is no COCO annotation of boxes ({one_line(error)}); get it again") from None
    here = {entry.name for entry in os.scandir(folder / f"{part}2017")}
    missing = [name for name, _, _ in images.values() if name not in here]
    if missing or not images:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f"names {missing[0]}{more}, which {part}2017/ lacks" if missing else "names no images"
        raise UserError(f"{file}: {what}; put the images of this annotation file there")
    kinds = {number: place for place, number in enumerate(sorted(categories))}
    per_image: dict[int, list[tuple[list[float], int, bool]]] = {number: [] for number in images}
    for number, image, kind, box, crowd in found:
        if image not in images or kind not in kinds or len(box) != 4:
            odd = f"image_id {image}" if image not in images else f"category_id {kind}" if kind not in kinds else box
            raise UserError(f"{file}: annotation {number} has {odd}, which the file does not have; get it again")
        name, width, height = images[image]
        if not all(math.isfinite(value) for value in box) or min(box[2:]) < 0:
            raise UserError(
                f"{file}: annotation {number} has the box {box}; a box is [left, top, width, height] in pixels"
            )
        left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
        if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
            raise UserError(
                f"{file}: annotation {number} has the box {box} outside of {name}, which is {width:g} x {height:g}; "
                "a box is [left, top, width, height] in pixels"
            )
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if right > left and bottom > top:  # COCO has a few without an area, which the original leaves out too
            per_image[image].append(([left, top, right, bottom], kinds[kind], crowd))
    lists = [*per_image.values()]
    if not any(lists):
        raise UserError(f"{file}: has no box with an area, so nothing can be learnt or measured; get it again")
    return Annotated(
        images=[str(folder / f"{part}2017" / name) for name, _, _ in images.values()],
        labels=np.array([len(entries) for entries in lists]),
        classes=[categories[number] for number in sorted(categories)],
        root=str(folder),
        boxes=[np.array([box for box, _, _ in entries], np.float32).reshape(-1, 4) for entries in lists],
        kinds=[np.array([kind for _, kind, _ in entries], np.int64) for entries in lists],
        crowds=[np.array([crowd for _, _, crowd in entries], bool) for entries in lists],
        sizes=[(int(height), int(width)) for _, width, height in images.values()],
        ids=sorted(categories),
    )


def load(cfg: Data, only_test: bool = False) -> dict[str, Split]:
    """The splits train, val and test; or test alone, for which train2017 need not be there."""
    check_data(cfg, only_test)
    folder = locate(cfg, only_test)
    test = read_part(folder, "val")
    found = {"test": Split(test, np.arange(len(test.images)))}
    if only_test:
        return found
    train = read_part(folder, "train")
    if train.classes != test.classes:
        raise UserError(f"{folder}/annotations: the two files have different categories; get both from one release")
    rest, val = Split(train, np.arange(len(train.images))).cut_by_name(cfg.val_fraction, cfg.split_seed, "val")
    if not (len(rest) and len(val)):
        raise UserError(f"data.val_fraction={cfg.val_fraction}: leaves val or train empty, of {len(train.images)}")
    return {"train": rest, "val": val} | found


# --- samples --------------------------------------------------------------------------------------------------------


def transforms(size: Sequence[int], augment: Augment) -> tuple[Any, Any]:
    """(for training, for evaluation): ``size`` is the shorter side and the longest that the longer may have."""
    short, longest = size
    end = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]
    sides = augment.sides or [short]
    training: list[Any] = [v2.RandomHorizontalFlip(augment.hflip or 0.0)]
    if augment.crop:
        training.append(v2.RandomIoUCrop())
    training += [v2.RandomShortestSize(sides, longest), v2.SanitizeBoundingBoxes(labels_getter=by_name), *end]
    return v2.Compose(training), v2.Compose([v2.Resize(short, max_size=max(longest, short + 1)), *end])


def by_name(inputs: Any) -> Any:
    """What of a sample loses an entry with every box that is lost."""
    return inputs[1]["class_labels"], inputs[1]["iscrowd"]


class Boxed(Samples):
    """Samples (image (3, H, W), target, index). A target has what transformers' loss reads, ``class_labels`` (n,) and
    ``boxes`` (n, 4) as centre and size in shares of the image, without crowds; and for the metric ``size`` (2,), the
    image's height and width as it lies on disk, with ``xyxy``, ``kinds`` and ``iscrowd`` of all its boxes there."""

    upright = False  # boxes are of the pixels as they are stored

    def prepared(self, image: Image.Image, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        source: Any = self.split.source
        size = image.height, image.width
        if size != source.sizes[index]:
            said = "its annotation file says {1} x {0}".format(*source.sizes[index])
            raise UserError(
                f"{source.images[index]}: has {image.width} x {image.height} pixels and {said}; get it again"
            )
        xyxy, kinds = torch.from_numpy(source.boxes[index]), torch.from_numpy(source.kinds[index])
        crowd = torch.from_numpy(source.crowds[index])
        boxes = tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=size)  # type: ignore[call-arg]
        pixels, target = self.transform(image, {"boxes": boxes, "class_labels": kinds, "iscrowd": crowd})
        height, width = pixels.shape[-2:]
        left, top, right, bottom = target["boxes"].as_subclass(Tensor).unbind(1)
        shares = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)
        learnt = ~target["iscrowd"]
        return pixels.as_subclass(Tensor), {
            "class_labels": target["class_labels"][learnt],
            "boxes": (shares / torch.tensor([width, height, width, height]))[learnt],
            "size": torch.tensor(size),
            "xyxy": xyxy,
            "kinds": kinds,
            "iscrowd": crowd,
        }


def join(samples: Sequence[Any]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], Tensor]:
    """Images (B, 3, H, W), right and below padded with zeros to the largest; masks (B, H, W), 1 where there is image;
    targets; indices (B,)."""
    height, width = (max(image.shape[axis] for image, _, _ in samples) for axis in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    masks = torch.zeros(len(samples), height, width, dtype=torch.long)
    for b, (image, _, _) in enumerate(samples):
        images[b, :, : image.shape[1], : image.shape[2]] = image
        masks[b, : image.shape[1], : image.shape[2]] = 1
    return images, masks, [target for _, target, _ in samples], torch.tensor([index for _, _, index in samples])


class CocoData(DataModule):
    """Loaders of the splits; ``size`` as in :func:`transforms`."""

    join = staticmethod(join)

    def __init__(
        self, cfg: Data, splits: Mapping[str, Split], size: Sequence[int], schedule: Schedule, seed: int
    ) -> None:
        super().__init__(cfg, splits, schedule.batch_size, schedule.eval_batch_size, seed)
        self.train_transform, self.eval_transform = transforms(size, schedule.augment)

    @property
    def source(self) -> Annotated:
        return next(iter(self.splits.values())).source

    @property
    def class_names(self) -> list[str]:
        return self.source.classes

    def samples(self, key: str, train: bool) -> Boxed:
        if train:
            return Boxed(self.splits[key], self.train_transform, self.seed, self.skip, refill=True)
        return Boxed(self.splits[key], self.eval_transform, None, self.skip, refill=False)

    def record(self) -> dict[str, Any]:
        return {"classes": self.class_names, "splits": {key: about(split) for key, split in self.splits.items()}}


def about(split: Split) -> dict[str, Any]:
    """How many images and boxes, and hex digits that change with their names, boxes and classes."""
    source: Any = split.source
    digest = hashlib.blake2b(digest_size=8)
    for index in sorted(split.indices.tolist(), key=source.name):
        digest.update(f"{source.name(index)}\0".encode(errors="surrogateescape"))
        digest.update(source.boxes[index].tobytes() + source.kinds[index].tobytes())
    return {
        "images": len(split),
        "boxes": int(split.labels.sum()),
        "fingerprint": digest.hexdigest(),
    }
