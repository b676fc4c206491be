"""W&B's sweep files without W&B: the runs that a file asks for, and what came of them.

A run's settings are written as W&B's agent writes them (``schedule.lr=1e-05``, ``capacity=1``), so that what works
here works there. The runs are made like a study's: each a process, finished ones not repeated, stopped ones going on.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amod.errors import UserError, did_you_mean
from amod.files import write_atomically, write_table
from amod.studies.plan import Run
from amod.training.checks import check_train
from amod.training.compose import compose_config
from amod.training.folder import read_summary
from amod.training.tasks import CLASSIFICATION, TASKS

METHODS, PROGRAM = ("grid", "random"), "src/train.py"
# W&B's keys that mean something here, or nothing to a run; others are refused.
KEYS = ("project", "entity", "name", "description", "program", "method", "run_cap", "metric", "command", "parameters")
PARAMETER_KEYS = ("value", "values", "probabilities", "distribution", "min", "max")
DISTRIBUTIONS = (
    "uniform",
    "int_uniform",
    "log_uniform_values",
    "categorical",
    "categorical_w_probabilities",
    "constant",
)


@dataclass(frozen=True)
class SweepRun(Run):
    """A run of a sweep; ``values`` are the swept ones, as the file says them."""

    values: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.-]+", "_", "-".join([*map(str, self.values.values()), self.digest]))

    def summary(self, root: Path) -> dict[str, Any] | None:
        """What the run found; None if it is not finished."""
        folder = root / self.name
        return read_summary(folder) if (folder / "summary.json").exists() else None


# --- the file -----------------------------------------------------------------------------------------------------


def read_sweep(file: Path) -> dict[str, Any]:
    """The file's content. What W&B or Hydra would stumble over later is a UserError."""
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text; save it as that") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a file such as sweeps/lr.yaml") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict) or not sweep["parameters"]:
        raise UserError(f"{file}: has no parameters; write it like sweeps/lr.yaml")
    command = sweep.get("command") or []
    if not isinstance(command, list):
        raise UserError(f"{file}: command: must be a list of words, as in sweeps/lr.yaml")
    if "${args_no_hyphens}" not in command:
        raise UserError(f"{file}: the command needs ${{args_no_hyphens}}: Hydra reads key=value, not --key=value")
    refuse_unknown(sweep, KEYS, str(file))
    for program in (sweep.get("program", PROGRAM), *(c for c in map(str, sweep["command"]) if c.endswith(".py"))):
        if Path(str(program)) != Path(PROGRAM):
            raise UserError(f"{file}: program: {program}: without W&B a sweep is of {PROGRAM}")
    for key, parameter in sweep["parameters"].items():
        if not isinstance(key, str):
            raise UserError(f"{file}: {key}: is no setting of {PROGRAM}; write its name, as in schedule.lr")
        if key == "run_dir":
            raise UserError(f"{file}: run_dir: each run of a sweep has a folder of its own; leave it out")
        if not isinstance(parameter, dict) or "parameters" in parameter:
            raise UserError(f"{file}: {key}: nested keys arrive as one dictionary; write them flat, as in schedule.lr")
        refuse_unknown(parameter, PARAMETER_KEYS, f"{file}: {key}")
        if not isinstance(parameter.get("values", []), list):
            raise UserError(f"{file}: {key}: values={parameter['values']}: must be a list; one value is value: ...")
        said = [key for key in ("value", "values", "min") if key in parameter]
        if len(said) > 1:
            raise UserError(f"{file}: {key}: has {' and '.join(said)}; leave one of them out")
        check_probabilities(parameter, sweep.get("method"), f"{file}: {key}")
        if any(value is None for value in (*parameter.get("values", []), parameter.get("value", 0))):
            raise UserError(f"{file}: {key}: null arrives as the word None; write 'null', with its quotes")
    return sweep


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """What would be ignored here is not passed over in silence."""
    for key in map(str, given):
        if key not in known:
            hint = did_you_mean(key, known) or f"; without W&B a file has {', '.join(known)}"
            raise UserError(f"{where}: {key}: is not known here{hint}")


def check_probabilities(parameter: Mapping[str, Any], method: Any, where: str) -> None:
    shares = parameter.get("probabilities")
    if shares is None:
        return
    if method == "grid":
        raise UserError(f"{where}: probabilities: a grid takes every value once; leave them out, or say method: random")
    numbers = isinstance(shares, list) and all(isinstance(s, (int, float)) and s >= 0 for s in shares)
    if not numbers or len(shares) != len(parameter.get("values") or []) or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{where}: probabilities={shares}: must be one number for each of values, 1 together")


def arguments(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys and values as W&B's agent writes them for ${args_no_hyphens}; its server has turned 1.0 into 1."""
    return {k: str(int(v) if isinstance(v, float) and v.is_integer() else v) for k, v in values.items()}


def fixed_arguments(sweep: Mapping[str, Any]) -> dict[str, str]:
    """The settings in the file's command that hold without W&B as well."""
    given = dict(c.partition("=")[::2] for c in map(str, sweep["command"]) if "=" in c and not c.startswith("${"))
    return {key: value for key, value in given.items() if key.partition(".")[0] not in ("logger", "run_dir")}


def combinations(sweep: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """The values of every run: the grid, at most ``run_cap``, or as many random draws, the same every time."""
    method, parameters = sweep.get("method"), sweep["parameters"]
    if method not in METHODS:
        raise UserError(f"{file}: method={method} needs W&B (`wandb sweep {file}`); here: {' or '.join(METHODS)}")
    cap = sweep.get("run_cap")
    if not (cap is None or (isinstance(cap, int) and not isinstance(cap, bool) and cap >= 1)):
        raise UserError(f"{file}: run_cap={cap}: must be a whole number of at least 1")
    if method == "random":
        if cap is None:
            raise UserError(f"{file}: method=random without W&B needs run_cap, the number of runs")
        draw = random.Random(0)
        return [
            {key: sample(parameter, draw, f"{file}: {key}") for key, parameter in parameters.items()}
            for _ in range(cap)
        ]
    for key, parameter in parameters.items():
        if not ("value" in parameter or parameter.get("values")):
            raise UserError(f"{file}: {key}: a grid needs values: [...]")
    choices = [parameter.get("values") or [parameter["value"]] for parameter in parameters.values()]
    return [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.islice(itertools.product(*choices), cap)]


def sample(parameter: Mapping[str, Any], draw: random.Random, where: str) -> Any:
    """One value, by W&B's names of the distributions."""
    if "value" in parameter:
        return parameter["value"]
    if (other := parameter.get("distribution", "uniform")) not in DISTRIBUTIONS:
        raise UserError(f"{where}: distribution={other} needs W&B; here: {', '.join(DISTRIBUTIONS)}")
    if parameter.get("probabilities"):
        return draw.choices(parameter["values"], parameter["probabilities"])[0]
    if parameter.get("values"):
        return draw.choice(parameter["values"])
    low, high = parameter.get("min"), parameter.get("max")
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        raise UserError(f"{where}: needs values, or min and max as numbers (1.0e-5: in YAML 1e-5 is a word)")
    if low > high:
        raise UserError(f"{where}: min={low}: is above max={high}")
    whole = isinstance(low, int) and isinstance(high, int)
    match parameter.get("distribution", "int_uniform" if whole else "uniform"):
        case "int_uniform":
            if not whole:
                raise UserError(f"{where}: min={low}, max={high}: must be whole numbers for int_uniform")
            return draw.randint(int(low), int(high))
        case "uniform":
            return draw.uniform(low, high)
        case "log_uniform_values":
            if low <= 0:
                raise UserError(f"{where}: min={low}: must be above 0 for log_uniform_values")
            return math.exp(draw.uniform(math.log(low), math.log(high)))
    raise UserError(f"{where}: distribution={parameter['distribution']} needs values")


def runs_of(file: Path, extra: Mapping[str, str]) -> list[SweepRun]:
    """The runs of `file`, none twice; `extra` settings overrule those of its command."""
    sweep = read_sweep(file)
    if "run_dir" in extra:
        raise UserError(f"run_dir={extra['run_dir']}: each run of a sweep has a folder of its own; leave it out")
    if twice := [key for key in extra if key in sweep["parameters"]]:
        raise UserError(f"{twice[0]}={extra[twice[0]]}: {file} sweeps it; leave it out")
    runs: dict[str, SweepRun] = {}
    for values in combinations(sweep, file):
        settings = {**fixed_arguments(sweep), **extra, **arguments(values)}
        run = SweepRun("sweep", "", settings, values=values)
        runs.setdefault(run.digest, run)
    return list(runs.values())


def check(runs: Sequence[SweepRun], root: Path) -> None:
    """Whether src/train.py would take every run."""
    for run in runs:
        check_train(compose_config("train", run.arguments(root)))


# --- the report ---------------------------------------------------------------------------------------------------


def write_report(runs: Sequence[SweepRun], root: Path, failed: Mapping[str, str], title: str) -> Path:
    """Writes runs.csv (a row per run), report.md and, where only router, seed and learning rate are swept,
    stability.png. ``failed``: {run's name: why}.
    """
    found = [(run, run.summary(root)) for run in runs]
    task = TASKS[compose_config("train", runs[0].arguments(root)).model.get("task", "classification")]
    validation, test, (words, unit) = f"val_{task.best}", f"test_{task.best}", task.shown[task.best]
    columns = ("gflops", validation, test, "epochs", "seconds")  # of summary.json
    table = []
    for run, summary in found:
        state = "finished" if summary else "failed" if run.name in failed else "not run"
        table.append([*run.values.values(), state, *((summary or {}).get(key) for key in columns), run.name])
    write_table(root / "runs.csv", [*runs[0].values, "state", *columns, "run"], table)

    keys = [key for key in runs[0].values if key != "seed"]
    groups: dict[tuple[str, ...], list[dict[str, Any] | None]] = {}
    for run, summary in found:
        groups.setdefault(tuple(str(run.values[key]) for key in keys), []).append(summary)
    lines = [f"# `{title}`", "", f"{sum(bool(s) for _, s in found)} of {len(runs)} runs finished.", ""]
    name = f"{words[0].upper()}{words[1:]}{' in percent' if unit else ''}"
    lines += [f"{name} of each run's best epoch: mean over the seeds (least to most).", ""]
    lines += [f"| {' | '.join([*keys, 'runs', 'GFLOPs', 'validation', 'test'])} |", "|---" * (len(keys) + 4) + "|"]
    for values, summaries in groups.items():
        done = [summary for summary in summaries if summary]
        count = f"{len(done)}" if len(done) == len(summaries) else f"{len(done)} of {len(summaries)}"
        gflops = f"{statistics.fmean(summary['gflops'] for summary in done):.4f}" if done else "-"
        lines.append(f"| {' | '.join([*values, count, gflops, spread(done, validation), spread(done, test)])} |")
    if failed:
        lines += ["", "## Failed", "", *(f"- `{name}`: {why}" for name, why in failed.items())]
    if task is CLASSIFICATION and {"schedule.lr"} <= {*keys} <= {"schedule.lr", "router"}:
        draw([(run, summary) for run, summary in found if summary or run.name in failed], root)
        lines += ["", "![Accuracy against the learning rate](stability.png)"]
    report = root / "report.md"
    write_atomically(report, ("\n".join(lines) + "\n").encode())
    return report


def spread(summaries: Sequence[Mapping[str, Any]], key: str) -> str:
    found = [summary[key] for summary in summaries if summary.get(key) is not None]
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.2f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def draw(found: Sequence[tuple[SweepRun, Mapping[str, Any] | None]], root: Path) -> None:
    """stability.png of the runs that were run."""
    from amod.analysis.stability import draw_stability

    if not found:
        return
    rows = []
    for run, summary in found:
        cfg = compose_config("train", run.arguments(root))
        top1 = summary["val_top1"] if summary else None
        rows.append({"router": cfg.router.name, "lr": cfg.schedule.lr, "seed": cfg.seed, "top1": top1})
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    caption = (
        f"{cfg.model.label} on {cfg.data.name}, capacity {cfg.capacity:g}, {cfg.schedule.epochs} epochs, seed {seeds}; "
        "validation accuracy of the best epoch"
    )
    draw_stability(rows, root / "stability.png", "Accuracy against the learning rate", caption)
