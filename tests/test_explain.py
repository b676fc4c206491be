"""The command: from run folders to pictures, tables and a report; what it refuses."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import amod
import families
from amod.analysis import panels, pictures
from amod.analysis.explain import explain
from amod.analysis.explain_checks import check_explain, data_config, decided, folders, saved
from amod.analysis.routing_statistics import seen
from amod.errors import UserError
from amod.training.command import check_beside_run
from amod.training.compose import compose_config
from amod.training.config import ExplainConfig
from amod.training.folder import saved_config
from amod.training.rules import parse
from amod.training.weights import build, weightless
from tiny import MODEL, config

FILES = ["agreement.csv", "correlation.csv", "correlation.png", "heads.png", "importance.png", "kept-often.png"]
FILES += ["kept.png", "report.md", "scores.png"]


def make_run(folder: Path, *overrides: str) -> Path:
    """A finished run's folder, with random weights."""
    cfg = config("model.pretrained=false", *overrides, f"run_dir={folder}")
    folder.mkdir()
    torch.manual_seed(cfg.seed)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(saved_config(cfg))))
    model = build(weightless(cfg), 10).model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """dense-SEED, attention-SEED (from dense-SEED) and linear-SEED of two seeds."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        dense = make_run(root / f"dense-{seed}", "router=none", f"seed={seed}")
        for router in ("attention", "linear"):
            adapt = (f"router={router}", "capacity=0.3", f"seed={seed}", f"model.checkpoint={dense}")
            make_run(root / f"{router}-{seed}", *adapt)
            (root / f"{router}-{seed}.log").touch()  # a study's, which a pattern finds too
    return root


def run(*overrides: str) -> None:
    explain(check_explain(compose_config("explain", ["images_max=6", "device=cpu", *overrides])), "command")


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / name).open()))


def test_two_seeds_of_both_routers(runs, tmp_path, capsys):
    run(f"run={runs}/attention-*", f"mod={runs}/linear-*", f"output={tmp_path}", "tokens=8", "shown=2")
    said = capsys.readouterr().out
    # two routed blocks, 1 and 3 of 4: 3 + 1 blocks of 4 for each token
    assert "2 runs x 6 images x 8 patches x 2 blocks cost as much as 96 images" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    report = (tmp_path / "report.md").read_text()
    assert "Dense model: dense-0; dense-1." in report  # no path of this machine
    assert "seeds 0, 1, 6 images" in report
    assert "over 2 runs" in report
    found, _, rest = report.partition("## What was measured")
    assert found.count("| scores |") == 1  # what was found first, in one table
    assert "\nA-MoD: the patches that it keeps have " in found
    assert rest.count("| scores |") == 8
    assert "MoD as routed" in report
    found = rows(tmp_path, "correlation.csv")
    assert {row["scores"] for row in found} == {"dense maps", "attention", "linear", "random", "contrast"}
    assert {row["over"] for row in found} == {"2 runs"}
    assert len(found) == 2 * 5 * 2 * 2  # measures, sources, blocks, methods
    kept = rows(tmp_path, "agreement.csv")
    assert [(row["run"], row["router"], row["block"]) for row in kept][:3] == [
        ("0", "attention", "1"),
        ("0", "attention", "3"),
        ("0", "linear", "1"),
    ]


def test_a_dense_run_is_adapted_untrained(runs, tmp_path):
    folder = f"output={tmp_path}"
    run(f"run={runs}/dense-0", "router=linear", "capacity=0.5", folder, "tokens=3", "shown=1", "split=val")
    report = (tmp_path / "report.md").read_text()
    assert "capacity 0.5 (13 of 26 tokens kept in a routed block)" in report
    assert "Dense model: the run itself" in report
    assert "digits, val images" in report


def test_what_a_budget_picked_is_told(runs, tmp_path):
    run(f"run={runs}/dense-0", "budget=75%", "images_max=2", "tokens=2", "shown=1", f"output={tmp_path}/out")
    report = (tmp_path / "out/report.md").read_text()
    told = re.search(r"capacity ([\d.]+) \((\d+) of 26 tokens kept", report)
    assert told
    assert math.floor(float(told[1]) * 26 + 1e-6) == int(told[2]) > 3  # not 0.125, which nobody asked for


def test_your_own_pictures_without_the_data(runs, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / name
        )
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    moved = OmegaConf.load(runs / "attention-0/config.yaml")
    moved.model.checkpoint = "gone"
    copy = tmp_path / "copy"
    copy.mkdir()
    OmegaConf.save(moved, copy / "config.yaml")
    (copy / "weights.safetensors").symlink_to(runs / "attention-0/weights.safetensors")
    run(f"run={copy}", f"images={tmp_path}/pictures", f"output={tmp_path}/out", "tokens=3")
    report = (tmp_path / "out/report.md").read_text()
    assert "own pictures" in report
    assert "2 images" in report
    assert "the class that the dense model predicts" in report
    assert "own weights with all tokens" in report  # what the run came from is gone


def test_a_model_by_its_name(runs, tmp_path):
    model = [*MODEL, "data=digits", f"model.checkpoint={runs}/dense-1/weights.safetensors"]
    run(*model, "capacity=0.4", "placement.blocks=[2]", f"output={tmp_path}", "tokens=3", "shown=1")
    assert {row["block"] for row in rows(tmp_path, "correlation.csv")} == {"2"}
    assert "Dense model: dense-1/weights.safetensors." in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (["router=tome", "router.r=4"], "of 26 tokens 22, 18, 14, 10 left"),
        (["router=evit", "router.keep_rate=0.5"], "of 26 tokens 15, 9, 6 left"),
        (["router=dynamicvit", "router.keep_rate=0.5"], "of 26 tokens 13, 7, 4 left"),
        (["router=plan", "router.file={}/plan.yaml"], "of 26 tokens 18, 9, 1 left"),
    ],
)
def test_what_merges_and_prunes_is_drawn_too(router, said, runs, tmp_path):
    (tmp_path / "plan.yaml").write_text("1: {Merge: {r: 8}}\n2: {Route: {capacity: 0.5}}\n3: ClassOnly\n")
    router = [value.format(tmp_path) for value in router]
    run(f"run={runs}/dense-0", *router, f"output={tmp_path}/out", "tokens=3", "shown=1")
    report = (tmp_path / "out/report.md").read_text()
    assert said in report
    assert {"kept.png", "kept-often.png", "scores.png"} < {file.name for file in (tmp_path / "out").iterdir()}


def test_seen_says_of_every_patch_what_became_of_it():
    """Five tokens: 1 and 3 merge (4 leave), then two of the four are kept, then one of them is pruned."""
    owner = torch.tensor([[0, 1, 2, 1, 3]])
    gone = torch.tensor([[0, -1, 1, -1, 2]])
    routing = [
        amod.RoutedLayer(0, torch.zeros(1, 0), torch.arange(4)[None], owner),
        amod.RoutedLayer(1, torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.tensor([[1, 3]]), owner),
        amod.RoutedLayer(2, torch.tensor([[0.4, 0.1, 0.3, 0.2]]), torch.arange(3)[None], gone),
        amod.RoutedLayer(3, torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0]]), gone),
    ]
    merged, routed, pruned, after = seen(routing)
    assert merged.scores is None
    assert merged.kept.all()
    assert merged.alone().tolist() == [[True, False, True, False, True]]
    assert routed.scores is not None
    assert torch.equal(routed.scores, torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.3]]))
    assert routed.kept.tolist() == [[False, True, False, True, True]]
    assert pruned.scores is not None
    assert torch.equal(pruned.scores, torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.2]]))
    assert pruned.kept.tolist() == [[True, False, True, False, True]]
    assert pruned.alone().tolist() == [[True, False, True, False, True]]  # those that are gone join nobody
    assert after.scores is not None
    assert torch.equal(after.scores, torch.tensor([[0.5, 0, 0.3, 0, 0.2]]))
    assert after.kept.tolist() == [[True, False, False, False, False]]


def test_merged_patches_have_one_colour(tmp_path, monkeypatch):
    image = torch.rand(1, 3, 8, 8)
    owner = torch.tensor([[0, 1, 2, 1, 3]])  # the first and the third patch are one
    routing = [amod.RoutedLayer(0, torch.zeros(1, 0), torch.arange(4)[None], owner)]
    drawn = []
    monkeypatch.setattr(pictures, "squares", lambda axis, colours: drawn.append(axis.get_images()[0]))
    pictures.draw_kept_patches(image, {"ToMe": routing}, (2, 2), tmp_path / "kept.png", "title")
    pixels, before = np.asarray(drawn[0].get_array()), image[0].permute(1, 2, 0).numpy()
    assert np.allclose(pixels[:, 4:], before[:, 4:])
    assert np.allclose(pixels[:, :4], before[:, :4].mean(axis=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("family", ["dinov2_registers", "gap_no_class_token"])
def test_prefix_tokens_are_squares_below(family, tmp_path, monkeypatch):
    """As many squares as the family has tokens without a patch, on every panel but the images themselves."""
    vit, size = families.build(family)
    images = torch.rand(1, *size)
    model = amod.convert(vit, "attention", 0.4)
    with torch.no_grad():
        routing = model(images, return_routing=True)[1]
    seen = []
    for module in (pictures, panels):
        monkeypatch.setattr(module, "squares", lambda axis, colours: seen.append(len(colours)))
    grid = vit.patch_embed.grid_size
    for draw in (pictures.draw_kept_patches, pictures.draw_scores):
        draw(images, {"A-MoD": routing}, grid, tmp_path / "picture.png", "title")
    pictures.draw_kept_often({"A-MoD": routing}, grid, tmp_path / "picture.png", "title")
    assert seen == [vit.num_prefix_tokens] * (3 * len(routing))


def test_what_was_skipped_is_pale_and_without_colour_and_what_was_kept_as_it_was(tmp_path, monkeypatch):
    image = torch.rand(1, 3, 8, 8)
    routing = [amod.RoutedLayer(1, torch.rand(1, 5), torch.tensor([[0, 2]]))]  # the class token and the second patch
    drawn = []
    monkeypatch.setattr(pictures, "squares", lambda axis, colours: drawn.append((axis.get_images()[0], colours)))
    pictures.draw_kept_patches(image, {"A-MoD": routing}, (2, 2), tmp_path / "kept.png", "title")
    ((shown, colours),) = drawn
    pixels, before = np.asarray(shown.get_array()), image[0].permute(1, 2, 0).numpy()
    assert np.allclose(pixels[:4, 4:], before[:4, 4:])
    skipped = np.concatenate([pixels[:4, :4].reshape(-1, 3), pixels[4:].reshape(-1, 3)])
    assert np.ptp(skipped, axis=1).max() < 1e-6
    assert 0.5 < skipped.min() < skipped.max() < 1
    assert colours == ["black"]


WRONG = {
    "folder": (["run=nowhere"], "run=nowhere: no such folder"),
    "unfinished": (["run={}/unfinished"], "is not finished"),
    "no run": (["run={}"], "is no run (there is no config.yaml)"),
    "counts": (["run={}/attention-*", "mod={}/linear-0"], "has 1 folders for 2 of run"),
    "same router": (["run={}/attention-0", "mod={}/attention-1"], "its router is attention"),
    "dense as mod": (["run={}/attention-0", "mod={}/dense-0"], "its router is none"),
    "decided": (["run={}/attention-0", "capacity=0.7"], "capacity=0.7: run={}/attention-0 decides it"),
    "model": (["run={}/dense-0", "model=vit_pico"], "decides it"),
    "images": (["run={}/attention-0", "images=nowhere"], "images=nowhere: is no folder"),
    "no picture": (["run={}/attention-0", "images={}/dense-0"], "holds no picture"),
    "split": (["run={}/attention-0", "split=train"], "must be one of test, val"),
    "tokens": (["run={}/attention-0", "tokens=1"], "tokens=1: must be a whole number of at least 2"),
    "router": (["run={}/dense-0", "router=none"], "routes nothing"),
    "gates": (["run={}/dense-0", "router=tuning"], "router=tuning: explain compares"),
    "gates in a plan": (["run={}/dense-0", "router=plan", "router.file={}/gates.yaml"], "a gate has no such number"),
    "no choice": (["run={}/dense-0", "router=plan", "router.file={}/alone.yaml"], "no block of its plan chooses"),
    "output": (["run={}/attention-0", "output={}/dense-0/config.yaml"], "is a file"),
    "mixed": (["run=[{0}/attention-0,{0}/other-size]"], "the runs differ in model.kwargs"),
    "mixed kinds": (["run=[{0}/attention-0,{0}/linear-1]"], "the runs differ in router.name"),
    "mixed routers": (["run=[{0}/attention-0,{0}/kept-prefix]"], "the runs differ in router;"),
    "other model": (
        ["run={0}/attention-0", "mod={0}/other-mod"],
        "mod={}/other-mod: differs from run= in model.kwargs",
    ),
    "other capacity": (
        ["run={0}/attention-0", "mod={0}/linear-more"],
        "mod={}/linear-more: differs from run= in capacity (0.75 and 0.3)",
    ),
    "other seed": (["run={0}/attention-0", "mod={0}/linear-1"], "differs from run= in seed (1 and 0)"),
    "twice": (["run=[{0}/attention-0,{0}/attention-0]"], "names a folder twice"),
    "routed as dense": (
        ["run={0}/attention-0", "dense={0}/linear-0"],
        "its router is linear; name a run of router=none",
    ),
    "nothing": (["run=[]"], "run=[]: names no folder"),
    "no place": (["run={}/dense-0", "output={}/dense-0/config.yaml/x"], "dense-0/config.yaml/x: cannot be written"),
    "device": (["run={}/attention-0", "device=cuda"], "device=cuda: torch sees no CUDA device here"),
    "untrained": ([*MODEL, "data=digits"], "run: say which run folder"),
    "head": ([*MODEL, "data=digits", "model.checkpoint={}/headless.safetensors"], "have no head for the 10 classes"),
}


def test_what_the_run_decides_is_what_was_typed_with_its_default_too(runs):
    adapted, dense = (decided(compose_config("explain", [f"run={runs}/{name}-0"])) for name in ("attention", "dense"))
    assert {"router", "capacity"} <= {*adapted}
    assert not {"router", "capacity"} & {*dense}
    cfg = compose_config("explain", [f"run={runs}/attention-0"])
    with pytest.raises(UserError, match=r"capacity=0\.125: run=.*attention-0 decides it"):
        check_beside_run(cfg, ["capacity=0.125"], adapted)
    check_beside_run(cfg, [f"data.root={runs}", "images_max=5"], adapted)


def test_a_root_that_is_typed_acts_though_it_is_the_default(runs, monkeypatch):
    cfg = parse(ExplainConfig, compose_config("explain", [f"run={runs}/attention-0"]))
    run = saved(runs / "attention-0").model_copy(update={"data": cfg.data.model_copy(update={"root": "elsewhere"})})
    assert data_config(cfg, run).root == "elsewhere"
    monkeypatch.setattr("sys.argv", ["explain.py", f"data.root={cfg.data.root}"])
    assert data_config(cfg, run).root == cfg.data.root


def test_a_folder_may_have_a_name_like_a_pattern(runs, tmp_path):
    odd = (tmp_path / "run[1]").resolve()
    odd.symlink_to(runs / "attention-0")
    assert folders(parse(ExplainConfig, compose_config("explain", [f"run='{odd}'"])), "run") == [odd]


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_said(case, runs, tmp_path):
    if not (runs / "unfinished").exists():
        make_run(runs / "unfinished", "router=attention").joinpath("weights.safetensors").unlink()
        make_run(runs / "other-size", "router=attention", "model.kwargs.embed_dim=16")
        make_run(runs / "other-mod", "router=linear", "model.kwargs.depth=6")
        make_run(runs / "linear-more", "router=linear", "capacity=0.75")
        make_run(runs / "kept-prefix", "router=attention", "router.keep_prefix=true")
        (runs / "gates.yaml").write_text("1: {Gate: {target: 0.5, scale: 1.0}}\n")
        (runs / "alone.yaml").write_text("3: ClassOnly\n")
        state = build(config("router=none"), 7).model.state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, runs / "headless.safetensors")
    overrides, message = WRONG[case]
    out = [] if case in ("output", "no place") else [f"output={tmp_path}/out"]
    with pytest.raises(UserError) as error:
        run(*(override.format(runs) for override in overrides), *out)
    assert message.format(runs) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
