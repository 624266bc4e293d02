"""A real NNI experiment on this machine, from its file to what its trials leave."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.nni_experiments import DIGITS, digits_experiment, finished, get

from nni_haloc.cli.main import app
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.table import CostTable
from nni_haloc.experiments.check import check_experiment
from nni_haloc.experiments.results import trial_results
from nni_haloc.runs.saved import load


def test_every_trial_succeeds(experiment):
    port, _, _ = experiment
    assert [trial["status"] for trial in get(port, "trial-jobs")] == ["SUCCEEDED", "SUCCEEDED"]


def test_trials_report_a_curve_and_a_flat_final_dict(experiment):
    port, _, _ = experiment
    metrics = get(port, "metric-data")
    for trial in get(port, "trial-jobs"):
        mine = [m for m in metrics if m["trialJobId"] == trial["trialJobId"]]
        curve = [json.loads(json.loads(m["data"])) for m in mine if m["type"] == "PERIODICAL"]
        (final,) = [json.loads(json.loads(m["data"])) for m in mine if m["type"] == "FINAL"]
        assert len(curve) == 1 + 2  # after compression, fine-tuning epochs
        assert all(0 <= point["default"] <= 1 for point in curve)
        assert all(isinstance(value, (int, float)) for value in final.values())
        assert {
            "default",
            "original_top1",
            "top1",
            "test_top1",
            "latency_ms",
            "original_latency_ms",
            "speedup",
            "images_per_s",
            "macs",
            "macs_reduction",
            "params_reduction",
        } <= set(final)
        assert "top5" not in final  # ten classes


def test_each_trial_leaves_a_folder_that_loads_and_its_own_parameters(experiment):
    port, _, _ = experiment
    for trial in get(port, "trial-jobs"):
        folder = Path(trial["logPath"]) / "haloc"
        load(folder)
        content = json.loads((folder / "metrics.json").read_text())
        assert content["parameters"] == json.loads(trial["hyperParameters"][0])["parameters"]
        macs = content["stages"]["finetune"]["macs"]
        assert macs <= content["parameters"]["budget.fraction"] * 1493632


def test_results_are_read_from_the_experiment(experiment):
    _, number, home = experiment
    rows = trial_results(home / "nni-experiments", number)
    assert [(r["budget.fraction"], r["status"]) for r in rows] == [
        (0.5, "SUCCEEDED"),
        (0.3, "SUCCEEDED"),
    ]
    assert rows[0]["macs"] > rows[1]["macs"]


def test_a_trial_that_cannot_succeed_fails_with_its_line(tmp_path):
    with digits_experiment(tmp_path, [0.001]) as (port, number):
        (trial,) = get(port, "trial-jobs")
        assert trial["status"] == "FAILED"
        assert [r["status"] for r in trial_results(tmp_path / "nni-experiments", number)] == [
            "FAILED"
        ]
    line = "budget: 1.49 k MACs is below the cheapest network, 84.9 k MACs"
    for log in (
        Path(trial["logPath"]) / "trial.stderr",
        Path(trial["logPath"]) / "haloc" / "log.txt",
    ):
        assert line in log.read_text()
        assert "Traceback" not in log.read_text()


@pytest.mark.filterwarnings(
    "ignore:.*expected workers that are alike"
)  # microseconds, on a machine that does other things
def test_workers_measure_a_table_together(tmp_path):
    code = tmp_path / "measure"
    shutil.copytree(DIGITS.parent / "measure", code)
    words = ["--model", "digits_cnn", "--input", "1x8x8", "--out", str(code / "spec.json")]
    app(["spec", *words], standalone_mode=False)
    file = code / "measure.yml"
    file.write_text(
        file.read_text().replace("--threads 1", "--threads 1 --rounds 1 --min-run-time 0.001")
    )
    assert check_experiment(file) == "trials measure a cost table"
    with finished(tmp_path, file) as (_, number):
        rows = trial_results(tmp_path / "nni-experiments", number)
    assert [(row["part"], row["status"]) for row in rows] == [
        ("0/3", "SUCCEEDED"),
        ("1/3", "SUCCEEDED"),
        ("2/3", "SUCCEEDED"),
    ]
    shares = [
        str(path)
        for path in (tmp_path / "nni-experiments" / number).glob(
            "environments/*/trials/*/haloc/costs.json"
        )
    ]
    measure_main(
        [
            "--spec",
            str(code / "spec.json"),
            "--merge",
            *shares,
            "--out",
            str(tmp_path / "costs.json"),
        ]
    )
    table = CostTable.load(tmp_path / "costs.json")
    assert sum(row["default"] for row in rows) > sum(map(len, table.costs.values())) - len(
        table.costs
    )  # dense layers by each of them
    assert table.identity["memory_format"] == "channels_last"
