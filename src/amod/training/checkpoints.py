"""Checkpoints that are never half written, and never run code that is pickled in them."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from amod.errors import UserError
from amod.files import write_atomically

log = logging.getLogger(__name__)


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written by ``write_atomically`` and read by ``read_checkpoint``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        before = path.with_name("previous.ckpt") if path.name == "last.ckpt" else None
        write_atomically(path, buffer.getbuffer(), before)

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(path)


# What the checkpoint of a run holds: Lightning's part, and the module's train_loss.
CONTENTS = ("state_dict", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", "train_loss")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run, on the CPU. Code that is pickled in it is refused and not run."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the reader raise
        reason = "it holds pickled code, which is not run" if "weights_only" in str(error) else type(error).__name__
        raise UserError(f"{path}: refused ({reason}); put the run's own file back, or delete the folder") from error
    if lacks := [key for key in CONTENTS if not isinstance(checkpoint, dict) or key not in checkpoint]:
        raise UserError(
            f"{path}: is no checkpoint of this version, it lacks {', '.join(lacks)}; put the run's own file back, "
            "resume the run with the version that wrote it, or name another run_dir"
        )
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written: torch.save's archives carry check sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever the bytes make the reader raise
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from: last.ckpt, or the one before it where that is torn; None to begin anew."""
    found = [path for name in ("last", "previous") if (path := folder / f"checkpoints/{name}.ckpt").exists()]
    for path in found:
        if is_whole(path):
            return path
        log.warning("warning: %s is damaged; the run goes on from before it", path)
    return None


def best_checkpoint(folder: Path, step: int, steps: Collection[int]) -> dict[str, Any]:
    """The checkpoint after optimiser step ``step``: best.ckpt, or where that is damaged another of that step.

    A best.ckpt of another one of ``steps``, those of the epochs, is taken as it is: an epoch that was cut off between
    the two checkpoints and repeated, on a GPU say, need not be as good again.
    """
    best, *others = [folder / f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")]
    for path in (best, *others):
        if is_whole(path) and (checkpoint := read_checkpoint(path))["global_step"] == step:
            if path is not best:
                state = "damaged" if best.exists() else "missing"
                log.warning("warning: %s is %s; %s has the same weights", best, state, path)
            return checkpoint
    if is_whole(best) and (checkpoint := read_checkpoint(best))["global_step"] in steps:
        log.warning(
            "warning: no checkpoint has the weights of step %d, the best epoch's; those of step %d in %s are taken",
            step, checkpoint["global_step"], best,
        )  # fmt: skip
        return checkpoint
    if not best.exists():
        raise UserError(
            f"{best}: is missing, and no other checkpoint has the best epoch's weights; put it back, or see to it that "
            "all processes of the run have the same run_dir"
        )
    raise UserError(
        f"{best}: is damaged, and no other checkpoint has the best epoch's weights; delete the folder and run the same "
        "command again"
    )
