"""The search gives a plan that fits, no worse than what people write by hand, the same one every time."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
import yaml
from timm.models.vision_transformer import VisionTransformer

import amod
import search as command
import tiny
from amod import ClassOnly, Merge, Prune, Route
from amod.agreement import Loss, disagreement
from amod.hub import class_names_of
from amod.judge import Gene, Judge, Shape
from amod.plan import entries_of, read_plan
from amod.searching import by_hand, changed
from amod.training.command import check_beside_run
from amod.training.compose import compose_config
from hub_models import build

IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small(**kwargs):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 5} | kwargs
    vit = VisionTransformer(**kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return vit


def find(vit, budget=0.7, **kwargs):
    return amod.search(vit, IMAGES, budget, **{"effort": 3, "progress": False, **kwargs})


def test_the_plan_fits_and_is_no_worse_than_those_made_by_hand(tmp_path):
    vit = small()
    vit.head.weight.data.mul_(10)  # so that losses are far above the rounding of logits
    found = find(vit)
    assert found.flops == amod.count_flops(amod.convert(vit, plan=found.plan))
    assert 0.9 * 0.7 < found.flops / amod.count_flops(vit) <= 0.7
    assert found.plan[5] == ClassOnly()
    judge = Judge(vit, IMAGES)
    plans = [judge.within(shape, 0.7 * judge.whole) for shape in by_hand(6, True)]
    assert len([plan for plan in plans if plan]) > 8
    with torch.no_grad():
        dense = vit(IMAGES)
        each = [disagreement(dense, amod.convert(vit, plan=plan)(IMAGES), True) for plan in plans if plan is not None]
        ours = disagreement(dense, amod.convert(vit, plan=found.plan)(IMAGES), True)
    assert ours.sqrt().mean() <= min(other.sqrt().mean() for other in each) + 1e-4
    assert found.disagreement == pytest.approx(float(ours.mean()), rel=1e-3)

    found.save(tmp_path / "plan.yaml")
    again = amod.convert(vit, plan=tmp_path / "plan.yaml")
    assert again.plan == found.plan == read_plan(tmp_path / "plan.yaml")
    about = yaml.safe_load((tmp_path / "plan.yaml").read_text())["search"]
    assert about["images"] == 16
    assert about["image_size"] == [3, 32, 32]
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_plans_are_ranked_by_the_mean_root_and_the_mean_is_told(monkeypatch):
    monkeypatch.setattr(Judge, "judged", lambda self, plan, part: Loss(1 / len(plan), float(len(plan))))
    found = find(small(), effort=3)
    judge = Judge(small(), IMAGES)
    plans = [judge.within(shape, 0.7 * judge.whole) for shape in by_hand(6, True)]
    assert len(found.plan) <= min(len(plan) for plan in plans if plan)
    assert found.disagreement == pytest.approx(1 / len(found.plan))


def test_a_stopped_search_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    vit, ledger = small(), tmp_path / "judged.jsonl"
    whole = find(vit, ledger=ledger)
    assert find(vit) == whole
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:10]) + lines[10][:20])  # killed while it wrote
    again = []  # judged and counted, beside the dense model
    judged, count = Judge.judged, amod.judge.count_on_meta
    monkeypatch.setattr(Judge, "judged", lambda self, plan, part: again.append(plan) or judged(self, plan, part))

    def counted(model, size):
        if entries_of(model):
            again.append(model)
        return count(model, size)

    monkeypatch.setattr(amod.judge, "count_on_meta", counted)
    assert find(vit, ledger=ledger) == whole
    assert len(again) == len(lines) - 10
    assert sorted(ledger.read_text().splitlines()) == sorted(line.strip() for line in lines)
    again.clear()
    assert find(vit, ledger=ledger) == whole
    assert again == []
    ledger.write_text("".join(lines).replace(', \\"norm\\": false', ""))  # of before that field
    assert find(vit, ledger=ledger) == whole
    assert again == []


@pytest.mark.parametrize(
    "plan",
    [
        {3: Merge(3), 5: ClassOnly()},
        {2: Route(0.5, "class_attention"), 3: Route(0.5, "class_attention")},
        {1: Route(0.5)},
        {0: Prune(0.5)},
        {5: ClassOnly()},
        {},
    ],
)
@torch.no_grad()
def test_what_is_remembered_of_early_blocks_changes_nothing(plan):
    vit = small()
    judge = Judge(vit, IMAGES)
    expected = disagreement(vit(IMAGES), amod.convert(vit, plan=plan)(IMAGES), True)
    for part, images in ((0, expected[:4]), (1, expected[4:]), (None, expected)):
        loss = judge.loss(plan, part)
        assert loss.disagreement == pytest.approx(float(images.mean()), rel=1e-3, abs=1e-6)
        assert loss.distance == pytest.approx(float(images.clamp(min=0).sqrt().mean()), rel=1e-3, abs=1e-3)


def test_what_rounding_takes_from_one_merge_the_next_one_gets():
    judge = Judge(small(patch_size=4), IMAGES)  # 64 patches
    merges = Shape(tuple(Gene(i, "merge", 1.0) for i in range(4)))
    plan = judge.plan_of(merges, 5.5 / 64)
    assert [plan[i].r for i in range(4)] == [6, 5, 6, 5]
    loose, fit = (judge.cost(judge.plan_of(merges, r / 64)) for r in (5, 5.5))
    assert fit < loose


def test_disagreement_by_hand():
    dense, other = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    expected = 0.75 * torch.log(torch.tensor(1.5)) + 0.25 * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(disagreement(dense, other, True), expected[None])
    cosine = disagreement(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), False)
    torch.testing.assert_close(cosine, torch.tensor([0.4]))


def test_without_a_head_or_a_class_token():
    features = find(small(num_classes=0))
    assert "cosine" in features.about["measure"]
    averaged = find(small(global_pool="avg", class_token=False))
    assert not any(isinstance(entry, ClassOnly) for entry in averaged.plan.values())
    nothing = find(small(), 0.999)
    assert nothing.plan == {5: ClassOnly()}  # the same logits, so there is nothing to search for
    assert nothing.disagreement < 1e-6


def test_changes_stay_within_the_model():
    rng, shapes = random.Random(0), list(by_hand(12, True))
    for _ in range(500):
        shapes.append(changed(rng.choice(shapes), 11, rng))
        blocks = [gene.block for gene in shapes[-1].genes]
        assert blocks == sorted(set(blocks))
        assert all(0 <= block < 11 for block in blocks)
        assert all(0 < gene.weight <= 1 for gene in shapes[-1].genes)
    assert len(set(shapes)) > 200


def dearer(judge, plan):
    """A clock on which a matching takes as long as a twentieth of the dense model's FLOPs."""
    return 0.05 + judge.cost(plan) / judge.whole + 0.05 * sum(isinstance(e, Merge) and e.rounds for e in plan.values())


def test_a_budget_of_time_is_kept(monkeypatch):
    vit, searches = small(), []
    monkeypatch.setattr(
        "amod.searching.milliseconds", lambda judge, plan, runtime: {"dense": 10.0, "plan": 10 * dearer(judge, plan)}
    )
    real = amod.searching.evolve
    monkeypatch.setattr("amod.searching.evolve", lambda *args: searches.append(args[1]) or real(*args))
    for budget in (0.8, 8.0):
        found = find(vit, budget, runtime="eager", effort=8)
        assert 7.5 <= found.about["milliseconds"]["plan"] <= 8
        assert "ms (eager)" in str(found)
    assert len(searches) <= 4
    monkeypatch.setattr("amod.searching.milliseconds", lambda *_: {"dense": 10.0, "plan": 9.0})
    with pytest.raises(amod.UserError, match="no plan was so fast"):
        find(vit, 0.7, runtime="eager", effort=8)


def test_time_is_predicted_from_a_few_plans():
    judge = Judge(small(), IMAGES)
    judge.watch(lambda plan: dearer(judge, plan))
    for plan in ({1: Merge(4, by="tokens", rounds=2), 4: Merge(2)}, dict.fromkeys(range(5), Merge(1)), {3: Prune(0.6)}):
        assert judge.takes(plan) == pytest.approx(dearer(judge, plan), rel=1e-6)
    many, few = (Shape(tuple(Gene(i, "merge", 1.0) for i in blocks)) for blocks in (range(5), (2,)))
    assert judge.cost(judge.within(many, 0.9)) < judge.cost(judge.within(few, 0.9))  # what is left of it for FLOPs


def test_eager_time_is_measured(monkeypatch):
    monkeypatch.setattr("amod.searching.ROUNDS", 3)
    found = find(small(), 1000, runtime="eager", effort=2)  # milliseconds: anything is that fast
    assert set(found.about["milliseconds"]) == {"dense", "plan"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0}, "budget=0"),
        ({"budget": True}, "budget=True"),
        ({"budget": "half"}, "budget='half'"),
        ({"budget": 0.001}, "no plan of this model"),
        ({"budget": 0.7, "runtime": "cuda"}, "runtime='cuda'"),
        ({"effort": "a"}, "effort='a'"),
        ({"effort": math.nan}, "effort=nan"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    with pytest.raises(amod.UserError, match=words) as error:
        find(small(), **arguments)
    assert "\n" not in str(error.value)


def test_bad_images_models_and_files_are_one_line(tmp_path):
    with pytest.raises(amod.UserError, match="at least 8 prepared images"):
        amod.search(small(), IMAGES[:4], 0.7)
    with pytest.raises(amod.UserError, match="images: list; at least 8"):
        amod.search(small(), [*IMAGES], 0.7)
    with pytest.raises(amod.UserError, match="not finite"):
        amod.search(small(), IMAGES.log(), 0.7)
    with pytest.raises(amod.UserError, match=r"are torch\.uint8; prepare them"):
        amod.search(small(), (255 * IMAGES.clamp(0, 1)).byte(), 0.7)
    assert amod.search(small(), IMAGES.double(), 0.7, effort=1, progress=False).plan == find(small(), effort=1).plan
    with pytest.raises(amod.UserError, match="cannot be routed"):
        amod.search(torch.nn.Linear(2, 2), IMAGES, 0.7)
    ledger = tmp_path / "judged.jsonl"
    find(small(), ledger=ledger, effort=1)
    with pytest.raises(amod.UserError, match="is of other model and images"):
        find(small(num_classes=4), ledger=ledger)
    with pytest.raises(amod.UserError, match="is a folder"):
        find(small(), ledger=tmp_path)
    broken = small()
    broken.head.bias.data[0] = torch.nan
    with pytest.raises(amod.UserError, match="its answers to these images are not finite"):
        amod.search(broken, IMAGES, 0.7, progress=False)
    for notes in ("not\njson\n", "my own notes, one line\n", "\udcff\udc89PNG\r\n\x00"):
        ledger.write_text(notes, errors="surrogateescape", newline="")
        with pytest.raises(amod.UserError, match="no file of finished work"):
            find(small(), ledger=ledger)
        assert ledger.read_bytes() == notes.encode(errors="surrogateescape")


# --- transformers' encoders


def texts(side="right"):
    """16 texts of 5 to 20 tokens of a tiny BERT, padded."""
    lengths = torch.arange(5, 21).unsqueeze(1)
    at = torch.arange(20).expand(16, -1)
    mask = (at < lengths if side == "right" else at >= 20 - lengths).long()
    ids = torch.randint(4, 60, (16, 20), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


def alone(model, batch):
    """What the model says of each text by itself, without padding, where it stands: logits, or the last mean."""
    found = []
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            out = model(input_ids=ids[mask].unsqueeze(0), position_ids=torch.arange(20)[mask].unsqueeze(0))
            found.append(out.logits if "logits" in out else out.last_hidden_state.mean(dim=1))
    return torch.cat(found)


@pytest.mark.parametrize(
    ("head", "side"), [("ForSequenceClassification", "right"), ("Model", "right"), ("Model", "left")]
)
def test_texts_are_judged_as_each_alone(head, side, tmp_path):
    model, batch = build("Bert", head, **({"num_labels": 5} if head != "Model" else {})), texts(side)
    if head != "Model":
        model.bert.pooler.dense.weight.data.mul_(0.3)
        model.classifier.weight.data.mul_(30)  # so that losses are far above the rounding of logits
    found = amod.search(model, batch, 0.8, effort=3, ledger=tmp_path / "l.jsonl", progress=False)
    assert (
        found.flops == amod.count_flops(amod.convert(model, plan=found.plan), 20) <= 0.8 * amod.count_flops(model, 20)
    )
    assert found.about["texts"] == 16
    assert found.about["tokens"] == 20
    assert "on 16 texts" in str(found)
    each = disagreement(alone(model, batch), alone(amod.convert(model, plan=found.plan), batch), head != "Model")
    assert found.disagreement == pytest.approx(float(each.mean()), rel=1e-3, abs=1e-6)
    for placement in ("late", "alternate", [1]):
        by_hand_ = amod.convert(model, "class_attention", None, placement, budget=found.flops, input_size=20)
        other = disagreement(alone(model, batch), alone(by_hand_, batch), head != "Model")
        assert each.clamp(min=0).sqrt().mean() <= other.clamp(min=0).sqrt().mean() + 1e-4
    again = amod.search(model, batch, 0.8, effort=3, ledger=tmp_path / "l.jsonl", progress=False)
    assert again == found
    found.save(tmp_path / "plan.yaml")
    assert amod.convert(model, plan=tmp_path / "plan.yaml").plan == found.plan


def test_images_of_transformers_models_are_searched_on():
    for family, head, more in (("SiglipVision", "Model", {}), ("Dinov2", "ForImageClassification", {"num_labels": 5})):
        model = build(family, head, **more)
        found = amod.search(model, {"pixel_values": IMAGES}, 0.8, effort=2, progress=False)
        assert found.flops == amod.count_flops(amod.convert(model, plan=found.plan)) <= 0.8 * found.dense_flops
        assert found.about["images"] == 16
        again = amod.search(model, {"pixel_values": IMAGES.double()}, 0.8, effort=2, progress=False)
        assert again.plan == found.plan
        with pytest.raises(amod.UserError, match=r"are torch\.uint8; prepare them"):
            amod.search(model, {"pixel_values": IMAGES.byte()}, 0.8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": lambda: build("Bert", "ForMaskedLM")}, "gives no one answer"),
        ({"model": lambda: build("Bert", is_decoder=True)}, "as a decoder"),
        (
            {"model": lambda: build("Bert", "ForSequenceClassification", num_labels=1)},
            "one output, .* with the base model",
        ),
        ({"batch": torch.ones(16, 4)}, "images: Tensor; BertModel needs what its tokenizer gives"),
        ({"batch": {"attention_mask": torch.ones(16, 4)}}, "needs what its tokenizer gives"),
        ({"batch": {"input_ids": torch.ones(4, 4).long()}}, "4 of them; at least 8"),
        (
            {"batch": {"input_ids": torch.ones(16, 4).long(), "attention_mask": torch.ones(15, 4)}},
            "no tensor of 16 rows",
        ),
        ({"batch": {"input_ids": torch.ones(16, 4).long(), "attention_mask": torch.zeros(16, 4)}}, "has no token"),
        ({"runtime": "eager"}, "runtime='eager': of transformers' models the budget is of FLOPs"),
        ({"budget": 0.01}, "at 20 tokens costs so little"),
        ({"model": lambda: build("Bert", num_hidden_layers=1)}, "has one layer, and before the first"),
    ],
)
def test_texts_that_cannot_be_searched_on_are_one_line(change, words):
    change = {"model": lambda: build("Bert"), "batch": texts(), "budget": 0.8, "runtime": "flops"} | change
    with pytest.raises(amod.UserError, match=words) as error:
        amod.search(change["model"](), change["batch"], change["budget"], change["runtime"], progress=False)
    assert "\n" not in str(error.value)


# --- the command


def test_the_command_finds_a_plan_that_others_take(tmp_path, capsys):
    run = tmp_path / "run"
    tiny.run(run, "router=none", "schedule.epochs=1")
    output = tmp_path / "plan.yaml"
    wanted = ["model=vit_pico", f"run={run}", "budget=0.8", "effort=6", "images_max=16", f"output={output}"]
    command.job(command.check(compose_config("search", wanted)))
    assert f"{output}: " in capsys.readouterr().out
    plan = read_plan(output)
    assert plan[3] == ClassOnly()
    with pytest.raises(amod.UserError, match=r"data\.root=elsewhere: data=digits lie in no folder"):
        command.job(command.check(compose_config("search", [*wanted, "data.root=elsewhere"])))
    assert len(json.loads((tmp_path / "plan.jsonl").read_text().splitlines()[-1])["judged"]) == 2
    summary = tiny.run(
        tmp_path / "tuned", "router=plan", f"router.file={output}", "schedule.epochs=1", f"model.checkpoint={run}"
    )
    assert summary["gflops"] < 0.8 * json.loads((run / "summary.json").read_text())["gflops"]


def test_the_command_saves_the_model_with_its_head_fitted(tmp_path, capsys):
    run, folder = tmp_path / "run", tmp_path / "fast"
    tiny.run(run, "router=none", "schedule.epochs=1")
    wanted = [f"run={run}", "budget=0.6", "effort=3", "images_max=64", f"output={tmp_path / 'plan.yaml'}"]
    command.job(command.check(compose_config("search", ["model=vit_pico", *wanted, f"save={folder}"])))
    printed = capsys.readouterr().out
    fast, dense = amod.from_pretrained(folder), amod.from_pretrained(run)
    assert fast.plan == read_plan(tmp_path / "plan.yaml")
    assert fast.pretrained_cfg["label_names"] == dense.pretrained_cfg["label_names"]
    assert "the head is fitted: mean root of the KL" in printed
    assert "the head is fitted" in (folder / "README.md").read_text()
    changed = {name for name, value in dense.state_dict().items() if not torch.equal(fast.state_dict()[name], value)}
    assert changed == {"head.weight", "head.bias"}


def test_a_checkpoints_images_are_prepared_and_its_classes_named_as_in_its_run(tmp_path):
    tiny.run(tmp_path / "run", "router=none", "schedule.epochs=1", "trainer.limit_train_batches=1", "data.crop_pct=0.8")
    (tmp_path / "photo.png").write_bytes(b"")
    asked = [*tiny.MODEL, f"model.checkpoint={tmp_path}/run", f"images={tmp_path}"]
    model, _, _ = command.subject(command.check(compose_config("search", asked)))
    assert class_names_of(model) == [str(digit) for digit in range(10)]
    assert model.pretrained_cfg["crop_pct"] == 0.8


def test_the_command_searches_on_lines_of_text(tmp_path, capsys):
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *"abcdefgh"]
    folder, lines, output = tmp_path / "model", tmp_path / "lines.txt", tmp_path / "plan.yaml"
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    build("Bert").save_pretrained(folder)
    rng = random.Random(0)
    lines.write_text("\n".join(" ".join(rng.choices(words[4:], k=n)) for n in range(4, 24)))
    asked = [f"run={folder}", f"texts={lines}", "budget=0.8", "effort=2", "images_max=16", f"output={output}"]
    command.job(command.check(compose_config("search", [*asked, f"save={tmp_path / 'fast'}"])))
    assert f"{output}: " in capsys.readouterr().out
    fast = amod.from_pretrained(tmp_path / "fast")
    assert fast.plan == read_plan(output) != {}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "fast")("a b")["input_ids"] == [2, 4, 5, 3]
    with pytest.raises(amod.UserError, match="name texts=FILE"):
        command.job(command.check(compose_config("search", [f"run={folder}", f"images={tmp_path}", "budget=0.8"])))
    lines.write_text("a\nb\n")
    with pytest.raises(amod.UserError, match="has 2 different lines; at least 8"):
        command.job(command.check(compose_config("search", asked)))


def test_a_model_that_pools_nothing_is_refused():
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", global_pool="", **kwargs)
    with pytest.raises(amod.UserError, match=r"gives all its tokens \(17, 16\).* choose a pooling"):
        amod.search(vit, torch.randn(8, 3, 16, 16), 0.7, effort=2, progress=False)


def test_what_a_run_has_already_is_refused_but_where_its_images_are(tmp_path):
    cfg = compose_config("search", [f"run={tmp_path}"])
    check_beside_run(cfg, ["data.root=elsewhere"], command.of_run(cfg))
    for settings, extra in ((["data.num_workers=1"], []), (["data.root=elsewhere"], [f"images={tmp_path}"])):
        cfg = compose_config("search", [f"run={tmp_path}", *extra])
        with pytest.raises(amod.UserError, match="decides it"):
            check_beside_run(cfg, settings, command.of_run(cfg))


def test_a_place_that_cannot_be_written_is_said_before_the_search(tmp_path):
    for place in ("/proc/fast", f"{tmp_path}/file/fast"):
        (tmp_path / "file").touch()
        cfg = command.check(compose_config("search", [f"images={tmp_path}", "model=vit_pico", f"save={place}"]))
        with pytest.raises(amod.UserError, match=f"{place}: cannot be written"):
            command.job(cfg)
        with pytest.raises(amod.UserError, match=f"{place}: cannot be written"):
            amod.save_pretrained(timm.create_model("test_vit"), place)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(amod.UserError, match=r"save=.*: is a training run's folder"):
        command.check(compose_config("search", [f"images={tmp_path}", "model=vit_pico", f"save={tmp_path}"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["texts=lines.txt"], "texts=lines.txt: goes with run=FOLDER"),
        (["run=nowhere", "texts=lines.txt"], "texts=lines.txt: is no file"),
        (["budget=0"], "budget=0: must be a number above 0"),
        (["runtime=gpu"], "runtime=gpu: must be one of flops"),
        (["run=nowhere"], "run=nowhere: is no run"),
        (["images=nowhere"], "images=nowhere: is no folder"),
        (["data=digits", "output=plan.txt"], "output=plan.txt: must be a file that ends in .yaml"),
        (["model.checkpoint=nowhere.pth"], "no such file"),
        (["data=digits", f"save={__file__}"], "is a file; name a folder"),
        (["data=digits", "schedule.epochs=3"], "schedule.epochs=3: src/search.py trains nothing; leave it out"),
    ],
)
def test_the_commands_mistakes_are_one_line(settings, words, tmp_path):
    script = Path(__file__).parents[1] / "src/search.py"
    done = subprocess.run(
        [sys.executable, script, *settings], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]
