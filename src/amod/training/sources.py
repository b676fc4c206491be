"""From files on disk to three splits. torchvision reads the annotations, the images are opened later.

Official splits are kept. What a set lacks is split from its training part, stratified by class, by
``data.split_seed``: the same for every run seed.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from timm.data import ImageNetInfo
from torchvision import datasets
from torchvision.datasets.imagenet import META_FILE, load_meta_file

from amod.errors import UserError, one_line
from amod.training.data import locate


@dataclass(frozen=True)
class Source:
    """Images as paths or as one uint8 array (N, H, W), with one label each."""

    images: Sequence[str] | np.ndarray
    labels: np.ndarray
    classes: list[str]

    def name(self, index: int) -> str:
        return f"image {index}" if isinstance(self.images, np.ndarray) else self.images[index]


@dataclass(frozen=True)
class Split:
    """The part of a source that ``indices`` names."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    def cut(self, fraction: float, seed: int) -> tuple[Split, Split]:
        """(rest, part): the part has round(fraction * n) samples, of each class its share to within one."""
        # Sorted by class (shuffled inside a class), an evenly spaced comb takes the same share of each class.
        # RandomState because numpy promises that its stream never changes.
        order = np.random.RandomState(seed).permutation(len(self))
        order = order[np.argsort(self.labels[order], kind="stable")]
        count = round(fraction * len(self))
        comb = ((np.arange(count) + 0.5) * len(self) / count).astype(int)
        part = np.zeros(len(self), dtype=bool)
        part[order[comb]] = True
        return Split(self.source, self.indices[~part]), Split(self.source, self.indices[part])


def load(cfg: Mapping[str, Any]) -> dict[str, Split]:
    """The splits train, val and test of ``cfg``, fetched if asked for and found nowhere; UserError otherwise."""
    name = cfg["name"]
    try:
        folder = locate(cfg)
    except UserError:
        if not cfg.get("download"):
            raise
        _download(name, Path(cfg["root"]).expanduser())
        folder = locate(cfg)
    try:
        parts = READERS[name](folder, cfg)
    except UserError:
        raise
    except Exception as error:  # whatever torchvision and scipy make of a broken file
        raise UserError(f"data={name}: cannot be read from {folder} ({one_line(error)})") from error

    for key, source in parts.items():
        if not len(source.labels):
            raise UserError(f"data={name}: no {key} images in {folder}")
        _check(name, folder, source, cfg.get("num_classes"))
    splits = {key: Split(source, np.arange(len(source.labels))) for key, source in parts.items()}
    for key in ("test", "val"):
        if key not in splits:
            whole, fraction = splits["train"], cfg[f"{key}_fraction"]
            splits["train"], splits[key] = whole.cut(fraction, cfg["split_seed"])
            if not (len(splits["train"]) and len(splits[key])):
                raise UserError(f"data.{key}_fraction={fraction}: leaves {key} or train empty, of {len(whole)} images")
    return {key: splits[key] for key in ("train", "val", "test")}


def _check(name: str, folder: Path, source: Source, num_classes: int | None) -> None:
    if len(source.classes) < 2:
        raise UserError(f"data={name}: {folder} has one class, {source.classes[0]}; give at least two class folders")
    if num_classes is not None and len(source.classes) != num_classes:
        raise UserError(f"data.num_classes={num_classes}: data={name} has {len(source.classes)} classes")
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= len(source.classes)))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"data={name}: {source.name(first)} has label {source.labels[first]}, "
            f"outside 0..{len(source.classes) - 1}; {len(wrong)} such labels"
        )


def _download(name: str, root: Path) -> None:
    sets = {
        "imagenette": partial(datasets.Imagenette, size="320px"),
        "flowers": datasets.Flowers102,
        "pets": datasets.OxfordIIITPet,
        "fashion_mnist": datasets.FashionMNIST,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # the processes of a multi-device run arrive together
            sets[name](root, download=True)
    except Exception as error:
        raise UserError(
            f"data={name}: the download to {root} failed ({one_line(error)}); try again, or get the files by hand: "
            f"conf/data/{name}.yaml says where they belong"
        ) from error


def _imagenet(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """1,281,167 train images and the 50,000 of val/, which are the papers' test set."""
    parts = {"train": _folder_source(folder / "train"), "test": _folder_source(folder / "val")}
    _same_classes(parts)
    if (folder / META_FILE).is_file():
        names = load_meta_file(folder)[0]
        for source in parts.values():
            source.classes[:] = [names[synset][0] if synset in names else synset for synset in source.classes]
    return parts


def _imagenette(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """Ten easy classes of ImageNet, 9469 train images and the 3925 of val/ as the test set; or what the folder holds.

    The classes go by the first of their ImageNet names ("tench"), a folder that is no synset by its own.
    """
    parts = {"train": _folder_source(folder / "train"), "test": _folder_source(folder / "val")}
    _same_classes(parts)
    described = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    assert isinstance(described, dict)
    for source in parts.values():
        source.classes[:] = [described.get(name, name).partition(",")[0] for name in source.classes]
    return parts


def _flowers(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """1020 train, 1020 val, 6149 test images; ``train_on: train+val`` pools 2040 and splits val anew."""
    _check_mat(folder / "imagelabels.mat", "labels")
    _check_mat(folder / "setid.mat", "trnid")
    parts = {}
    for part in ("train", "val", "test"):
        try:
            data = datasets.Flowers102(folder.parent, part)
        except RuntimeError as error:
            raise UserError(
                f"data=flowers: imagelabels.mat or setid.mat in {folder} is not the original (md5); "
                "delete both and add data.download=true"
            ) from error
        parts[part] = _source(data._image_files, data._labels, data.classes)
    if cfg["train_on"] == "train+val":
        train, val = parts["train"], parts.pop("val")
        parts["train"] = _source([*train.images, *val.images], [*train.labels, *val.labels], train.classes)
    return parts


def _cars(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """8144 train and 8041 test images."""
    _check_mat(folder / "devkit/cars_meta.mat", "class_names")
    _check_mat(folder / "devkit/cars_train_annos.mat", "annotations", "class")
    _check_mat(folder / "cars_test_annos_withlabels.mat", "annotations", "class")
    data = {part: datasets.StanfordCars(folder.parent, part) for part in ("train", "test")}
    return {part: _pairs(d._samples, d.classes) for part, d in data.items()}


def _pets(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """3680 trainval and 3669 test images."""
    data = {key: datasets.OxfordIIITPet(folder.parent, part) for key, part in (("train", "trainval"), ("test",) * 2)}
    return {key: _source(d._images, d._labels, d.classes) for key, d in data.items()}


def _fashion_mnist(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """60,000 train and 10,000 test images of 28 x 28 pixels, gzipped (as Debian ships them) or not.

    ``background: noise`` puts a grey drawn for each pixel in the place of black, which half of all pixels are: no patch
    is constant then. Every image keeps its noise.
    """
    parts = {}
    noise = np.random.default_rng(0)
    for key, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(next(folder.glob(f"{prefix}-images-idx3-ubyte*")), 3)
        labels = _read_idx(next(folder.glob(f"{prefix}-labels-idx1-ubyte*")), 1)
        if len(images) != len(labels):
            raise UserError(f"data=fashion_mnist: {len(images)} {prefix} images but {len(labels)} labels in {folder}")
        if cfg.get("background") == "noise":  # runs of before this setting have none
            images = np.where(images, images, noise.integers(1, 256, images.shape, np.uint8))
        parts[key] = Source(images, labels.astype(np.int64), list(datasets.FashionMNIST.classes))
    return parts


def _digits(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels in 17 greys; test and val are both split off."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {"train": Source(images, digits.target.astype(np.int64), [str(name) for name in digits.target_names])}


SPLIT_NAMES = {"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing", "eval"}


def _folder(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Source]:
    """train/ [val/] [test/] of class folders, or the class folders alone; a missing part is split off."""
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    known = ("train", "val", "test") if "train" in names else ()
    for name in names:
        if name not in known and (known or name.casefold() in SPLIT_NAMES):
            raise UserError(
                f"{folder / name}: is it a part or a class? Name the parts train, val and test (lower case) and put "
                "every class folder inside them, or use class folders alone"
            )
    if not known:
        return {"train": _folder_source(folder)}
    parts = {key: _folder_source(folder / key) for key in ("train", "val", "test") if (folder / key).is_dir()}
    _same_classes(parts)
    return parts


READERS = {
    "imagenet": _imagenet,
    "imagenette": _imagenette,
    "flowers": _flowers,
    "cars": _cars,
    "pets": _pets,
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
    "folder": _folder,
}


def _source(images: Sequence[Any], labels: Sequence[int], classes: Sequence[str]) -> Source:
    return Source([str(path) for path in images], np.asarray(labels, dtype=np.int64), list(classes))


def _pairs(samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> Source:
    return _source([path for path, _ in samples], [label for _, label in samples], classes)


def _folder_source(folder: Path) -> Source:
    try:
        data = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {one_line(error)}; every class needs a folder with at least one image") from error
    return _pairs(data.samples, data.classes)


def _same_classes(parts: Mapping[str, Source]) -> None:
    for key, source in parts.items():
        if odd := set(parts["train"].classes) ^ set(source.classes):
            raise UserError(f"the class folders of train and {key} differ: {', '.join(sorted(odd)[:5])}")


def _check_mat(file: Path, key: str, field: str | None = None) -> None:
    """torchvision's errors about a .mat file do not name it."""
    from scipy.io import loadmat

    try:
        value = loadmat(file, squeeze_me=True)[key]
        if field is not None and field not in (value.dtype.names or ()):
            raise KeyError(field)
    except Exception as error:
        raise UserError(f"{file}: not the file it should be ({one_line(error)}); get it again") from error


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes; torchvision's own reader cannot read the gzipped form."""
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        shape = struct.unpack_from(f">{dimensions}I", raw, 4)
        if raw[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"starts with {raw[:4].hex()}, not 000008{dimensions:02x}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except Exception as error:
        raise UserError(f"{file}: not an idx file of {dimensions} dimensions ({one_line(error)})") from error
