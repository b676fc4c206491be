"""Files of finished work: what was finished is never lost, and what is somebody else's stays as it is."""

from __future__ import annotations

import pytest

import amod
from amod.files import Ledger

ABOUT = {"seed": 0, "model": "toy"}


@pytest.mark.parametrize("about", [ABOUT, None])
def test_a_line_that_was_cut_off_is_dropped_and_the_rest_goes_on(tmp_path, about):
    file = tmp_path / "new" / "cells.jsonl"
    for number in range(3):
        Ledger(file, about).add({"cell": number, "at": (1, 2)})
    whole = file.read_text()
    for cut in range(len(whole.splitlines(keepends=True)[-1])):  # killed while it wrote the last one
        file.write_text(whole[: len(whole) - 1 - cut])
        ledger = Ledger(file, about)
        assert [line["cell"] for line in ledger.lines] == [0, 1, 2][: 3 if cut == 0 else 2]
        if cut:
            ledger.add({"cell": 2, "at": [1, 2]})
            assert ledger.lines[-1] == {"cell": 2, "at": [1, 2]}
        assert file.read_text() == whole


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("my notes", "is no file of finished work"),
        ("\n", "is no file of finished work"),
        ("[1]\n", "is no file of finished work"),
        ('{"seed": 0, "model": "toy"}\nnotes\n{"cell": 0}\n', "is no file of finished work"),
        ('{"seed": 1, "model": "toy", "size": 8}\n{"cell": 0}\n', "is of other seed, size; name another file"),
    ],
)
def test_what_is_somebody_elses_is_refused_and_left(tmp_path, text, problem):
    file = tmp_path / "cells.jsonl"
    file.write_text(text)
    with pytest.raises(amod.UserError, match=problem):
        Ledger(file, ABOUT)
    assert file.read_text() == text


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(amod.UserError, match="is a folder; name a file"):
        Ledger(tmp_path)
    ledger = Ledger(tmp_path / "cells.jsonl", ABOUT)
    ledger.file.unlink()
    ledger.file.symlink_to("/dev/full")
    with pytest.raises(amod.UserError, match=r"cells.jsonl: cannot be written \(No space left on device\)"):
        ledger.add({"a": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(amod.UserError, match="cannot be"):
        Ledger(tmp_path / "file" / "cells.jsonl", ABOUT)
