"""What an image file is taken for: upright, on white, and never in silence left out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fakes
from amod.errors import UserError
from amod.image_files import open_rgb
from amod.training.config import Data
from amod.training.sources import load


def pixels(file: Path) -> np.ndarray:
    return np.asarray(open_rgb(str(file)))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_photograph_is_upright(tmp_path, orientation, turn, suffix):
    """As a phone writes it: the pixels lie, and EXIF says how to turn them."""
    lying = Image.fromarray(np.uint8(np.arange(30 * 20 * 3).reshape(30, 20, 3) % 256))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        expected = stored.convert("RGB").transpose(turn)
    assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.asarray(expected))


def strokes(mode: str) -> Image.Image:
    """A black stroke where it is opaque, and black where it is not: as drawing programs save it."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 3] = 255
    if mode == "RGBA":
        return Image.merge("RGBA", [Image.new("L", (8, 8))] * 3 + [Image.fromarray(alpha)])
    if mode == "LA":
        return Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(alpha)])
    image = Image.fromarray(np.uint8(alpha == 0), "P" if mode == "P" else "L")  # 0: the stroke; 1: see-through
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 0, 0])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = strokes(mode)
    image.save(tmp_path / "a.png", **({"transparency": 1} if mode in "PL" else {}))
    found = pixels(tmp_path / "a.png")
    assert (found[2:6, 3] == 0).all()
    assert (found[:, 0] == 255).all()


def test_an_opaque_image_is_what_it_was(tmp_path):
    fakes.image(tmp_path / "a.png", seed=3)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(image))


def test_what_programs_leave_is_no_class_and_no_image(tmp_path):
    fakes.image_folder(tmp_path)
    for name in (".ipynb_checkpoints/0.png", "class_0/.ipynb_checkpoints/0-checkpoint.png", "class_1/._0.png"):
        fakes.image(tmp_path / name)
    fakes.image(tmp_path / "__MACOSX/class_0/0.png")
    splits = load(Data(name="folder", root=str(tmp_path)))
    assert splits["train"].source.classes == ["class_0", "class_1", "class_2"]
    assert sum(map(len, splits.values())) == 30


def test_files_that_are_left_out_are_said(tmp_path, caplog):
    fakes.image_folder(tmp_path)
    for number in range(10):
        fakes.image(tmp_path / f"class_0/{number}.gif")
    (tmp_path / "class_1/notes.txt").touch()
    with caplog.at_level(logging.WARNING, "amod"):
        load(Data(name="folder", root=str(tmp_path)))
    assert (
        "11 files are no images by their ending and are left out: 10 of class_0/*.gif, 1 of class_1/*.txt"
        in caplog.text
    )


def test_a_class_of_unread_endings_is_refused(tmp_path):
    fakes.image_folder(tmp_path)
    fakes.image(tmp_path / "gifs/0.gif")
    with pytest.raises(UserError, match=r"gifs.*every class needs a folder with at least one image \(\.jpg, "):
        load(Data(name="folder", root=str(tmp_path)))
