"""`haloc throughput`: one plan for each device, on the devices of this machine."""

import json
from pathlib import Path

import pytest
import torch

from nni_haloc.config import load_config
from nni_haloc.models import build_model
from nni_haloc.predictors import CostTable, count_macs
from nni_haloc.throughput import CLOCK, at_hand, print_throughput, throughput
from nni_haloc.yaml_files import ConfigError

DIGITS = Path(__file__).parents[1] / "examples/digits/run.yml"
SHORT = {"search.epochs": 1, "finetune.epochs": 0, "budget.fraction": 0.7, "cost.batch_size": 64, "rank_space": {"step": 16}}


def test_every_device_has_its_own_plan_and_row(tmp_path, capsys):
    """On a processor of the day nothing may be faster; then the row says so. The array is the same every day."""
    pytest.importorskip("zigzag")
    rows = {row["device"]: row for row in throughput(load_config(DIGITS, SHORT), tmp_path, ["onnxruntime", "eyeriss"])}
    assert list(json.loads((tmp_path / "throughput.json").read_text())["rows"]) == list(rows.values())
    table = CostTable.load(tmp_path / "onnxruntime/table.json")
    assert table.identity["runtime"].startswith("onnxruntime")
    assert table.identity["input"] == [64, 1, 8, 8]
    if "reason" not in rows["onnxruntime"]:
        assert rows["onnxruntime"]["images_per_s"] > 0
    array = rows["eyeriss"]
    facts = json.loads((tmp_path / "eyeriss/ranks.json").read_text())["chosen_by"]
    assert facts["metric"] == "cycles"
    assert facts["cost"] <= 0.7 * facts["original_cost"]
    assert array["images_per_s"] == pytest.approx(CLOCK / facts["cost"])
    assert array["speedup"] == pytest.approx(facts["original_cost"] / facts["cost"])
    original = count_macs(build_model("digits_cnn"), torch.zeros(1, 1, 8, 8))
    assert array["macs"] == pytest.approx((1 - array["macs_reduction"]) * original)
    capsys.readouterr()
    print_throughput("title", list(rows.values()))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("eyeriss", "96.39 %", f"{array['speedup']:.2f}", f"{CLOCK / facts['cost']:,.0f}"))
    assert "top-5" not in printed  # of ten classes


def test_what_cannot_be_done_on_any_device_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^eyeriss: .*budget"):
        throughput(load_config(DIGITS, {**SHORT, "budget.fraction": 0.001}), tmp_path, ["eyeriss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"budget.absolute": 5.0}, "budget.fraction: expected, because"), ({"trainer.devices": 2}, "trainer.devices: expected 1")],
)
def test_settings_of_one_device_are_refused(tmp_path, changes, message):
    settings = {key: value for key, value in SHORT.items() if key != "budget.fraction"} | changes
    with pytest.raises(ConfigError, match=message):
        throughput(load_config(DIGITS, settings), tmp_path, ["torch"])


def test_this_machine_has_its_processor():
    found = at_hand()
    assert "torch" in found
    assert ("cuda" in found) == torch.cuda.is_available()
