"""What ``src/explain.py`` writes: pictures, tables (Markdown and CSV), and the report that shows and explains them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from torch import Tensor

from amod.analysis import pictures
from amod.analysis.depths import draw_depths
from amod.analysis.measurement import CONTRAST, DENSE_MAPS, Measured, correlations
from amod.analysis.routing_statistics import AGREEMENT, MEASURES, METHODS, Correlation, agreement, estimate
from amod.analysis.style import NAMES
from amod.files import write_atomically, write_table
from amod.routing import RoutedLayer


@dataclass(frozen=True)
class About:
    """What was measured, in words, for captions and the head of the report.

    ``labelled``: whether importance is about the true classes (or the predicted ones); ``dense``: where the dense
    model comes from.
    """

    subject: str
    amount: str
    seeds: list[int]
    dense: str
    labelled: bool
    command: str
    provenance: str


def write_report(
    output: Path,
    about: About,
    runs: Sequence[Measured],
    images: Tensor,
    names: Sequence[str],
    heads: Mapping[str, tuple[int, Tensor]],
) -> None:
    """report.md, correlation.csv, agreement.csv and the pictures, of the first run where they show single images.

    Args:
        images: the first B measured images in [0, 1], (B, 3, H, W), with a label each in ``names``.
        heads: of these images, by router, what :func:`~amod.analysis.measurement.head_scores` gives; may be empty.
    """
    run, count = runs[0], len(images)
    measured = len(run.predicted)
    dense = f"{about.subject}, dense model of seed {about.seeds[0]}."
    caption = f"{about.subject}, {about.amount}, seed {about.seeds[0]}."
    routings = {
        NAMES[router]: [
            RoutedLayer(
                layer.layer,
                layer.scores[:count],
                layer.indices[:count],
                None if layer.owner is None else layer.owner[:count],
            )
            for layer in layers
        ]
        for router, layers in run.routing.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    table = correlations(runs)
    write_correlations(table, output / "correlation.csv")
    write_agreement(runs, output / "agreement.csv")
    panels = (run.grid, output / "kept.png", "Patches that each routed block kept", names, caption)
    pictures.draw_kept_patches(images, routings, *panels)
    panels = (run.grid, output / "scores.png", "Scores by which each routed block chose", names, caption)
    pictures.draw_scores(images, routings, *panels)
    if heads:
        panels = (run.grid, output / "heads.png", "Heads of the last dense block", names, caption)
        pictures.draw_heads(images, {NAMES[router]: value for router, value in heads.items()}, *panels)
    importance = {block: values[:count] for block, values in run.importance.items()}
    panels = (run.grid, output / "importance.png", "Leave-one-out importance of each patch", names, dense)
    pictures.draw_importance(images, importance, run.removed[:count], run.prefix, *panels)
    halting = routings.get(NAMES["avit"])
    if halting:
        draw_depths(images, halting, run.grid, output / "depths.png", names)
    every = {NAMES[router]: layers for router, layers in run.routing.items()}
    foot = f"{caption[:-1]}, {measured} images."
    pictures.draw_kept_often(every, run.grid, output / "kept-often.png", "How often each place is kept", foot)

    seeds = f"seed{'s' if len(runs) > 1 else ''} {', '.join(map(str, about.seeds))}"
    all_of_it = f"{about.subject}, {about.amount}, {seeds}, {measured} images."
    over = "the images" if len(runs) == 1 else f"{len(runs)} runs"
    labels = source_labels(run.scores)
    pictures.draw_correlation(
        table,
        output / "correlation.png",
        "Does a score rank the patches as their leave-one-out importance does?",
        f"{all_of_it} Per image over its {run.removed.shape[1]} patches; means and 95 % intervals over {over}"
        f"{'; dashes: each run' * (len(runs) > 1)}.",
        labels,
    )
    wanted = "the true class" if about.labelled else "the class that the dense model predicts"
    own = [*(["depths"] if halting else []), *(["heads"] if heads else [])]
    shown = ["kept", "scores", *own, "importance", "kept-often", "correlation"]
    lines = [
        f"# What routing does: {about.subject}\n",
        f"    {about.command}\n",
        f"{about.provenance} {all_of_it}\n",
        "## What was found\n",
        findings(table, runs, labels),
        *(f"![{name}]({name}.png)\n" for name in shown),
        "## What was measured\n",
        f"Importance of a patch at a block: how the dense model's cross-entropy of {wanted} changes when the patch is "
        f"removed before the block ({run.removed.shape[1]} patches of each image, one at a time). "
        f"Dense model: {about.dense}.\n",
        "## Correlation with importance\n",
        f"Per image over its patches, then over {over}. Contrast is the spread of a patch's pixels.\n",
        correlation_tables(table, labels),
        "## Which tokens are kept\n",
        agreement_tables(runs),
    ]
    write_atomically(output / "report.md", "\n".join(lines).encode())


def source_labels(sources: Iterable[str]) -> dict[str, str]:
    """Names of the sources of scores, in their order."""
    own = {DENSE_MAPS: "A-MoD on the dense model's maps", "random": "random", CONTRAST: "patch contrast (no model)"}
    return {source: own.get(source) or f"{NAMES[source]} as routed" for source in sources}


def findings(table: Sequence[Correlation], runs: Sequence[Measured], labels: Mapping[str, str]) -> str:
    """One table, Spearman's correlation with the size of the importance, and a sentence for each router."""
    found = {(row.router, row.block): row for row in table if (row.measure, row.method) == ("size", "Spearman")}
    blocks = sorted({block for _, block in found})
    cells = [[label, *(_mean(found.get((source, block))) for block in blocks)] for source, label in labels.items()]
    said = [
        "Do the scores rank the patches as their leave-one-out importance does? Spearman's correlation with the size "
        "of the change of the loss, by block (what that is, intervals and the other measures: below):\n",
        markdown(["scores", *(f"block {block}" for block in blocks)], cells),
    ]
    for router in runs[0].routing:
        rows = [row for run in runs for row in kept_by(router, run)]
        if not rows:
            continue  # merging gives no scores, and drops nothing
        last = [row for row in rows if row["block"] == max(row["block"] for row in rows)]
        parts = [f"the patches that it keeps have {_span(rows, 'contrast')} times the contrast of their image"]
        if not math.isnan(rows[0]["class token kept"]):
            parts.append(f"the class token is kept in {_span(rows, 'class token kept', share=True)} of the images")
        parts.append(
            f"no routed block keeps {_span(last, 'never kept', share=True)} of the tokens "
            f"({_span(last, 'never, by chance', share=True)} by chance)"
        )
        said.append(f"{NAMES[router]}: {'; '.join(parts)}.\n")
    return "\n".join(said)


def _mean(row: Correlation | None) -> str:
    return "-" if row is None or math.isnan(row.value.mean) else f"{row.value.mean:.2f}"


def _span(rows: Sequence[Mapping[str, float]], key: str, share: bool = False) -> str:
    """The least and the greatest of the blocks and runs, in words; a ``share`` as percent."""
    values = [row[key] for row in rows if not math.isnan(row[key])]
    ends = [f"{100 * end:.0f}" if share else f"{end:.2f}" for end in (min(values), max(values))] if values else ["-"]
    return " to ".join(dict.fromkeys(ends)) + " %" * share


def correlation_tables(table: Sequence[Correlation], labels: Mapping[str, str]) -> str:
    """Two Markdown tables per measure and method: coefficients with intervals, and the p-values of single images."""
    blocks = sorted({row.block for row in table})
    head = ["scores", *(f"block {block}" for block in blocks)]
    text = []
    for (measure, meaning), method in product(MEASURES.items(), METHODS):
        rows = {(row.router, row.block): row for row in table if (row.measure, row.method) == (measure, method)}
        over = max((row.over for row in rows.values()), key=lambda over: int(over.split()[0]))
        for title, cell in (
            (f"mean and 95 % interval over {over} (p of the mean being zero)", _coefficient),
            ("median p of a single image, and the share of images with p < 0.05", _chance),
        ):
            text.append(f"{method}, {meaning}: {title}.\n")
            cells = [
                [label, *(cell(rows.get((source, block))) for block in blocks)] for source, label in labels.items()
            ]
            text.append(markdown(head, cells))
    return "\n".join(text)


def agreement_tables(runs: Sequence[Measured]) -> str:
    """A Markdown table per router: a row per statistic, a column per routed block; intervals where there are runs."""
    text = []
    for router in runs[0].routing:
        found = [kept_by(router, run) for run in runs]
        if not found[0]:
            continue
        blocks = [int(row["block"]) for row in found[0]]
        rows = []
        for key, meaning in AGREEMENT.items():
            cells = [str(estimate([run[i][key] for run in found])) for i in range(len(blocks))]
            if set(cells) != {"-"}:
                rows.append([f"{key}: {meaning}", *cells])
        text.append(f"{NAMES[router]}{_over(runs)}:\n")
        text.append(markdown(["", *(f"block {block}" for block in blocks)], rows))
    return "\n".join(text)


def kept_by(router: str, run: Measured) -> list[dict[str, float]]:
    contrast = next(iter(run.scores[CONTRAST].values()))[:, run.prefix :]
    return agreement(run.routing[router], run.prefix, contrast, run.class_token)


def write_correlations(table: Sequence[Correlation], path: Path) -> None:
    """correlation.csv: a row per measure, scores, block and method."""
    statistics = ["mean", "low", "high", "p", "each_run", "over", "median_p_of_an_image"]
    header = ["measure", "scores", "block", "method", *statistics, "share_of_images_below_5_percent"]
    rows = []
    for row in table:
        v = row.value
        numbers = [f"{x:.6g}" for x in (v.mean, v.low, v.high, v.p)]
        chance = [f"{x:.6g}" for x in (row.median_p, row.significant)]
        each = " ".join(f"{x:.6g}" for x in row.each)
        rows.append([row.measure, row.router, row.block, row.method, *numbers, each, row.over, *chance])
    write_table(path, header, rows)


def write_agreement(runs: Sequence[Measured], path: Path) -> None:
    """agreement.csv: a row per run (numbered from 0), router and block."""
    rows = [
        [number, router, int(row["block"]), *(f"{row[key]:.6g}" for key in AGREEMENT)]
        for number, run in enumerate(runs)
        for router in run.routing
        for row in kept_by(router, run)
    ]
    write_table(path, ["run", "router", "block", *AGREEMENT], rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _over(runs: Sequence[Measured]) -> str:
    return f", means and 95 % intervals over {len(runs)} runs" if len(runs) > 1 else ""


def _coefficient(row: Correlation | None) -> str:
    if row is None:
        return "-"
    p = row.value.p
    return str(row.value) if math.isnan(p) else f"{row.value} ({_p(p)})"


def _chance(row: Correlation | None) -> str:
    return "-" if row is None or math.isnan(row.median_p) else f"{_p(row.median_p)}, {row.significant:.0%}"


def _p(p: float) -> str:
    return f"{p:.2f}" if p >= 0.01 else f"{p:.0e}" if p >= 1e-99 else "<1e-99"
