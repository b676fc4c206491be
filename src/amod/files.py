"""How work is written down, a file whole, or a line of JSON for each finished thing; and a saved model's file names."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from amod.errors import UserError, reachable, writable

WEIGHTS, ROUTERS, CONFIG, CARD = "model.safetensors", "routers.safetensors", "config.json", "README.md"
"""Of a saved model: for whoever writes them and whoever reads them."""


def write_atomically(path: Path, data: bytes | memoryview, keep: Path | None = None) -> None:
    """Write to a temporary name in the same folder, then rename: a reader sees the old file or the new, whole.

    The old file becomes ``keep``, which for a moment is the only one of the two. The temporary name is always the same
    (one process writes in a run folder), so that kills leave no pile of them. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room or make it writable, and run the same command "
            "again; what was written before is intact"
        ) from error


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A .csv, by ``write_atomically``; names of files that are no UTF-8 are written as the bytes that they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def expanded(path: str | Path) -> Path:
    """The path with the home folder for its ``~``; as it is where nobody of that name has one."""
    return Path(os.path.expanduser(path))


def check_model_folder(folder: Path, named: str | None = None) -> None:
    """UserError for a place where no saved model can be, ``named`` as it was asked for: nothing is made."""
    named = named or str(folder)
    with reachable(named):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{named}: is a file; name a folder for the model")
        if (folder / "config.yaml").is_file():
            raise UserError(f"{named}: is a training run's folder, which is read as that run; name another")


def make_folder(folder: Path, named: str | None = None) -> None:
    """The folder and those above it, ``named`` as it was asked for in the UserError where it cannot be."""
    with writable(named or f"{folder}"):
        folder.mkdir(parents=True, exist_ok=True)


def check_place(folder: Path) -> None:
    """UserError unless a folder can be made or written in there; the folders above it are made."""
    with writable(f"{folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder if folder.exists() else folder.parent).close()


class Ledger:
    """A file with a line for each thing that is finished, so that work which was stopped goes on behind it.

    Args:
        file: made, with its folder, where it is not there. A last line that was cut off in writing is dropped.
        about: what it is of, its first line; None: it has no such line.

    Raises:
        UserError: it is no such file, is of something else, or cannot be written; it is left as it is.
    """

    lines: list[dict[str, Any]]
    """What is finished."""

    def __init__(self, file: str | Path, about: Mapping[str, Any] | None = None) -> None:
        self.file, head = Path(file), [] if about is None else [json.dumps(about)]
        with reachable(str(file)):
            if self.file.is_dir():
                raise UserError(f"{file}: is a folder; name a file")
            text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        whole, torn = text.splitlines(), False
        if whole and record_of(whole[-1]) is None:
            torn = whole.pop().startswith("{")
        records = [record for line in whole if (record := record_of(line)) is not None]
        if len(records) < len(whole) or (text and not whole and not torn):
            raise UserError(f"{file}: is no file of finished work; name another")
        if head and records and records[0] != (wanted := json.loads(head[0])):
            other = [key for key in {**wanted, **records[0]} if records[0].get(key) != wanted.get(key)]
            raise UserError(f"{file}: is of other {', '.join(other)}; name another file, or remove it")
        self.lines = records[len(head) :]
        with suppress(OSError):  # said in writing
            self.file.parent.mkdir(parents=True, exist_ok=True)
        if (now := "".join(f"{line}\n" for line in whole or head)) != text:
            write_atomically(self.file, now.encode())

    def add(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record)
        self.lines.append(json.loads(line))
        with writable(str(self.file)), self.file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def record_of(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None
