"""The one exception that stands for a mistake in what was asked, not in this code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class UserError(ValueError):
    """A wrong value, file or combination. The message is one line: the value, what is allowed, what to do.

    Commands print it as ``error: ...`` and exit with status 2; the library raises it as it is.
    """


def one_line(error: BaseException) -> str:
    """Type and text of an error, for a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def unreadable(path: object, error: BaseException | str) -> UserError:
    """Of a file of results, which is damaged."""
    said = error if isinstance(error, str) else one_line(error)
    return UserError(f"{path}: cannot be read ({said}); bring it back from version control, or delete it")


@contextmanager
def reachable(place: str, use: str = "looked at", instead: str = "name a place that you may read") -> Iterator[None]:
    """Around the first look at a place that was named: somebody else's folder, say, or a name that is too long."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place}: cannot be {use} ({error.strerror}); {instead}") from error


def writable(place: str) -> AbstractContextManager[None]:
    """Around the first writing in a place that was named."""
    return reachable(place, "written", "name another folder")


def shown(value: object) -> str:
    """A setting's value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def misfits(wanted: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """In words, every key and shape in which ``state`` is not the state dict that is ``wanted``."""
    problems = [f"{key} is missing" for key in wanted if key not in state]
    problems += [f"{key} is not of this model" for key in state if key not in wanted]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    return problems
