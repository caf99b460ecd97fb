"""Tables of a sweep: cells, paired differences against formulas written anew, the paper's figures, and the formats."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest

from fsd_fast import cli
from fsd_fast.sweep import paper
from fsd_fast.sweep.results import Row, write_results
from fsd_fast.sweep.statistics import best_on_heldout, bootstrap, make_cells, on_heldout, paired_scores
from fsd_fast.sweep.table import (
    Table,
    as_csv,
    as_latex,
    as_markdown,
    as_text,
    conditions_of,
    differences,
    figures_of,
    means_table,
)

PAPER_RECORD = {
    "arguments": {
        "max_seq_length": 128,
        "pad_features": "include",
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "model_name_or_path": "models/bert-base-uncased",
    },
    "facts": {"world_size": 1, "student_layers": 6},
}


def row(
    task="rte",
    method="vkd",
    seed=0,
    score=0.5,
    *,
    heldout=None,
    data=None,
    rows=2490,
    record=None,
    **settings,
):
    return Row(
        task=task,
        method=method,
        seed=seed,
        train_samples=rows,
        score=score,
        heldout_score=heldout,
        agreement=0.9,
        kl=0.1,
        seconds=1.0,
        settings={
            "data": data or {},
            "teacher": {"model_name_or_path": "bert-base-uncased"},
            "distill": settings,
        },
        scores={
            "eval_accuracy": score,
            "eval_pearson": score,
            "eval_spearmanr": score - 0.1,
            "eval_f1": score + 0.1,
        },
        record=record or {"arguments": {}, "facts": {}},
        versions={},
        run=f"{task}-{method}-{seed}-{score}-{settings}-{data}",
    )


def test_runs_that_differ_in_their_seed_alone_share_a_cell():
    cells = make_cells(
        [
            *(row(seed=seed, alpha=0.2) for seed in range(3)),
            *(row(method="fsd_ilg", seed=seed, beta=beta, alpha=0.2) for seed in (0, 1) for beta in (3, 4)),
        ]
    )
    assert {cell.label: len(cell.rows) for cell in cells} == {
        "vkd": 3,
        "fsd_ilg beta=3": 2,
        "fsd_ilg beta=4": 2,
    }
    with pytest.raises(ValueError, match="expected one row for each seed, got several of rte, vkd"):
        make_cells([row(seed=1), row(seed=1)])


def test_settings_of_the_data_are_conditions():
    rows = [
        row(method=method, data={"max_train_samples": size}, score=0.5)
        for method in ("vkd", "rkd")
        for size in (1000, 300, None)
    ]
    teacher = row(method="teacher", data={"max_train_samples": 5})
    cells = make_cells([*rows, teacher])
    assert [dict(condition)["max_train_samples"] for condition in conditions_of(cells)] == [
        "300",
        "1000",
        "null",
    ]
    assert {cell.label for cell in cells} == {"vkd", "rkd", "teacher"}
    # A teacher of other rows stands in every condition.
    assert sum(cell.method == "teacher" for cell in cells) == 3
    # One of the same rows in its own alone.
    own = make_cells([*rows, row(method="teacher", data={"max_train_samples": 300})])
    assert [cell.condition for cell in own if cell.method == "teacher"] == [(("max_train_samples", "300"),)]


def test_a_setting_that_goes_with_a_condition_is_no_label():
    """Few rows are read more often: within their table the runs of a method do not differ in it."""
    rows = [
        row(method=method, data={"max_train_samples": size}, score=0.5, num_train_epochs=epochs)
        for method in ("vkd", "rkd")
        for size, epochs in ((100, 30), (1000, 3))
    ]
    assert {cell.label for cell in make_cells(rows)} == {"vkd", "rkd"}
    rows.append(row(method="rkd", data={"max_train_samples": 100}, score=0.6, num_train_epochs=40))
    labels = {(dict(cell.condition)["max_train_samples"], cell.label) for cell in make_cells(rows)}
    assert labels == {
        ("100", "vkd"), ("1000", "vkd"), ("1000", "rkd"),
        ("100", "rkd num_train_epochs=30"), ("100", "rkd num_train_epochs=40"),
    }  # fmt: skip


def test_tables_of_the_heldout_rows():
    held = {
        "eval_heldout_accuracy": 0.75,
        "eval_heldout_teacher_agreement": 0.8,
        "eval_heldout_teacher_kl": 0.2,
    }
    plain = dataclasses.replace(
        row(score=0.5, heldout=0.75), scores={"eval_validation_accuracy": 0.5, **held}
    )
    (found,) = on_heldout([plain])
    assert (found.score, found.agreement, found.kl) == (0.75, 0.8, 0.2)
    assert figures_of(make_cells([found])[0]) == [("accuracy", [75.0])]
    assert figures_of(make_cells([plain])[0]) == [("accuracy", [50.0])]
    with pytest.raises(
        ValueError, match="expected a score on held-out rows of every run, got none of rte-vkd"
    ):
        on_heldout([row()])


def test_a_task_with_settings_of_its_own_is_no_condition():
    cells = make_cells([row(data={"data_dir": "a"}), row(task="cola", data={"data_dir": "b"})])
    assert {cell.condition for cell in cells} == {()}


def test_the_settings_are_chosen_on_heldout_rows():
    rows = [
        row(method="fsd_ilg", seed=seed, beta=beta, score=1 - heldout, heldout=heldout)
        for seed in (0, 1)
        for beta, heldout in ((3, 0.5), (4, 0.7), (5, 0.6))
    ]
    (best,) = best_on_heldout(make_cells(rows))
    assert (best.label, best.heldout) == ("fsd_ilg", pytest.approx(0.7))
    assert [each.settings["distill"]["beta"] for each in best.rows] == [4, 4]
    rows[0] = dataclasses.replace(rows[0], heldout_score=None)
    with pytest.raises(
        ValueError, match="expected a score on held-out rows of every run, got none of rte, fsd_ilg"
    ):
        best_on_heldout(make_cells(rows))


# --- differences ------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed():
    generator = np.random.default_rng(0)
    common = generator.normal(size=8)  # what a seed adds to every method
    base = [row(seed=seed, score=0.5 + common[seed]) for seed in range(8)]
    other = [row(method="rkd", seed=seed, score=0.51 + common[seed]) for seed in (7, 3, 4, 5)]
    cells = {cell.label: cell for cell in make_cells([*base, *other])}
    assert paired_scores(cells["rkd"], cells["vkd"]) == pytest.approx([0.01] * 4)
    found = differences(list(cells.values()), (), "vkd")["rkd"]["rte"]
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.pairs == 4


def test_the_interval_is_that_of_all_resamples():
    # Of three pairs there are 27 resamples: their exact distribution, against ten thousand drawn ones.
    values = np.array([0.0, 1.0, 5.0])
    means = np.sort([np.mean([a, b, c]) for a in values for b in values for c in values])
    found = bootstrap([values])
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(means[0])  # of 27 the lowest has 3.7 %
    assert found.high == pytest.approx(means[-1])
    assert bootstrap([values]) == found
    spread = np.random.default_rng(0).normal(size=9)
    assert bootstrap([spread], seed=1) != bootstrap([spread], seed=2)


def test_the_interval_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = sum(
        found.low <= 0.3 <= found.high
        for found in (bootstrap([generator.normal(0.3, 1, size=30)], seed) for seed in range(200))
    )
    assert 180 <= covered <= 200


def test_tasks_weigh_alike_in_their_mean():
    few, many = np.array([1.0, 3.0]), np.array([10.0] * 20)
    found = bootstrap([few, many])
    assert found.mean == pytest.approx(6)
    assert found.pairs == 2
    assert (found.low, found.high) == pytest.approx((5.5, 6.5))  # the few alone spread


def test_one_pair_has_no_interval():
    found = bootstrap([np.array([2.0])])
    assert (found.mean, found.pairs) == (2, 1)
    assert math.isnan(found.low)
    with pytest.raises(ValueError, match="expected at least one pair"):
        bootstrap([np.array([])])
    with pytest.raises(ValueError, match="expected at least one pair"):
        bootstrap([])


# --- the paper --------------------------------------------------------------------------------------------------


def test_the_papers_figures_are_read_off_its_table():
    assert paper.paper_figures("fsd_ilg", "rte") == [(66.61, 1.01)]
    assert paper.paper_figures("vkd", "mnli") == [(82.20, 0.19), (82.85, 0.12)]
    assert paper.paper_figures("rkd", "mrpc") == [(86.87, 0.47), (81.84, 0.35)]
    [(mean, deviation)] = paper.paper_figures("teacher", "cola")
    assert mean == 55.47
    assert math.isnan(deviation)
    assert paper.paper_figures("fsd_i", "rte") is None
    assert paper.paper_figures("vkd", "reviews") is None
    for method in ("teacher", "vkd", "pkd", "minilm", "rkd", "fsd_ilg"):
        for task, metrics in paper.METRICS.items():
            assert len(paper.paper_figures(method, task)) == len(metrics)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"max_seq_length": 64},
        {"pad_features": "exclude"},
        {"num_train_epochs": 4},
        {"max_steps": 100},
        {"per_device_train_batch_size": 16},
        {"gradient_accumulation_steps": 2},
        {"model_name_or_path": "minilm"},
        {"rows": 2000},
        {"student_layers": 3},
        {"teacher": "minilm"},
    ],
)
def test_the_papers_figures_stand_beside_its_own_setting_alone(change):
    record = {key: dict(value) for key, value in PAPER_RECORD.items()}
    rows = 2490
    for name, value in change.items():
        if name == "rows":
            rows = value
        elif name in record["facts"]:
            record["facts"][name] = value
        elif name != "teacher":
            record["arguments"][name] = value
    runs = [row(method="fsd_ilg", seed=seed, record=record, rows=rows) for seed in (0, 1)]
    if "teacher" in change:
        runs[1].settings["teacher"]["model_name_or_path"] = change["teacher"]
    table = means_table(make_cells(runs) if "teacher" not in change else make_cells(runs[1:]), ())
    expected = [["fsd_ilg (paper)", "", "66.61 ± 1.01"]] if not change else []
    assert table.rows[1:] == expected


# --- layout -----------------------------------------------------------------------------------------------------


def cells():
    return make_cells(
        [
            row(task, method, seed, base + seed / 100)
            for task, base in (("reviews", 0.7), ("stsb", 0.8), ("wnli", 0.5))
            for method in ("fsd_ilg", "vkd", "teacher")
            for seed in ((0, 1) if method != "teacher" else (0,))
        ]
    )


def test_columns_and_rows_have_the_papers_order():
    table = means_table(cells(), ())
    assert table.header == ["method", "runs", "WNLI", "STS-B P/S", "reviews"]
    assert [line[0] for line in table.rows] == ["teacher", "vkd", "fsd_ilg"]
    assert table.rows[1] == ["vkd", "2", "50.50 ± 0.71", "80.50 ± 0.71 / 70.50 ± 0.71", "70.50 ± 0.71"]
    assert table.rows[0] == ["teacher", "1", "50.00", "80.00 / 70.00", "70.00"]


def test_each_split_of_mnli_has_its_figure():
    scores = {"eval_validation_matched_accuracy": 0.8, "eval_validation_mismatched_accuracy": 0.7}
    (cell,) = make_cells([dataclasses.replace(row("mnli"), scores=scores)])
    assert figures_of(cell) == [
        ("validation_matched_accuracy", [pytest.approx(80)]),
        ("validation_mismatched_accuracy", [pytest.approx(70)]),
    ]


def test_the_formats():
    table = Table("A_title", ["method", "x%"], [["a_b", "1.0 ± 0.5"], ["longer|name", ""]])
    assert as_text(table) == "A_title\nmethod       x%\na_b          1.0 ± 0.5\nlonger|name\n"
    assert as_markdown(table) == (
        "A_title:\n\n| method | x% |\n|---|---|\n| a_b | 1.0 ± 0.5 |\n| longer\\|name |  |\n"
    )
    assert as_latex(table) == (
        "% A_title\n\\begin{tabular}{lr}\n\\toprule\nmethod & x\\% \\\\\n\\midrule\na\\_b & 1.0 $\\pm$ 0.5 \\\\\n"
        "longer$\\mid$name &  \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_csv_has_every_figure_unrounded():
    lines = list(csv.DictReader(io.StringIO(as_csv(cells(), "vkd"))))
    (found,) = [
        line
        for line in lines
        if (line["task"], line["label"], line["metric"]) == ("stsb", "vkd", "spearmanr")
    ]
    assert float(found["mean"]) == pytest.approx(70.5, rel=1e-12)
    assert float(found["std"]) == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert found["paper_mean"] == ""
    differing = [line for line in lines if line["kind"] == "difference"]
    assert {line["task"] for line in differing} == {"reviews", "stsb", "wnli", "all"}
    assert {line["label"] for line in differing} == {"fsd_ilg"}


def test_the_command_writes_tables(tmp_path, capsys):
    path = tmp_path / "results.csv"
    write_results(path, [each for cell in cells() for each in cell.rows])
    assert cli.main(["table", str(path)]) == 0
    out = capsys.readouterr().out
    assert "Mean ± standard deviation over seeds, in percent\nmethod   runs  WNLI" in out
    assert "fsd_ilg  2      +0.00 [+0.00, +0.00]" in out
    assert cli.main(["table", str(path), "--format", "latex", "--output_file", str(tmp_path / "t.tex")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "t.tex").read_text().count("\\begin{tabular}") == 3


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (None, [], "results.csv: no such file; expected the results.csv of a sweep"),
        ("task,score\nrte,1\n", [], "line 1: expected the header task,method"),
        ([], [], "expected at least one finished run, got none"),
        ([row()], ["--baseline", "pkd"], "baseline: expected one of vkd; got 'pkd'"),
        ([row(seed=1), row(seed=1, score=0.4)], [], "expected one row for each seed"),
        ([row(), row(alpha=1)], ["--best_on_heldout"], "expected a score on held-out rows"),
        ([row()], ["--scored_on", "heldout"], "expected a score on held-out rows"),
        ([row()], ["--format", "html"], "--format: expected one of text, markdown, latex, csv"),
        ([row()], ["extra"], "unknown arguments extra"),
    ],
)
def test_results_that_make_no_table_are_refused(tmp_path, capsys, content, more, words):
    path = tmp_path / "results.csv"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        write_results(path, content)
    assert cli.main(["table", str(path), *more]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fsd-fast table: error: ")
    assert words in message
