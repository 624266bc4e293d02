"""`haloc throughput`: one plan for each device, on the devices of this machine."""

import json
import sys

import pytest
import torch
from helpers.paths import DIGITS

from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.runs import devices as module
from nni_haloc.runs.devices import CLOCK, at_hand, known_devices, print_throughput, throughput
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import HalocError

SHORT = {
    "search.epochs": 1,
    "finetune.epochs": 0,
    "budget.fraction": 0.7,
    "cost.batch_size": 64,
    "rank_space": {"step": 16},
}


def test_onnx_runtime_has_its_own_plan_and_row(tmp_path, monkeypatch):
    """Its costs are measured, and then made to follow the MACs.

    On a processor of the day nothing may be faster on so small a network.
    """
    pytest.importorskip("onnxruntime")
    counts = mac_table(build_model("digits_cnn"), torch.zeros(1, 1, 8, 8), AllowedRanks(16))
    measured = []

    def measure_and_mend(spec, runtime, file, *arguments):
        content = measure(spec, runtime, file, *arguments)
        measured.append(CostTable.load(file))
        costs = {
            layer: {name: counts.costs[layer][name] / 1e6 for name in row}
            for layer, row in measured[0].costs.items()
        }
        CostTable("latency_ms", costs, counts.fixed / 1e6, measured[0].identity).save(file)
        return content

    monkeypatch.setattr(module, "measure", measure_and_mend)
    (row,) = throughput(
        load_config(DIGITS, SHORT | {"budget.check": "skip"}), tmp_path, ["onnxruntime"]
    )
    assert measured[0].identity["runtime"].startswith("onnxruntime")
    assert measured[0].identity["input"] == [64, 1, 8, 8]
    assert measured[0].original > 0
    assert row["images_per_s"] > 0
    assert row["speedup"] == pytest.approx(row["images_per_s"] / row["original_images_per_s"])
    assert row["macs_reduction"] >= 0.3 - 1e-9
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [row]


def test_the_array_has_its_own_plan_and_row(tmp_path, capsys):
    """It is the same every day."""
    pytest.importorskip("zigzag")
    (array,) = throughput(load_config(DIGITS, SHORT), tmp_path, ["eyeriss"])
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [array]
    facts = json.loads((tmp_path / "eyeriss/ranks.json").read_text())["chosen_by"]
    assert facts["metric"] == "cycles"
    assert facts["cost"] <= 0.7 * facts["original_cost"]
    assert array["images_per_s"] == pytest.approx(CLOCK / facts["cost"])
    assert array["speedup"] == pytest.approx(facts["original_cost"] / facts["cost"])
    original = count_macs(build_model("digits_cnn"), torch.zeros(1, 1, 8, 8))
    assert array["macs"] == pytest.approx((1 - array["macs_reduction"]) * original)
    capsys.readouterr()
    print_throughput("title", [array])
    printed = capsys.readouterr().out
    assert all(
        text in printed
        for text in (
            "eyeriss",
            "70.00 %",
            f"{100 * array['top1']:.2f} %",
            f"{array['speedup']:.2f}",
            f"{CLOCK / facts['cost']:,.0f}",
        )
    )
    assert "top-5" not in printed  # of ten classes


@pytest.fixture
def measured(monkeypatch):
    """Yield what each device is found to have, without the work: a number, or an error."""
    found = {}

    def row(job, device, resume):
        if isinstance(found[device], BaseException):
            raise found[device]
        return {"images_per_s": found[device]}

    monkeypatch.setattr(module, "_row", row)
    return found


def kept(folder):
    content = json.loads((folder / "throughput.json").read_text())
    return {row["device"]: row.get("images_per_s", row.get("reason")) for row in content["rows"]}


def test_a_later_call_keeps_the_rows_of_other_devices(tmp_path, measured):
    config = load_config(DIGITS, SHORT)
    measured |= {"torch": 1.0, "onnxruntime": HalocError("too slow")}
    throughput(config, tmp_path, ["torch", "onnxruntime"])
    assert kept(tmp_path) == {"torch": 1.0, "onnxruntime": "too slow"}
    measured |= {"eyeriss": 2.0, "onnxruntime": 3.0}
    rows = throughput(config, tmp_path, ["eyeriss", "onnxruntime"])
    assert kept(tmp_path) == {"torch": 1.0, "onnxruntime": 3.0, "eyeriss": 2.0}
    assert [row["device"] for row in rows] == ["torch", "eyeriss", "onnxruntime"]
    measured |= {"torch": 4.0, "eyeriss": HalocError("no")}
    rows = throughput(config, tmp_path, ["torch", "eyeriss"])
    assert kept(tmp_path) == {"torch": 4.0, "onnxruntime": 3.0, "eyeriss": 2.0}  # measured before
    assert rows[-1] == {"device": "eyeriss", "reason": "no"}
    assert not list(tmp_path.glob("*.part"))


def test_what_is_measured_is_kept_when_a_later_device_is_interrupted(tmp_path, measured):
    measured |= {"torch": 1.0, "eyeriss": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        throughput(load_config(DIGITS, SHORT), tmp_path, ["torch", "eyeriss"])
    assert kept(tmp_path) == {"torch": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ('{"version": 7}', "expected a table of devices of version 1, found version 7"),
        ('{"version": 1, "rows": [1]}', "rows: expected a list, each with its device"),
    ],
)
def test_a_damaged_table_is_named_before_the_work_and_left(content, message, tmp_path, measured):
    (tmp_path / "throughput.json").write_text(content)
    with pytest.raises(HalocError, match=f"throughput.json: {message}"):
        throughput(
            load_config(DIGITS, SHORT), tmp_path, ["torch"]
        )  # of which nothing is known here
    assert (tmp_path / "throughput.json").read_text() == content


def test_what_cannot_be_done_on_any_device_is_one_line(tmp_path):
    with pytest.raises(HalocError, match=r"^eyeriss: .*budget"):
        throughput(load_config(DIGITS, {**SHORT, "budget.fraction": 0.001}), tmp_path, ["eyeriss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget.absolute": 5.0}, "budget: expected a fraction, because"),
        ({"trainer.devices": 2}, "trainer: expected one process, .*; found 2"),
    ],
)
def test_settings_of_one_device_are_refused(tmp_path, changes, message):
    settings = {key: value for key, value in SHORT.items() if key != "budget.fraction"} | changes
    with pytest.raises(HalocError, match=message):
        throughput(load_config(DIGITS, settings), tmp_path, ["torch"])


def test_this_machine_has_its_processor_and_says_why_it_has_nothing_else(monkeypatch, caplog):
    packages = ("onnxruntime", "openvino", "executorch", "tensorrt", "zigzag")
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level("INFO"):
        found = at_hand()
    assert set(found) >= {"torch", "torch-compile"}
    assert ("cuda" in found) == torch.cuda.is_available()
    assert not {*found} & {"onnxruntime", "openvino", "executorch", "tensorrt", "eyeriss"}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(known_devices()) - len(found)
    assert all("\n" not in line for line in said)
    for name in packages:
        name = "eyeriss" if name == "zigzag" else name
        (line,) = [line for line in said if line.startswith(f"without {name}: ")]
        assert "pip install" in line


@pytest.mark.parametrize(
    ("device", "place", "runtime", "memory_format"),
    [
        ("torch", "cpu", "torch", "channels_last"),
        ("torch-compile", "cpu", "torch-compile", "channels_last"),
        ("onnxruntime", "cpu", "onnxruntime", "contiguous"),
        ("openvino", "cpu", "openvino", "contiguous"),
        ("executorch", "cpu", "executorch", "contiguous"),
        ("tensorrt", "cuda", "tensorrt", "contiguous"),
        ("eyeriss", "cpu", "torch", "channels_last"),
        ("cuda", "cuda", "torch", "channels_last"),
    ],
)
def test_each_device_is_a_runtime_in_its_own_layout(device, place, runtime, memory_format):
    changes = {"cost.memory_format": "channels_last", "cost.batch_size": 2}
    cost = module._config_for(load_config(DIGITS, {**SHORT, **changes}), device).cost
    found = (cost.device, cost.runtime, cost.memory_format, cost.batch_size)
    assert found == (place, runtime, memory_format, 2)
    assert cost.metric == ("cycles" if device == "eyeriss" else "latency_ms")


def test_every_registered_runtime_is_a_device():
    assert known_devices() == [*RUNTIMES.names(), "eyeriss", "cuda"]


def test_a_device_without_the_precision_of_the_settings_says_so(tmp_path):
    pytest.importorskip("onnx")
    cost = {"cost.runtime": "onnxruntime", "cost.dtype": "int8", "cost.memory_format": "contiguous"}
    with pytest.raises(HalocError, match="^torch: runtime torch: dtype: expected .* found 'int8'"):
        throughput(load_config(DIGITS, {**SHORT, **cost}), tmp_path, ["torch"])
