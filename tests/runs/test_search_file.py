"""``search.json``: what a run's search knew of each candidate, enough to choose its plan again."""

import itertools
import json
import math

import pytest
from helpers.paths import DIGITS

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.plan.budget import cheapest
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.limits import limits_of
from nni_haloc.runs.run import run, search_only
from nni_haloc.search.history import describe_search
from nni_haloc.space.ranks import AllowedRanks

CHANGES = {
    "data.share": 0.25,
    "rank_space": {"step": 8, "calibration_images": 32},
    "search.epochs": 1,
    "finetune.epochs": 0,
    "recalibration_batches": 1,
    "budget.also": [{"metric": "params", "fraction": 0.4}],
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Return the folder of a search with two limits, and its strategy."""
    folder = RunFolder(tmp_path_factory.mktemp("search"))
    return folder, search_only(load_config(DIGITS, CHANGES), folder.path)


def content_of(folder):
    return json.loads(folder.search_file.read_text())


def test_it_is_the_state_of_the_search(searched):
    folder, strategy = searched
    assert content_of(folder) == describe_search(strategy)
    assert content_of(folder)["version"] == 1


def test_its_costs_are_those_of_the_tables(searched):
    folder, _ = searched
    content = content_of(folder)
    tables = [CostTable.load(file) for file in (folder.costs, folder.further_costs(0))]
    facts = RankPlan.load(folder.ranks).chosen_by
    assert [limit["metric"] for limit in content["limits"]] == ["macs", "params"]
    for number, (table, limit, fact) in enumerate(
        zip(tables, content["limits"], [facts, *facts["also"]], strict=True)
    ):
        assert limit["original_cost"] == table.original
        assert limit["budget"] == fact["budget"]
        rows = content["layers"].items()
        for layer, row in rows:
            costs = {name: candidate["cost"][number] for name, candidate in row.items()}
            assert costs == {name: table.costs[layer][name] for name in row}
        expected = table.fixed + sum(
            each["probability"] * each["cost"][number] for _, row in rows for each in row.values()
        )
        unsearched = sum(
            row["dense"] for layer, row in table.costs.items() if layer not in content["layers"]
        )
        assert limit["expected_cost"] == pytest.approx(expected + unsearched, rel=1e-5)


def test_its_probabilities_are_of_its_logits(searched):
    folder, _ = searched
    for row in content_of(folder)["layers"].values():
        total = sum(math.exp(each["logit"]) for each in row.values())
        for each in row.values():
            assert each["probability"] == pytest.approx(math.exp(each["logit"]) / total, rel=1e-4)


def test_its_scores_and_costs_choose_the_plan(searched):
    """Every network of the space is counted out.

    The best is that of those that use 95 % of a budget, or of all if none does.
    """
    folder, _ = searched
    content, plan = content_of(folder), RankPlan.load(folder.ranks)
    tables = [CostTable.load(file) for file in (folder.costs, folder.further_costs(0))]
    budgets = [limit["budget"] for limit in content["limits"]]
    layers = content["layers"]
    allowed = []
    for names in itertools.product(*layers.values()):
        choice = dict(zip(layers, names, strict=True))
        used = [t.total(choice) / b for t, b in zip(tables, budgets, strict=True)]
        if max(used) <= 1:
            score = sum(layers[layer][name]["score"] for layer, name in choice.items())
            allowed.append((max(used) >= 0.95, score, choice))
    assert len(allowed) > 10
    *_, best = max(allowed, key=lambda network: network[:2])
    assert plan.names == best


def test_reading_a_search_back_leaves_it_and_writes_a_lost_one_anew(searched):
    folder, _ = searched
    before = folder.search_file.read_bytes()
    config = load_config(DIGITS, CHANGES)
    search_only(config, folder.path, resume=True)
    assert folder.search_file.read_bytes() == before
    folder.search_file.unlink()
    run(config, folder.path, resume=True)
    assert folder.search_file.read_bytes() == before


def test_a_rule_leaves_none_and_takes_away_that_of_an_earlier_search(tmp_path):
    folder = RunFolder(tmp_path)
    search_only(load_config(DIGITS, CHANGES), folder.path)
    assert folder.search_file.exists()
    run(load_config(DIGITS, CHANGES | {"rule": "uniform"}), folder.path)
    assert not folder.search_file.exists()


def test_the_plan_that_is_timed_before_a_search_is_the_one_of_the_least_loss(monkeypatch, tmp_path):
    """Here the cheapest network alone loses nothing."""

    class Looked(Exception):
        pass

    def losses(job, space):
        (limit,) = limits_of(job.config, job.model, job.example, AllowedRanks(), job.folder)
        least = cheapest(space.candidates, limit.costs)
        return {
            layer: {name: float(name != least[layer]) for name in row}
            for layer, row in space.candidates.items()
        }

    def look(job, limits, make_plan, candidates):
        raise Looked(make_plan(limits).names, cheapest(candidates, limits[0].costs))

    monkeypatch.setattr("nni_haloc.runs.stages.choose_ranks._sensitivities", losses)
    monkeypatch.setattr("nni_haloc.runs.stages.choose_ranks.promised_plan", look)
    changes = {**CHANGES, "budget.also": [], "rule": "search", "search.min_use": 0}
    with pytest.raises(Looked) as seen:
        search_only(load_config(DIGITS, changes), tmp_path)
    plan, least = seen.value.args
    assert plan == least
