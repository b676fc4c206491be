"""A study of four runs, and finished run folders without a training."""

from __future__ import annotations

import json

from amod.studies.plan import runs_of
from amod.studies.rows import table_of

SCALE = {
    "name": "toy",
    "seeds": [0, 1],
    "models": ["vit_pico"],
    "data": "digits",
    "transfer": [],
    "stages": {"scratch": {"settings": ["schedule.epochs=2"]}},
}
STUDY = {
    "name": "toy",
    "title": "A toy",
    "stage": "scratch",
    "runs": [{"router": ["linear", "attention"], "capacity": [0.5]}],
    "metric": "test_top1",
    "claims": [{"text": "A-MoD is above MoD", "higher": "attention", "lower": "linear"}],
}


def rows(capacity=0.5, changes=None, **accuracies):
    """A finished row for each accuracy of each router, seeds 0, 1, ...; with ``changes`` of what all have."""
    usual = {"status": "finished", "stage": "finetune", "data": "digits", "model": "vit_pico", "gflops": 0.025}
    usual |= {"placement": "alternate", "keep_prefix": "false", "capacity": capacity, **(changes or {})}
    return table_of(
        [
            usual | {"router": router, "seed": seed, "test_top1": float(value), "run": f"{router}{seed}"}
            for router, values in accuracies.items()
            for seed, value in enumerate(values)
        ]
    )


def finish(root, accuracies):
    """The runs of STUDY, each with the files that a report reads."""
    runs = runs_of(STUDY, SCALE)
    for run in runs:
        value = accuracies[run.settings["router"]][int(run.settings["seed"])]
        finished(root / run.name, value)
    return runs


def finished(folder, accuracy):
    """A run's folder with the files that a report reads."""
    folder.mkdir(parents=True)
    summary = {"gflops": 0.025, "params": 1, "val_top1_untrained": None, "test_top1": accuracy, "seconds": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"git_commit": "abc", "threads": 1}))
    (folder / "metrics.csv").write_text(f"epoch,val/top1\n0,{accuracy - 5}\n1,{accuracy}\n")
