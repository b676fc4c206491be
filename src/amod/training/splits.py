"""Images with labels, and how a part of them is split off: by each file's own name, or stratified by its place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def draw_of(name: str) -> float:
    """A number in [0, 1) that a name always has."""
    written = name.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "little") / 2**64


@dataclass(frozen=True)
class Source:
    """Images as paths or as one uint8 array (N, H, W), with one label each; paths begin with ``root``."""

    images: Sequence[str] | np.ndarray
    labels: np.ndarray
    classes: list[str]
    root: str = ""

    def name(self, index: int) -> str:
        """What an image is called, wherever its data set lies."""
        if isinstance(self.images, np.ndarray):
            return f"image {index}"
        return os.path.relpath(self.images[index], self.root) if self.root else self.images[index]


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

    def cut_by_name(self, fraction: float, seed: int, key: str) -> tuple[Split, Split]:
        """(rest, part): whether an image is in the part depends on its own name alone, so that none that is added or
        removed moves another. The part has about ``fraction`` of the images.
        """

        draws = (draw_of(f"{seed}/{key}/{self.source.name(index)}") for index in self.indices.tolist())
        part = np.array([draw < fraction for draw in draws], dtype=bool)
        return Split(self.source, self.indices[~part]), Split(self.source, self.indices[part])

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
