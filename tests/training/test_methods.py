"""The losses and schedules that methods add to training, by hand, and on a tiny model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch.testing import assert_close

import amod
from amod.errors import UserError
from amod.training.config import Router
from amod.training.methods import (
    Recipe,
    distribution_loss,
    divergence,
    halting_target,
    make_recipe,
    ratio_loss,
    scheduled,
    warm_keep,
)


def vit():
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **kwargs)


def test_the_ratio_loss_by_hand():
    # stage 1: images keep 3/4 and 1/4 of the patches, wanted 1/2; stage 2: 1/4 and 1/4, wanted 1/4
    first = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    second = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0]])
    assert_close(ratio_loss([first, second], [0.5, 0.25]), torch.tensor(0.0625 / 2))


def test_the_halting_target_is_the_papers():
    printed = (0, 0, 0, 0, 0.00044, 0.01445, 0.17606, 0.78905, 1.30092, 0.78905, 0.17606, 0.01445)
    assert_close(halting_target(12), torch.tensor(printed), atol=1.1e-5, rtol=0)


def test_the_distribution_loss_by_hand():
    target = halting_target(12)
    means = torch.tensor([0.1] * 12)  # all blocks alike: each is 1/12
    expected = sum(t * math.log(t * 12) for t in target.tolist() if t > 0) / 12
    assert float(distribution_loss(means)) == pytest.approx(max(0.0, expected), rel=1e-5)
    assert torch.isfinite(distribution_loss(torch.zeros(12)))  # nothing halts
    tiny = torch.full((12,), 1e-30, requires_grad=True)  # as at the shift of the paper's, before anything is learnt
    loss = distribution_loss(tiny)
    assert float(loss.detach()) == pytest.approx(max(0.0, expected), rel=1e-5)
    assert torch.autograd.grad(loss, tiny)[0].abs().max() > 0


def test_the_ponder_loss_counts_blocks_and_remainders():
    model = amod.convert(vit(), "avit", halt_scale=0.0, halt_shift=-math.log(0.6 / 0.4)).train()  # every h is 0.6
    recipe = Recipe(model, Router(name="avit", ponder=1.0, distribution=0.0))
    _, added = recipe(model, torch.randn(2, 3, 32, 32), 0.0)
    assert float(added.detach()) == pytest.approx(2 + 0.4, abs=1e-5)  # 0.6 + 0.6 > 0.99 in the second block


def test_gates_with_a_teacher_have_both_losses():
    """All gates are open at first: 3 (1 - 0.25) for each of the two, beside the distance from the teacher."""
    images = torch.randn(2, 3, 32, 32)
    router = Router(name="tuning", target=0.25, scale=3.0)
    model: torch.nn.Module = amod.convert(vit(), "tuning", layers=[1, 2], target=0.25, scale=3.0).train()
    for weight, teacher in ((0.0, None), (0.5, vit)):
        recipe = make_recipe(model, router, weight, teacher) or Recipe(model, router)
        logits, added = recipe.train()(model, images, 0.0)
        distance = 0.0 if teacher is None else 0.5 * float(divergence(teacher().eval()(images), logits))
        assert float(added.detach()) == pytest.approx(2 * 3 * 0.75 + distance, abs=1e-5)


def test_a_teacher_that_agrees_teaches_nothing():
    logits = torch.randn(4, 5)
    assert float(divergence(logits, logits)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]]))) == pytest.approx(
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), abs=1e-6
    )


def test_the_keep_rate_warms_up():
    assert [warm_keep(0.7, epoch, 10, 110) for epoch in (0, 10, 60, 110, 200)] == pytest.approx([1, 1, 0.85, 0.7, 0.7])
    model = amod.convert(vit(), "evit", keep_rate=0.5)
    with scheduled(model, Router(name="evit", warmup=[0, 2]), 1.0):
        assert {entry.keep for entry in model.plan.values()} == {0.75}
    assert {entry.keep for entry in model.plan.values()} == {0.5}


@pytest.mark.parametrize("router", ["dynamicvit", "avit", "evit", "tome", "attention"])
def test_training_leaves_no_parameter_unused(router):
    """DDP would stop at one."""
    model: torch.nn.Module = amod.convert(vit(), router).train()
    recipe = make_recipe(model, Router(name=router, halt_shift=5.0), 0.5, vit)
    assert recipe is not None
    logits, added = recipe.train()(model, torch.randn(4, 3, 32, 32), 0.0)
    (logits.logsumexp(dim=1).sum() + added).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad is None for p in recipe.teacher.parameters())
    assert not recipe.teacher.training


def test_dynamicvit_has_two_learning_rates_and_a_backbone_that_waits():
    model = amod.convert(vit(), "dynamicvit")
    recipe = Recipe(model, Router(name="dynamicvit"))
    groups = recipe.groups(model, 0.05)
    assert [group["part"] for group in groups] == ["predictors", "predictors", "backbone", "backbone"]
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)].startswith("routers.") for g in groups[:2] for p in g["params"]} == {True}
    trained = {named[id(p)] for group in groups for p in group["params"]}
    assert {*named.values()} - trained == {"cls_token", "pos_embed"}
    assert [recipe.factor("backbone", share) for share in (0.1, 0.5)] == [0.0, 0.01]
    assert recipe.factor("predictors", 0.1) == 1.0
    for parameter in model.routers.parameters():  # the head alone, say
        parameter.requires_grad_(False)
    assert Recipe(model, Router(name="dynamicvit")).factor("backbone", 0.1) == 1.0


def planned(folder, text, *overrides):
    from amod.training.checks import check_train
    from amod.training.compose import compose_config

    (folder / "plan.yaml").write_text(text)
    (folder / "dense.safetensors").touch()
    shared = ["data=digits", "model=vit_pico", "router=plan", f"router.file={folder}/plan.yaml"]
    return check_train(compose_config("train", [*shared, f"model.checkpoint={folder}/dense.safetensors", *overrides]))


def test_a_plan_is_trained_by_the_settings_of_its_entries(tmp_path):
    predict = "1: {Predict: {keep: 0.7}}"
    cfg = planned(tmp_path, predict, "router.backbone_lr=1", "router.frozen=0", "distil=0.5")
    model = amod.convert(vit(), plan={1: amod.Predict(0.7)})
    recipe = make_recipe(model, cfg.router, cfg.distil, vit)
    assert recipe.factor("backbone", 0.0) == 1.0
    assert cfg.router.distil_tokens == 0
    assert make_recipe(model, planned(tmp_path, predict).router, 0.0, vit).teacher is None
    tokens = planned(tmp_path, predict, "router.distil_tokens=0.5")
    assert make_recipe(model, tokens.router, 0.0, vit).teacher is not None
    assert planned(tmp_path, "1: {Prune: {keep: 0.7}}", "router.warmup=[0,1]").router.warmup == [0, 1]
    for text, setting, words in (
        ("1: {Route: {capacity: 0.5}}", "router.backbone_lr=1", "the plan has no Predict"),
        (predict, "router.warmup=[0,1]", "the plan has no Prune"),
        (predict, "router.ponder=1", "the plan has no Halt"),
        (f"{predict}\n11: ClassOnly", "router.distil_tokens=0.5", "the plan's ClassOnly leaves no patches"),
    ):
        with pytest.raises(UserError, match=words):
            planned(tmp_path, text, setting)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["router=avit", "budget=0.02"], "router=avit decides image by image"),
        (["router=dynamicvit"], "distil=0.5: the teacher is the dense model"),
        (["router=attention", "distil=1"], "distil=1: the teacher is the dense model"),
        (["router=evit", "router.warmup=[2,1]"], "two rising numbers"),
        (["router=evit", "router.warmup=[1,40]"], "ends behind the last of schedule.epochs"),
    ],
)
def test_what_a_method_lacks_is_said(overrides, line):
    from amod.training.checks import check_train
    from amod.training.compose import compose_config

    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        check_train(compose_config("train", ["data=digits", "model=vit_pico", *overrides]))
