"""The model of a finished run, from its folder alone."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from timm.models import load_state_dict
from torch import nn

from amod.errors import UserError, one_line
from amod.training.config import TrainConfig, check_classifier
from amod.training.data import moved
from amod.training.folder import read_config
from amod.training.loaders import ImageData, build_datamodule
from amod.training.record import classes_of
from amod.training.weights import HEADS, build, input_config, weightless


def load_run(folder: Path, data_root: str | None = None) -> tuple[TrainConfig, nn.Module, ImageData]:
    """(config, model, data) of a finished run: the best epoch's weights in evaluation mode, the data unaugmented.

    ``data_root`` is where the data lie now, if they have moved.
    """
    run = read_config(folder / "config.yaml")
    check_classifier(run.model, f"run={folder}")
    run.data = moved(run.data, data_root)
    inputs = input_config(run.model)
    sizes = run.schedule.batch_size, run.schedule.eval_batch_size
    data = build_datamodule(run.data, inputs, {}, *sizes, run.seed, classes_of(folder))
    return run, load_model(folder, run, data.num_classes), data


def load_model(folder: Path, run: TrainConfig, num_classes: int) -> nn.Module:
    weights_of(folder)  # said before anything is built
    return with_weights(build(weightless(run), num_classes).model, folder)


def with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """The model of a run with the best epoch's weights, in evaluation mode."""
    weights = weights_of(folder)
    try:
        model.load_state_dict(load_state_dict(str(weights)))
    except Exception as error:  # whatever the bytes make the readers raise
        raise UserError(f"{weights}: cannot be read as this run's weights ({one_line(error)})") from error
    return model.eval()


def weights_of(folder: Path) -> Path:
    weights = folder / "weights.safetensors"
    if not weights.exists():
        raise UserError(f"run={folder}: is not finished, it has no weights.safetensors; resume it with its own command")
    return weights


def classes_in(weights: Path) -> int:
    """How many classes a model's head has."""
    try:
        with safe_open(weights, "pt") as file:
            return next(file.get_slice(key).get_shape()[0] for key in HEADS if key in file.keys())  # noqa: SIM118
    except Exception as error:  # whatever the bytes make the reader raise
        raise UserError(f"{weights}: cannot be read as this run's weights ({one_line(error)})") from error
