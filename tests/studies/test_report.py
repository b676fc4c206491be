"""What a report says, against numbers worked out by hand."""

from __future__ import annotations

import csv
import math

import pytest
from fakes_studies import SCALE, STUDY, finish, rows

from amod.studies.paper import ACCURACY
from amod.studies.report import (
    COLUMNS,
    beside_the_paper,
    epochs_to_peak,
    examine,
    interval,
    rows_of,
    table,
    write_claims,
    write_report,
)


def test_the_interval_is_students():
    # three values 1, 2, 3: s = 1, s / sqrt(3) = 0.57735, t(0.975, 2) = 4.30265
    mean, half = interval([1, 2, 3])
    assert mean == 2
    assert half == pytest.approx(4.30265 * 0.57735, rel=1e-5)
    assert math.isnan(interval([5.0])[1])


def test_epochs_to_within_one_percent_of_the_peak():
    assert epochs_to_peak([(0, 50.0), (1, 79.1), (2, 79.2), (3, 80.0), (4, 79.9)]) == 2  # 0.99 * 80 = 79.2
    assert epochs_to_peak([(0, 80.0), (1, 70.0)]) == 0
    assert epochs_to_peak([]) is None


@pytest.mark.parametrize(
    ("linear", "attention", "verdict"),
    [
        ([70, 71, 72], [72, 73, 74.1], "held"),  # differences 2, 2, 2.1
        ([70, 71, 72], [72, 69, 73], "not held"),  # 2, -2, 1
        ([70, 71, 72], [68, 69, 70.1], "not held"),  # the other way
        ([70], [72], "not tested"),  # one seed says nothing about the spread
    ],
)
def test_a_claim_is_held_only_where_the_interval_of_the_differences_is_above_zero(linear, attention, verdict):
    found = examine(
        {"text": "", "higher": "attention", "lower": "linear"},
        rows(linear=linear, attention=attention),
        "test_top1",
    )
    assert found["verdict"] == verdict


def test_a_margin_lets_a_little_be_lost():
    claim = {"text": "", "higher": "attention", "lower": "isoflop", "margin": 1.0}
    assert examine(claim, rows(isoflop=[80, 81, 82], attention=[79.5, 80.5, 81.4]), "test_top1")["verdict"] == "held"
    assert (
        examine(claim | {"margin": 0.0}, rows(isoflop=[80, 81], attention=[79, 80.1]), "test_top1")["verdict"]
        == "not held"
    )


def test_runs_are_paired_by_seed():
    # seed by seed the difference is about 1, however far the seeds are apart
    found = examine(
        {"text": "", "higher": "attention", "lower": "linear"},
        rows(linear=[10, 50, 90], attention=[11, 51, 91.1]),
        "test_top1",
    )
    assert found["verdict"] == "held"
    assert "+1.03 ± 0.14 (n = 3)" in found["lines"][0]


def test_no_spread_is_no_evidence():
    claim = {"text": "", "higher": "attention", "lower": "linear"}
    found = examine(claim, rows(linear=[2, 1, 2], attention=[3, 2, 3]), "test_top1")
    assert found["verdict"] == "not tested"
    assert "+1.00 in every seed (n = 3), not tested" in found["lines"][0]


def test_cells_are_counted():
    both = rows(linear=[70, 71], attention=[72, 73.1]) + rows(capacity=0.125, linear=[70, 71], attention=[60, 62])
    claim = {"text": "", "higher": "attention", "lower": "linear"}
    assert examine(claim, both, "test_top1")["verdict"] == "held in 1 of 2 cells"


def test_a_claim_about_the_dense_model_meets_it_at_every_capacity():
    dense = [row | {"capacity": 1.0} for row in rows(none=[80, 81])]
    claim = {"text": "", "higher": "attention", "lower": "none", "margin": 5.0}
    assert examine(claim, dense + rows(attention=[79, 80.1]), "test_top1")["verdict"] == "held"


def test_the_table_has_a_line_for_each_cell_and_counts_what_finished():
    shown = table(rows(linear=[70, 72], attention=[71, 74]), ["test_top1"])
    assert "| 0.5 | MoD | 0.0250 | 2/2 | 71.00 ± 12.71 | 70 72 |" in shown  # s = sqrt(2), t(0.975, 1) = 12.7062
    unfinished = [row | {"status": "failed", "test_top1": None, "gflops": None} for row in rows(linear=[70])]
    assert "| 0.5 | MoD |  | 0/1 |  |  |" in table(unfinished, ["test_top1"])


def test_the_files_of_a_report(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    failed = {runs[-1].name: "error: no room"}
    (tmp_path / "runs" / runs[-1].name / "summary.json").unlink()
    report = write_report(STUDY, SCALE, *rows_of(runs, tmp_path / "runs", failed), tmp_path / "results")
    text = report.read_text()
    assert "# A toy (toy scale)" in text
    assert "error: no room" in text
    assert "not tested" in text
    assert (tmp_path / "results/figure.png").stat().st_size > 5000
    with open(tmp_path / "results/runs.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == list(COLUMNS)
    assert [row["status"] for row in written].count("failed") == 1
    with open(tmp_path / "results/curves.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {run.name for run in runs[:-1]}


def test_a_part_of_a_study_leaves_the_report_of_more_as_it_is(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.5]})
    whole = write_report(STUDY, SCALE, *rows_of(runs, tmp_path / "runs", {}), tmp_path / "results")
    text = whole.read_text()
    part = write_report(STUDY, SCALE, *rows_of(runs[:2], tmp_path / "runs", {}), tmp_path / "results")
    assert part == tmp_path / "results/partial/report.md"
    assert "2 runs finished" in part.read_text()
    assert whole.read_text() == text
    again = write_report(STUDY, SCALE, *rows_of(runs, tmp_path / "runs", {}), tmp_path / "results")
    assert again == whole


def test_each_model_has_a_picture(tmp_path):
    both = rows(linear=[70, 71]) + [row | {"model": "deit_tiny"} for row in rows(linear=[60, 61])]
    text = write_report(STUDY, SCALE, [row | {"stage": "scratch"} for row in both], [], tmp_path).read_text()
    for model in ("deit_tiny", "vit_pico"):
        assert f"(figure-{model}.png)" in text
        assert (tmp_path / f"figure-{model}.png").stat().st_size > 5000


def paper_rows(name, data, **cells):
    """Finished rows of a table's study: {"router_model": (capacity, placement, accuracy)}."""
    made = []
    for cell, (capacity, placement, accuracy) in cells.items():
        router, _, model = cell.partition("_on_")
        labels = {"data": data, "model": model, "placement": placement}
        made += [row | labels for row in rows(capacity, **{router: [accuracy]})]
    return beside_the_paper({"name": name, "metric": "test_top1"}, made)


def test_ours_stands_beside_the_papers_figure_of_the_same_cell():
    text = paper_rows(
        "table1",
        "imagenet",
        isoflop_on_deit_tiny=(0.125, "alternate", 11),
        attention_on_vit_base=(0.5, "alternate", 22),
    )
    assert "| imagenet | deit_tiny | isoFLOP | 0.125 | 0.75 | 0.7463 | 67.4 | 11.00 |" in text
    assert "| imagenet | vit_base | A-MoD | 0.5 | 13.1 | 13.1048 | 80.4 | 22.00 |" in text
    assert "| imagenet | vit_large | A-MoD | 0.5 | 45.92 | 45.9257 | 82.82 | not run |" in text
    text = paper_rows("table3", "imagenet", linear_on_vit_base=(0.5, "alternate", 33))
    assert "| imagenet | vit_base | MoD | 0.5 |  | 13.1057 | 69.91 | 33.00 |" in text
    text = paper_rows("table5", "pets", attention_on_vit_large=(0.5, "alternate", 44))
    assert "| pets | vit_large | A-MoD | 0.5 | 45.925 | 45.9247 | 90.37 | 44.00 |" in text
    assert "| cars | vit_large | A-MoD | 0.5 | 45.925 | 45.9249 | 91.95 | not run |" in text


def test_table_7_is_about_the_blocks_of_sec_4_5():
    other = paper_rows("table7", "imagenet", attention_on_deit_small=(0.5, "alternate", 70))
    assert "| imagenet | deit_small | A-MoD | 0.5 | 3.8 | 3.8164 | 79.63 | not run |" in other
    text = paper_rows("table7", "imagenet", attention_on_deit_small=(0.5, "last8", 70))
    assert "| 3.8 | 3.8164 | 79.63 | 70.00 |" in text


def test_all_claims_stand_on_one_page_with_those_that_no_study_tests(tmp_path):
    untested = [{"text": "it detects objects", "why": "there is no detector here"}]
    other = {**STUDY, "name": "other"}
    (tmp_path / "toy/toy").mkdir(parents=True)
    (tmp_path / "toy/toy/report.md").touch()
    found = [(STUDY, rows(linear=[70, 71], attention=[72, 73.1])), (other, [])]
    page = write_claims(found, untested, "toy", tmp_path).read_text()
    assert "| A-MoD is above MoD | other | **not tested** | no runs |" in page
    assert "| A-MoD is above MoD | [toy](toy/toy/report.md) | **held** | C = 0.5: +2.05 ± 0.64 (n = 2) |" in page
    assert "| it detects objects | - | **not tested** | there is no detector here |" in page


def test_the_papers_tables_are_whole():
    # three variants at two capacities for four models; Table 3 has no isoFLOP; 7 and 8 are short
    sizes = {study: {data: len(cells) for data, cells in tables.items()} for study, tables in ACCURACY.items()}
    transfer = {"cars": 24, "flowers": 24, "pets": 24}
    assert sizes["table1"] == {"imagenet": 24}
    assert sizes["table3"] == {"imagenet": 16}
    assert sizes["table4"] == sizes["table5"] == transfer
    assert sizes["table7"] == {"imagenet": 2}
    assert sizes["table8"] == {"imagenet": 4}
