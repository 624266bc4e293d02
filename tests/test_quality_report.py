"""The quality study's arithmetic: pairs, intervals, and when a choice of ranks costs epochs."""

import json
import sys

import pytest
from helpers.paths import ROOT
from scipy import stats

STUDY = ROOT / "tests" / "benchmarks" / "quality"
sys.path.insert(0, str(STUDY))
import report  # noqa: E402
import rows  # noqa: E402


def line(method, top1, seed=0, table=rows.EQUAL_TUNING, choose_s=1.0, epochs=6, **changes):
    found = {
        **{
            "method": method,
            "metric": "macs",
            "fraction": 0.28,
            "seed": seed,
            "decomposition": "auto",
            "score": "test",
            "table": table,
        },
        **{
            "choose_s": choose_s,
            "finetune_s": 60.0 * epochs,
            "epochs": epochs,
            "top1": top1,
            "val": [0.5, top1],
        },
        **{
            "cost_fraction": 0.279,
            "macs_fraction": 0.279,
            "params_fraction": 0.3,
            "ranks": {"layer1.0.conv1": "r4"},
            "search": None,
        },
    }
    return found | changes


def cells(table, method):
    (row,) = [r for r in table.splitlines() if r.startswith(f"| {method} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_leads_are_differences_seed_by_seed_with_students_interval():
    lines = [line("haloc", x, i) for i, x in enumerate((0.84, 0.85, 0.86))] + [
        line("uniform", x, i) for i, x in enumerate((0.83, 0.83, 0.86))
    ]
    lead = cells(report.table(lines, {}, "macs", 0.28, rows.EQUAL_TUNING), "uniform")[3]
    _, high = stats.ttest_rel([84, 85, 86], [83, 83, 86]).confidence_interval(0.95)
    assert lead == f"+1.00 ± {high - 1:.2f}"


@pytest.mark.parametrize(
    ("centre", "half", "said"),
    [(1, 0.5, "ahead"), (-1, 0.5, "behind"), (0.3, 0.5, "tied"), (0.3, 0.8, "not told apart")],
)
def test_a_tie_is_an_interval_that_holds_0_and_is_narrow(centre, half, said):
    assert report.verdict(centre, half) == said


def test_two_seeds_have_no_verdict_and_a_missing_search_no_lead():
    lines = [line("haloc", 0.84, i) for i in range(2)] + [
        line("uniform", 0.83, i) for i in range(2)
    ]
    assert cells(report.table(lines, {}, "macs", 0.28, rows.EQUAL_TUNING), "uniform")[3:5] == [
        "+1.00",
        "",
    ]
    assert cells(report.table(lines[2:], {}, "macs", 0.28, rows.EQUAL_TUNING), "uniform")[3:5] == [
        "",
        "",
    ]


def test_whoever_pays_for_its_ranks_has_a_line_of_its_own_at_equal_compute():
    lines = [
        line("haloc", 0.86),
        line("haloc", 0.84, table=rows.EQUAL_COMPUTE, epochs=4),
        line("uniform", 0.85),
    ]
    lines += [
        line("sensitivity-knapsack", 0.855),
        line("sensitivity-knapsack", 0.845, table=rows.EQUAL_COMPUTE, epochs=5),
    ]
    for order in (lines, lines[::-1]):
        table = report.table(order, {}, "macs", 0.28, rows.EQUAL_COMPUTE)
        assert [cells(table, m)[2] for m in ("haloc", "uniform", "sensitivity-knapsack")] == [
            "84.00 (1)",
            "85.00 (1)",
            "84.50 (1)",
        ]
        assert [cells(table, m)[5] for m in ("haloc", "uniform", "sensitivity-knapsack")] == [
            "4",
            "6",
            "5",
        ]
        assert (
            cells(report.table(order, {}, "macs", 0.28, rows.EQUAL_TUNING), "haloc")[2]
            == "86.00 (1)"
        )


def test_ranks_decomposed_afresh_stand_beside_the_row_that_they_are_of():
    lines = [
        line("haloc", 0.86),
        line("haloc", 0.85, afresh=True),
        line("haloc", 0.80, afresh=True, decomposition="hosvd"),
    ]
    table = report.table(lines, {}, "macs", 0.28, rows.EQUAL_TUNING)
    assert cells(table, "haloc")[2] == "86.00 (1)"
    assert cells(table, "haloc, its ranks alone")[2:4] == ["85.00 (1)", "+1.00"]
    assert cells(report.decompositions(lines), "haloc")[1:] == ["50.0", "50.0", "80.00", "86.00"]


def test_a_choice_that_costs_epochs_is_not_shown_as_equal_compute_as_it_is():
    lines = [
        line("haloc", 0.86),
        line("paper", 0.86, choose_s=400.0),
        line("haloc", 0.85, afresh=True),
    ]
    lines.append(line("nni-random", 0.85, choose_s=100.0))  # it was not made for that
    both = [
        report.by_method(lines, "macs", 0.28, kind)
        for kind in (rows.EQUAL_TUNING, rows.EQUAL_COMPUTE)
    ]
    assert [set(found) for found in both] == [
        {"haloc", "paper", "nni-random", "haloc, its ranks alone"},
        {"haloc"},
    ]


def test_a_budget_that_is_not_kept_is_said():
    table = report.table(
        [line("haloc", 0.86), line("paper", 0.86, cost_fraction=0.31)],
        {},
        "macs",
        0.28,
        rows.EQUAL_TUNING,
    )
    assert cells(table, "paper")[7] == "31.0 (over)"


@pytest.mark.parametrize(
    ("choose_s", "left"), [(29, None), (31, 5), (149, 4), (151, 3), (360, None)]
)
def test_the_choice_of_ranks_costs_whole_epochs_to_the_nearest(choose_s, left):
    assert rows._epochs_left(line("haloc", 0.8, choose_s=float(choose_s))) == left
    assert rows._epochs_left(line("nni-random", 0.8, choose_s=float(choose_s))) is None
    assert rows._epochs_left(line("haloc", 0.8, choose_s=float(choose_s), fraction=0.45)) is None


def test_rows_that_the_file_has_are_not_made_again():
    row = rows.Row("haloc", "macs", 0.28, 0)
    assert not rows._complete(row, [line("haloc", 0.8, 1), line("uniform", 0.8)])
    assert rows._complete(row, [line("haloc", 0.8)])
    costly = line("haloc", 0.8, choose_s=100.0)
    assert not rows._complete(row, [costly])
    assert rows._complete(row, [costly, line("haloc", 0.8, table=rows.EQUAL_COMPUTE)])
    assert not rows._complete(rows.Row("haloc", "macs", 0.28, 0, afresh=True), [line("haloc", 0.8)])


def test_the_published_tables_are_those_of_the_published_rows(tmp_path):
    docs = STUDY.parents[2] / "docs"
    page = tmp_path / "results.md"
    page.write_text((docs / "results.md").read_text())
    report.main(docs / "raw" / "quality.jsonl", None, page)
    assert page.read_text() == (docs / "results.md").read_text()


def test_the_published_rows_are_of_one_score_and_each_there_once():
    lines = [
        json.loads(text)
        for text in (STUDY.parents[2] / "docs" / "raw" / "quality.jsonl").read_text().splitlines()
    ]
    assert {found["score"] for found in lines} == {"test"}
    keys = [(*rows._key(found).values(), found["table"]) for found in lines]
    assert len(keys) == len(set(keys))
