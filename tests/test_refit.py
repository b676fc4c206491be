"""A fitted head: by hand where the answer is known, and what must stay as it is."""

from __future__ import annotations

import pytest
import timm
import torch

import amod
from amod.agreement import disagreement
from amod.refit import FOLDS, head_fit, ridge_maps


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=5
    )
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(160, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def with_nan(vit):
    vit.head.bias.data[0] = torch.nan
    return vit


def divergence(dense, model, images):
    with torch.inference_mode():
        return disagreement(dense(images), model(images), True).mean().item()


def test_ridge_regression_by_hand():
    """y = 2 x + 1 on x = -1, 0, 1: the squared x have the sum 2, which a ridge of 1 doubles, so half of the slope."""
    x = torch.tensor([[-1.0], [0.0], [1.0]]).double()
    maps = ridge_maps(x, 2 * x + 1)
    slope, shift = maps[0]
    assert (slope.item(), shift.item()) == (0, 1)
    slope, shift = maps[7]  # a ridge of 10^0
    assert (slope.item(), shift.item()) == (pytest.approx(1), pytest.approx(1))
    assert maps[1][0].item() == pytest.approx(2, rel=2e-3)


def test_a_head_that_only_was_moved_is_found_again(vit, images):
    """A linear difference of logits is all that a head can make good, and it does, on images it has not seen."""
    model = amod.convert(vit, plan={3: amod.ClassOnly()})
    with torch.no_grad():
        model.head.weight += 0.3 * torch.randn(5, 32)
        model.head.bias += 0.3
    fitted = amod.fit_head(model, vit, images[:128])
    assert divergence(vit, model, images[128:]) > 0.1
    assert divergence(vit, fitted, images[128:]) < 1e-4


def test_a_strong_merge_comes_nearer_to_the_dense_model(vit, images):
    model = amod.convert(vit, "tome", r=5)
    fitted = amod.fit_head(model, vit, images[:128])
    assert divergence(vit, fitted, images[128:]) < 0.8 * divergence(vit, model, images[128:])


def test_only_the_head_changes_and_only_in_the_copy(vit, images):
    model = amod.convert(vit, "tome", r=5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = amod.fit_head(model, vit.train(), images)
    assert model.training
    assert fitted.training
    assert vit.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert not model.head._forward_pre_hooks
    assert not fitted.head._forward_pre_hooks
    assert amod.count_flops(fitted) == amod.count_flops(model)


def test_where_nothing_helps_nothing_changes(vit, images):
    fit = head_fit(vit, images, vit(images).detach())
    assert torch.equal(fit.weight, vit.head.weight)
    assert fit.after == fit.before == 0
    assert "stays" in str(fit)
    noise = 3 * torch.randn(16, 5, generator=torch.Generator().manual_seed(0))  # which no feature tells
    fit = head_fit(vit, images[:16], vit(images[:16]).detach() + noise)
    assert torch.equal(fit.weight, vit.head.weight)
    assert fit.after == fit.before > 0.5


def test_half_precision_keeps_its_type(vit, images):
    half = amod.convert(vit, "tome", r=5).bfloat16()
    fitted = amod.fit_head(half, vit, images)
    assert fitted.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda vit, images: (vit, vit, images[: 2 * FOLDS - 1]), r"images: \(7, 3, 16, 16\); at least 8 prepared"),
        (lambda vit, images: (vit, vit, [*images]), "images: list; at least 8 prepared"),
        (lambda vit, images: (vit, vit, images / 0), "not finite"),
        (lambda vit, images: (timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=1),
                              vit, images), "has one output, .*; its head stays as it is"),
        (lambda vit, images: (vit, vit, torch.randn(8, 3, 24, 24)), r"images: \(8, 3, 24, 24\) do not fit the model"),
        (lambda vit, images: (vit, vit, torch.randn(8, 1, 16, 16)), "images: have 1 channels; this model takes 3"),
        (lambda vit, images: (timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0),
                              vit, images), "no linear layer"),
        (lambda vit, images: (timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4), vit,
                              images), r"\(two\) is no linear layer"),
        (lambda vit, images: (vit, timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=3),
                              images), "3"),
        (lambda vit, images: (vit, images, vit), "dense: Tensor; give the dense model, then the images"),
        (lambda vit, images: (vit, with_nan(vit), images), "its answers to these images are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_said(vit, images, make, message):
    with pytest.raises(amod.UserError, match=message):
        amod.fit_head(*make(vit, images))
