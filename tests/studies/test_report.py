"""What a report says, against numbers worked out by hand."""

from __future__ import annotations

import pandas as pd
from fakes_studies import SCALE, STUDY, finish, rows

from amod.studies import figures
from amod.studies.paper import ACCURACY
from amod.studies.report import beginnings, beside_the_paper, seeds_of, table, write_report
from amod.studies.rows import COLUMNS, curves_of, read, rows_of


def test_the_table_has_a_line_for_each_cell_and_counts_what_finished():
    shown = table(rows(linear=[70, 72], attention=[71, 74]), ["test_top1"])
    assert "| 0.5 | MoD | 0.0250 | 2/2 | 71.00 ± 12.71 | 70 72 |" in shown  # s = sqrt(2), t(0.975, 1) = 12.7062
    unfinished = rows(changes={"status": "failed", "gflops": None}, linear=[float("nan")])
    assert "| 0.5 | MoD |  | 0/1 |  |  |" in table(unfinished, ["test_top1"])


def test_a_placement_is_told_of_routers_that_are_placed_by_it():
    late = rows(changes={"placement": "late"}, attention=[73])
    everywhere = rows(tome=[74], isoflop=[60])  # their rows say "alternate", which does nothing to them
    assert "placement" not in table(pd.concat([late, everywhere]), ["test_top1"])
    text = table(pd.concat([late, rows(attention=[71]), everywhere]), ["test_top1"])
    for line in ("placement | C | configuration", "alternate | 0.5 | A-MoD", "late | 0.5 | A-MoD", "- | - | ToMe"):
        assert f"| {line} |" in text
    assert "| as alternate | 0.5 | isoFLOP |" in text  # as deep as the FLOPs of such a model allow


def test_accuracy_against_compute_is_shown_before_and_after_training(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_finish", lambda figure, *_: drawn.extend(figure.axes))
    found = rows(none=[90], attention=[73], avit=[80]).assign(test_top1_untrained=[pd.NA, 60, 88])
    study = STUDY | {"metrics": ["test_top1_untrained", "test_top1"]}
    figures.pareto(found, found, study, "", tmp_path)
    assert [[float(bar[0].get_ydata()[0]) for bar in axis.containers] for axis in drawn] == [[60], [90, 73, 80]]


def test_the_files_of_a_report(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    failed = {runs[-1].name: "error: no room"}
    (tmp_path / "runs" / runs[-1].name / "summary.json").unlink()
    report = write_report(STUDY, SCALE, *rows_of(runs, tmp_path / "runs", failed), tmp_path / "results")
    text = report.read_text()
    assert "# A toy (toy scale)" in text
    assert "error: no room" in text
    assert "**one seed**" in text
    assert (tmp_path / "results/figure.png").stat().st_size > 5000
    written = read(tmp_path / "results/runs.csv")
    assert list(written.columns) == list(COLUMNS)
    assert list(written["status"]).count("failed") == 1
    curves = pd.read_csv(tmp_path / "results/curves.csv")
    assert set(curves["run"]) == {run.name for run in runs[:-1]}


def test_what_was_not_run_is_counted_by_seed(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    for run in runs[-2:]:
        (tmp_path / "runs" / run.name / "summary.json").unlink()
    (tmp_path / "runs" / f"{runs[-1].name}.log").write_text(f"seed 1\nstopped; run_dir={tmp_path}/runs/mine goes on\n")
    found = rows_of(runs, tmp_path / "runs", {})
    text = write_report(STUDY, {**SCALE, "weights": "/a/vit.pth"}, *found, tmp_path / "results").read_text()
    assert "2 runs finished, 2 runs not run; seeds 0." in text
    assert "| stopped; run_dir=mine goes on |" in text
    assert "Not run: 1 runs of seed 1." in text
    assert "study=toy scale=toy scale.weights=vit.pth`" in text


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


def test_as_many_runs_of_other_seeds_do_not_replace_a_report(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.5]})
    rows, curves = rows_of(runs, tmp_path / "runs", {})
    first, second = rows[rows["seed"] == 0], rows[rows["seed"] == 1]
    write_report(STUDY, {**SCALE, "seeds": [0]}, first, curves, tmp_path / "results")
    other = write_report(STUDY, {**SCALE, "typed": ["scale.seeds=[1]"]}, second, curves, tmp_path / "results")
    assert other == tmp_path / "results/partial/report.md"
    assert "study=toy scale=toy 'scale.seeds=[1]'`, run at" in other.read_text()
    assert list(read(tmp_path / "results/runs.csv")["seed"]) == [0, 0]
    write_report(STUDY, SCALE, rows, curves, tmp_path / "results")
    assert list(read(tmp_path / "results/runs.csv")["seed"]) == [0, 0, 1, 1]


def test_runs_that_began_from_two_trainings_of_the_dense_model_are_told():
    found = rows(linear=[70, 71], attention=[72, 73])
    found["start_accuracy"] = [88.0, 88.5, 88.0, 88.25]  # seeds 0, 1, 0, 1
    assert beginnings(found[found["seed"] == 0]) == ""
    assert beginnings(found).endswith("from each (seed 1: 1 from one of 88.25 %, 1 from one of 88.5 %).")


def test_cells_of_fewer_seeds_are_said_and_a_router_of_ones_own_is_shown(tmp_path):
    """And what was typed about the study, and an old picture of other models goes."""
    found = rows(linear=[70, 71], attention=[72])
    assert seeds_of(found) == "seeds 0, 1, of some rows fewer"
    assert seeds_of(rows(linear=[70, 71], attention=[72, 73])) == "seeds 0, 1"
    found.loc[found["router"] == "attention", "router"] = "mine"
    (tmp_path / "report").mkdir()
    (tmp_path / "report/figure-other.png").write_bytes(b"")
    study = {**STUDY, "stage": "finetune", "claims": []}
    scale = {**SCALE, "typed": ["study.runs=[{router:[mine]}]"], "stages": {"finetune": {"settings": []}}}
    text = write_report(study, scale, found, curves_of(tmp_path / "none"), tmp_path / "report").read_text()
    assert "scale=toy 'study.runs=[{router:[mine]}]'`" in text
    assert "| mine | 0.0250 | 1/1 | 72.00 |" in text
    assert [file.name for file in (tmp_path / "report").glob("*.png")] == ["figure.png"]


def test_each_model_has_a_picture(tmp_path):
    scratch = {"stage": "scratch"}
    both = pd.concat(
        [rows(changes=scratch, linear=[70, 71]), rows(changes={**scratch, "model": "deit_tiny"}, linear=[60, 61])]
    )
    text = write_report(STUDY, SCALE, both, pd.DataFrame(columns=["run", "epoch", "val_top1"]), tmp_path).read_text()
    for model in ("deit_tiny", "vit_pico"):
        assert f"(figure-{model}.png)" in text
        assert (tmp_path / f"figure-{model}.png").stat().st_size > 5000


def paper_rows(name, data, **cells):
    """Finished rows of a table's study: {"router_model": (capacity, placement, accuracy)}."""
    made = []
    for cell, (capacity, placement, accuracy) in cells.items():
        router, _, model = cell.partition("_on_")
        made.append(rows(capacity, {"data": data, "model": model, "placement": placement}, **{router: [accuracy]}))
    return beside_the_paper({"name": name, "metric": "test_top1"}, pd.concat(made))


def test_a_report_of_runs_without_any_figure_is_written(tmp_path):
    runs = finish(tmp_path / "runs", {"linear": [70.0, 71.0], "attention": [72.0, 73.0]})
    study = {**STUDY, "metric": "val_top1_untrained", "metrics": ["speedup", "val_top1_untrained"]}
    write_report(study, SCALE, *rows_of(runs, tmp_path / "runs", {}), tmp_path / "results")
    assert (tmp_path / "results/figure.png").stat().st_size > 1000


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


def test_table_9_has_the_compute_of_the_transformer():
    text = paper_rows("table9", "coco", attention_on_detr=(0.5, "alternate", 33), linear_on_detr=(0.5, "alternate", 34))
    assert "| coco | detr | A-MoD | 0.5 | 7.745 | 7.7457 | 38.6 | 33.00 |" in text
    assert "| coco | detr | MoD | 0.5 | 7.747 | 7.7471 | 39.6 | 34.00 |" in text


def test_table_7_is_about_the_blocks_of_sec_4_5():
    other = paper_rows("table7", "imagenet", attention_on_deit_small=(0.5, "alternate", 70))
    assert "| imagenet | deit_small | A-MoD | 0.5 | 3.8 | 3.8164 | 79.63 | not run |" in other
    text = paper_rows("table7", "imagenet", attention_on_deit_small=(0.5, "last8", 70))
    assert "| 3.8 | 3.8164 | 79.63 | 70.00 |" in text


def test_the_papers_tables_are_whole():
    # three variants at two capacities for four models; Table 3 has no isoFLOP; 7 and 8 are short
    sizes = {study: {data: len(cells) for data, cells in tables.items()} for study, tables in ACCURACY.items()}
    transfer = {"cars": 24, "flowers": 24, "pets": 24}
    assert sizes["table1"] == {"imagenet": 24}
    assert sizes["table3"] == {"imagenet": 16}
    assert sizes["table4"] == sizes["table5"] == transfer
    assert sizes["table7"] == {"imagenet": 2}
    assert sizes["table8"] == {"imagenet": 4}
