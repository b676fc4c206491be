"""Verdicts against numbers worked out by hand, and the page that shows them."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from fakes_studies import SCALE, STUDY, rows

from amod.studies.claims import Cell, examine, interval, seeds_to_decide, verdict_of
from amod.studies.claims_page import write_page
from amod.studies.rows import write

CLAIM = {"text": "", "higher": "attention", "lower": "linear"}


def seen(claim=CLAIM, **accuracies):
    return examine(claim, rows(**accuracies), "test_top1")


def test_the_interval_is_students():
    # three values 1, 2, 3: s = 1, s / sqrt(3) = 0.57735, t(0.975, 2) = 4.30265
    mean, half = interval([1, 2, 3])
    assert mean == 2
    assert half == pytest.approx(4.30265 * 0.57735, rel=1e-5)
    assert math.isnan(interval([5.0])[1])


@pytest.mark.parametrize(
    ("linear", "attention", "verdict"),
    [
        ([70, 71, 72], [72, 73, 74.1], "held"),  # differences 2, 2, 2.1
        ([70, 71, 72], [68, 69, 70.1], "contradicted"),  # -2, -2, -1.9
        ([70, 71, 72], [72, 69, 73], "undecided"),  # 2, -2, 1
        ([70], [72], "one seed"),  # says nothing about the spread
        ([70, 71], [72, 73], "undecided"),  # 2 and 2: tested, and no spread is no evidence
        ([88.1667, 87.9333], [88.3, 88.0667], "undecided"),  # 4 of 3,000 images twice, rounded to 0.1333 and 0.1334
    ],
)
def test_three_kinds_of_verdict(linear, attention, verdict):
    assert seen(linear=linear, attention=attention).verdict == verdict


def test_a_verdict_is_not_that_of_the_claim_turned_round():
    """Held one way is contradicted the other way; undecided stays undecided."""
    turned = {"text": "", "higher": "linear", "lower": "attention"}
    for linear, attention in (([70, 71, 72], [72, 73, 74.1]), ([70, 71, 72], [72, 69, 73])):
        pair = [seen(claim, linear=linear, attention=attention).verdict for claim in (CLAIM, turned)]
        assert pair in (["held", "contradicted"], ["undecided", "undecided"])


def test_a_margin_moves_the_bound_for_both_verdicts():
    # differences -0.5, -0.5, -0.6: -0.53 +- 0.14, above -1 and below -0.25
    values = {"linear": [80, 81, 82], "attention": [79.5, 80.5, 81.4]}
    verdicts = [seen({**CLAIM, "margin": margin}, **values).verdict for margin in (1.0, 0.25, 0.6)]
    assert verdicts == ["held", "contradicted", "undecided"]


def test_how_many_seeds_would_decide():
    # differences 1, 2, 6: mean 3, s = sqrt(7) = 2.6458; t(0.975, n - 1) s / sqrt(n): n = 5: 3.285, n = 6: 2.777
    assert seeds_to_decide([1, 2, 6]) == 6
    assert seeds_to_decide([1, 2, 6], margin=97) == 4  # far from the bound: one more
    assert seeds_to_decide([-1, 1, 0.001]) is None
    cell = Cell("C = 0.5", (1.0, 2.0, 6.0))
    assert cell.text == "C = 0.5: +3.00 ± 6.57 (n = 3), undecided (6 seeds would decide)"
    assert "not even 100 seeds" in Cell("", (-1.0, 1.0, 0.001)).text


def test_more_seeds_of_the_same_kind_decide_as_said():
    few = [1.0, 2.0, 6.0]
    needed = seeds_to_decide(few)
    spread, mean = pd.Series(few).std(), 3.0
    sample = pd.Series([mean + (-1) ** i for i in range(needed)])  # then the same mean and the same spread
    sample = mean + (sample - sample.mean()) * spread / sample.std()
    assert Cell("", tuple(sample)).verdict == "held"


def test_runs_are_paired_by_seed():
    # seed by seed the difference is about 1, however far the seeds are apart
    found = seen(linear=[10, 50, 90], attention=[11, 51, 91.1])
    assert found.verdict == "held"
    assert "+1.03 ± 0.14 (n = 3), held" in found.cells[0].text


def test_seeds_that_only_one_side_has_do_not_count():
    assert seen(linear=[70, 71], attention=[72, 73.1, 90]).cells[0].differences == pytest.approx((2, 2.1))
    found = seen(attention=[72, 73])
    assert found.cells[0].text == "C = 0.5: no pairs of runs"
    assert found.verdict == "not tested"


def test_one_seed_shows_its_difference():
    assert seen(linear=[70], attention=[72]).cells[0].text == "C = 0.5: +2.00 (one seed)"


def test_cells_are_counted_and_untested_ones_are_not():
    held, against, open_ = (Cell("", d) for d in ((2.0, 2.1), (-2.0, -2.1), (-1.0, 1.5)))
    assert verdict_of([held, held]) == "held"
    assert verdict_of([held, against, open_, held]) == "held in 2, contradicted in 1, undecided in 1 of 4 cells"
    assert verdict_of([against, Cell("", (3.0,)), Cell("", ())]) == "contradicted"
    assert verdict_of([]) == "not tested"
    same = Cell("", (0.0, 0.0))  # it was tested, and no spread says nothing
    assert verdict_of([same, Cell("", (1.0,))]) == "undecided"


def test_routers_of_unequal_cost_are_said():
    """20 % apart, and 1 % apart; the dense model's cost is another by design."""
    found = rows(linear=[70, 71], attention=[72, 73.1], none=[80, 80])
    found.loc[found["router"] == "attention", "gflops"] = 0.02
    assert examine(CLAIM, found, "test_top1").cells[0].text.startswith("C = 0.5 (0.02 and 0.025 G): +2.05 ± ")
    dense = {"text": "", "higher": "attention", "lower": "none"}
    assert "G)" not in examine(dense, found, "test_top1").cells[0].text
    found.loc[found["router"] == "attention", "gflops"] = 0.02475
    assert "G)" not in examine(CLAIM, found, "test_top1").cells[0].text


def test_cells_are_told_apart_by_what_varies():
    both = pd.concat(
        [rows(linear=[70, 71], attention=[72, 73.1]), rows(capacity=0.125, linear=[70, 71], attention=[60, 62])],
        ignore_index=True,
    )
    found = examine(CLAIM, both, "test_top1")
    assert [cell.where for cell in found.cells] == ["C = 0.5", "C = 0.125"]
    assert found.verdict == "held in 1, contradicted in 1 of 2 cells"
    placed = pd.concat([both, rows(changes={"placement": "last8"}, linear=[70, 71], attention=[72, 73.1])])
    assert "last8, C = 0.5" in [cell.where for cell in examine(CLAIM, placed, "test_top1").cells]
    only = {**CLAIM, "where": {"placement": "last8"}}
    assert [cell.where for cell in examine(only, placed, "test_top1").cells] == ["last8, C = 0.5"]


def test_a_claim_about_the_dense_model_meets_it_at_every_capacity():
    both = pd.concat([rows(1.0, none=[80, 81]), rows(attention=[79, 80.1])])
    claim = {"text": "", "higher": "attention", "lower": "none", "margin": 5.0}
    assert examine(claim, both, "test_top1").verdict == "held"


def test_a_method_with_blocks_of_its_own_meets_every_placement():
    claim = {"text": "", "higher": "attention", "lower": "tome"}
    both = pd.concat([rows(attention=[70, 71], tome=[75, 76]), rows(changes={"placement": "late"}, attention=[79, 80])])
    found = {cell.where: cell.differences for cell in examine(claim, both, "test_top1").cells}
    assert found == {"C = 0.5": (-5, -5), "late, C = 0.5": (4, 4)}


def test_the_dense_model_is_that_of_the_same_rate_or_the_one_before():
    claim = {"text": "", "higher": "attention", "lower": "none"}
    before = rows(1.0, {"lr": "0.02"}, none=[70, 71])
    tuned = rows(1.0, {"lr": "0.0005"}, none=[75, 76])
    ours = rows(changes={"lr": "0.0005"}, attention=[79, 80])
    assert examine(claim, pd.concat([before, ours]), "test_top1").cells[0].differences == (9, 9)
    assert examine(claim, pd.concat([before, tuned, ours]), "test_top1").cells[0].differences == (4, 4)


def test_a_claim_about_another_axis():
    both = pd.concat([rows(attention=[70, 71]), rows(changes={"placement": "last8"}, attention=[72, 73.1])])
    claim = {"text": "", "higher": "last8", "lower": "alternate", "axis": "placement", "where": {"router": "attention"}}
    assert examine(claim, both, "test_top1").cells[0].text.startswith("C = 0.5: +2.05")


def test_the_front_page(tmp_path):
    untested = [
        {"text": "it detects objects", "why": "there is no detector here"},
        {"text": "it is fast", "why": "1.6 times", "verdict": "measured elsewhere"},
    ]
    other = {**STUDY, "name": "other"}
    study = {**STUDY, "stage": "finetune", "claims": [{**STUDY["claims"][0], "paper": "78.66 / 77.43"}]}
    toy = {**SCALE, "about": "a toy", "stages": {"finetune": {"settings": []}, "scratch": {"settings": []}}}
    for scale, attention in (("toy", [72, 73.1]), ("big", [60, 61.1])):
        (tmp_path / "toy" / scale).mkdir(parents=True)
        write(rows(linear=[70, 71], attention=attention), tmp_path / "toy" / scale / "runs.csv")
    scales = [toy, {**toy, "name": "big", "about": "a big one"}, {**toy, "name": "huge"}]
    page = write_page([study, other], scales, untested, tmp_path).read_text()
    assert "| claim | the paper | toy | big | verdict |" in page
    assert "*toy*: a toy; *big*: a big one" in page
    assert "huge" not in page
    assert "\n\n4 claims are the papers': 1 measured elsewhere, 2 not tested, 1 not the same in all cells.\n\n" in page
    (line,) = [line for line in page.splitlines() if "[toy](toy/big/report.md)" in line]
    assert "| 78.66 / 77.43 | C = 0.5: +2.05 ± 0.64 (n = 2), held<br>[toy](toy/toy/report.md), test top-1 (%) |" in line
    assert line.endswith("| **held in 1, contradicted in 1 of 2 cells** |")
    assert "| A-MoD is above MoD | - | not run | not run | **not tested** |" in page
    assert "| it is fast | - | 1.6 times |  | **measured elsewhere** |" in page
    assert "| it detects objects | - | there is no detector here |  | **not tested** |" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1
