"""What a run's ``model.task`` decides: how it is read, built, trained and measured, and which epoch is the best.

A new task is an entry of ``TASKS`` and its own file, with the functions of ``Parts``. Everything else is shared: the
optimiser, seeds, resuming, the run folder (``run.py``), and the steps around a loss (``module.py``). Importing this
costs nothing: the task's own file is loaded once a run has been checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from amod.errors import UserError, one_line


class Parts(Protocol):
    """What the file of a task has. Configs are ``config.TrainConfig``, data a ``loaders.DataModule``."""

    def read(self, cfg: Any) -> Any:
        """The data module of a training."""

    def build(self, cfg: Any, data: Any) -> Any:
        """``weights.Built``: the model that the config asks for, with its weights."""

    def module(self, model: Any, cfg: Any, data: Any) -> Any:
        """``module.TaskModule`` around the model."""

    def cost(self, model: Any, cfg: Any) -> dict[str, Any]:
        """What the model costs, for the summary: ``gflops``, ``params``, and what is routed."""

    def measured(self, model: Any, data: Any) -> dict[str, Any] | None:
        """What of that is up to the data, measured on some of the test split: of trained gates."""

    def keep(self, cfg: Any, folder: Path) -> None:
        """Put into the run's folder what its config only points to."""

    def load_measured(self, folder: Path, cfg: Any, split: str) -> tuple[Any, Any]:
        """(model, data) of a finished run: its best weights, and a data module whose test split is ``split``."""


@dataclass(frozen=True)
class Task:
    """``shown`` are the numbers of an evaluation in the order of metrics.csv, with the words and unit of a printed
    line; ``tested`` are those that the summary has of the test split. ``best`` chooses the epoch.
    """

    name: str
    file: str
    data: tuple[str, ...]  # the choices of data= that have what it learns from
    shown: dict[str, tuple[str, str]]
    tested: tuple[str, ...]
    best: str
    samples: str = "images"
    extra: str = ""  # of pyproject.toml, with the packages that it needs

    @property
    def columns(self) -> tuple[str, ...]:
        """Of metrics.csv."""
        return ("epoch", "step", "lr", "train/loss", *(f"val/{name}" for name in self.shown))

    @staticmethod
    def is_low(name: str) -> bool:
        """Whether less of it is better."""
        return name in ("loss", "perplexity")

    def parts(self) -> Parts:
        try:
            return cast(Parts, import_module(f"amod.training.{self.file}"))
        except ImportError as error:
            if not self.extra:
                raise
            raise UserError(
                f"{self.name}: needs packages that are not here ({one_line(error)}); pip install 'amod[{self.extra}]'"
            ) from error

    def best_of(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The first row with the best validation; the last of a run without validation."""
        key = f"val/{self.best}"
        validated = [row for row in rows if key in row]
        choose = min if self.is_low(self.best) else max
        return choose(validated, key=lambda row: row[key]) if validated else rows[-1]


CLASSIFICATION = Task(
    name="classification",
    file="classification",
    data=("imagenet", "imagenette", "flowers", "cars", "pets", "fashion_mnist", "digits", "folder"),
    shown={"loss": ("loss", ""), "top1": ("top-1", " %"), "top5": ("top-5", " %")},
    tested=("top1", "top5"),
    best="top1",
)
LANGUAGE = Task(
    name="language",
    file="language",
    data=("text",),
    shown={"loss": ("loss", ""), "perplexity": ("perplexity", "")},
    tested=("loss", "perplexity"),
    best="loss",
    samples="sequences",
)
DETECTION = Task(
    name="detection",
    file="detecting",
    data=("coco",),
    shown={"loss": ("loss", ""), "map": ("mAP", " %"), "map50": ("mAP at IoU 0.5", " %")},
    tested=("map", "map50"),
    best="map",
    extra="detection",
)
TASKS = {task.name: task for task in (CLASSIFICATION, LANGUAGE, DETECTION)}


def said(task: Task, name: str, value: float, digits: int) -> str:
    """A number of an evaluation in words, as in "top-1 91.07 %"."""
    words, unit = task.shown[name]
    return f"{words} {value:.{digits}f}{unit}"
