"""What src/reproduce.py does: the studies one after the other, each run and reported, or only listed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from amod.errors import UserError, shown
from amod.files import check_place
from amod.studies.plan import Run, at_scale, runs_of
from amod.studies.runner import arguments, command, execute, finished, how_to_run, to_run
from amod.training.checks import check_train
from amod.training.compose import compose_config
from amod.training.config import CONF, TrainConfig, UntrainedConfig, choices
from amod.training.rules import parse

BENCHMARK = Path(__file__).parents[2] / "benchmark.py"


def check_reproduce(cfg: DictConfig) -> None:
    """What this command's own settings show; those of the runs are checked before the first is started."""
    for key in ("study", "scale"):
        if not isinstance(cfg.get(key), DictConfig):
            raise UserError(f"{key}={cfg.get(key)}: must stay a group; choose one of {', '.join(choices(key))}")
    if not (cfg.jobs is None or (isinstance(cfg.jobs, int) and not isinstance(cfg.jobs, bool) and cfg.jobs >= 1)):
        raise UserError(f"jobs={cfg.jobs}: must be a whole number of at least 1, or null")
    for key in ("dry", "report_only", "fresh"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: must be true or false")
    how_to_run(cfg.launcher, cfg.extra)
    weights = cfg.scale.get("weights")
    if not (weights is None or isinstance(weights, str)):
        raise UserError(f"scale.weights={weights}: must be a file of the model's weights, or null for the hub's")
    if cfg.dry and cfg.report_only:
        raise UserError("dry=true: lists what would be run, and report_only=true runs nothing; leave one of them out")
    study, scale = cfg.study, cfg.scale
    for key in ("jobs", "launcher", "extra") if study.get("benchmark") else ():
        if cfg[key] is not None:
            raise UserError(f"{key}={shown(cfg[key])}: study={study.name} is timed in one process here; leave it out")
    if scale.name not in choices("scale"):
        raise UserError(f"scale.name={scale.name}: must be one of {', '.join(choices('scale'))}; choose it with scale=")
    if scale.name not in study.get("scales", [scale.name]) and "studies" not in study:
        raise UserError(f"scale={scale.name}: study={study.name} is of scale {', '.join(study.scales)}; choose that")
    for key in ("runs", "results"):
        if not isinstance(cfg[key], str) or not cfg[key]:
            raise UserError(f"{key}={shown(cfg[key])}: must be the name of a folder")
        if Path(cfg[key]).exists() and not Path(cfg[key]).is_dir():
            raise UserError(f"{key}={cfg[key]}: is a file; name a folder")
    seeds = cfg.scale.seeds
    if not OmegaConf.is_list(seeds) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise UserError(f"scale.seeds={seeds}: must be a list of whole numbers such as [0,1,2]")


def reproduce(cfg: DictConfig) -> None:
    GlobalHydra.instance().clear()  # composing the runs' configs needs a Hydra of its own
    scale = _plain(cfg.scale)
    typed = (item for item in sys.argv[1:] if item.startswith(("study.", "scale.")))
    scale["typed"] = [item for item in typed if not item.startswith("scale.weights=")]  # whose folder nobody needs
    root, results = Path(cfg.runs), Path(cfg.results)
    how = how_to_run(cfg.launcher, cfg.extra)
    if not cfg.dry:
        check_place(results)  # before the hours of the runs
    studies = [at_scale(study, scale) for study in studies_of(_plain(cfg.study), scale["name"])]
    plans = {study["name"]: runs_of(study, scale) for study in studies if "benchmark" not in study}
    from amod.studies import clock  # pandas takes a second
    from amod.studies.rows import METRICS, Known, curves_of, known_in, place_of, reported, with_own

    for study in studies:
        for metric in [*(study.get("metrics") or []), *([study["metric"]] if "metric" in study else [])]:
            if metric not in METRICS:
                raise UserError(f"study.metric={metric}: no report has it; choose one of {', '.join(METRICS)}")

    known: Known = ({}, curves_of(results / "none")) if cfg.fresh else known_in(results, scale["name"])

    def found_in(name: str, failed: Mapping[str, str] | None = None) -> tuple[Any, Any]:
        before = known if cfg.fresh else with_own(known, results / name / scale["name"])
        return reported(plans[name], root, before, failed)

    runs = list({run.name: run for plan in plans.values() for run in plan}.values())  # those they share once
    missing = to_run(runs, root, known[0])
    if cfg.dry:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it quietly
        for study in studies:
            print(f"\n{study['title']} ({scale['name']} scale)")
            if study["name"] in plans:
                dry_run(plans[study["name"]], root, how, missing)
            else:
                print("python src/benchmark.py " + " ".join(throughput(study, scale, results, cfg.fresh)))
        return

    if cfg.report_only:
        found = {name: found_in(name) for name in plans}
        measured = [study for study in studies if study["name"] in found]
        if known[0] and not any((rows["status"] == "finished").any() for rows, _ in found.values()):
            print(f"none of these runs is in {results} or {root}: {said_of(results, scale)}")
        there = [s for s in measured if is_there(s, measured, found, results / s["name"] / scale["name"])]
        report(there, scale, found, results)
        return

    here = [run for run in runs if run in missing or finished(run, root)]
    if len(here) < len(runs):
        print(f"{len(runs) - len(here)} runs are in {results} already and are not repeated; fresh=true runs them here")
    for run in missing:
        if run.start is None:  # the others need its checkpoint to be checked
            check_train(compose_config(Path(run.script).stem, arguments(run, root, how)))
    failed: dict[str, str] = {}
    try:
        execute(here, root, cfg.jobs or default_jobs(), how, failed)
        for study in studies:
            if study.get("clock"):
                rows, _ = found_in(study["name"], failed)
                place = place_of(rows, results / study["name"] / scale["name"])
                clock.measure(plans[study["name"]], root, place)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:  # an interrupted study is reported as far as it got
        found = {name: found_in(name, failed) for name in plans}
        report(studies, scale, found, results)
    for study in studies:
        if study["name"] not in plans:
            line = throughput(study, scale, results, cfg.fresh)
            if subprocess.run([sys.executable, str(BENCHMARK), *line], check=False).returncode:
                failed[study["name"]] = "see above"
    if failed:
        raise UserError(
            f"{len(failed)} runs failed, see the reports and {root}/*.log; the same command tries them again"
        )


def said_of(results: Path, scale: Mapping[str, Any]) -> str:
    """Why reports at this scale may be of other runs."""
    named = "the hub's" if scale.get("weights") is None else Path(scale["weights"]).name
    return f"reports at {scale['name']} scale name the weights that they began from (scale.weights=), these are {named}"


def is_there(
    study: Mapping[str, Any],
    studies: Sequence[Mapping[str, Any]],
    found: Mapping[str, tuple[Any, Any]],
    folder: Path,
) -> bool:
    """Whether a study can be reported: it was before, is whole, or has a finished run that no other has as well."""

    def runs(name: str) -> tuple[set[str], set[str]]:
        rows, _ = found[name]
        mine = rows[rows["stage"] == study["stage"]]
        return {*mine["run"]}, {*mine["run"][mine["status"] == "finished"]}

    asked, done = runs(study["name"])
    others = [runs(other["name"])[0] for other in studies if other is not study]
    return bool(done) and ((folder / "runs.csv").exists() or done == asked or bool(done.difference(*others)))


def report(
    studies: Sequence[dict[str, Any]], scale: Mapping[str, Any], found: Mapping[str, tuple[Any, Any]], results: Path
) -> None:
    """Write the report of each study of which ``found`` has (rows, curves), and the page of all claims."""
    from amod.studies.claims_page import write_page  # pandas, scipy and matplotlib take seconds
    from amod.studies.report import write_report

    for study in studies:
        if study["name"] in found:
            written = write_report(study, scale, *found[study["name"]], results / study["name"] / scale["name"])
            beside = written.parent.name == "partial"
            why = " (the report above it stays: it has finished runs that this one has not)" if beside else ""
            print(f"{study['title']}: {written}{why}", flush=True)
    whole = _plain(OmegaConf.load(CONF / "study/all.yaml"))
    scales = [_plain(OmegaConf.load(CONF / f"scale/{name}.yaml")) for name in whole["scales"]]
    print(f"all claims: {write_page(list(studies_of(whole)), scales, whole['untested'], results)}", flush=True)


def studies_of(study: dict[str, Any], scale: str | None = None) -> Iterator[dict[str, Any]]:
    """The study itself, or those that it lists which are meant for this scale; all of them for scale None."""
    if "studies" not in study:
        yield study
    for name in study.get("studies", []):
        listed = _plain(OmegaConf.load(CONF / "study" / f"{name}.yaml"))
        if scale is None or scale in listed.get("scales", [scale]):
            yield listed


def default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else 2


def dry_run(runs: list[Run], root: Path, how: Sequence[str], missing: Sequence[Run]) -> None:
    """Every command with what it costs: GFLOPs of one forward pass of one image (gates open), and epochs."""
    import torch

    counted: dict[str, float] = {}
    for run in runs:
        kind = TrainConfig if run.script == "train.py" else UntrainedConfig
        cfg = parse(kind, compose_config(Path(run.script).stem, arguments(run, root, how)))
        cfg.model.pretrained, cfg.model.checkpoint = False, None
        shape = f"{cfg.model} {cfg.router} {cfg.placement} {cfg.capacity} {cfg.budget} {cfg.data.num_classes}"
        if shape not in counted:
            with torch.device("meta"):
                counted[shape] = gflops_of(cfg)
        state = "to run" if run in missing else "finished" if finished(run, root) else "reported"
        epochs = f"{cfg.schedule.epochs} epochs" if run.script == "train.py" else "no training"
        print(f"# {counted[shape]:.4f} GFLOPs, {epochs}, {state}")
        print(" ".join(command(run, root, how)))
    print(f"{len(runs)} runs", flush=True)


def gflops_of(cfg: Any) -> float:
    """Of one image, from the config alone: without data, weights or numbers."""
    if cfg.model.task == "detection":
        from amod.training import detecting

        return detecting.cost(detecting.build_detr(cfg, ["thing"] * 80, range(80)).model, cfg)["gflops"]
    from amod.flops import count_flops
    from amod.gates import is_gated
    from amod.training.weights import build
    from amod.vit import dense

    model = build(cfg, cfg.data.num_classes or 2).model
    model = dense(model) if is_gated(model) else model  # its gates open
    return count_flops(model) / 1e9


def throughput(study: Mapping[str, Any], scale: Mapping[str, Any], results: Path, fresh: bool) -> list[str]:
    """The arguments of src/benchmark.py."""
    fixed = [
        "preset=quick",
        "measures=[speed,parts]",
        "variants=[isoflop,linear,attention]",
        "rounds=9",
        "min_rounds=5",
    ]
    return [
        *fixed,
        "modes=[forward]",
        "fill=0.2",
        *study["benchmark"],
        f"output={results / study['name'] / scale['name']}",
        *(["fresh=true"] if fresh else []),
    ]


def _plain(config: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
