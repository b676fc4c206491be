"""Tiny data sets in their true on-disk formats. Each function writes below ``root`` and returns ``root``.

torchvision checks the md5 sums of Flowers102's two .mat files, which invented ones cannot have. In a test use
``accept_fake_flowers(monkeypatch)``; for a command in a subprocess pass ``env=fake_flowers_env(tmp_path)``.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib.recfunctions import drop_fields
from PIL import Image
from scipy.io import savemat


def image(path: Path, size: tuple[int, int] = (40, 32), seed: int = 0) -> Path:
    """A noise image of (width, height) pixels in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def truncate(path: Path) -> Path:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def png_bomb(path: Path) -> Path:
    """A valid PNG header of 10,000 x 10,000 pixels, above the limit at which PIL only warns."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def flowers(root: Path, train: int = 1, val: int = 1, test: int = 1) -> Path:
    """Flowers102: so many images of each of the 102 classes. Numbers are shuffled, as in the original."""
    folder = root / "flowers-102"
    per_class = train + val + test
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(1, 103), per_class))
    ids = {"trnid": [], "valid": [], "tstid": []}
    for label in range(1, 103):
        mine = (np.flatnonzero(labels == label) + 1).tolist()
        ids["trnid"] += mine[:train]
        ids["valid"] += mine[train : train + val]
        ids["tstid"] += mine[train + val :]
    for number in range(1, len(labels) + 1):
        image(folder / f"jpg/image_{number:05d}.jpg", seed=number)
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    savemat(folder / "setid.mat", {key: np.array([value], dtype=np.uint16) for key, value in ids.items()})
    return root


def accept_fake_flowers(monkeypatch) -> None:
    from torchvision.datasets import Flowers102

    files = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def fake_flowers_env(folder: Path) -> dict[str, str]:
    """The environment for a subprocess whose torchvision takes any Flowers102 .mat file (sitecustomize.py)."""
    site = folder / "accept_fake_flowers"
    site.mkdir(parents=True, exist_ok=True)
    # torchvision is patched when it is imported, not here: the command must stay quick until it needs it.
    (site / "sitecustomize.py").write_text(
        "import importlib.machinery, sys\n"
        "class Patch(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name != 'torchvision.datasets.flowers102':\n"
        "            return None\n"
        "        spec = importlib.machinery.PathFinder.find_spec(name, path, target)\n"
        "        run = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            run(module)\n"
        "            files = module.Flowers102._file_dict\n"
        "            module.Flowers102._file_dict = {k: (n, None) for k, (n, _) in files.items()}\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Patch)\n"
    )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def cars(root: Path, train: int = 2, test: int = 1, classes: int = 196) -> Path:
    """StanfordCars: so many images of each class."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([f"Maker Model {number}" for number in range(classes)], dtype=object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    kinds = [(key, "i4") for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")] + [("fname", "O")]
    for part, count in (("train", train), ("test", test)):
        rows = [(1, 1, 30, 30, i % classes + 1, f"{i + 1:05d}.jpg") for i in range(count * classes)]
        annotations = np.array(rows, dtype=kinds)[None]
        for row in rows:
            image(folder / f"cars_{part}" / row[-1], seed=row[-2])
        if part == "train":
            savemat(folder / "devkit/cars_train_annos.mat", {"annotations": annotations})
        else:
            savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})
            unlabelled = drop_fields(annotations, "class")
            savemat(folder / "devkit/cars_test_annos.mat", {"annotations": unlabelled})
    return root


def pets(root: Path, trainval: int = 2, test: int = 1) -> Path:
    """OxfordIIITPet: so many images of each of 37 breeds."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, count, first in (("trainval", trainval, 1), ("test", test, 100)):
        lines = []
        for label in range(1, 38):
            for number in range(first, first + count):
                name = f"breed_{label:02d}_{number}"
                image(folder / f"images/{name}.jpg", seed=label)
                lines.append(f"{name} {label} {1 + label % 2} 1\n")
        (folder / f"annotations/{part}.txt").write_text("".join(lines))
    return root


def fashion_mnist(root: Path, train: int = 200, test: int = 50, compressed: bool = False) -> Path:
    """FashionMNIST: the four idx files, gzipped as they are published or not as torchvision leaves them."""
    folder = root / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        rng = np.random.RandomState(count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.randint(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            file = folder / f"{name}-ubyte"
            if compressed:
                Path(f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                file.write_bytes(data)
    return root


def image_folder(root: Path, classes: int = 3, per_class: int = 10, parts: tuple[str, ...] = ()) -> Path:
    """Class folders, in ``parts`` (train, val, test) or directly in ``root``."""
    for part in parts or ("",):
        for label in range(classes):
            for number in range(per_class):
                image(root / part / f"class_{label}" / f"{number}.png", seed=label * 100 + number)
    return root


def imagenet(root: Path, classes: int = 4, train: int = 10, val: int = 2) -> Path:
    """ImageNet: synset folders in imagenet/{train,val}, and torchvision's meta.bin."""
    folder = root / "imagenet"
    synsets = [f"n{1440764 + 7 * label:08d}" for label in range(classes)]
    for part, count in (("train", train), ("val", val)):
        for label, synset in enumerate(synsets):
            for number in range(count):
                name = f"{synset}_{number}" if part == "train" else f"ILSVRC2012_val_{label * val + number:08d}"
                image(folder / part / synset / f"{name}.JPEG", seed=label)
    names = {synset: (f"animal {label}", f"beast {label}") for label, synset in enumerate(synsets)}
    torch.save((names, [synset for synset in synsets for _ in range(val)]), folder / "meta.bin")
    return root


SYNSETS = {"n01440764": "tench", "n02102040": "English springer", "n03445777": "golf ball"}


def imagenette(folder: Path, train: int = 10, val: int = 2, synsets: tuple[str, ...] = tuple(SYNSETS)) -> Path:
    """Imagenette's layout: synset folders in train/ and val/ of ``folder``, which is returned."""
    for part, count in (("train", train), ("val", val)):
        for label, synset in enumerate(synsets):
            for number in range(count):
                image(folder / part / synset / f"{synset}_{number}.JPEG", seed=label * 100 + number)
    return folder
