"""Which files are images, and their pixels as RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS


def hidden(name: str) -> bool:
    """What programs leave beside images: .ipynb_checkpoints, ._copies, __MACOSX, @eaDir."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def is_image(name: str) -> bool:
    """By its ending."""
    return name.lower().endswith(IMG_EXTENSIONS)


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its folders but hidden ones, by their names."""
    found = [path for path in folder.rglob("*") if not any(map(hidden, path.relative_to(folder).parts))]
    return sorted(path for path in found if path.is_file())


def images_below(folder: Path) -> list[Path]:
    """Those of :func:`files_below` that are images."""
    return [file for file in files_below(folder) if is_image(file.name)]


def open_rgb(file: str | Path, upright: bool = True) -> Image.Image:
    """The image as 8-bit RGB, upright as its EXIF data say or else as it is stored, on white where it is transparent.

    16-bit grey is scaled down; PIL's own conversion would clip nearly all of it to white.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened) if upright else opened
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its 32-bit pixels have no fixed range; save it with 8 or 16 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
