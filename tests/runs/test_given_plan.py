"""Ranks by hand from end to end on the digits: `haloc plan`, and a run of the changed plan."""

import itertools
import json
import math
import shlex
import shutil

import pytest
import torch
from helpers.commands import haloc
from helpers.pages import Page
from helpers.paths import DIGITS

from nni_haloc.cli.main import main
from nni_haloc.costs.counts import count_macs
from nni_haloc.inputs.config import load_config, parse_config
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import plan_table
from nni_haloc.results.html_report import html_report
from nni_haloc.results.plan_table import PlanFiles, change_plan, plan_content, print_change
from nni_haloc.runs.check import check_runs
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.identity import finetuning_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import search_only
from nni_haloc.runs.stages.given_plan import fit_plan, given_plan
from nni_haloc.space.candidates import build_candidates
from nni_haloc.space.modules import replace_modules
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import find_layers
from nni_haloc.utils.errors import SettingsError

CHANGES = {
    "rank_space.step": 16,  # so few ranks that each is measured
    "rank_space.calibration_images": 64,
    "data.share": 0.5,
    "budget.fraction": 0.5,
    "finetune.epochs": 1,
    "recalibration_batches": 2,
}
SHORT = [word for key, value in CHANGES.items() for word in ("--set", f"{key}={value}")]
RULE = ("--rule", "sensitivity-knapsack")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen") / "run"
    done = haloc("run", DIGITS, *RULE, *SHORT, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def job(finished):
    return Job(load_config(DIGITS, {**CHANGES, "rule": RULE[1]}), finished)


@pytest.fixture
def command(monkeypatch, capsys):
    """A command in this process: what it prints, or the line that it ends with."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["haloc", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            (line,) = capsys.readouterr().err.splitlines()
            return f"{end.code}: {line}"
        return capsys.readouterr().out

    return call


def table(folder):
    return json.loads((folder / "costs.json").read_text())


def test_a_runs_sensitivities_are_those_of_a_direct_measurement(finished, job):
    """Each candidate is fitted to one half of the images and alone in the network on the other."""
    known = KnownLayers.load(finished / "layers.json")
    images = job.splits.images("plain", 64, job.config.seed)
    specs = find_layers(job.model, job.example).specs
    assert known.measured
    for layer, row in known.candidates.items():
        ranks = {name: parse_rank(name, known.kinds[layer]) for name in row}
        added = dict.fromkeys(row, 0.0)
        for fitted, seen in ((images[1::2], images[::2]), (images[::2], images[1::2])):
            built = build_candidates(job.model, specs, {layer: ranks}, fitted)[layer]
            with torch.no_grad():
                p = job.model.eval()(seen).double().softmax(1)
                for name, module in built.items():
                    own = dict(job.model.named_modules())[layer]
                    replace_modules(job.model, {layer: module})
                    moved = job.model(seen).double().log_softmax(1)
                    replace_modules(job.model, {layer: own})
                    added[name] += float((p * (p.log() - moved)).sum(1).mean()) / 2
        for name, value in row.items():
            assert value == pytest.approx(added[name], rel=1e-3, abs=1e-6), (layer, name)


def test_a_plan_is_shown_with_costs_sensitivities_and_reasons(finished, command):
    content = json.loads(command("plan", finished, "--json"))
    ranks = RankPlan.load(finished / "ranks.json").names
    costs = table(finished)
    rows = {row["layer"]: row for row in content["layers"]}
    assert list(rows) == [*ranks, *(name for name in rows if name not in ranks)]
    for layer, name in ranks.items():
        assert rows[layer]["chosen"]["rank"] == name
        assert rows[layer]["chosen"]["cost"] == costs["costs"][layer][name]
        assert rows[layer]["dense"]["cost"] == costs["costs"][layer]["dense"]
        assert "saves" in rows[layer]["reason"] or "cheapest" in rows[layer]["reason"]
    assert rows["classifier"]["reason"].startswith("left alone: kind 'linear'")
    total = costs["fixed"] + sum(costs["costs"][layer][name] for layer, name in ranks.items())
    assert content["costs"][0]["cost"] == total
    assert content["movement"] == math.fsum(rows[x]["chosen"]["sensitivity"] for x in ranks)
    text = command("plan", finished)
    assert all(layer in text for layer in rows)
    assert "predicted change of the outputs" in text


@pytest.mark.parametrize("metric", ["macs", "latency_ms"])
def test_the_command_for_a_changed_plan_runs_and_measures_nothing(
    finished, tmp_path, command, monkeypatch, metric
):
    """Printed from one folder, run by the settings of another; a counted cost needs no table."""
    folder = shutil.copytree(finished, tmp_path / "a run")
    for name in ("costs.json", "ranks.json"):
        content = json.loads((folder / name).read_text())
        (content if name == "costs.json" else content["chosen_by"])["metric"] = metric
        if name == "costs.json":
            content["unit"] = {"macs": content["unit"], "latency_ms": "milliseconds"}[metric]
        (folder / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    options = ("--set", "block4.conv=16", "--out", "by hand.json", "--no-timing")
    last = command("plan", "a run", *options).splitlines()[-1]
    words = shlex.split(last.partition("fine-tune it: ")[2])
    assert words[:5] == ["haloc", "run", "RUN.yml", "--plan", "by hand.json"]
    assert ("--set" in words) == (metric == "latency_ms")
    more = ["--set", f"cost.metric={metric}", "--set", "budget.check=skip"]
    done = haloc("run", DIGITS, *words[3:], *SHORT, *more, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "measuring" not in done.stderr


def test_a_rank_set_by_hand_has_the_others_refitted_and_the_plan_runs(finished, tmp_path, command):
    """The others are the best of every network within the budget; the run chooses nothing."""
    before, file = RankPlan.load(finished / "ranks.json"), tmp_path / "by-hand.json"
    known, costs = KnownLayers.load(finished / "layers.json"), table(finished)
    layer, name, wish = "block4.conv", "r16", "block4.conv=16"
    assert before.names[layer] != name
    content = json.loads(command("plan", finished, "--set", wish, "--out", file, "--json"))
    new = RankPlan.load(file)
    assert new.names[layer] == name
    assert new.chosen_by["rule"] == "by hand"
    assert new.chosen_by["changed"] == content["changed"] == {layer: name}

    budget, found = before.chosen_by["budget"], []
    for names in itertools.product(*known.candidates.values()):
        choice = dict(zip(known.candidates, names, strict=True))
        cost = costs["fixed"] + sum(costs["costs"][x][n] for x, n in choice.items())
        if choice[layer] == name and cost <= budget:
            found.append((sum(known.candidates[x][n] for x, n in choice.items()), cost, choice))
    moved, cost, _ = min(found, key=lambda each: each[0])
    # Near the budget, as the rule does it; here the best of all is.
    assert content["after"]["movement"] == pytest.approx(moved)
    assert new.chosen_by["cost"] == content["after"]["costs"][0]["cost"] == cost
    text = command("plan", finished, "--set", wish)
    assert "set by hand" in text
    assert "predicted change of the outputs" in text

    out = tmp_path / "run"
    done = haloc("run", DIGITS, "--plan", file, *SHORT, "--out", out)
    assert done.returncode == 0, done.stderr
    ran = RankPlan.load(out / "ranks.json")
    assert ran.ranks == new.ranks
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stages"]["finetune"]["macs"] == cost
    assert (metrics["config"]["rule"], metrics["config"]["plan"]) == ("plan", str(file))
    shown = plan_content(PlanFiles.read(out))
    reasons = {row["layer"]: row["reason"] for row in shown["layers"]}
    assert reasons.pop(layer) == "set by hand"
    assert {reasons[x] for x in ran.ranks if x != layer} == {"as in the plan that was given"}
    assert (shown["measured"], shown["costs"][0]["cost"]) == (False, cost)
    assert "no sensitivities: the run measured none (rule 'plan')" in command("plan", out)

    weights = (out / "weights.safetensors").read_bytes()
    again = haloc("run", DIGITS, "--plan", file, *SHORT, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert (out / "weights.safetensors").read_bytes() == weights
    before.save(file)  # another plan is another run
    refused = haloc("run", DIGITS, "--plan", file, *SHORT, "--out", out, "--resume")
    assert refused.returncode == 2
    assert "plan" in refused.stderr.splitlines()[-1]
    assert (out / "weights.safetensors").read_bytes() == weights


def test_a_plan_is_part_of_a_runs_identity_by_its_content(tmp_path):
    file, moved = tmp_path / "a.json", tmp_path / "b.json"
    RankPlan({"block2.conv": (8, 8)}).save(file)
    shutil.copy(file, moved)
    same = [finetuning_identity(load_config(DIGITS, {"rule": "plan", "plan": str(f)}))
            for f in (file, moved)]  # fmt: skip
    assert same[0] == same[1]
    RankPlan({"block2.conv": (8, 4)}).save(file)
    assert finetuning_identity(load_config(DIGITS, {"rule": "plan", "plan": str(file)})) != same[0]
    assert "plan" not in finetuning_identity(load_config(DIGITS))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({}, "expected layers and their ranks, found none"),
        ({"block9.conv": (8, 8)}, "layer 'block9.conv' is not in DigitsCNN"),
        ({"block2.conv": (99, 8)}, "layer 'block2.conv': ranks [99, 8] are above its channels"),
        ({"block2.conv": (8,)}, "layer 'block2.conv' is of kind 'conv', which does not take"),
        ({"block2": (8, 8)}, "layer block2: expected an nn.Linear or an ungrouped nn.Conv2d"),
        ({"classifier": (4, 4)}, "layer 'classifier' is of kind 'linear', which does not take"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(job, tmp_path, ranks, message):
    file = tmp_path / "plan.json"
    RankPlan(ranks).save(file)
    config = load_config(DIGITS, {"rule": "plan", "plan": str(file)})
    with pytest.raises(SettingsError) as error:
        fit_plan(config, job.model, job.example)
    assert str(error.value).startswith(f"plan: {file}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_any_rank_of_any_layer_may_be_given(job, tmp_path):
    """One that is no candidate, of a kind that is not searched, or dearer than dense."""
    file = tmp_path / "plan.json"
    ranks = {"block2.conv": (31, 5), "classifier": (3,), "block1.conv": (16, 1)}
    RankPlan(ranks).save(file)
    config = load_config(DIGITS, {"rule": "plan", "plan": str(file)})
    plan, layers, allowed = fit_plan(config, job.model, job.example)
    assert plan.ranks == ranks
    candidates = layers.candidates(allowed)
    assert {layer: list(row.values()) for layer, row in candidates.items()} == {
        layer: [rank] for layer, rank in ranks.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "plan"}, "plan: the rule 'plan' needs a file (haloc plan FOLDER --out FILE)"),
        (
            {"plan": "{file}"},
            "rule: expected 'plan', or none, beside the file 'plan', found",
        ),
        ({"rule": "plan", "plan": "none.json"}, "plan: no such file or folder"),
    ],
)
def test_a_rule_and_a_plan_exclude_each_other(tmp_path, changes, message):
    file = tmp_path / "plan.json"
    RankPlan({"block2.conv": (8, 8)}).save(file)
    given = {key: value.format(file=file) for key, value in changes.items()}
    with pytest.raises(SettingsError) as error:
        load_config(DIGITS, given)  # which names the search
    assert message in str(error.value)


def test_a_plan_alone_is_the_rule(tmp_path):
    file = tmp_path / "plan.json"
    RankPlan({"block2.conv": (8, 8)}).save(file)
    settings = load_config(DIGITS).model_dump(mode="json") | {"plan": str(file)}
    del settings["rule"]
    assert parse_config(settings, "run.yml").rule == "plan"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "plan.json"], "--out: expected --set LAYER=RANK beside it"),
        (["--set", "block2.conv=7"], "layer 'block2.conv' has no candidate 7"),
        (["--set", "classifier=7"], "layer 'classifier' is left alone: kind 'linear'"),
        (["--set", "*=dense"], "--set: with block2.conv at dense, block3.conv at dense"),
    ],
)
def test_a_change_that_is_not_possible_is_one_line(finished, command, words, message):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    line = command("plan", finished, *words)
    assert line.startswith("2: haloc: ")
    assert message in line
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ranks.json", None, "ranks.json: no such file; expected the folder of a finished run"),
        ("layers.json", "{", "layers.json: not a JSON file"),
        ("layers.json", '{"version": 9}', "layers.json: expected a layers of version 1"),
        ("costs.json", "{}", "costs.json"),
    ],
)
def test_a_damaged_folder_is_one_line(finished, tmp_path, command, file, content, message):
    shutil.copytree(finished, tmp_path / "run")
    damaged = tmp_path / "run" / file
    damaged.unlink() if content is None else damaged.write_text(content)
    assert message in command("plan", tmp_path / "run")


def test_the_folder_of_an_earlier_version_shows_its_costs(finished, tmp_path, command):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "layers.json").unlink()
    text = command("plan", tmp_path / "run")
    assert "no sensitivities: the folder has no layers.json" in text
    assert "next lower rank" in text
    refused = command("plan", tmp_path / "run", "--set", "block2.conv=16")
    assert "layers.json: no such file" in refused
    page = Page(html_report(tmp_path / "run"))
    assert "sensitivity" not in [cell for row in page.rows for cell in row]


def test_the_report_has_the_same_table(finished):
    page = Page(html_report(finished))
    rows = {row[0]: row[1:] for row in page.rows}
    for row in plan_content(PlanFiles.read(finished))["layers"]:
        assert rows[row["layer"]][-1] == row["reason"]
        if not row["reason"].startswith("left alone"):
            assert f"{row['chosen']['sensitivity']:.3g}" in rows[row["layer"]]


def test_a_picture_of_the_plan_is_drawn(finished, tmp_path, command):
    shutil.copytree(finished, tmp_path / "run")
    assert command("plan", tmp_path / "run", "--plot").endswith(
        f"{tmp_path / 'run' / 'plan.png'}\n"
    )
    assert (tmp_path / "run" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert RunFolder(tmp_path / "run").plan_picture.is_file()
    words = ["--set", "block4.conv=16", "--out", tmp_path / "by-hand.json", "--plot"]
    command("plan", finished, *words)
    assert (tmp_path / "by-hand.png").is_file()
    assert not (finished / "plan.png").exists()


@pytest.fixture
def latencies(finished, tmp_path, monkeypatch):
    """A run whose budget is a latency, and the networks that are timed."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    costs, ranks = table(folder), json.loads((folder / "ranks.json").read_text())
    costs |= {"metric": "latency_ms", "unit": "milliseconds"}
    ranks["chosen_by"]["metric"] = "latency_ms"
    (folder / "costs.json").write_text(json.dumps(costs))
    (folder / "ranks.json").write_text(json.dumps(ranks))
    timed = []
    monkeypatch.setattr(
        plan_table,
        "measure_latency",
        lambda networks, batch, runtime, others: (
            timed.append((networks, batch)) or dict.fromkeys(networks, 2.5)
        ),
    )
    return folder, timed


def test_a_budget_of_latency_has_whole_networks_timed_together(latencies, command):
    folder, timed = latencies
    files = PlanFiles.read(folder)
    new, content = change_plan(files, ["block4.conv=16"])
    ((networks, batch),) = timed
    assert content["latency_ms"] == dict.fromkeys(("original", "before", "after"), 2.5)
    assert tuple(batch.shape) == (128, 1, 8, 8)
    for name, plan in (("before", files.plan), ("after", new)):
        for layer, rank in plan.ranks.items():
            first = next(
                m for m in networks[name].get_submodule(layer).modules() if hasattr(m, "weight")
            )
            assert first.weight.shape[0] == (rank[-1] if rank else first.weight.shape[0])
            assert not networks[name].training
    assert "measured latency, ms" in command("plan", folder, "--set", "block4.conv=16")
    assert "measured" not in command("plan", folder, "--set", "block4.conv=16", "--no-timing")
    assert len(timed) == 2


@pytest.mark.parametrize(("share", "warned"), [(1.25, True), (1.02, False)])
def test_a_changed_plan_above_its_latency_budget_is_a_warning(
    latencies, monkeypatch, caplog, share, warned
):
    folder, _ = latencies
    budget = json.loads((folder / "ranks.json").read_text())["chosen_by"]["budget"]
    times = {"original": 4 * budget, "before": budget, "after": share * budget}
    monkeypatch.setattr(plan_table, "measure_latency", lambda *_, **__: times)
    _, content = change_plan(PlanFiles.read(folder), ["block4.conv=16"])
    assert content["latency_budget_ms"] == budget
    with caplog.at_level("WARNING", logger="nni_haloc"):
        print_change(content)
    assert ("takes 125.0 % of its latency budget" in caplog.text) == warned


def test_what_is_not_timed_says_why(latencies):
    folder, timed = latencies
    costs = table(folder) | {"identity": {"device": "a phone"}}
    (folder / "costs.json").write_text(json.dumps(costs))
    _, content = change_plan(PlanFiles.read(folder), ["block4.conv=16"])
    assert content["not_timed"] == "the budget is one of another device, a phone"
    costs["identity"] = {}
    (folder / "costs.json").write_text(json.dumps(costs))
    (folder / "metrics.json").unlink()
    _, content = change_plan(PlanFiles.read(folder), ["block4.conv=16"])
    assert "expected the settings of a finished run" in content["not_timed"]
    assert timed == []


def test_a_search_keeps_what_it_starts_from(tmp_path):
    """Its sensitivities are those of the candidates that it chooses from."""
    changes = {**CHANGES, "search.epochs": 1, "data.share": 0.25}
    strategy = search_only(load_config(DIGITS, changes), tmp_path)
    known = KnownLayers.load(tmp_path / "layers.json")
    assert known.measured
    assert {layer: list(row) for layer, row in known.candidates.items()} == {
        layer: list(row) for layer, row in strategy.probabilities.items()
    }
    assert "classifier" in known.left_alone
    new, _ = change_plan(PlanFiles.read(tmp_path), ["block4.conv=16"])
    assert new.names["block4.conv"] == "r16"


def test_a_given_plan_above_the_budget_is_a_warning_with_the_numbers(job, tmp_path, caplog):
    file = tmp_path / "plan.json"
    ranks = {"block2.conv": (31, 20), "classifier": (3,)}
    RankPlan(ranks).save(file)
    config = load_config(DIGITS, {**CHANGES, "rule": "plan", "plan": str(file), "budget": 0.2})
    plan, network, known = given_plan(job.at(config, tmp_path))
    macs = plan.chosen_by["cost"]
    assert macs == count_macs(network, job.example)
    original = count_macs(job.model, job.example)
    assert plan.chosen_by["budget"] == pytest.approx(0.2 * original)
    assert f"{macs / plan.chosen_by['budget']:.2f} times the budget" in caplog.text
    assert plan.ranks == ranks
    assert known.left_alone["block3.conv"] == "not in the plan"


def test_a_rank_that_the_cost_table_lacks_is_one_line(job, finished, tmp_path):
    file = tmp_path / "plan.json"
    RankPlan({"block2.conv": (31, 5)}).save(file)
    changes = {"rule": "plan", "plan": str(file), "cost.table": str(finished / "costs.json")}
    with pytest.raises(SettingsError) as error:
        given_plan(job.at(load_config(DIGITS, changes), tmp_path))
    message = "the cost table has no entry for layer 'block2.conv', candidate 'r31x5'"
    assert str(error.value) == f"plan: {file}: {message}"


def test_a_plan_is_checked_before_an_experiment(tmp_path):
    file = tmp_path / "plan.json"
    RankPlan({"block2.conv": (8, 8)}).save(file)
    check_runs([load_config(DIGITS, {"rule": "plan", "plan": str(file)})])
    RankPlan({"block9.conv": (8, 8)}).save(file)
    with pytest.raises(SettingsError, match=r"block9\.conv"):
        check_runs([load_config(DIGITS, {"rule": "plan", "plan": str(file)})])
