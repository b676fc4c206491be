from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import amod
import benchmark
from amod.analysis.throughput import goals, measures, memory, parts, pictures, report, variants
from amod.analysis.throughput.timing import Quartiles, alternate, paired, quartiles
from amod.training.compose import compose_config
from hub_models import build as build_hub
from hub_models import config_of

SRC = Path(__file__).parents[1] / "src"
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def config(*overrides):
    return compose_config("benchmark", list(overrides))


# --- statistics, on made-up timings


def test_quartiles_by_hand():
    assert quartiles([5, 1, 2, 4, 3]) == Quartiles(2, 3, 4)
    assert quartiles([1, 2, 3, 4]) == Quartiles(1.75, 2.5, 3.25)
    assert quartiles([7]) == Quartiles(7, 7, 7)


def test_ratios_are_paired_within_a_round():
    # the machine is three times as slow in the second round; the ratio of the medians would be 6 / 2 = 3
    assert paired([2, 6, 8], [1, 3, 2]) == Quartiles(2, 2, 3)


class Fake:
    """A clock that only the steps move, and what was called."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def step(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run

    def clock(self):
        return self.now


def test_variants_take_turns():
    fake = Fake()
    steps = {"a": fake.step("a", 1.0), "b": fake.step("b", 3.0)}
    times, repeats = alternate(steps, 3, clock=fake.clock)
    assert "".join(fake.calls) == "ababbaab"  # the first pair is not timed; then each begins in turn
    assert times == {"a": [1, 1, 1], "b": [3, 3, 3]}
    assert repeats == {"a": 1, "b": 1}


def test_short_steps_are_repeated_and_long_cells_end_early():
    fake = Fake()
    steps = {"a": fake.step("a", 0.25), "b": fake.step("b", 1.0)}
    times, repeats = alternate(steps, 9, min_rounds=2, seconds=5.0, fill=1.0, clock=fake.clock)
    assert repeats == {"a": 4, "b": 1}
    assert times == {"a": [0.25] * 3, "b": [1.0] * 3}  # 2 s a round: the third begins at 4 s, the fourth would at 6 s
    times, _ = alternate(steps, 9, min_rounds=2, seconds=0.0, clock=fake.clock)
    assert len(times["a"]) == 2


# --- variants and measurements


@pytest.fixture(scope="module")
def vit():
    return variants.dense("vit_tiny_patch16_224", TINY)


@pytest.mark.parametrize("name", ["dense", "linear@0.5", "attention@0.5", "attention_weighted@0.5", "random@0.5"])
def test_build_gives_the_named_model_and_its_flops(vit, name):
    variant = variants.build(vit, name)
    assert variant.flops == amod.count_flops(variant.model, (3, 16, 16))
    if name != "dense":
        assert variant.note == "K = 8"


def test_build_takes_the_papers_depths_and_equal_cost_for_tome(vit):
    assert variants.build(vit, "tome_r3").model.plan == dict.fromkeys(range(4), amod.Merge(3))
    with torch.device("meta"):
        small = timm.create_model("deit_small_patch16_224")
        assert variants.build(small, "isoflop@0.125").note == "6 blocks"
        assert variants.build(small, "tome@0.5").note == "r = 8"


def test_fused_attention_must_be_on(monkeypatch):
    monkeypatch.setattr(timm.layers.attention, "use_fused_attn", lambda: False)
    with pytest.raises(amod.UserError, match="TIMM_FUSED_ATTN"):
        variants.dense("vit_tiny_patch16_224", TINY)


@pytest.mark.parametrize("name", ["dense", "linear@0.5", "attention@0.5", "tome_r3"])
def test_parts_are_timed_without_changing_the_model(vit, name):
    model = variants.build(vit, name).model.eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    functions = [getattr(*where) for where in parts.FUNCTIONS]
    watch = parts.Stopwatch(torch.device("cpu"))
    with parts.watching(model, watch):
        assert torch.equal(model(images), before)
    spent = watch.read()
    assert {part for part in spent if spent[part] > 0} == {
        "attention",
        "mlp",
        *(() if name == "dense" else ("routing", "movement")),
    }
    assert functions == [getattr(*where) for where in parts.FUNCTIONS]
    assert all("forward" not in vars(module) for module in model.modules())
    model(images)
    assert not any(watch.read().values())


def test_every_attention_and_mlp_counts_once(vit):
    model = variants.build(vit, "attention@0.5").model.eval()
    watch = parts.Stopwatch(torch.device("cpu"))
    with parts.watching(model, watch):
        model(torch.randn(2, 3, 16, 16))
    marked = [part for part, _, _ in watch.marks]
    assert marked.count("attention") == marked.count("mlp") == 4
    assert marked.count("movement") == 4  # take and put of two routed blocks
    assert marked.count("routing") == 4  # router and top-k of two routed blocks


def test_allocated_peak_by_hand():
    def step():
        a = torch.empty(1000)  # 4,000 bytes
        b = torch.empty(500)  # 6,000 in all
        del a
        return b + torch.empty(500)  # 2,000 + 2,000 + 2,000

    with torch.inference_mode():
        assert memory.allocated_peak(step) == 6000


# --- the plan


def test_the_goals_preset_holds_every_goal():
    cells = list(benchmark.cells_of(config()))
    facts = {"commit": "abc", "took": 1.0}
    records = []
    for cell in cells:
        names = cell["variants"]
        flops = {name: 2e9 if name == "dense" else 1e9 for name in names}
        record = {"cell": cell, **facts, "notes": dict.fromkeys(names, "r = 1"), "flops": flops}
        if cell["measure"] == "speed":
            record["seconds"] = {name: [2.0] if name == "dense" else [1.0] for name in names}
        if cell["measure"] == "memory":
            record["memory"] = {name: {"tensors": 30, "weights": 10, "process": 50} for name in names}
        records.append(record)
    rows = goals.goals(records)
    assert all(row.measured is not None for row in rows)
    # three models at two capacities for five goals; ToMe, batch 1, memory; runtimes at two batches, and there ToMe
    assert len(rows) == 6 * 5 + 3 + 1 + 2 + 2 * 4 + 4
    by_goal = {row.goal: row for row in rows}
    assert by_goal["efficiency, forward, compiled"].measured.median == 1.0  # twice as fast at half the FLOPs
    assert by_goal["efficiency, forward, compiled"].reached
    assert by_goal["A-MoD / MoD, forward, eager"].reached
    assert not by_goal["A-MoD / ToMe at equal GFLOPs, forward, eager"].reached  # 1.0 < 1.1
    assert by_goal["speed-up, batch 1, forward, eager"].measured.median == 2.0
    assert by_goal["peak memory at 4097 tokens, forward, / dense"].measured.median == 1.0
    head = dict.fromkeys(("command", "kind", "threads", "system", "python", "torch", "timm"), "")
    written = [*report.report(head, records, [], rows, [])]
    assert sum("| yes |" in line or "| no |" in line for line in written) == len(rows)
    assert written.index("## Goals") < written.index("## Speed")


def test_goals_that_were_not_run_say_so():
    rows = goals.goals([])
    assert {row.reached for row in rows} == {None}
    assert all("not run" in line for line in list(report.goal_table(rows))[2:])


def test_a_setting_replaces_the_presets_in_all_its_parts():
    cells = list(benchmark.cells_of(config("models=[vit_pico]", "capacities=[0.3]", "measures=[speed]")))
    assert {cell["model"] for cell in cells} == {"vit_pico"}
    assert {cell["measure"] for cell in cells} == {"speed"}
    assert all(name.partition("@")[2] in ("", "0.3") for cell in cells for name in cell["variants"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["preset=goal"], ["preset=goal", "goals, quick, full", "did you mean goals?"]),
        (["models=[deit_smal]"], ["deit_smal must be one of", "did you mean deit_small?"]),
        (["models=deit_small"], ["must be a list", "models=[deit_small]"]),
        (["variants=[tome_13]"], ["tome_13", "one of dense"]),
        (["capacities=[0.5,2]"], ["2 must be a number in (0, 1]"]),
        (["batch_sizes=[0]"], ["batch_sizes=[0]", "at least 1"]),
        (["compile=[maybe]"], ["true or false"]),
        (["precision=[16]"], ["bf16-mixed"]),
        (["rounds=0"], ["rounds=0"]),
        (["device=tpu"], ["device=tpu", "auto, cpu, cuda"]),
        (["rouds=3"], ["did you mean rounds?"]),
        (["models=['hf:x',deit_small]"], ["of timm's or of transformers'"]),
        (["models=['hf:x']", "runtimes=[openvino]"], ["runtimes=[openvino]", "runtimes=[torch]"]),
        (["models=['hf:x']", "measures=[speed,memory]"], ["measures=[memory]", "measures=[speed]"]),
        (["models=['hf:']"], ["hf:FOLDER"]),
        (["tokens=0"], ["tokens=0", "at least 1"]),
        (["tokens=64"], ["tokens=64: is of models that read texts; leave it out"]),
        (["rounds=2", "min_rounds=9"], ["min_rounds=9: rounds=2 are fewer"]),
    ],
)
def test_mistakes_are_explained(overrides, words):
    with pytest.raises(amod.UserError) as caught:
        benchmark.check(config(*overrides))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(SRC / "benchmark.py"), "models=[nothing]", f"output={tmp_path / 'new'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: models=[nothing]")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_capacity_too_small_for_a_model_is_refused_before_anything_is_timed(tmp_path):
    with pytest.raises(amod.UserError, match="keeps no token"):
        benchmark.job(config("preset=quick", "capacities=[0.001]", f"output={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()


def test_exported_files_are_cells_of_their_own():
    cells = [cell for cell in benchmark.cells_of(config()) if cell["runtime"] != "torch"]
    found = {(cell["runtime"], cell["batch"], cell["precision"]) for cell in cells}
    assert len(found) == len(cells) == 6
    assert ("onnxruntime", 1, "default") not in found
    asked = config("runtimes=[openvino]", "modes=[forward,train]", "compile=[false,true]", "measures=[speed]")
    assert {(cell["mode"], cell["compile"]) for cell in benchmark.cells_of(asked)} == {("forward", False)}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_exported_file_is_timed(runtime):
    pytest.importorskip(runtime)
    kwargs = {**TINY, "depth": 2}
    cell = {"timm_name": "vit_tiny_patch16_224", "kwargs": kwargs, "variants": ["dense", "attention@0.5"], "batch": 2}
    cell |= {"runtime": runtime, "precision": "32-true", "threads": 1, "rounds": 2, "min_rounds": 2, "seconds": 9}
    record = measures.measure_speed({**cell, "fill": 0.0}, torch.device("cpu"))
    assert {name: len(seconds) for name, seconds in record["seconds"].items()} == {"dense": 2, "attention@0.5": 2}
    assert record["computed_in"] == ["float32"]


# --- transformers' models

HF = ["rounds=2", "min_rounds=2", "seconds=0", "fill=0", "batch_sizes=[2]", "capacities=[0.5]", "device=cpu"]


@pytest.mark.parametrize(("family", "tokens"), [("Bert", 12), ("ViT", 17)])
def test_a_model_of_transformers_is_timed(family, tokens, tmp_path, monkeypatch):
    config_of(family).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    asked = [*HF, f"model=hf:{tmp_path}/model", "modes=[forward,train]", "variants=[linear,attention]"]
    asked += ["tokens=12"] if family == "Bert" else []
    benchmark.job(config(*benchmark.one_model(asked)))
    lines = (tmp_path / "outputs/benchmark/model/cells.jsonl").read_text().splitlines()
    forward, train = map(json.loads, lines)
    model = build_hub(family)
    size = tokens if family == "Bert" else (3, 32, 32)
    for record in (forward, train):
        assert {name: len(seconds) for name, seconds in record["seconds"].items()} == {
            "dense": 2, "linear@0.5": 2, "attention@0.5": 2,
        }  # fmt: skip
        assert record["flops"]["dense"] == amod.count_flops(model, size)
        assert record["flops"]["attention@0.5"] == amod.count_flops(amod.convert(model, "attention", 0.5), size)
    assert "results" not in {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["model=hf:{0}", "variants=[tome]", "tokens=12"], "tome"),
        (["model=hf:{0}/gone"], "no such model"),
        (["model=hf:{0}", "image_size=64"], "image_size=64: hf:.* reads texts; leave it out"),
        (["model=hf:{0}/vit", "tokens=64"], "tokens=64: hf:.*/vit reads images; leave it out"),
    ],
)
def test_what_transformers_models_do_not_have_is_one_line(asked, words, tmp_path):
    config_of("Bert").save_pretrained(tmp_path)
    config_of("ViT").save_pretrained(tmp_path / "vit")
    asked = benchmark.one_model([value.format(tmp_path) for value in asked])
    cfg = config(*HF, *asked, f"output={tmp_path}/out")
    with pytest.raises(amod.UserError, match=words) as error:
        benchmark.job(cfg)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# --- end to end

QUICK = ["preset=quick", "capacities=[0.5]", "variants=[attention,tome_r2]", "device=cpu"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run of preset=quick, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        benchmark.job(config(*QUICK, f"output={folder}"))
    return folder, printed.getvalue()


def test_quick_writes_tables_data_and_pictures(quick):
    folder, printed = quick
    written = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert "[4/4]" in printed
    assert str(folder / "report.md") in printed
    for word in ("A-MoD, C = 0.5", "ToMe, r = 2", "## Peak memory", "Where the time"):
        assert word in written
    assert "## Goals" not in written  # none is about this model
    assert written.splitlines()[2].startswith("`python src/benchmark.py ")
    assert {"command", "commit", "kind", "threads", "torch", "cells", "goals"} <= results.keys()
    for record in results["cells"]:
        for variant in record.get("seconds", []):
            assert len(record["seconds"][variant]) == 3
    peaks = next(record["memory"] for record in results["cells"] if "memory" in record)
    assert all(used["process"] > used["tensors"] > used["weights"] > 2e6 for used in peaks.values())
    for name in ("efficiency.png", "parts.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_skipped_and_a_torn_line_is_measured_again(quick, monkeypatch, capsys):
    folder, _ = quick
    store = folder / "cells.jsonl"
    lines = store.read_text().splitlines()
    store.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # killed while it wrote the last cell
    run = []

    def measure(cell, device):
        run.append(cell["measure"])
        return {key: value for key, value in json.loads(lines[-1]).items() if key not in ("cell", "commit", "took")}

    monkeypatch.setattr(measures, "MEASURES", dict.fromkeys(measures.MEASURES, measure))
    monkeypatch.setattr(report, "draw", lambda *_: [])
    settings = [*QUICK, f"output={folder}"]
    benchmark.job(config(*settings))
    assert run == ["memory"]
    assert len(store.read_text().splitlines()) == len(lines)
    benchmark.job(config(*settings))
    assert run == ["memory"]
    assert capsys.readouterr().out.count("expected end") == 1
    whole = (folder / "results.json").read_bytes()
    benchmark.job(config(*settings, "measures=[memory]", "fresh=true"))  # the others' work is not lost, nor the report
    assert run == ["memory"] * 2
    assert (folder / "results.json").read_bytes() == whole
    assert len(json.loads((folder / "partial/results.json").read_text())["cells"]) == 1
    benchmark.job(config(*settings))
    assert run == ["memory"] * 2


def test_only_the_goals_as_they_are_go_to_their_report(monkeypatch):
    goals, quick, other = (benchmark.output_of(config(*asked)) for asked in ([], ["preset=quick"], ["batch_sizes=[8]"]))
    assert [str(goals), str(quick), str(other)] == [
        *("results/benchmark", "outputs/benchmark/quick", "outputs/benchmark/goals")
    ]


def test_variants_without_a_capacity_have_no_picture(tmp_path):
    cell = {"measure": "speed", "variants": ["dense", "tome_r2"], "model": "vit_pico", "batch": 1}
    assert pictures.draw(tmp_path, [{"cell": cell, "seconds": {"dense": [1.0], "tome_r2": [1.0]}}]) == []


def test_cells_that_there_are_none_of_are_said():
    with pytest.raises(amod.UserError, match="preset=goals: has no cell of all that was asked for"):
        benchmark.job(config("modes=[train]", "runtimes=[onnxruntime]"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["measures=[parts]", "modes=[train]"], r"modes=\[train\]: preset=quick has no cell of train"),
        (["measures=[memory]", "compile=[true]"], r"compile=\[true\]: preset=quick has no cell of true"),
        (
            ["runtimes=[torch,openvino]", "precision=[32-true,bf16-mixed]", "measures=[parts]"],
            "has no cell of openvino",
        ),
        (["variants=[tome_r3]", "capacities=[0.3]"], "none of these variants has a capacity"),
        (["measures=[parts]", "modes=[forward]", "fill=5"], r"fill=5: is of measures=\[speed\]"),
    ],
)
def test_what_was_asked_for_and_is_in_no_cell_is_said(asked, words, tmp_path):
    with pytest.raises(amod.UserError, match=words):
        benchmark.job(config("preset=quick", *asked, f"output={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()


def test_at_least_so_many_rounds_are_more_than_the_presets():
    for asked, rounds in ((["min_rounds=20"], 20), (["min_rounds=2"], 9), (["rounds=30", "min_rounds=20"], 30)):
        cells = benchmark.cells_of(config("models=[deit_small]", "batch_sizes=[32]", "measures=[speed]", *asked))
        assert rounds in {cell["rounds"] for cell in cells}
        assert all(cell["rounds"] >= cell["min_rounds"] for cell in benchmark.cells_of(config(*asked)))


def test_without_a_compiler_compiled_cells_are_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = ["preset=quick", "measures=[speed]", "modes=[forward]", "compile=[true]", "device=cpu"]
    benchmark.job(config(*settings, f"output={tmp_path}"))
    assert "not run: torch.compile needs a C++ compiler" in capsys.readouterr().out
    assert "no-such-compiler" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "cells.jsonl").exists() or not (tmp_path / "cells.jsonl").read_text()


def test_a_cell_that_fails_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    def fail(cell, device):
        raise RuntimeError("too little memory\nand more")

    monkeypatch.setitem(measures.MEASURES, "speed", fail)
    settings = ["preset=quick", "measures=[speed,parts]", "variants=[attention]", "modes=[forward]", "device=cpu"]
    benchmark.job(config(*settings, f"output={tmp_path}"))
    assert "not run: RuntimeError: too little memory" in capsys.readouterr().out
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 1
