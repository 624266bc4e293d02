"""A package of somebody else's adds a rule, a runtime, a network and a data set, used by name.

The package is `helpers/extras`, which pip builds and installs as any other.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import haloc
from helpers.paths import DIGITS
from safetensors.torch import save_file

import nni_haloc
from nni_haloc.cli.main import main
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.latency import latency_table
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import DATA, MODELS, RULES, RUNTIMES
from nni_haloc.plan.rules import plan
from nni_haloc.runs.job import Job
from nni_haloc.runs.run import run
from nni_haloc.runs.stages.by_rule import _problem
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError

SOURCE = Path(__file__).parent / "helpers" / "extras"
COST = {"metric": "latency_ms", "runtime": "counting", "batch_size": 4}
SPACE = {"step": 16, "exclude": ["block3*", "block4*"], "calibration_images": 32}
SETTINGS = {
    "rule": "cheapest",
    "budget": 0.8,
    "cost": COST,
    "rank_space": SPACE,
    "finetune.epochs": 0,
    "recalibration_batches": 2,
    "data.share": 0.25,
}
PER_MAC = 1e-6 * COST["batch_size"]
"""Milliseconds that the counting runtime takes for one multiply-accumulate an image."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return a folder into which pip has installed the package, without an index."""
    source = shutil.copytree(SOURCE, tmp_path_factory.mktemp("source") / "extras")
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", site, source]
    subprocess.run(list(map(str, pip)), check=True, capture_output=True, text=True, timeout=300)
    assert list(site.glob("*.dist-info/entry_points.txt"))
    return site


@pytest.fixture
def installed(site, monkeypatch):
    """Put the package on this process's path, and on that of those it starts."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    yield
    sys.modules.pop("haloc_extras", None)


def test_without_the_package_its_names_are_unknown():
    names = {RULES: "cheapest", RUNTIMES: "counting", MODELS: "tiny", DATA: "stripes"}
    for registry, name in names.items():
        assert name not in registry
        with pytest.raises(SettingsError, match=f"expected one of .*, found '{name}'$"):
            registry[name]
    with pytest.raises(SettingsError, match=r"rule: expected one of search, .*found 'cheapest'"):
        load_config(DIGITS, {"rule": "cheapest"})
    with pytest.raises(SettingsError, match=r"cost\.runtime: expected one of torch, onnxruntime"):
        load_config(DIGITS, {"cost.runtime": "counting"})


def test_a_rule_and_a_runtime_are_used_by_name_from_yaml(installed, tmp_path):
    content = yaml.safe_load(DIGITS.read_text())
    content |= {"weights": str(DIGITS.with_name("digits.safetensors")), "cost": COST}
    content |= {"rule": "cheapest", "budget": 0.8}
    content["data"]["share"] = 0.25
    content["rank_space"] = SPACE
    content["finetune"] = {"epochs": 0}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(content))
    done = haloc("run", tmp_path / "run.yml", "--out", tmp_path / "out", fresh=True)
    assert done.returncode == 0, done.stderr
    _check(tmp_path / "out")
    table = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert (table["metric"], table["identity"]["runtime"]) == ("latency_ms", "counting 1")


def test_a_rule_and_a_runtime_are_used_by_name_from_python(installed, tmp_path):
    flat = run(load_config(DIGITS, SETTINGS), tmp_path)
    stages = _check(tmp_path)
    assert flat["speedup"] == pytest.approx(stages["original"]["macs"] / stages["finetune"]["macs"])
    model, allowed = (
        build_model("digits_cnn"),
        AllowedRanks(step=16, exclude=("block3*", "block4*")),
    )
    table = latency_table(
        model, torch.zeros(4, 1, 8, 8), allowed, RUNTIMES["counting"].from_options()
    )
    assert table.original == pytest.approx(PER_MAC * stages["original"]["macs"])
    job = Job(load_config(DIGITS, SETTINGS), tmp_path)
    assert (
        plan(_problem(job)[0], "cheapest").ranks
        == nni_haloc.RankPlan.load(tmp_path / "ranks.json").ranks
    )


def _check(folder):
    """Check that the rule has chosen, and that the runtime has timed; return the figures."""
    chosen = nni_haloc.RankPlan.load(folder / "ranks.json")
    assert chosen.chosen_by["rule"] == "cheapest"
    assert chosen.ranks == {"block2.conv": (16, 16)}  # and not dense
    stages = json.loads((folder / "metrics.json").read_text())["stages"]
    for name in ("original", "finetune"):
        assert stages[name]["latency_ms"] == pytest.approx(PER_MAC * stages[name]["macs"])
    assert chosen.chosen_by["original_cost"] == pytest.approx(stages["original"]["latency_ms"])
    assert chosen.chosen_by["cost"] == pytest.approx(stages["finetune"]["latency_ms"])
    return stages


def test_a_network_and_a_data_set_are_used_by_name(installed, tmp_path):
    save_file(build_model("tiny", {"width": 16}).state_dict(), tmp_path / "tiny.safetensors")
    content = {
        "model": {"name": "tiny", "arguments": {"width": 16}},
        "weights": "tiny.safetensors",
        "data": {"name": "stripes", "arguments": {"height": 2.0}, "size": 8, "batch_size": 16},
        "budget": 0.6,
        "rule": "uniform",
        "finetune": {"epochs": 8, "lr": 0.05, "schedule": "onecycle"},
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(content))
    flat = run(load_config(tmp_path / "run.yml"), tmp_path / "out")
    assert flat["top1"] > 0.9
    network = nni_haloc.load(tmp_path / "out")  # a name, and no factory of the folder's
    assert count_macs(network, torch.zeros(1, 3, 8, 8)) == flat["macs"]


def test_an_option_that_the_runtime_does_not_take_is_one_line(installed, tmp_path):
    config = load_config(DIGITS, SETTINGS | {"cost": COST | {"device": "cuda"}})
    with pytest.raises(SettingsError, match="^cost: device: the counting runtime has no cuda$"):
        Job(config, tmp_path)


def test_an_entry_point_that_cannot_be_imported_is_named_in_one_line(
    installed, tmp_path, monkeypatch, capsys
):
    assert "broken" in RULES
    words = ["run", DIGITS, "--rule", "broken", "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["haloc", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        "haloc: rule 'broken': the entry point haloc_extras_that_are_not_there:rule can't be "
        "loaded (No module named 'haloc_extras_that_are_not_there')"
    )
    assert not (tmp_path / "out" / "ranks.json").exists()
