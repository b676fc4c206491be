"""data.json, what a run folder knows of its data: the names of the classes, and which images each split has.

Labels follow the names; a resumed run must find the very images that it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amod.errors import UserError
from amod.training.splits import Split
from amod.training.terminal import say

# A fingerprint has the names of all images, and of so many the first so many bytes.
LOOKED_INTO, BYTES = 256, 65_536


def record_of(splits: Mapping[str, Split]) -> dict[str, Any]:
    """Of splits of images. Another task's has no classes, and a split's first entry is how many samples it has."""
    classes = next(iter(splits.values())).source.classes
    return {"classes": list(classes), "splits": {key: about(split) for key, split in splits.items()}}


def about(split: Split) -> dict[str, Any]:
    counts = np.bincount(split.labels, minlength=len(split.source.classes))
    return {"images": len(split), "of_each_class": counts.tolist(), "fingerprint": fingerprint(split)}


def fingerprint(split: Split) -> str:
    """Hex digits that change with an image's name, class or pixels, and not with the place where the data lie."""
    source, digest = split.source, hashlib.blake2b(digest_size=8)
    names = sorted((source.name(i), source.classes[source.labels[i]], i) for i in split.indices.tolist())
    for name, label, _ in names:
        digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
    if isinstance(source.images, np.ndarray):
        digest.update(source.images[split.indices].tobytes())
        return digest.hexdigest()
    for place in np.unique(np.linspace(0, len(names) - 1, min(len(names), LOOKED_INTO)).astype(int)):
        try:
            with open(source.images[names[place][2]], "rb") as file:
                digest.update(file.read(BYTES))
        except OSError:  # data.on_error decides what becomes of it
            digest.update(b"unreadable")
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """A run folder's record; None in a folder of before there was one."""
    try:
        record = json.loads((folder / "data.json").read_text())
        assert all(isinstance(record[key], kind) for key, kind in (("classes", list), ("splits", dict)))
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception:  # whatever the bytes make the reader raise
        raise UserError(f"{folder / 'data.json'}: is no record of a run's data; put the run's own file back") from None


def classes_of(folder: Path) -> list[str] | None:
    record = read_record(folder)
    return None if record is None else record["classes"]


def check_same(record: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Path, root: str) -> None:
    """A run goes on with the data that it began with."""
    if record is None:
        return
    start_anew = "put them back to go on, or start a new run with another run_dir"
    if odd := differ(record["classes"], now["classes"]):
        raise UserError(f"data.root={root}: the run in {folder} was begun with other classes ({odd}); {start_anew}")
    for key, found in now["splits"].items():
        before = record["splits"][key]
        if before != found:
            unit = next(iter(found))
            then, here = before.get(unit), found[unit]
            counts = f"{then} then, {here} now" if then != here else "as many"
            raise UserError(
                f"data.root={root}: the run in {folder} was begun with other {key} {unit} ({counts}); {start_anew}"
            )


def say_origin(split: str, now: Mapping[str, Any], record: Mapping[str, Any] | None, trained: str = "") -> None:
    """Whether a finished run is measured on its own data. ``now``: what is found of the split, of the training split
    where ``split`` is ``all``; ``trained``: what else is to be said of data that are not the run's own.
    """
    if record is None:
        return
    before, unit = record["splits"]["train" if split == "all" else split], next(iter(now))
    if split != "all" and now != before:
        say(f"they are not the run's own {split} {unit} (it had {before[unit]}){trained}")
    elif split == "all" and now == before:
        say(f"warning: it was trained on {now[unit]} of these {unit}")
    elif split == "all":
        say(f"warning: it may have been trained on some of these {unit}, which are not all as they were then")


def differ(one: Sequence[str], other: Sequence[str]) -> str:
    """The first names that only one of two has, or the order in words; empty where they are the same."""
    if list(one) == list(other):
        return ""
    return ", ".join(sorted({*one} ^ {*other})[:5]) or "in another order"
