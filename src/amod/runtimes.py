"""Exported files, opened: one way to call onnxruntime, OpenVINO and torch, each imported only where it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amod.errors import UserError, one_line

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch": ()}


class Session(NamedTuple):
    """Images (B, C, H, W) float32 -> logits and kept tokens; what the file says of itself; what it computes in."""

    run: Callable[[np.ndarray], list[Any]]
    facts: dict[str, Any]
    precision: str

    def __call__(self, images: np.ndarray) -> list[Any]:
        return self.run(images)


def needed(form: str, int8: bool = False) -> None:
    """UserError unless the packages of a format are here."""
    wanted = NEEDS[form] + (("nncf",) if int8 and form == "openvino" else ())
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise UserError(f"format={form}: needs {', '.join(missing)}; pip install 'amod[export]'")


def format_of(path: Path, format: str | None, named: str | None = None) -> str:
    """The format of a file that is to be made, ``named`` as it was asked for; UserError unless its suffix is of it."""
    named = named or str(path)
    found = {suffix: name for name, suffix in SUFFIXES.items()}
    if format is None:
        if path.suffix not in found:
            raise UserError(f"{named}: its suffix names no format; use {', '.join(found)}, or say format=")
        return found[path.suffix]
    if format not in SUFFIXES:
        raise UserError(f"format={format!r}: choose one of {', '.join(SUFFIXES)}")
    if path.suffix != SUFFIXES[format]:
        raise UserError(f"{named}: a file of format={format} ends in {SUFFIXES[format]}")
    return format


def open_session(
    path: str | Path,
    form: str | None = None,
    threads: int | None = None,
    default_precision: bool = False,
    batch: int | None = None,
) -> Session:
    """Open a file that :func:`amod.export` made.

    Args:
        threads: of the runtime; None: its own choice.
        default_precision: OpenVINO's own choice on this machine, which may be bfloat16, in place of float32.
        batch: how many images every call will have, where that is known. OpenVINO then knows all shapes beforehand and
            is 1.05 times (dense) to 1.3 times (routed, merging) as fast with one image; the others are no faster.
    """
    path = Path(path)
    form = form or next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
    if form is None:
        raise UserError(f"{path}: its suffix names no format; use {', '.join(SUFFIXES.values())}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; make one by src/export.py")
    needed(form)
    try:
        return OPENERS[form](path, threads, default_precision, batch)
    except UserError:
        raise
    except Exception as error:  # whatever the runtime makes of the bytes
        raise UserError(f"{path}: {form} cannot open it ({one_line(error)})") from error


def facts_of(path: Path, written: str | None) -> dict[str, Any]:
    """What a file says of itself; UserError where it says nothing."""
    if not written:
        raise UserError(f"{path}: was not made by amod.export, whose files say how images are to be prepared")
    return dict(json.loads(written))


def _open_onnx(path: Path, threads: int | None, default_precision: bool, batch: int | None) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = facts_of(path, session.get_modelmeta().custom_metadata_map.get("amod"))
    return Session(lambda images: session.run(None, {"images": images}), facts, "float32")


@lru_cache
def openvino_core() -> Any:
    """The one of this process. Each gives the thread another stack for signals and takes it back when it goes: of two
    whose lives overlap the second leaves a freed one behind, and the next signal ends the process (2026.4).
    """
    import openvino

    return openvino.Core()


def _open_openvino(path: Path, threads: int | None, default_precision: bool, batch: int | None) -> Session:
    core = openvino_core()
    model = core.read_model(path)
    facts = facts_of(path, model.get_rt_info(["amod"]).astype(str) if model.has_rt_info(["amod"]) else None)
    if batch is not None:
        model.reshape({"images": [batch, *facts["input_size"]]})
    config: dict[str, Any] = {} if default_precision else {"INFERENCE_PRECISION_HINT": "f32"}
    config |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    compiled = core.compile_model(model, "CPU", config)
    kind = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return Session(
        lambda images: [*compiled(images).values()], facts, {"f32": "float32", "bf16": "bfloat16"}.get(kind, kind)
    )


def _open_torch(path: Path, threads: int | None, default_precision: bool, batch: int | None) -> Session:
    import torch

    extra = {"amod.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    facts = facts_of(path, extra["amod.json"])

    def run(images: np.ndarray) -> list[Any]:
        with torch.no_grad():
            return [*program(torch.from_numpy(images))]

    return Session(run, facts, "float32")


OPENERS = {"onnx": _open_onnx, "openvino": _open_openvino, "torch": _open_torch}
