"""From files on disk to three splits. torchvision reads the annotations, the images are opened later.

Official splits are kept. What a set lacks is split from its training part by ``data.split_seed``, the same for every
run seed: by each file's own name (data.split_by=name), or by its place in the order of the files, stratified by class.
"""

from __future__ import annotations

import gzip
import logging
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from timm.data import ImageNetInfo
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.imagenet import META_FILE, load_meta_file

from amod.errors import UserError, one_line
from amod.files import expanded
from amod.image_files import hidden, is_image
from amod.training.config import Data
from amod.training.data import locate
from amod.training.splits import Source, Split

log = logging.getLogger(__name__)


def load(cfg: Data, classes: Sequence[str] | None = None) -> dict[str, Split]:
    """The splits train, val and test, fetched if asked for and found nowhere; UserError otherwise.

    ``classes``: the labels follow these names, of which the data may have some only.
    """
    parts, _ = read_parts(cfg, classes)
    splits = {key: Split(source, np.arange(len(source.labels))) for key, source in parts.items()}
    for key, fraction in (("test", cfg.test_fraction), ("val", cfg.val_fraction)):
        if key not in splits:
            whole = splits["train"]
            if cfg.split_by == "name":
                splits["train"], splits[key] = whole.cut_by_name(fraction, cfg.split_seed, key)
            else:
                splits["train"], splits[key] = whole.cut(fraction, cfg.split_seed)
            if not (len(splits["train"]) and len(splits[key])):
                raise UserError(f"data.{key}_fraction={fraction}: leaves {key} or train empty, of {len(whole)} images")
    for key, split in splits.items() if classes is None else ():
        counts = np.bincount(split.labels, minlength=len(split.source.classes))
        if bare := [name for name, count in zip(split.source.classes, counts, strict=True) if not count]:
            more = f", ... ({len(bare)} in all)" if len(bare) > 5 else ""
            log.warning("warning: no %s images of %s%s", key, ", ".join(bare[:5]), more)
    return {key: splits[key] for key in ("train", "val", "test")}


def load_one(cfg: Data, key: str, classes: Sequence[str] | None) -> tuple[Split, int]:
    """The images that a trained model is measured on, and of how many they are a part.

    ``key``: test, val, or all that there is. A folder may hold no more than what is measured.
    """
    parts, folder = read_parts(cfg, classes, key)
    if key == "all":
        sources = list(parts.values())
        labels = np.concatenate([source.labels for source in sources])
        first = sources[0].images
        images: Any = [image for source in sources for image in source.images]
        images = np.stack(images) if isinstance(first, np.ndarray) else images
        root = sources[0].root if len(sources) == 1 else str(folder)
        return Split(Source(images, labels, sources[0].classes, root), np.arange(len(labels))), len(labels)
    if key in parts and key != "train":
        return Split(parts[key], np.arange(len(parts[key].labels))), len(parts[key].labels)
    if "train" not in parts:
        raise UserError(f"split={key}: {folder} has {' and '.join(parts)} only; choose that, or split=all")
    split = load(cfg, classes)[key]
    return split, len(split.source.labels)


def read_parts(cfg: Data, classes: Sequence[str] | None, only: str | None = None) -> tuple[dict[str, Source], Path]:
    """What the files say, before anything is split off; ``only``: it is to be measured, and the rest may be missing."""
    name = cfg.name
    try:
        folder = locate(cfg, only == "test")
    except UserError:
        if not cfg.download:
            raise
        _download(name, expanded(cfg.root))
        folder = locate(cfg)
    try:
        parts = _folder(folder, cfg, partial=only is not None) if name == "folder" else READERS[name](folder, cfg)
    except UserError:
        raise
    except Exception as error:  # whatever torchvision and scipy make of a broken file
        raise UserError(f"data={name}: cannot be read from {folder} ({one_line(error)})") from error

    for key, source in parts.items():
        if not len(source.labels):
            raise UserError(f"data={name}: no {key} images in {folder}")
        if classes is None:
            _check(name, folder, source, cfg.num_classes)
        parts[key] = source = source if source.root else replace(source, root=str(folder))
        if classes is not None:
            parts[key] = aligned(source, classes, folder)
    return parts, folder


def aligned(source: Source, classes: Sequence[str], folder: Path) -> Source:
    """The same images with labels that follow ``classes``, by name."""
    if source.classes == list(classes):  # as with ImageNet, two of whose classes are called crane
        return source
    if unknown := [name for name in source.classes if name not in classes]:
        raise UserError(
            f"data.root: {folder} has classes that the model does not know ({', '.join(unknown[:5])}); it knows "
            f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}; rename or leave out the class folders"
        )
    if twice := [name for name in source.classes if list(classes).count(name) > 1]:
        raise UserError(
            f"data.root: {folder}: {twice[0]} names two classes of the model, and nothing tells which is meant; leave "
            "it out, or give all of the model's classes"
        )
    place = np.array([classes.index(name) for name in source.classes])
    return replace(source, labels=place[source.labels], classes=list(classes))


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


def _imagenet(folder: Path, cfg: Data) -> dict[str, Source]:
    """1,281,167 train images and the 50,000 of val/, which are the papers' test set."""
    folders = {"train": folder / "train", "test": folder / "val"}
    parts = {key: _folder_source(place) for key, place in folders.items() if place.is_dir()}  # test alone: to measure
    _same_classes(parts)
    if (folder / META_FILE).is_file():
        names = load_meta_file(folder)[0]
        for source in parts.values():
            source.classes[:] = [names[synset][0] if synset in names else synset for synset in source.classes]
    return parts


def _imagenette(folder: Path, cfg: Data) -> dict[str, Source]:
    """Ten easy classes of ImageNet, 9469 train images and the 3925 of val/ as the test set; or what the folder holds.

    The classes go by the first of their ImageNet names ("tench"), a folder that is no synset by its own.
    """
    parts = {"train": _folder_source(folder / "train"), "test": _folder_source(folder / "val")}
    _same_classes(parts)
    described = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    assert isinstance(described, dict)
    for source in parts.values():
        source.classes[:] = [
            described[name].partition(",")[0] if name in described else name for name in source.classes
        ]
    return parts


def _flowers(folder: Path, cfg: Data) -> dict[str, Source]:
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
    if cfg.train_on == "train+val":
        train, val = parts["train"], parts.pop("val")
        parts["train"] = _source([*train.images, *val.images], [*train.labels, *val.labels], train.classes)
    return parts


def _cars(folder: Path, cfg: Data) -> dict[str, Source]:
    """8144 train and 8041 test images."""
    _check_mat(folder / "devkit/cars_meta.mat", "class_names")
    _check_mat(folder / "devkit/cars_train_annos.mat", "annotations", "class")
    _check_mat(folder / "cars_test_annos_withlabels.mat", "annotations", "class")
    data = {part: datasets.StanfordCars(folder.parent, part) for part in ("train", "test")}
    return {part: _pairs(d._samples, d.classes) for part, d in data.items()}


def _pets(folder: Path, cfg: Data) -> dict[str, Source]:
    """3680 trainval and 3669 test images."""
    data = {key: datasets.OxfordIIITPet(folder.parent, part) for key, part in (("train", "trainval"), ("test",) * 2)}
    return {key: _source(d._images, d._labels, d.classes) for key, d in data.items()}


def _fashion_mnist(folder: Path, cfg: Data) -> dict[str, Source]:
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
        if cfg.background == "noise":
            images = np.where(images, images, noise.integers(1, 256, images.shape, np.uint8))
        parts[key] = Source(images, labels.astype(np.int64), list(datasets.FashionMNIST.classes))
    return parts


def _digits(folder: Path, cfg: Data) -> dict[str, Source]:
    """scikit-learn's 1797 handwritten digits, 8 x 8 pixels in 17 greys; test and val are both split off."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return {"train": Source(images, digits.target.astype(np.int64), [str(name) for name in digits.target_names])}


SPLIT_NAMES = {"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing", "eval"}


def _folder(folder: Path, cfg: Data, partial: bool = False) -> dict[str, Source]:
    """train/ [val/] [test/] of class folders, or the class folders alone; a missing part is split off.

    ``partial``: there may be a val/ or test/ alone.
    """
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not hidden(entry.name)]
    parts = ("train", "val", "test")
    known = parts if "train" in names or (partial and names and set(names) <= set(parts)) else ()
    for name in names:
        if name not in known and (known or name.casefold() in SPLIT_NAMES):
            raise UserError(
                f"{folder / name}: is it a part or a class? Name the parts train, val and test (lower case) and put "
                "every class folder inside them, or use class folders alone"
            )
    if not known:
        return {"train": _folder_source(folder)}
    found = {key: _folder_source(folder / key) for key in known if (folder / key).is_dir()}
    if not partial:
        _same_classes(found)
    return found


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


class VisibleFolders(datasets.ImageFolder):
    """torchvision's class folders without what programs leave beside them."""

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not hidden(e.name))
        if not names:
            raise FileNotFoundError(f"no class folder in {directory}")
        return names, {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: dict[str, int], *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        """torchvision's, which would pass over folders that cannot be read, and follow a link that leads back."""
        seen = {os.path.realpath(directory)}
        for name in class_to_idx:
            for place, _, _ in os.walk(os.path.join(directory, name), onerror=_unreadable, followlinks=True):
                if (real := os.path.realpath(place)) in seen:
                    raise UserError(f"{place}: is {real} once more, by a link; remove the link")
                seen.add(real)
        return datasets.ImageFolder.make_dataset(directory, class_to_idx, *args, **kwargs)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable, or leave it out")


def _folder_source(folder: Path) -> Source:
    """Every image below ``folder``, by class; how many files of other endings are left out is said."""
    left: Counter[str] = Counter()
    start = len(str(folder)) + 1

    def take(path: str) -> bool:
        *inner, name = path[start:].split(os.sep)
        if any(map(hidden, inner)) or hidden(name):
            return False
        if not is_image(name):
            left["/".join([*inner, f"*{os.path.splitext(name)[1]}"])] += 1
        return is_image(name)

    try:
        data = VisibleFolders(folder, is_valid_file=take)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: {one_line(error)}; every class needs a folder with at least one image "
            f"({', '.join(IMG_EXTENSIONS)})"
        ) from error
    if left:
        shown = ", ".join(f"{count} of {kind}" for kind, count in left.most_common(5))
        log.warning("%s: %d files are no images by their ending and are left out: %s", folder, left.total(), shown)
    return Source([path for path, _ in data.samples], np.array(data.targets, dtype=np.int64), data.classes, str(folder))


def _same_classes(parts: Mapping[str, Source]) -> None:
    for key, source in parts.items():
        if odd := set(next(iter(parts.values())).classes) ^ set(source.classes):
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
