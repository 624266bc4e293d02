"""Ranks by a rule as a user meets them, on the digits."""

import json
import re
import shutil

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS
from typer.testing import CliRunner

from nni_haloc.cli.main import app
from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.runs.identity import search_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages import by_rule as module
from nni_haloc.runs.stages.by_rule import by_rule
from nni_haloc.runs.stages.choose_ranks import ChooseRanks
from nni_haloc.utils.errors import HalocError, UnusableCheckpoint

LEARNED = (
    "run",
    DIGITS,
    "--rule",
    "learned",
    "--budget",
    "0.25",
    "--set",
    "finetune.epochs=1",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    done = haloc(*LEARNED, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_by_a_rule_has_ranks_by_the_rule(finished):
    plan = json.loads((finished / "ranks.json").read_text())
    content = json.loads((finished / "metrics.json").read_text())
    facts, metrics = plan["chosen_by"], content["stages"]["finetune"]
    assert (facts["rule"], content["config"]["rule"]) == ("learned", "learned")
    assert (
        0.24 * facts["original_cost"]
        < facts["cost"]
        <= facts["budget"]
        == 0.25 * facts["original_cost"]
    )
    assert metrics["macs"] == facts["cost"]
    assert metrics["top1"] > 0.9
    assert content["stages"]["search"]["cost"] == facts["cost"]
    assert not (finished / "search").exists()
    assert any(
        rank != "dense" and rank[0] % 4 for rank in plan["ranks"].values()
    )  # a rank between the search's steps


def test_a_run_by_a_rule_that_goes_on_reads_its_plan_back(finished, monkeypatch):
    """In this process, so that it can be seen that no rule is asked."""
    before = {
        name: (finished / name).read_bytes() for name in ("ranks.json", "weights.safetensors")
    }
    monkeypatch.setattr(module, "plan", None)
    settings = [
        "--budget",
        "0.25",
        "--out",
        str(finished),
        "--set",
        "finetune.epochs=1",
        "--resume",
    ]
    done = CliRunner().invoke(
        app, ["run", str(DIGITS), "--rule", "learned", *settings], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert "fine-tuning: 1 of 1 epochs are done" in (finished / "log.txt").read_text()


def test_a_fine_tuning_with_other_settings_starts_anew_from_the_rules_weights(finished, tmp_path):
    """It ends as a run that had these settings from the start."""
    folder, fresh = tmp_path / "copy", tmp_path / "fresh"
    shutil.copytree(finished, folder)
    other = ["--set", "finetune.lr=0.003", "--set", "finetune.epochs=2"]
    for out, more in ((folder, ["--resume"]), (fresh, [])):
        done = haloc(*LEARNED, *other, "--out", out, *more)
        assert done.returncode == 0, done.stderr
    assert "fine-tuning starts anew" in (folder / "log.txt").read_text()
    assert (folder / "weights.safetensors").read_bytes() == (
        fresh / "weights.safetensors"
    ).read_bytes()


def test_a_state_of_other_settings_is_refused_and_kept(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    config = load_config(DIGITS, {"rule": "uniform", "budget.fraction": 0.25})
    message = r"made with other settings \(rule was 'learned', now 'uniform'"
    with pytest.raises(UnusableCheckpoint, match=message):
        by_rule(Job(config, folder), resume=True)
    assert (folder / "ranks.json").read_bytes() == (finished / "ranks.json").read_bytes()
    assert (folder / "finetuning").exists()


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_state_without_its_plan_is_one_line(finished, tmp_path, content):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "ranks.json").unlink()
    if content is not None:
        (folder / "ranks.json").write_text(content)
    done = haloc(*LEARNED, "--out", folder, "--resume")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "ranks.json" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["baseline", DIGITS], "Missing option '--rule'"),
        (
            ["baseline", DIGITS, "--rule", "search"],
            "--rule: expected one of uniform, energy, .*, found 'search'",
        ),
        (
            ["run", DIGITS, "--rule", "uniform", "--budget", "30%"],
            "--budget: .*'30%'; write 0.3",
        ),
        (
            ["search", DIGITS, "--set", "rule=uniform"],
            "rule: haloc search needs 'search', found 'uniform'",
        ),
    ],
)
def test_a_rule_where_none_fits_is_one_line(arguments, message):
    done = haloc(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"rule": "uniform"}, "search.alpha_lr, search.epochs, search.lr: not used by"),
        ({"rule": "uniform", "scale": 0.5}, "search.alpha_lr, search.lr: not used"),
        ({"rule": "search"}, None),
    ],
)
def test_settings_of_a_search_that_does_not_run_are_a_warning(tmp_path, caplog, changes, warned):
    ChooseRanks().check(Job(load_config(DIGITS, changes), tmp_path))
    assert bool(warned) == bool(caplog.messages)
    assert not warned or re.match(warned, caplog.messages[0])


def test_an_impossible_budget_is_one_line_and_leaves_no_plan(tmp_path):
    config = load_config(DIGITS, {"rule": "vbmf", "budget.fraction": 0.001})
    message = r"^budget: 1\.49 k MACs is below the cheapest network, \S+ k MACs, 0\.\d+ of"
    with pytest.raises(HalocError, match=f"{message} the original's; set 0.[0-9]+ or more"):
        by_rule(Job(config, tmp_path))
    assert not (tmp_path / "ranks.json").exists()


def test_a_table_of_the_searchs_ranks_serves_every_rule(tmp_path):
    """`haloc measure` and `haloc predict` make such tables; rules would rather see every rank."""
    job = Job(load_config(DIGITS, {"rule": "uniform", "budget.fraction": 0.5}), tmp_path)
    mac_table(job.model, job.example).save(tmp_path / "table.json")
    config = load_config(
        DIGITS,
        {"rule": "uniform", "budget.fraction": 0.5, "cost.table": str(tmp_path / "table.json")},
    )
    plan, _ = by_rule(Job(config, tmp_path))
    assert 0.4 < plan.chosen_by["cost"] / plan.chosen_by["original_cost"] <= 0.5


def test_a_table_of_the_accelerator_model_serves_a_run(tmp_path):
    """It is of one image and of another runtime than this machine's."""
    job = Job(load_config(DIGITS, {"rule": "uniform", "budget.fraction": 0.5}), tmp_path)
    counted = mac_table(job.model, job.example)
    CostTable(
        "cycles", counted.costs, counted.fixed, {"input": [1, 8, 8], "runtime": "zigzag-dse 3"}
    ).save(tmp_path / "table.json")
    changes = {
        "rule": "uniform",
        "budget.fraction": 0.5,
        "cost.metric": "cycles",
        "cost.table": str(tmp_path / "table.json"),
    }
    plan, _ = by_rule(Job(load_config(DIGITS, changes), tmp_path))
    assert plan.chosen_by["metric"] == "cycles"


@pytest.mark.parametrize("rule", ["uniform", "learned", "nni-random"])
def test_nothing_to_search_is_one_line(tmp_path, rule):
    config = load_config(
        DIGITS, {"rule": rule, "budget.fraction": 1.0, "rank_space.exclude": ["*"]}
    )
    with pytest.raises(HalocError, match=r"^nothing to search in DigitsCNN \(.*excluded by name"):
        by_rule(Job(config, tmp_path))


@pytest.mark.parametrize("command", ["run", "baseline"])
def test_a_wrong_rule_is_one_line_and_exit_status_2(tmp_path, command):
    done = haloc(command, DIGITS, "--rule", "best", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("haloc: ")
    assert done.stderr.count("\n") == 1
    assert re.search("--rule: expected one of (search, )?uniform, ", done.stderr)
    assert done.stderr.endswith("found 'best'\n")


def ranks_of(tmp_path, **changes):
    settings = {"rule": "sensitivity-knapsack", "budget.fraction": 0.3, **changes}
    job = Job(load_config(DIGITS, settings), tmp_path)
    with job.active():
        plan, _ = by_rule(job)
    return [rank for rank in plan.ranks.values() if rank is not None]


def test_the_knapsack_chooses_both_ranks_where_costs_are_counted(tmp_path):
    assert any(r1 != r2 for r1, r2 in ranks_of(tmp_path / "open"))
    closed = ranks_of(tmp_path / "equal", **{"rank_space.equal": True})
    assert all(r1 == r2 for r1, r2 in closed)


@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({}, False),
        ({"cost.metric": "params"}, False),
        ({"cost.metric": "latency_ms"}, True),  # each pair that is measured takes its time
        ({"budget.also": [{"metric": "latency_ms", "fraction": 0.5}]}, True),
        ({"rank_space.step": 4}, True),  # set for few candidates
        ({"rank_space.step": 4, "rank_space.equal": False}, False),
        ({"rank_space.equal": True}, True),
    ],
)
def test_ranks_may_differ_where_all_costs_are_counted_and_nothing_else_is_said(changes, equal):
    config = load_config(DIGITS, {"rule": "sensitivity-knapsack", **changes})
    assert allowed_ranks_of(config, every_rank=True, pairs=True).equal is equal
    assert allowed_ranks_of(config).equal is (changes.get("rank_space.equal") is not False)


def test_small_budgets_have_the_smallest_ranks(tmp_path):
    assert (1, 1) in ranks_of(tmp_path, **{"budget.fraction": 0.02})


def test_a_table_without_pairs_still_has_every_rank(tmp_path):
    space = {"rank_space.equal": True}
    fine = ranks_of(tmp_path / "equal", **space)
    table = CostTable.load(tmp_path / "equal" / "costs.json")
    table.save(tmp_path / "macs.json")
    given = {"cost.table": str(tmp_path / "macs.json")}
    assert ranks_of(tmp_path / "given", **given) == fine
    assert any(r1 % 2 for r1, _ in fine)


def test_a_state_of_equal_ranks_is_one_of_ranks_left_open_where_they_are_equal():
    """Earlier versions wrote true, where today the settings leave it open."""
    for changes, same in (
        ({"rule": "search"}, True),
        ({"rule": "uniform"}, True),
        ({"rule": "sensitivity-knapsack"}, False),
        ({"rule": "sensitivity-knapsack", "cost.metric": "latency_ms"}, True),
    ):
        left_open, saved = (
            search_identity(load_config(DIGITS, changes | more))
            for more in ({}, {"rank_space.equal": True})
        )
        assert (left_open == saved) is same, changes


@pytest.mark.parametrize("rule", ["uniform", "energy", "alds", "error-knapsack"])
def test_other_rules_keep_the_ranks_equal(rule, tmp_path):
    assert all(r1 == r2 for r1, r2 in ranks_of(tmp_path, rule=rule))
