"""Which data sets there are, where their files must lie, and the one call that makes loaders of them.

Importing this module costs nothing, so a missing file is reported before torch is loaded. The rest is in
``sources.py`` (files on disk -> images, labels, splits) and ``loaders.py`` (randomness, batches, resume).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amod.errors import UserError, reachable

if TYPE_CHECKING:
    from amod.training.loaders import DataModule


@dataclass(frozen=True)
class Layout:
    """Where a data set lies: ``folder`` is looked for in ``data.root``, ``files`` are patterns inside it.

    With ``any_name``, ``data.root`` may be that folder itself, whatever it is called.
    """

    folder: str
    files: tuple[str, ...]
    get: str
    can_download: bool = False
    any_name: bool = False


_DOWNLOAD = "add data.download=true to fetch it"

LAYOUTS = {
    "imagenet": Layout(
        "imagenet",
        ("train/*/*", "val/*/*"),
        "register at image-net.org, unpack ILSVRC2012 so that train/ and val/ hold one folder per synset",
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
    "digits": Layout("", (), "it comes with scikit-learn"),
    "folder": Layout("", ("*/*",), "point data.root at a folder of class folders, or of train/ [val/] [test/]"),
}


def check_data(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for a wrong value or a missing file of the ``data`` config; reads no file."""
    choices = {
        "name": tuple(LAYOUTS),
        "on_error": ("stop", "skip"),
        "train_on": ("train", "train+val"),
        "background": ("black", "noise"),
        "download": (True, False),
    }
    for key, allowed in choices.items():
        if key in cfg and cfg[key] not in allowed:
            raise UserError(f"data.{key}={cfg[key]}: must be one of {', '.join(map(str, allowed))}")
    for key in ("val_fraction", "test_fraction", "split_seed"):
        if key in cfg and cfg[key] is None:
            raise UserError(
                f"data.{key}=null: must be a number; leave it out for the one of conf/data/{cfg['name']}.yaml"
            )
    for key in ("val_fraction", "test_fraction", "crop_pct"):
        value, most = cfg.get(key), 1.0 if key == "crop_pct" else 0.99
        if value is not None and not (type(value) in (int, float) and 0 < value <= most):
            raise UserError(f"data.{key}={value}: must be a number above 0, at most {most}")
    for key, least in (("num_workers", 0), ("num_classes", 2), ("split_seed", 0)):
        value = cfg.get(key)
        if value is not None and not (type(value) is int and least <= value < 2**32):
            raise UserError(f"data.{key}={value}: must be a whole number of at least {least} and below 2**32")
    layout = LAYOUTS[cfg["name"]]
    if not cfg.get("download"):
        locate(cfg)
    elif not layout.can_download:
        raise UserError(f"data.download=true: data={cfg['name']} cannot be downloaded; {layout.get}")


def locate(cfg: Mapping[str, Any]) -> Path:
    """The folder that holds all of a data set's files; UserError says what is missing and how to get it."""
    name, layout = cfg["name"], LAYOUTS[cfg["name"]]
    if not layout.files:
        return Path()
    root = Path(cfg["root"]).expanduser().absolute()
    places = [root / layout.folder]
    if layout.folder and (layout.any_name or root.name == places[0].name):
        places.append(root)
    places += [Path(place).expanduser() for place in cfg.get("fallback") or ()]
    with reachable(f"data.root={root}"):
        for place in places:
            if all(_found(place, pattern) for pattern in layout.files):
                return place
        place = places[0]
        found = place.is_dir()
    if not found:
        looked = ", ".join(map(str, places))
        raise UserError(f"data={name}: no data in {looked}; {layout.get}, or set data.root=FOLDER (or AMOD_DATA)")
    missing = [pattern for pattern in layout.files if not _found(place, pattern)]
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


def build_datamodule(
    data_cfg: Mapping[str, Any],
    input_cfg: Mapping[str, Any],
    augment: Mapping[str, Any] | None,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
) -> DataModule:
    """Read the data set and make its loaders.

    ``input_cfg`` is timm's ``resolve_model_data_config`` (input_size, mean, std, interpolation, crop_pct) and
    ``augment`` holds arguments of timm's ``create_transform``. Batch sizes are per process. Raises UserError.
    """
    from amod.training import loaders, sources

    check_data(data_cfg)
    splits = sources.load(data_cfg)
    return loaders.DataModule(data_cfg, splits, input_cfg, augment or {}, batch_size, eval_batch_size, seed)
