"""What goes wrong on a machine, not in a config or in this code: one line, with what to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from amod.errors import UserError

SMALLER = "a smaller schedule.batch_size (schedule.accumulate makes up for it) or schedule.eval_batch_size"
# Words of the error -> what it is, and what to try.
TROUBLES = {
    ("shared memory", "unable to write to file </torch_", "</torch_", "bus error"): (
        "the loader's workers have too little shared memory (/dev/shm)",
        "data.num_workers=0, or a larger /dev/shm (docker run --shm-size=8g)",
    ),
    ("dataloader worker",): (
        "a worker of the data loader was killed, mostly because memory ran out",
        "data.num_workers=0 or fewer than now",
    ),
    ("received 0 items of ancdata", "too many open files"): (
        "the loader's workers have too many files open",
        "data.num_workers=0 or fewer than now, or ulimit -n 65536",
    ),
    ("cuda out of memory", "mps backend out of memory", "cublas_status_alloc_failed", "outofmemoryerror"): (
        "the device is out of memory",
        SMALLER,
    ),
    ("can't allocate memory", "cannot allocate memory", "memoryerror", "std::bad_alloc"): (
        "the machine is out of memory",
        f"{SMALLER}, or data.num_workers=0",
    ),
}


def trouble(error: BaseException) -> str | None:
    """What it is and what to try, where it is known."""
    text = f"{type(error).__name__}: {error}".casefold()
    if isinstance(error, UserError):
        return None
    for words, (what, remedy) in TROUBLES.items():
        if any(word in text for word in words):
            return f"{what} ({' '.join(str(error).split())[:120].strip() or type(error).__name__}); try {remedy}"
    return None


@contextmanager
def known_troubles(go_on: str) -> Iterator[None]:
    """Errors of the machine become UserErrors that end with how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        said = trouble(error)
        if said is None:
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise UserError(f"{said}; {go_on}") from error
