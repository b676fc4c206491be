"""What a command prints, once for all processes of a run."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table


@rank_zero_only
def say(text: str) -> None:
    print(text, flush=True)


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values))


@rank_zero_only
def show(summary: dict[str, Any]) -> None:
    """The summary as a table."""
    table = Table(show_header=False)
    for key, value in summary.items():
        if isinstance(value, float):
            value = f"{value:.4f}".rstrip("0").rstrip(".")
        elif isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = shown(value)
        table.add_row(key, "" if value is None else str(value))
    Console().print(table)


def quiet() -> None:
    """Our own notes on stdout; Lightning's banners and advice off."""
    main_process = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    logging.getLogger("amod").setLevel(logging.INFO if main_process else logging.ERROR)
    logging.getLogger("amod").handlers = [logging.StreamHandler(sys.stdout)]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torchmetrics")
