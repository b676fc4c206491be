"""The frontier's rows cost the same, its report says what was measured, and it goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer

import amod
import frontier as command
import tiny
from amod.agreement import disagreement
from amod.entries import ClassOnly, Merge, Prune, Route
from amod.judge import Judge
from amod.studies import frontier
from amod.studies.frontier import as_near
from amod.studies.frontier_report import in_words, interval
from amod.training.compose import compose_config
from amod.training.finished import load_run
from amod.training.loaders import Samples


def asked(*settings):
    return command.check(compose_config("frontier", list(settings)))


def test_the_frontier_of_a_tiny_run(tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "frontier"
    tiny.run(run, "router=none", "schedule.epochs=1")
    wanted = [f"run={run}", f"output={output}", "shares=[0.5]", "effort=2", "images=40", "search_images=16"]
    wanted += ["runtimes=[eager]", "batches=[2]", "rounds=2"]
    command.job(asked(*wanted))
    records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()][1:]
    dense = records[0]
    assert dense["method"] == "dense"
    assert dense["disagreement"] == 0
    assert {record["method"] for record in records} >= {"tome", "few_merges", "searched"}
    assert {record["method"] for record in records} >= {"tome_fitted", "merge_fitted", "searched_fitted"}
    plans = {record["method"]: (record["plan"], record["flops"]) for record in records}
    assert plans["searched_fitted"] == plans["searched"]  # another head, no FLOPs
    _, vit, data = load_run(run)  # what a fitted head is measured by: its own model's disagreement
    of, plan = {r["method"]: r for r in records}, amod.plan.from_data(plans["merge"][0])
    samples = [Samples(data.splits[split], data.eval_transform, None, False, False) for split in ("train", "test")]
    (on, _), (seen, _) = (some.stacked(some.drawn(n, 0)) for some, n in zip(samples, (16, 40), strict=True))
    fitted = amod.fit_head(amod.convert(vit, plan=plan), vit, on)
    with torch.no_grad():
        loss = disagreement(vit(seen), fitted(seen), True).mean()
    assert of["merge_fitted"]["disagreement"] == pytest.approx(float(loss), rel=1e-3)
    assert of["merge_fitted"]["disagreement"] != of["merge"]["disagreement"]
    within = [record for record in records[1:] if not record["method"].startswith(("tome_above", "as_tome"))]
    assert all(record["flops"] <= 0.5 * dense["flops"] for record in within)
    assert all(len(record["right"]) == 40 for record in records)
    text = (output / "README.md").read_text()
    assert "eager, batch 2" in text
    assert "as_tome" in {record["method"] for record in records}
    assert "ToMe's time / that of router=merge where it agrees" in text
    assert text.count("\n| ") == 1 + len(records)
    assert (output / "frontier.png").is_file()
    assert amod.read_plan(output / "plan-0.5.yaml")

    before = (output / "records.jsonl").read_text()
    capsys.readouterr()
    command.job(asked(*wanted))
    assert "measured" not in capsys.readouterr().out
    assert (output / "records.jsonl").read_text() == before
    (output / "records.jsonl").write_text(before.replace(', "norm": false', ""))  # of before that field
    command.job(asked(*wanted))
    assert "measured" not in capsys.readouterr().out
    assert (output / "records.jsonl").read_text() == before.replace(', "norm": false', "")
    times = output / "times.jsonl"
    taken = times.read_text()
    command.job(asked(*wanted[:-2], "batches=[4]", "rounds=2"))
    assert times.read_text().startswith(taken)
    assert "The times of eager, batch 2, wall time are an earlier command's." in (output / "README.md").read_text()
    command.job(asked(*wanted[:-1], "rounds=3"))  # other rounds, and other plans: timed again
    command.job(asked(*wanted, "timed=[tome]"))
    assert [json.loads(line)["of"]["rounds"] for line in times.read_text().splitlines()[1:]] == [2, 2, 3, 2]
    with pytest.raises(amod.UserError, match="is of other images; name another file"):
        command.job(asked(*wanted[:4], "images=41", *wanted[5:]))

    weights = run / "weights.safetensors"
    state = load_file(weights)
    save_file({**state, "head.bias": state["head.bias"] + 1}, weights)
    (output / "search.jsonl").unlink()
    with pytest.raises(amod.UserError, match=r"records.jsonl: is of other model and images; name another file"):
        command.job(asked(*wanted))


def test_a_stopped_one_goes_on_within_the_images(tmp_path, monkeypatch, capsys):
    run, output = tmp_path / "run", tmp_path / "frontier"
    tiny.run(run, "router=none", "schedule.epochs=1")
    wanted = [f"run={run}", f"output={output}", "shares=[0.8]", "effort=2", "images=40", "search_images=16"]
    wanted += ["runtimes=[]"]
    command.job(asked(*wanted))
    whole = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
    (output / "records.jsonl").unlink()
    monkeypatch.setattr(frontier, "CHUNK", 16)
    command.job(asked(*wanted))
    assert "measured 16 of 40 images\nmeasured 32 of 40 images\nmeasured 40 of 40" in capsys.readouterr().out
    text, records = (output / "README.md").read_text(), (output / "records.jsonl").read_text()
    (output / "records.jsonl").write_text(records[: len(records) // 2])  # in the middle of a line
    command.job(asked(*wanted))
    assert "measured 16 of" not in capsys.readouterr().out
    assert (output / "records.jsonl").read_text() == records
    assert (output / "README.md").read_text() == text
    known = frontier.Records(output / "records.jsonl", whole[0])
    for one in whole[1:]:
        joined = known.get((one["method"], one["share"]), amod.plan.from_data(one["plan"]), 40)
        assert joined["right"] == one["right"]
        assert joined["disagreement"] == pytest.approx(one["disagreement"], rel=1e-4, abs=1e-9)


def test_a_batch_is_as_large_as_it_is_said_to_be(monkeypatch):
    """Of 6 images too; and an exported file is checked on at least 4."""
    seen = []
    monkeypatch.setattr(frontier, "runner", lambda model, images, *how: seen.append((len(images), how[-1])) or int)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=1, num_classes=3)
    for batch in (1, 6, 256):
        frontier.clock(vit, torch.randn(6, 3, 16, 16), {("dense", 1.0): {}}, "eager", batch, 1, "wall")
    assert seen == [(4, 1), (6, 6), (256, 256)]


def test_few_merges_agree_as_well_as_tome_and_a_stronger_one_does_not():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=5)
    judge = Judge(vit, torch.randn(16, 3, 32, 32))

    def loss(plan):
        return judge.loss(plan).disagreement

    tome = {i: Merge(2) for i in range(judge.depth)}
    near = as_near(judge, tome)
    assert loss(near) <= loss(tome)
    stronger = {i: replace(entry, r=entry.r + 2) if isinstance(entry, Merge) else entry for i, entry in near.items()}
    assert loss(stronger) > loss(tome)


def test_plans_in_words():
    assert in_words({}) == "every block whole"
    plan = {0: Merge(5), 1: Merge(5), 2: Merge(5), 4: Merge(5), 5: Prune(0.5), 6: Route(0.25), 11: ClassOnly()}
    assert in_words(plan) == "merge 5 in 0, 1, 2, 4; keep 0.50 in 5; C = 25 % in 6; class token alone in 11"
    assert in_words(dict.fromkeys(range(3, 7), Merge(2, proportional=False, norm=True))) == (
        "merge 2, norm kept, counted as size^0 in 3 to 6"
    )


def test_the_interval_is_of_the_mean():
    values = np.array([0.0] * 50 + [100.0] * 50)  # standard error 5 points
    mean, low, high = interval(values)
    assert mean == 50
    assert 38 <= low <= 42
    assert 58 <= high <= 62


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "run: say which run"),
        (["run=nowhere"], "no config.yaml there"),
        (["shares=[1.5]"], "shares"),
    ],
)
def test_mistakes_are_one_line(settings, words):
    with pytest.raises(amod.UserError, match=words) as error:
        asked(*settings)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(amod.UserError, match=r"output=.*config.yaml/x: cannot be written"):
        command.job(asked(f"run={tmp_path}", f"output={tmp_path}/config.yaml/x"))
    tiny.run(tmp_path / "run", "router=none", "schedule.epochs=1", "trainer.limit_train_batches=1")
    with pytest.raises(amod.UserError, match=r"data.root=elsewhere: data=digits lie in no folder"):
        command.job(asked(f"run={tmp_path}/run", f"output={tmp_path}/out", "data.root=elsewhere"))
