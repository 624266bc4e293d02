"""The table at the end of a run."""

from pathlib import Path

import pytest

from nni_haloc.cli.compress import code_of
from nni_haloc.cli.summary import print_networks, print_summary
from nni_haloc.inputs.config import parse_config
from nni_haloc.runs.summary import cost_line, summary, summary_line
from nni_haloc.utils.printing import short

ORIGINAL = {
    "top1": 0.9871, "top5": 0.9995, "latency_ms": 1.25, "macs": 1_493_632, "params": 65_834,
    "bytes": 270_000,
}  # fmt: skip
COMPRESSED = {
    "top1": 0.9815, "top5": 0.9990, "latency_ms": 0.5, "macs": 373_408, "params": 16_458,
    "bytes": 67_500,
}  # fmt: skip


def test_original_compressed_and_change_stand_side_by_side():
    columns, rows = summary({"original": ORIGINAL, "compressed": COMPRESSED})
    assert columns == ["", "original", "compressed", "change"]
    assert rows == [
        ["top-1", "98.71 %", "98.15 %", "-0.56 points"],
        ["top-5", "99.95 %", "99.90 %", "-0.05 points"],
        ["latency", "1.25 ms", "0.5 ms", "-60.0 %"],
        ["MACs", "1.494 M", "373.4 k", "-75.0 %"],
        ["parameters", "65.83 k", "16.46 k", "-75.0 %"],
        ["file of weights", "270 kB", "67.5 kB", "-75.0 %"],
    ]


def test_each_further_stage_has_a_column_behind_the_change():
    networks = {
        "original": {"top1": 0.9, "macs": 100},
        "searched": {"epochs": 3},
        "compressed": {"top1": 0.8, "macs": 50},
        "pruned": {"top1": 0.7, "macs": 25},
        "toy": {"top1": 0.6, "latency_ms": 1.0},
    }
    columns, rows = summary(networks)
    assert columns == ["", "original", "compressed", "change", "pruned", "change", "toy", "change"]
    points = ["80.00 %", "-10.00 points", "70.00 %", "-20.00 points", "60.00 %", "-30.00 points"]
    assert rows == [
        ["top-1", "90.00 %", *points],
        ["latency", "", "", "", "", "", "1 ms", ""],
        ["MACs", "100", "50", "-50.0 %", "25", "-75.0 %", "", ""],
    ]


def test_a_latency_that_was_not_timed_beside_the_original_has_no_change():
    networks = {"original": ORIGINAL, "compressed": COMPRESSED, "pruned": COMPRESSED}
    latency = next(row for row in summary(networks)[1] if row[0] == "latency")
    assert latency == ["latency", "1.25 ms", "0.5 ms", "-60.0 %", "0.5 ms", ""]


def test_a_later_latency_changes_by_what_was_timed_with_it():
    pruned = {**COMPRESSED, "speedup": 4.0}  # the original took 2 ms when this took 0.5 ms
    networks = {"original": ORIGINAL, "compressed": COMPRESSED, "pruned": pruned}
    latency = next(row for row in summary(networks)[1] if row[0] == "latency")
    assert latency == ["latency", "1.25 ms", "0.5 ms", "-60.0 %", "0.5 ms", "-75.0 %"]


def test_networks_in_onnx_runtime_have_columns_with_units_and_no_change(capsys):
    quantized = {
        "top1": 0.98, "int8_top1": 0.97, "onnx_latency_ms": 1.026, "int8_latency_ms": 1.018,
        "int8_bytes": 91_876, "bytes": 92_676,
    }  # fmt: skip
    print_networks({"original": ORIGINAL, "quantize": quantized})
    text = capsys.readouterr().out
    words = ["quantized (simulated)", "float32 in ONNX Runtime", "int8 in ONNX Runtime"]
    assert all(word in text for word in [*words, "1.026 ms", "1.018 ms", "91.88 kB", "97.00 %"])
    assert "change" not in text
    assert "int8_" not in text


def test_accuracies_beside_those_of_test_images_say_which_images_they_are_of():
    original = {"top1": 0.9, "test_top1": 0.8, "images": 48}
    networks = {"original": original, "compressed": {"top1": 0.8, "test_top1": 0.7}}
    headings = [row[0] for row in summary(networks)[1]]
    assert headings == ["top-1, 48 validation images", "top-1, test images"]
    line = "top-1 90.00 % (48 validation images), top-1 80.00 % (test images)"
    assert summary_line(original) == line
    assert summary_line(networks["compressed"]).startswith("top-1 80.00 % (validation images)")


def test_no_figures_make_no_table():
    assert summary({}) == ([""], [])
    assert summary({"original": {"top1": 0.5}}) == (["", "original"], [["top-1", "50.00 %"]])
    assert summary({"original": {"macs": 0}, "toy": {"macs": 0}})[1] == [["MACs", "0", "0", ""]]


def test_counts_are_short():
    counts = (0, 999, 1000, 65_834, 1_493_632, 1_819_070_000)
    assert [short(n) for n in counts] == [
        "0", "999", "1 k", "65.83 k", "1.494 M", "1.819 G",
    ]  # fmt: skip
    assert [short(n, digits=3) for n in (999.6, 999_960, 27_648)] == ["1 k", "1 M", "27.6 k"]
    assert [short(n, "B") for n in (270_000, 12)] == ["270 kB", "12 B"]


def test_the_folder_and_the_next_commands_follow_the_table(tmp_path, capsys):
    print_summary(tmp_path, {"original": ORIGINAL, "finetune": COMPRESSED})
    *table, folder, report, bench = capsys.readouterr().out.splitlines()
    assert "compressed" in "".join(table)
    assert folder == f"results: {tmp_path}"
    assert report.startswith(f"next:    haloc report {tmp_path} ")
    assert bench.startswith(f"         haloc bench {tmp_path} ")


def test_the_next_command_names_the_folder_of_a_factory(tmp_path, capsys):
    """`haloc bench` makes the original network, and calls a factory for folders named so alone."""
    changes = {
        "model": {"name": "my_net:make"},
        "weights": "my_net.safetensors",
        "data": {"name": "digits"},
        "budget": {"fraction": 0.5},
    }
    own = parse_config(changes, "run.yml", files=False)
    ours = parse_config(changes | {"model": {"name": "digits_cnn"}}, "run.yml", files=False)
    assert [code_of(config, Path("a/run.yml")) for config in (own, ours)] == [" --code a", ""]
    print_summary(tmp_path, {"original": ORIGINAL}, " --code a")
    assert f"haloc bench {tmp_path} --code a " in capsys.readouterr().out


def test_a_plans_cost_is_one_line_with_its_share_of_the_original():
    facts = {"cost": 441040.0, "original_cost": 1493632.0, "metric": "macs", "budget": 448089.6}
    assert cost_line(facts) == "441 k of 1.494 M macs (29.5 %), budget 448.1 k"


def test_a_line_of_figures_has_commas_between_them_alone():
    line = summary_line({"top1": 0.5, "measured_share": 0.9, "latency_ms_of_budget": 1.0})
    names = ["top-1 50.00 %", "latency of the original 90.0 %", "latency of the budget 100.0 %"]
    assert line.split(", ") == names


@pytest.mark.parametrize(("met", "told"), [(0.0, True), (1.0, False), (None, False)])
def test_a_missed_budget_is_told_with_what_helps(capsys, met, told):
    figures = COMPRESSED if met is None else {**COMPRESSED, "budget_met": met}
    print_summary(Path("here"), {"original": ORIGINAL, "compressed": figures})
    assert ("The budget is missed. To meet it, measure" in capsys.readouterr().out) == told
