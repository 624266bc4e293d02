"""Many budgets from one search, against every network of the space, without a second search."""

import itertools
import json

import pytest
import torch
from helpers.commands import haloc
from helpers.paths import DIGITS
from PIL import Image

from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.costs_file import UNITS
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import front as fronts
from nni_haloc.results.front import pareto_front
from nni_haloc.runs.run import search_only
from nni_haloc.runs.saved import load
from nni_haloc.training.finetuning import accuracy, recalibrate
from nni_haloc.utils.errors import HalocError

ORIGINAL = 1493632
BUDGETS = [0.3, 0.9, 0.6, 0.15, 0.05, 0.3]
SETTINGS = {"search.epochs": 3, "trainer.logger": "tensorboard", "recalibration_batches": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a finished search, with a front made from it."""
    folder = tmp_path_factory.mktemp("search")
    search_only(load_config(DIGITS, SETTINGS), folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (folder / "metrics.json").write_text("{}")
    pareto_front(folder, BUDGETS)
    (folder / "metrics.json").unlink()
    after = {
        p: p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and folder / "front" not in p.parents
    }
    assert before == after, "a front changes nothing of what was there, and adds nothing to it"
    return folder


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "front" / "front.json").read_text())


def test_the_front_has_one_point_for_each_feasible_budget(content):
    trained = build_model("digits_cnn")
    load_weights(trained, DIGITS.with_name("digits.safetensors"))
    assert content["metric"] == "macs"
    assert content["searched_at"] == pytest.approx(0.3)
    assert [p["fraction"] for p in content["points"]] == [0.9, 0.6, 0.3, 0.15]
    assert all(p["cost"] <= p["fraction"] * ORIGINAL for p in content["points"])
    assert content["original"] == {
        "cost": ORIGINAL,
        "top1": pytest.approx(accuracy(trained, val())[0]),
    }
    assert content["infeasible"] == [
        {
            "fraction": 0.05,
            "reason": "budget: 74.7 k MACs is below the cheapest network, 84.9 k MACs, "
            "0.0568 of the original's; set 0.057 or more",
        }
    ]


def val():
    return digits(0.2).loader("val", 64)


def test_each_plan_is_the_best_of_all_networks_that_use_its_budget(folder, content):
    """Every network of the space is counted out.

    The best is that of those that cost at least 95 % of the budget, or of all if none does.
    """
    saved = torch.load(folder / "search" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    table, space = CostTable.load(folder / "costs.json"), "training_module._model."
    rows = {}
    for layer, costs in table.costs.items():
        prefix = f"{space}model.{layer}."
        names = list(
            dict.fromkeys(
                key.removeprefix(prefix).split(".")[0] for key in saved if key.startswith(prefix)
            )
        )
        if "alpha" in names:
            names.remove("alpha")
            paid = float(saved[f"{space}prices"]) / (
                0.3 * ORIGINAL
            )  # for a unit of cost, in units of the budget
            free = {
                name: float(a) + paid * costs[name]
                for name, a in zip(names, saved[f"{prefix}alpha"], strict=True)
            }
            rows[layer] = {
                name: score - sum(free.values()) / len(free) for name, score in free.items()
            }
    networks = [dict(zip(rows, names, strict=True)) for names in itertools.product(*rows.values())]
    counted = [
        (table.total(n), sum(rows[layer][name] for layer, name in n.items()), n) for n in networks
    ]
    assert len(counted) == 576
    plans = []
    for point in content["points"]:
        plan = RankPlan.load(folder / "front" / point["folder"] / "ranks.json")
        plans.append(plan.names)
        within = [c for c in counted if c[0] <= point["fraction"] * ORIGINAL]
        least, most, share = min(c[0] for c in counted), point["fraction"] * ORIGINAL, 0.95
        while not (using := [c for c in within if c[0] >= least + share * (most - least)]):
            share = 2 * share - 1
        _, best, names = max(using, key=lambda c: c[1])
        assert sum(rows[layer][name] for layer, name in plan.names.items()) == pytest.approx(best)
        assert plan.names == names
        assert plan.chosen_by["cost"] == point["cost"]
    assert len({tuple(plan.items()) for plan in plans}) == len(plans)


def test_each_network_of_the_front_loads_and_has_its_cost_and_accuracy(folder, content):
    for point in content["points"]:
        network = load(folder / "front" / point["folder"])
        assert count_macs(network, torch.zeros(1, 1, 8, 8)) == point["cost"]
        assert accuracy(network, val())[0] == pytest.approx(point["top1"])


def test_the_networks_have_the_searched_weights_and_new_batchnorm_statistics(folder, content):
    """The point at the search's own budget is the search's own network, recalibrated."""
    (point,) = (p for p in content["points"] if p["fraction"] == 0.3)
    ours, searched = load(folder / "front" / point["folder"]), load(folder)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), searched.parameters(), strict=True)
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(ours.buffers(), searched.buffers(), strict=True)
    )
    torch.manual_seed(0)
    recalibrate(searched, digits(0.2).loader("train", 64, shuffle=True), 10)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), searched.buffers(), strict=True))


def test_the_plot_is_a_picture(folder):
    with Image.open(folder / "front" / "front.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_the_command_prints_a_table(folder, tmp_path):
    done = haloc("front", folder, "--budgets", "0.5,0.05", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((tmp_path / "front.json").read_text())["points"]
    (row,) = (
        line
        for line in done.stdout.splitlines()
        if f"{100 * point['top1']:.2f} %" in line and "0.5 " in line
    )
    assert f"{100 * point['cost_fraction']:.1f} %" in row
    assert str(tmp_path / "0.5") in row
    assert "84.9 k MACs" in done.stdout


def test_mistakes_are_one_line(folder, tmp_path):
    with pytest.raises(
        HalocError, match=r"checkpoint\.ckpt: no such file; expected the folder of a search"
    ):
        pareto_front(tmp_path, [0.5])
    with pytest.raises(
        HalocError,
        match="budgets: expected fractions of the original's cost, above 0 to 1, found 1.5",
    ):
        pareto_front(folder, [0.5, 1.5])
    content = torch.load(folder / "search" / "checkpoint.ckpt", weights_only=True)
    (tmp_path / "search").mkdir()
    torch.save({**content, "epoch": 1}, tmp_path / "search" / "checkpoint.ckpt")
    message = r"is not finished \(2 of 3 epochs\); continue with haloc run RUN\.yml --resume --out "
    with pytest.raises(HalocError, match=message):
        pareto_front(tmp_path, [0.5])
    content["nni_haloc"]["facts"]["config"]["model"] = {
        "name": "os:mkdir",
        "arguments": {"path": str(tmp_path / "called")},
    }
    torch.save(content, tmp_path / "search" / "checkpoint.ckpt")
    with pytest.raises(HalocError, match="made by code of your own; pass load"):
        pareto_front(tmp_path, [0.5])
    assert not (tmp_path / "called").exists()


def test_tensorboard_shows_the_search(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "search")).Reload()
    tags = events.Tags()["scalars"]
    assert {
        "search/expected_cost_epoch",
        "search/probability_loss",
        "search/weight_loss",
        "search/approach_loss",
    } <= set(tags)
    saved = torch.load(folder / "search" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    for layer in ("block2.conv", "block3.conv", "block4.conv"):
        mine = [tag for tag in tags if tag.startswith(f"prob/{layer}/")]
        curves = [[event.value for event in events.Scalars(tag)] for tag in mine]
        assert {len(curve) for curve in curves} == {3}  # one point an epoch
        assert [sum(column) for column in zip(*curves, strict=True)] == pytest.approx(
            [1, 1, 1], abs=1e-5
        )
        last = torch.softmax(saved[f"training_module._model.model.{layer}.alpha"], 0)
        assert sorted(curve[-1] for curve in curves) == pytest.approx(
            sorted(last.tolist()), abs=1e-6
        )


def test_every_cost_has_an_axis():
    assert set(fronts._AXES) == set(UNITS)


@pytest.mark.parametrize("range_", [None, [0.2, 0.6]])
def test_budgets_below_those_searched_for_are_a_warning(folder, tmp_path, range_, caplog):
    """The fixture's search was made at 0.3 alone."""
    if range_ is not None:
        folder = tmp_path / "ranged"
        search_only(load_config(DIGITS, {**SETTINGS, "search.budget_range": range_}), folder)
    caplog.clear()
    pareto_front(folder, [0.25, 0.15, 0.5], tmp_path / "out")
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (line,) = [line for line in lines if line.startswith("budgets ")]
    assert line.startswith("budgets 0.15: " if range_ else "budgets 0.15, 0.25: ")
    assert "search.budget_range: [0.15, " in line


def test_a_front_of_a_run_by_a_rule_says_what_it_needs(tmp_path):
    RankPlan({"a": (2, 2)}, {"rule": "sensitivity-knapsack"}).save(tmp_path / "ranks.json")
    with pytest.raises(
        HalocError,
        match="was made by the rule sensitivity-knapsack; front needs a search: haloc search RUN",
    ):
        pareto_front(tmp_path, [0.5])
