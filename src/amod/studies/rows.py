"""One row for each run, as a pandas table: read from run folders, written to runs.csv and read back from it.

Text that is missing is "", a figure that is missing NA. ``AXES`` tell the cells of a study apart; the rows of a cell
differ in their seed alone. ``start_accuracy`` is that of the run which a run began from, on test images, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from amod.analysis import style
from amod.errors import unreadable
from amod.files import write_atomically
from amod.studies.plan import Run
from amod.studies.runner import finished, last_line
from amod.training.folder import read_summary

ROUTERS = (
    "isoflop",
    "reversed",
    "random",
    "linear",
    "attention",
    "attention_weighted",
    "tome",
    "merge",
    "evit",
    "dynamicvit",
    "avit",
    "tuning",
)  # as tables and pictures list them
NAMES = {
    "none": "dense",
    **{router: style.NAMES[router] for router in ROUTERS},
}


def router_rank(router: str) -> tuple[int, str]:
    """Its place in tables and pictures; those that no study of ours runs come last."""
    return ([*NAMES].index(router) if router in NAMES else len(NAMES), router)


METRICS = {
    "test_top1": "test top-1 (%)",
    "val_top1": "validation top-1 (%)",
    "val_top1_untrained": "untrained top-1 (%)",
    "test_top1_untrained": "untrained test top-1 (%)",
    "test_map": "test mAP (%)",
    "test_map50": "test mAP at IoU 0.5 (%)",
    "test_map_untrained": "untrained test mAP (%)",
    "epochs_to_peak": "epochs to within 1 % of the peak",
    "share_kept": "share kept",
    "seconds": "seconds",
    "step_seconds": "seconds of a training step",
    "peak_mib": "peak memory of training (MiB)",
    "speedup": "images per second, of dense",
    "training_speedup": "training steps per second, of dense",
    "training_mib": "memory of a training step (MiB)",
}
AXES = ("data", "model", "variant", "placement", "keep_prefix", "lr", "capacity", "budget", "router", "setting")
TEXT = ("run", "status", "stage", *(axis for axis in AXES if axis != "capacity"), "git_commit", "git_changed", "note")
WHOLE = ("seed", "params", "depth", "epochs_to_peak", "best_epoch", "epochs", "threads")
COLUMNS = (
    *("run", "status", "stage", *AXES, "seed", "gflops", "params", "depth", *METRICS),
    *("start_accuracy", "best_epoch", "epochs", "threads", "git_commit", "git_changed", "note"),
)
CURVES = {"run": "str", "epoch": "int64", "val_top1": "float64"}  # of detectors, mAP in the place of top-1


def table_of(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """Rows with all of ``COLUMNS``, each of its own kind."""
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    kinds = {name: "str" if name in TEXT else "Int64" if name in WHOLE else "Float64" for name in COLUMNS}
    return frame.fillna(dict.fromkeys(TEXT, "")).astype(kinds)


def read(path: Path) -> pd.DataFrame:
    """The rows of a runs.csv; none where there is no such file."""
    if not path.exists():
        return table_of([])
    found = read_csv(path, dict.fromkeys(TEXT, "str"))
    try:
        return table_of(found)
    except ValueError as error:  # a word where a figure belongs
        raise unreadable(path, error) from error


def read_csv(path: Path, kinds: Mapping[str, str] | None = None) -> pd.DataFrame:
    """A file of ours; UserError that names it where it is damaged."""
    try:
        found = pd.read_csv(path, dtype=dict(kinds or {}))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if "run" not in found:
        raise unreadable(path, "it has no column run")
    return found


def read_as(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a file with these columns of these kinds, or at least the first of them; none where there is no such
    file."""
    if not path.exists():
        return pd.DataFrame(columns=list(columns)).astype(columns)
    found = read_csv(path)
    if missing := [name for name in columns if name not in found]:
        raise unreadable(path, f"it has no column {missing[0]}")
    try:
        typed = found[list(columns)].astype(columns)
    except (ValueError, TypeError) as error:  # a word where a figure belongs
        raise unreadable(path, error) from error
    for name in (name for name, kind in columns.items() if kind == "int64"):
        if (typed[name] != found[name]).any():
            raise unreadable(path, f"its {name} are no whole numbers")
    return typed


def write(rows: pd.DataFrame, path: Path) -> None:
    write_atomically(path, rows.to_csv(index=False, lineterminator="\n").encode())


def place_of(rows: pd.DataFrame, output: Path) -> Path:
    """`output`, or `output`/partial where the report that is there has finished runs which these rows have not."""
    there = read(output / "runs.csv")
    done = set(rows["run"][rows["status"] == "finished"])
    return output if done >= set(there["run"][there["status"] == "finished"]) else output / "partial"


# --- from run folders -----------------------------------------------------------------------------------------------


def rows_of(runs: Sequence[Run], root: Path, failed: Mapping[str, str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(one row for each run, one row for each validation of each run: ``CURVES``)."""
    rows, curves = [], []
    for run in runs:
        row = row_of(run) | {"status": "failed" if run.name in failed else "not run", "note": failed.get(run.name, "")}
        if finished(run, root):
            folder = root / run.name
            summary = read_summary(folder)
            environment = read_summary(folder, "environment")
            row |= {key: value for key, value in (environment | summary).items() if key in COLUMNS and key not in AXES}
            curve = curve_of(folder, summary.get("val_top1_untrained", summary.get("val_map_untrained")))
            row |= {"status": "finished", "note": "", "epochs_to_peak": epochs_to_peak(curve)}
            curves += [(run.name, epoch, value) for epoch, value in curve]
            if run.start and finished(run.start, root):
                row["start_accuracy"] = accuracy_of(root / run.start.name)
        elif row["status"] == "not run":
            row["note"] = last_line(run, root)
        rows.append(row)
    return table_of(rows), pd.DataFrame(curves, columns=list(CURVES)).astype(CURVES)


def accuracy_of(folder: Path) -> float | None:
    """What a finished run found on test images, in percent."""
    summary = read_summary(folder)
    found = summary.get("test_top1", summary.get("test_map"))
    return None if found is None else float(found)


def row_of(run: Run) -> dict[str, Any]:
    """What a run is, before it has found anything."""
    settings = run.settings
    return {
        "run": run.name,
        "stage": run.stage,
        "data": settings["data"],
        "model": settings["model"],
        "variant": run.variant,
        "placement": settings.get("placement.blocks", settings.get("placement", "alternate")),
        "keep_prefix": settings.get("router.keep_prefix", "false"),
        "setting": setting_of(settings),
        "budget": settings.get("budget", ""),
        "lr": settings.get("schedule.lr", ""),
        "capacity": float(settings.get("capacity", 1)),
        "router": settings["router"],
        "seed": int(settings["seed"]),
    }


def setting_of(settings: Mapping[str, str]) -> str:
    """What tells runs of one router apart: of a trained gate what it skips and per what; and what is not usual."""
    router = settings["router"]
    parts = []
    if router == "tuning":
        parts.append(f"{settings.get('router.skip', 'attention')} per {settings.get('router.per', 'token')}")
    if "router.ponder" in settings:
        parts.append(f"ponder {settings['router.ponder']}")
    if "router.backbone_lr" in settings:
        parts.append(f"backbone rate x {settings['router.backbone_lr']}")
    if "distil" in settings:
        parts.append("distilled" if float(settings["distil"]) else "no teacher")
    return ", ".join(parts)


Known = tuple[dict[str, dict[str, Any]], pd.DataFrame]
"""What reports say of finished runs: ({run: row}, their curves)."""


def known_in(results: Path, scale: str) -> Known:
    """From the reports at a scale, whichever study they are of."""
    known: Known = {}, curves_of(results / "none")
    for file in sorted(results.glob(f"*/{scale}/runs.csv")):
        known = with_own(known, file.parent)
    return known


def with_own(known: Known, folder: Path) -> Known:
    """What is known, but of a run that the report in this folder has, what that says."""
    found = read(folder / "runs.csv")
    rows = known[0] | {row["run"]: row for row in _records(found[found["status"] == "finished"])}
    curves = pd.concat([known[1], curves_of(folder / "curves.csv")], ignore_index=True)
    return rows, curves.drop_duplicates(["run", "epoch"], keep="last")


def reported(
    runs: Sequence[Run],
    root: Path,
    known: Known,
    failed: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As ``rows_of``, and what is ``known`` (``known_in``) of runs whose own folders are gone.

    A dense model that was trained again is another one than those runs began from, whose row stays.
    """
    rows, curves = rows_of(runs, root, failed or {})
    before, curves_before = known
    lost = {*rows["run"][rows["status"] == "not run"]} & {*before}
    lost |= {run.start.name for run in runs if run.start and run.name in lost} & {*before}
    curves = curves[~curves["run"].isin(lost)]
    curves = pd.concat([curves_before[curves_before["run"].isin(lost)], curves], ignore_index=True).astype(CURVES)
    return table_of([before[row["run"]] if row["run"] in lost else row for row in _records(rows)]), curves


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def curves_of(path: Path) -> pd.DataFrame:
    """The rows of a curves.csv; none where there is no such file."""
    return read_as(path, CURVES)


def curve_of(folder: Path, untrained: float | None) -> list[tuple[int, float]]:
    """(epochs trained, validation top-1 in percent), the untrained accuracy first where there is one."""
    if not (folder / "metrics.csv").exists():
        return []  # measured without training
    try:
        found = pd.read_csv(folder / "metrics.csv")
        key = "val/top1" if "val/top1" in found else "val/map"
        found = found.dropna(subset=[key])
        trained = [(int(epoch) + 1, float(value)) for epoch, value in zip(found["epoch"], found[key], strict=True)]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(folder / "metrics.csv", error) from error
    return trained if untrained is None else [(0, untrained), *trained]


def epochs_to_peak(curve: Sequence[tuple[int, float]]) -> int | None:
    """Epochs until the accuracy is first at least 0.99 of its highest (Sec. 4.3: "within 1 % of its peak")."""
    peak = max((value for _, value in curve), default=None)
    return None if peak is None else next(epoch for epoch, value in curve if value >= 0.99 * peak)


# --- cells ----------------------------------------------------------------------------------------------------------


def ours_of(study: Mapping[str, Any], scale: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that the study is about: of the runs that others start from, only where it says with_start."""
    start = scale["stages"][study["stage"]].get("start") if study.get("with_start") else None
    return rows[rows["stage"].isin([study["stage"], start])]


def measured(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The finished rows that have the metric."""
    return rows[(rows["status"] == "finished") & rows[metric].notna()]


def router_order(rows: pd.DataFrame) -> list[str]:
    """The routers of the rows, in the order in which tables and pictures show them."""
    return sorted({*rows["router"]}, key=router_rank)


def describe(labels: Mapping[str, Any]) -> str:
    """The labels that are worth showing: what every run shares by default is left out."""
    parts = [str(value) for key, value in labels.items() if key in ("data", "model")]
    parts += [placed(labels["placement"])] if labels.get("placement", "alternate") != "alternate" else []
    parts += [labels["variant"]] if labels.get("variant") else []
    parts += ["class token kept"] if labels.get("keep_prefix", "false") != "false" else []
    parts += [f"lr {labels['lr']}"] if labels.get("lr") else []
    parts += [f"C = {labels['capacity']:g}"] if labels.get("capacity", 1) < 1 and not labels.get("budget") else []
    parts += [f"{labels['budget'].rstrip('%')} % of dense"] if labels.get("budget", "").endswith("%") else []
    parts += [style.name_of(labels["router"])] if "router" in labels else []
    parts += [labels["setting"]] if labels.get("setting") else []
    return ", ".join(parts)


def placed(placement: str) -> str:
    """A placement in words: ``[6,7,8,9]`` as "blocks 6-9", ``[1,4]`` as "blocks 1, 4", a name as it is."""
    if not placement.startswith("["):
        return placement
    blocks = [int(block) for block in placement.strip("[]").split(",")]
    unbroken = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
    return f"blocks {blocks[0]}-{blocks[-1]}" if unbroken else f"blocks {', '.join(map(str, blocks))}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
