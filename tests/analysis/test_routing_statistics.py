from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import amod
from amod.analysis.measurement import DENSE_MAPS, correlations, grid_of, head_scores, measure
from amod.analysis.panels import patch_pixels
from amod.analysis.routing_statistics import agreement, correlate, correlation, estimate, patch_contrast
from amod.routing import RoutedLayer
from families import PLAIN, build


def test_correlation_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    values = torch.tensor([[0.0, 1.0, 2.0, 9.0], [2.0, 1.0, 4.0, 3.0], [0.0, 1.0, 2.0, 9.0]])
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6
    spearman, pearson = correlate(scores, values, "Spearman"), correlate(scores, values, "Pearson")
    assert spearman[:2, 0] == pytest.approx([1.0, 0.6])
    # deviations (-1.5, -0.5, 0.5, 1.5) and (-3, -2, -1, 6): 14 / sqrt(5 * 50)
    assert pearson[:2, 0] == pytest.approx([14 / math.sqrt(250), 0.6])
    assert np.isnan(spearman[2]).all()  # a constant has no rank
    assert np.isnan(pearson[2]).all()
    # two-sided p of r = 0.6 with two degrees of freedom: t = 0.6 * sqrt(2 / 0.64)
    assert pearson[1, 1] == pytest.approx(2 * stats.t.sf(0.6 * math.sqrt(2 / 0.64), 2))


def test_estimate_by_hand():
    # mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027; t = 2 sqrt(3)
    found = estimate([1.0, 2.0, math.nan, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-5)
    assert found.p == pytest.approx(2 * stats.t.sf(2 * math.sqrt(3), 2))
    assert str(found) == "2.00 ± 2.48"
    assert math.isnan(estimate([0.5]).low)
    assert str(estimate([0.5])) == "0.50"
    assert str(estimate([math.nan])) == "-"


def test_one_run_is_over_images_and_several_are_over_runs():
    first = np.array([[0.1, 0.2], [0.3, 0.01], [0.5, 0.04]])
    alone = correlation("attention", 1, "change", "Spearman", [first])
    assert (alone.over, alone.median_p, alone.significant) == ("3 images", 0.04, pytest.approx(2 / 3))
    both = correlation("attention", 1, "change", "Spearman", [first, first + 0.2])
    assert both.over == "2 runs"
    assert both.value.mean == pytest.approx(0.4)
    assert both.each == pytest.approx((0.3, 0.5))
    assert both.value.high == pytest.approx(0.4 + stats.t.ppf(0.975, 1) * 0.1)


def test_agreement_by_hand():
    # one image, class token and four patches, two of five kept in each of two blocks
    routing = [
        RoutedLayer(1, torch.tensor([[0.1, 0.6, 0.2, 0.05, 0.05]]), torch.tensor([[1, 2]])),
        RoutedLayer(3, torch.tensor([[0.7, 0.3, -0.1, 0.05, 0.05]]), torch.tensor([[0, 1]])),
    ]
    one, two = agreement(routing, 1, contrast=torch.tensor([[1.0, 3.0, 0.0, 4.0]]))
    assert (one["contrast"], two["contrast"]) == (1.0, 0.5)  # (1 + 3) / 2 and 1, over a mean of 2
    assert one["block"] == 1
    assert math.isnan(one["kept again"])
    assert two["kept again"] == 0.5  # patch 1, of two
    assert two["by chance"] == pytest.approx(0.4)
    assert (one["class token kept"], two["class token kept"]) == (0, 1)
    assert one["entropy"] == pytest.approx(stats.entropy([0.1, 0.6, 0.2, 0.05, 0.05]) / math.log(5))
    assert math.isnan(two["entropy"])  # a negative score is no share
    assert one["top score"] == pytest.approx(0.6)
    assert one["on one token"] == 1
    assert (one["on a patch"], two["on a patch"]) == (1, 0)
    assert one["never kept"] == pytest.approx(3 / 5)
    assert two["never kept"] == pytest.approx(2 / 5)  # patches 3 and 4
    assert two["never, by chance"] == pytest.approx(0.36)
    routing[1] = RoutedLayer(3, -routing[1].scores.abs(), torch.tensor([[0, 1, 2, 3]]))  # four of five
    _, two = agreement(routing, 1, contrast=torch.ones(1, 4), class_token=False)
    assert two["never, by chance"] == pytest.approx(0.6 * 0.2)
    assert two["by chance"] == pytest.approx(0.4)  # what the block before kept, of any draw
    assert math.isnan(two["top score"])  # negative scores' shares would be positive, the lowest score's the largest
    assert math.isnan(two["class token kept"])  # token 0 is a register


def test_agreement_where_tokens_are_gone():
    """Of a class token and four patches the first two patches stay; what is gone is no part of any chance."""
    owner = torch.tensor([[0, 1, 2, -1, -1]])
    routing = [
        RoutedLayer(1, torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]]), torch.tensor([[0, 1, 2]]), owner),
        RoutedLayer(3, torch.tensor([[0.4, 0.4, 0.4]]), torch.tensor([[0, 1]]), torch.tensor([[0, 1, -1, -1, -1]])),
    ]
    one, two = agreement(routing, 1, contrast=torch.ones(1, 4))
    assert (one["entropy"], two["entropy"]) == pytest.approx((1, 1))  # all equal, of five and of three
    assert two["top score"] == pytest.approx(1 / 3)
    assert two["kept again"] == 1
    assert math.isnan(two["by chance"])
    assert math.isnan(two["never, by chance"])
    assert two["never kept"] == pytest.approx(2 / 5)
    merged = torch.tensor([[0, 1, 1, 1, 2]])  # three patches are one: its score counts once
    routing = [
        RoutedLayer(1, torch.zeros(1, 0), torch.arange(3)[None], merged),
        RoutedLayer(3, torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0, 1]]), merged),
    ]
    (row,) = agreement(routing, 1, contrast=torch.ones(1, 4))
    assert row["top score"] == pytest.approx(0.5)
    assert row["entropy"] == pytest.approx(stats.entropy([0.5, 0.25, 0.25]) / math.log(3))


def test_contrast_of_patches():
    image = torch.zeros(1, 3, 4, 6)
    image[0, :, 0, 4] = 4.0  # in the last of three patches of the first row
    found = patch_contrast(image, (2, 3))
    assert found.shape == (1, 6)
    assert found[0].tolist() == [0, 0, torch.tensor([4.0, 0, 0, 0]).std(), 0, 0, 0]


def test_patches_lie_where_they_are_and_prefix_tokens_nowhere():
    values = torch.tensor([9.0, 8.0, 1, 2, 3, 4, 5, 6])  # two tokens without a patch, a grid of two rows
    pixels = patch_pixels(values, (2, 3), (4, 6))
    assert pixels.tolist() == [[1, 1, 2, 2, 3, 3]] * 2 + [[4, 4, 5, 5, 6, 6]] * 2


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_is_measured(family):
    vit, size = build(family)
    images, labels = torch.randn(2, *size), torch.tensor([1, 2])
    models = {"attention": amod.convert(vit, "attention", 0.4), "linear": amod.convert(vit, "linear", 0.4)}
    found = measure(vit, models, images, labels, tokens=2)
    tokens = found.prefix + found.grid[0] * found.grid[1]
    blocks = list(models["attention"].blocks_routed)
    assert list(found.importance) == blocks
    for source in (DENSE_MAPS, "attention", "linear", "random", "contrast"):
        assert [scores.shape for scores in found.scores[source].values()] == [(2, tokens)] * len(blocks)
    # before anything was skipped, the routed model's first map is the dense model's
    torch.testing.assert_close(found.scores["attention"][1], found.scores[DENSE_MAPS][1])
    assert found.removed.min() >= found.prefix
    block, heads = head_scores(models["attention"], images)
    assert block == max(set(range(len(vit.blocks))) - set(blocks))
    torch.testing.assert_close(heads.sum(dim=2), torch.ones(heads.shape[:2]))
    if block + 1 in blocks:
        torch.testing.assert_close(heads.mean(dim=1), found.scores["attention"][block + 1], atol=1e-5, rtol=1e-4)


def test_grids_that_are_not_square():
    vit, _ = build("dynamic_image_size")
    images = torch.randn(2, 3, 48, 80)
    assert grid_of(vit, images) == (3, 5)
    found = measure(vit, {"attention": amod.convert(vit, "attention", 0.5)}, images)
    assert found.removed.shape == (2, 15)


def test_batches_and_labels():
    vit, size = build("deit")
    models = {"linear": amod.convert(vit, "linear", 0.4)}
    images = torch.randn(20, *size)  # two batches
    found, first = measure(vit, models, images), measure(vit, models, images[:3])
    assert len(found.routing["linear"][0].indices) == len(found.removed) == 20
    torch.testing.assert_close(found.importance[1][:3], first.importance[1])
    # unlabelled: of the class that the model predicts
    labelled = measure(vit, models, images[:3], vit(images[:3]).argmax(dim=1))
    torch.testing.assert_close(labelled.importance[3], first.importance[3])


def test_importance_correlates_with_itself_only_where_it_should():
    vit, size = build("deit")
    found = measure(vit, {"linear": amod.convert(vit, "linear", 0.4)}, torch.randn(12, *size))
    for block, values in found.importance.items():
        found.scores["linear"][block][:, 1:] = values  # a router that knows
    table = correlations([found])
    rows = {(row.router, row.block): row for row in table if (row.measure, row.method) == ("change", "Spearman")}
    for block in found.importance:
        assert rows["linear", block].value.mean == pytest.approx(1)
        assert rows["linear", block].significant == 1
        assert abs(rows["random", block].value.mean) < 0.3
    sizes = [row for row in table if (row.measure, row.method, row.router) == ("size", "Spearman", "linear")]
    assert all(row.value.mean < 0.9 for row in sizes)  # negative changes are large ones
