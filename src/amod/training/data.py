"""Which data sets there are, and where their files must lie.

Importing this module costs nothing, so a missing file is reported before torch is loaded. The rest is in
``sources.py`` (files on disk -> images, labels, splits) and ``loaders.py`` (randomness, batches, resume).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from amod.errors import UserError, reachable
from amod.files import expanded
from amod.training.config import Data


@dataclass(frozen=True)
class Layout:
    """Where a data set lies: ``folder`` is looked for in ``data.root``, ``files`` are patterns inside it, of which
    ``test_files`` are enough to measure a trained model on the test images.

    With ``any_name``, ``data.root`` may be that folder itself, whatever it is called.
    """

    folder: str
    files: tuple[str, ...]
    get: str
    can_download: bool = False
    test_files: tuple[str, ...] = ()
    any_name: bool = False


_DOWNLOAD = "add data.download=true to fetch it"

LAYOUTS = {
    "imagenet": Layout(
        "imagenet",
        ("train/*/*", "val/*/*"),
        "register at image-net.org, unpack ILSVRC2012 so that train/ and val/ hold one folder per synset",
        test_files=("val/*/*",),
    ),
    "imagenette": Layout(
        "imagenette2-320",
        ("train/*/*", "val/*/*"),
        f"{_DOWNLOAD} (340 MB), or name a folder that holds train/ and val/ with a folder per synset",
        can_download=True,
        any_name=True,
    ),
    "flowers": Layout("flowers-102", ("jpg/*.jpg", "imagelabels.mat", "setid.mat"), _DOWNLOAD, True),
    "cars": Layout(
        "stanford_cars",
        (
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train/*.jpg",
            "cars_test/*.jpg",
        ),
        "it can only be had by hand: github.com/pytorch/vision/issues/7545 says where",
    ),
    "pets": Layout(
        "oxford-iiit-pet",
        ("images/*.jpg", "annotations/trainval.txt", "annotations/test.txt"),
        _DOWNLOAD,
        True,
    ),
    "fashion_mnist": Layout(
        "FashionMNIST/raw",
        tuple(
            f"{part}-ubyte*"
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        ),
        f"{_DOWNLOAD} (30 MB), or install Debian's package dataset-fashion-mnist",
        True,
    ),
    "text": Layout("", ("**/*.txt",), "point data.root at a folder of .txt files"),
    "digits": Layout("", (), "it comes with scikit-learn"),
    "coco": Layout(
        "coco",
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017/*", "val2017/*"),
        "get train2017, val2017 and annotations_trainval2017 from cocodataset.org, or make a small set by "
        "tools/make_clothes.py",
        test_files=("annotations/instances_val2017.json", "val2017/*"),
        any_name=True,
    ),
    "folder": Layout("", ("*/*",), "point data.root at a folder of class folders, or of train/ [val/] [test/]"),
}


def check_data(cfg: Data, test_only: bool = False) -> None:
    """Raise UserError for a missing file of a data set; reads none."""
    layout = LAYOUTS[cfg.name]
    if not cfg.download:
        locate(cfg, test_only)
    elif not layout.can_download:
        raise UserError(f"data.download=true: data={cfg.name} cannot be downloaded; {layout.get}")


def moved(data: Data, root: str | None) -> Data:
    """A run's data in the folder where they are now; None: where they were."""
    if root is None:
        return data
    layout = LAYOUTS[data.name]
    if not layout.files:
        raise UserError(f"data.root={root}: data={data.name} lie in no folder, {layout.get}; leave it out")
    return data.model_copy(update={"root": root})


def typed_root(data: Data) -> str | None:
    """The ``data.root`` of a command that measures a run, where it is typed or not the default."""
    typed = any(argument.startswith("data.root=") for argument in sys.argv[1:])
    return data.root if typed or data.root != os.environ.get("AMOD_DATA", "data") else None


def locate(cfg: Data, test_only: bool = False) -> Path:
    """The folder that holds all of a data set's files; UserError says what is missing and how to get it."""
    name, layout = cfg.name, LAYOUTS[cfg.name]
    files = (test_only and layout.test_files) or layout.files
    if not files:
        return Path()
    root = expanded(cfg.root).absolute()
    places = [root / layout.folder]
    if layout.folder and (layout.any_name or root.name == places[0].name):
        places.append(root)
    places += [expanded(place) for place in cfg.fallback]
    with reachable(f"data.root={root}"):
        for place in places:
            if all(_found(place, pattern) for pattern in files):
                return place
        place = places[0]
        found = place.is_dir()
    if not found:
        looked = ", ".join(map(str, places))
        raise UserError(f"data={name}: no data in {looked}; {layout.get}, or set data.root=FOLDER (or AMOD_DATA)")
    missing = [pattern for pattern in files if not _found(place, pattern)]
    elsewhere = _found_deeper(place, missing[0])
    hint = f"found {elsewhere}: move it to where it belongs" if elsewhere else layout.get
    raise UserError(f"data={name}: {', '.join(str(place / pattern) for pattern in missing)} missing; {hint}")


def _found(place: Path, pattern: str) -> Path | None:
    return next(place.glob(pattern), None)


def _found_deeper(place: Path, pattern: str) -> Path | None:
    """The same file one folder too deep, as archives that hold their own name as a folder leave it."""
    parts = pattern.split("/")
    for at in range(len(parts)):
        if hit := _found(place, "/".join([*parts[:at], "*", *parts[at:]])):
            return hit
    return None
