"""A stage in one short file: run, resumed, reported, benched and loaded like the others."""

import json
from pathlib import Path

import pytest
import torch
from helpers import toy_stage
from helpers.pages import Page
from helpers.paths import DIGITS
from helpers.toy_stage import Round

import nni_haloc
from nni_haloc.cli.main import main
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.registries import STAGES
from nni_haloc.results.bench import bench
from nni_haloc.runs.finished import Finished, apply_stage
from nni_haloc.runs.run import run
from nni_haloc.runs.stages import all_stages, stages_of
from nni_haloc.utils.errors import SettingsError

SETTINGS = {
    "rule": "uniform",
    "finetune": {"epochs": 0},
    "data.share": 0.25,
    "recalibration_batches": 2,
    "round": {"digits": 1},
}
WORDS = [
    word for key, value in SETTINGS.items() for word in ("--set", f"{key}={json.dumps(value)}")
]
OURS = ["pretrain", "search", "finetune", "prune", "quantize"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    STAGES.register("round")(Round)
    yield
    del STAGES._added["round"]


@pytest.fixture
def applied(monkeypatch):
    """Return the digits of each time that the stage is applied."""
    calls, apply = [], Round.apply

    def counted(stage, job, *arguments):
        calls.append(job.config.round.digits)
        return apply(stage, job, *arguments)

    monkeypatch.setattr(Round, "apply", counted)
    return calls


@pytest.fixture
def command(monkeypatch):
    """Run the command line in this process, in which the stage is registered."""

    def haloc(*words):
        monkeypatch.setattr("sys.argv", ["haloc", *map(str, words)])
        main()

    return haloc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["haloc", "run", str(DIGITS), "--out", str(folder), *WORDS])
        main()
    return folder


def stages_in(folder):
    return json.loads((folder / "metrics.json").read_text())["stages"]


def test_the_file_is_short():
    assert len(Path(toy_stage.__file__).read_text().splitlines()) <= 40


def test_it_is_walked_last_and_only_where_the_settings_have_its_section():
    assert [stage.name for stage in all_stages()] == [*OURS, "round"]
    walked = stages_of(load_config(DIGITS, SETTINGS))
    assert [stage.name for stage in walked] == ["search", "finetune", "round"]
    assert "round" not in [stage.name for stage in stages_of(load_config(DIGITS))]


def test_a_run_leaves_its_network_and_its_figures(folder):
    stages = stages_in(folder)
    assert list(stages) == ["original", "search", "finetune", "round"]
    figures = {"top1", "test_top1", "macs", "params", "latency_ms", "speedup", "bytes"}
    assert stages["round"].keys() == {"digits", *figures}
    assert stages["round"]["digits"] == 1
    network = nni_haloc.load(folder / "rounded")
    for ours, theirs in zip(network.parameters(), nni_haloc.load(folder).parameters(), strict=True):
        assert torch.equal(ours, theirs.round(decimals=1))
    assert stages_in(folder / "rounded") == {"round": stages["round"]}


def test_a_resumed_run_reads_it_back(folder, command, applied, capsys):
    before = stages_in(folder)["round"]
    capsys.readouterr()
    command("run", DIGITS, "--out", folder, *WORDS, "--resume")
    assert applied == []
    assert stages_in(folder)["round"] == before
    assert "rounded" in capsys.readouterr().out  # a column of the table at the end


def test_it_is_applied_anew_with_other_settings(folder, command, applied):
    command("run", DIGITS, "--out", folder, *WORDS, "--set", "round.digits=0", "--resume")
    assert applied == [0]
    assert stages_in(folder)["round"]["digits"] == 0
    command("run", DIGITS, "--out", folder, *WORDS, "--resume")
    assert applied == [0, 1]


def test_what_a_run_returns_is_flat_and_its_default_is_of_the_last_stage(folder, applied):
    flat = run(load_config(DIGITS, SETTINGS), folder, resume=True)
    figures = stages_in(folder)["round"]
    assert {f"rounded_{key}": value for key, value in figures.items()}.items() <= flat.items()
    assert flat["default"] == flat["rounded_top1"] == figures["top1"]
    assert flat["top1"] == stages_in(folder)["finetune"]["top1"]
    assert all(type(value) in (int, float) for value in flat.values())
    assert applied == []


def test_the_report_has_its_row(folder, command):
    command("report", folder)
    rows = {row[0]: row[1:] for row in Page((folder / "report.html").read_text()).rows if row}
    figures = stages_in(folder)["round"]
    assert rows["rounded"][0] == f"{100 * figures['top1']:.2f} %"
    assert f"{figures['macs']:,}" in rows["rounded"]


def test_it_is_benched_and_among_the_networks(folder):
    assert list(Finished(folder).networks()) == ["original", "compressed", "rounded"]
    rows = bench(folder, rounds=1, min_run_time=0.001)["rows"]
    (row,) = (row for row in rows if (row["stage"], row["runtime"]) == ("rounded", "torch"))
    assert row["top1"] == pytest.approx(stages_in(folder)["round"]["top1"])


def test_it_is_applied_to_a_finished_run(folder, tmp_path):
    flat = apply_stage(folder, "round", {"round.digits": 3}, tmp_path / "out")
    assert flat["rounded_digits"] == 3
    assert (tmp_path / "out" / "weights.safetensors").is_file()


def test_a_mistake_in_its_section_is_one_line():
    with pytest.raises(
        SettingsError, match=r"run\.yml: round\.digit: unknown key; did you mean 'digits'\?$"
    ):
        load_config(DIGITS, {"round.digit": 1})


def test_a_new_run_without_it_leaves_none_of_its_results(folder, command):
    command("run", DIGITS, "--out", folder, *WORDS[:-2])
    assert not (folder / "rounded").exists()
    assert "round" not in stages_in(folder)


def test_an_entry_point_is_as_good(tmp_path, monkeypatch, applied):
    info = tmp_path / "rounding-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rounding\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nni_haloc.stages]\nround = helpers.toy_stage:Round\n")
    monkeypatch.setattr(STAGES, "_added", {})
    assert "round" not in STAGES
    monkeypatch.syspath_prepend(tmp_path)
    assert STAGES.foreign() == ["round"]
    flat = run(load_config(DIGITS, SETTINGS), tmp_path / "out")
    assert applied == [1]
    assert flat["default"] == flat["rounded_top1"]
