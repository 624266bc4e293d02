"""`haloc baseline` as a user meets it, on the digits."""

import json

import pytest
from test_cli import DIGITS, haloc
from typer.testing import CliRunner

from nni_haloc import baselines
from nni_haloc.baselines import by_rule
from nni_haloc.cli import app
from nni_haloc.config import load_config
from nni_haloc.job import Job
from nni_haloc.yaml_files import ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    done = haloc("baseline", DIGITS, "--rule", "learned", "--budget", "0.25", "--out", folder, "--set", "finetune.epochs=1")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_baseline_is_a_run_with_ranks_by_the_rule(finished):
    plan = json.loads((finished / "ranks.json").read_text())
    content = json.loads((finished / "metrics.json").read_text())
    facts, metrics = plan["chosen_by"], content["metrics"]
    assert (facts["rule"], content["config"]["rule"]) == ("learned", "learned")
    assert 0.24 * facts["original_cost"] < facts["cost"] <= facts["budget"] == 0.25 * facts["original_cost"]
    assert metrics["macs"] == facts["cost"]
    assert metrics["default"] > 0.9
    assert not (finished / "search").exists()
    assert any(rank != "dense" and rank[0] % 4 for rank in plan["ranks"].values())  # a rank between the search's steps


def test_a_baseline_that_goes_on_reads_its_plan_back(finished, monkeypatch):
    """In this process, so that it can be seen that no rule is asked."""
    before = {name: (finished / name).read_bytes() for name in ("ranks.json", "weights.safetensors")}
    monkeypatch.setattr(baselines, "plan", None)
    settings = ["--budget", "0.25", "--out", str(finished), "--set", "finetune.epochs=1", "--resume"]
    done = CliRunner().invoke(app, ["baseline", str(DIGITS), "--rule", "learned", *settings], catch_exceptions=False)
    assert done.exit_code == 0
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert "fine-tuning: 1 of 1 epochs are done" in (finished / "log.txt").read_text()


def test_a_state_of_other_settings_is_not_gone_on_from(finished):
    config = load_config(DIGITS, {"rule": "uniform", "budget.fraction": 0.25})
    found, _ = by_rule(Job(config, finished), resume=True)
    assert found.chosen_by["rule"] == "uniform"
    assert not (finished / "finetuning").exists()


def test_an_impossible_budget_is_one_line_and_leaves_no_plan(tmp_path):
    config = load_config(DIGITS, {"rule": "vbmf", "budget.fraction": 0.001})
    with pytest.raises(ConfigError, match=r"^budget: 1493\.63 macs is below the cheapest network, \d+ macs$"):
        by_rule(Job(config, tmp_path))
    assert not (tmp_path / "ranks.json").exists()


def test_a_wrong_rule_is_one_line_and_exit_status_2(tmp_path):
    done = haloc("baseline", DIGITS, "--rule", "best", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("haloc: ")
    assert done.stderr.count("\n") == 1
    assert "rule: input should be 'search', 'uniform'" in done.stderr
    assert done.stderr.endswith("found 'best'\n")
