"""How every picture shows a variant: its name, and a colour, a marker and a line that tell it apart without colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from amod.files import write_atomically


def save(figure: Any, path: Path, **how: Any) -> None:
    """Write a picture of matplotlib's, whole or not at all, and close it. ``how``: of ``savefig``."""
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, **how)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, drawn.getvalue())


def variant(router: str) -> str:
    """The key below of a name of conf/router: router=none is the dense model."""
    return "dense" if router == "none" else router


def name_of(router: str) -> str:
    """As tables and pictures have it; a router of one's own has its own name."""
    return NAMES.get(variant(router), router)


def look(router: str) -> dict[str, Any]:
    """matplotlib's arguments for a router's points and lines; one's own looks like a plan."""
    name = variant(router) if variant(router) in NAMES else "plan"
    return {"color": COLOURS[name], "marker": MARKERS[name], "linestyle": LINES[name], "label": name_of(router)}


# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "dense": "#000000",
    "isoflop": "#999999",
    "linear": "#E69F00",
    "attention": "#0072B2",
    "attention_weighted": "#56B4E9",
    "random": "#CC79A7",
    "reversed": "#009E73",
    "tome": "#D55E00",
    "few_merges": "#009E73",
    "merge": "#B15928",
    "evit": "#F0E442",
    "dynamicvit": "#7F3C8D",
    "avit": "#A5AA99",
    "plan": "#8B4513",
    "tuning": "#1F78B4",
    "class_attention": "#4B0082",
    "class_attention_value": "#8A2BE2",
}
MARKERS = {
    "dense": "X",
    "isoflop": "s",
    "linear": "D",
    "attention": "o",
    "attention_weighted": "v",
    "random": "P",
    "reversed": "<",
    "tome": "^",
    "few_merges": "<",
    "merge": "8",
    "evit": ">",
    "dynamicvit": "*",
    "avit": "d",
    "plan": "p",
    "tuning": "*",
    "class_attention": "h",
    "class_attention_value": "H",
}
LINES = {
    "dense": (0, (1, 1)),
    "isoflop": (0, (1, 3)),
    "linear": "--",
    "attention": "-",
    "attention_weighted": "-.",
    "random": (0, (5, 1, 1, 1, 1, 1)),
    "reversed": (0, (3, 1, 1, 1)),
    "tome": (0, (8, 3)),
    "few_merges": (0, (8, 2, 1, 2)),
    "merge": (0, (8, 2, 2, 2)),
    "evit": (0, (2, 1)),
    "dynamicvit": (0, (3, 2)),
    "avit": (0, (1, 2)),
    "plan": (0, (4, 1, 1, 1)),
    "tuning": (0, (2, 2, 6, 2)),
    "class_attention": (0, (6, 2, 2, 2)),
    "class_attention_value": (0, (6, 1, 1, 1)),
}
NAMES = {
    "dense": "dense",
    "isoflop": "isoFLOP",
    "linear": "MoD",
    "attention": "A-MoD",
    "attention_weighted": "A-MoD weighted",
    "random": "random",
    "reversed": "A-MoD reversed",
    "tome": "ToMe",
    "few_merges": "few merges",
    "merge": "three merges",
    "evit": "EViT",
    "dynamicvit": "DynamicViT",
    "avit": "A-ViT",
    "plan": "own plan",
    "tuning": "Router-Tuning",
    "class_attention": "class attention",
    "class_attention_value": "class attention x value norm",
}
