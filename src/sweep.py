"""Run a W&B sweep file on this machine, without W&B: python src/sweep.py sweeps/lr.yaml [key=value ...]

Each run is a process of src/train.py with a folder and a log in runs/sweeps/NAME/. Finished runs are not repeated and
stopped ones go on, so the same command again finishes a sweep. A failed run does not keep the others from running.
Then runs/sweeps/NAME/ holds report.md, runs.csv and, where the learning rate is swept, stability.png.

key=value holds for every run, as in data=digits schedule.epochs=5. hydra/launcher=NAME starts every run as a multirun
of Hydra by that launcher. jobs=N: so many at the same time; two on a machine without a GPU, else one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from amod.errors import UserError
from amod.studies.command import default_jobs
from amod.studies.runner import execute, how_to_run
from amod.sweeps import check, runs_of, write_report
from amod.training.command import one_line_errors


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return
    if not arguments or "=" in arguments[0]:
        raise UserError("say which file: make sweep SWEEP=sweeps/lr.yaml, or python src/sweep.py sweeps/lr.yaml")
    file, settings = Path(arguments[0]), dict(argument.partition("=")[::2] for argument in arguments[1:])
    jobs, launcher = settings.pop("jobs", None) or str(default_jobs()), settings.pop("hydra/launcher", None)
    if not jobs.isdigit() or int(jobs) < 1:
        raise UserError(f"jobs={jobs}: must be a whole number of at least 1")
    how = how_to_run(launcher)
    runs = runs_of(file, settings)
    root = Path("runs/sweeps") / file.stem
    check(runs, root)
    failed: dict[str, str] = {}
    try:
        execute(runs, root, int(jobs), how, failed)
    finally:  # a sweep that is stopped is reported as far as it got
        print(write_report(runs, root, failed, f"python src/sweep.py {' '.join(arguments)}"), flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, see {root}/*.log; the same command repeats them")


if __name__ == "__main__":
    with one_line_errors():
        try:
            main(sys.argv[1:])
        except KeyboardInterrupt:  # SIGTERM too
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)
