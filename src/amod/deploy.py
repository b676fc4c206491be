"""What to do with an exported file: prepare pictures as it wants them, read off classes, time it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from amod.errors import UserError, one_line
from amod.flops import default_input_size
from amod.image_files import images_below, open_rgb
from amod.runtimes import Session


def picture(file: Path, transform: Any) -> Tensor:
    """(C, H, W), prepared; read as images are in training, upright and on white."""
    try:
        return transform(open_rgb(file))
    except Exception as error:  # PIL's plugins raise whatever the bytes lead to
        raise UserError(f"{file}: cannot be read as a picture ({one_line(error)})") from error


def calibration_images(model: Any, folder: Path, most: int, least: int = 4) -> Tensor:
    """(B, C, H, W): at most so many pictures below the folder, spread over it, prepared for the model."""
    files = images_below(folder)
    if len(files) < least:
        raise UserError(f"images={folder}: has {len(files)} pictures; at least {least} are needed")
    count = min(most, len(files))
    files = [files[i * len(files) // count] for i in range(count)]
    transform, _ = preparation(model)
    return torch.stack([picture(file, transform) for file in files])


def preparation(model: Any) -> tuple[Any, dict[str, Any]]:
    """From a picture to what a model of timm's takes, and timm's data config of it (mean, std, ...)."""
    inputs = {**resolve_model_data_config(model), "input_size": default_input_size(model)}
    return create_transform(**inputs, is_training=False), inputs


def predict(session: Session, file: Path, most: int = 5) -> list[tuple[str, float]]:
    """The most likely classes of a picture and their probabilities, by the exported file and what it says of itself; of
    a model of one output that output."""
    facts = session.facts
    prepared = {key: facts[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    transform = create_transform(tuple(facts["input_size"]), is_training=False, **prepared)
    logits = torch.as_tensor(session(picture(file, transform)[None].numpy())[0])[0]
    if len(logits) == 1:
        return [("the output", logits.item())]
    top = logits.softmax(dim=0).topk(min(most, len(logits)))
    names = facts["class_names"] or [f"class {i}" for i in range(len(logits))]
    return [(names[i], share) for share, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def latency(named: Mapping[str, Any], rounds: int) -> Iterator[str]:
    """A line for each of the model in torch (first) and its files: milliseconds of one image, and how much faster.

    Timed in turns; the factor is the median over the ratios within a round, in brackets its quartiles.
    """
    from amod.analysis.throughput.timing import alternate, paired, quartiles

    first, model = next(iter(named.items()))
    sessions = [one for one in named.values() if isinstance(one, Session)]
    image = torch.randn(1, *sessions[0].facts["input_size"])

    def eager() -> None:
        with torch.inference_mode():
            model(image)

    steps: dict[str, Any] = {first: eager}
    steps |= {name: (lambda one=one: one(image.numpy())) for name, one in named.items() if isinstance(one, Session)}
    seconds, _ = alternate(steps, rounds, fill=0.1)
    for name in steps:
        q = paired(seconds[first], seconds[name])
        faster = "" if name == first else f"  {q.median:.2f}x [{q.low:.2f}, {q.high:.2f}]"
        print_name = f"{name} (eager, {torch.get_num_threads()} threads)" if name == first else name
        yield f"one image, {print_name}: {1000 * quartiles(seconds[name]).median:.1f} ms{faster}"
