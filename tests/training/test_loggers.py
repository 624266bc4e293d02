"""Lightning's loggers by name: where each writes, and what is said of one that can't be made."""

import csv
import importlib.util
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_haloc.inputs.registries import LOGGERS
from nni_haloc.training import loggers
from nni_haloc.training.loggers import Place, check_logger, make_logger
from nni_haloc.utils.errors import MissingPackage, SettingsError


def place(tmp_path, title="search"):
    return Place(tmp_path / "mine", tmp_path / "mine" / title, title)


def log(name, where):
    """Log one figure of two epochs as Lightning does, and end."""
    logger = make_logger(name, where)
    for step, value in enumerate((0.5, 0.25)):
        logger.log_metrics({"expected_cost/block2.conv": value}, step=step)
    logger.finalize("success")
    return logger


def test_none_is_no_logger_and_leaves_nothing(tmp_path):
    assert make_logger("none", place(tmp_path)) is False
    assert list(tmp_path.iterdir()) == []


def test_each_start_has_a_csv_file_of_its_own(tmp_path):
    for _ in range(2):
        log("csv", place(tmp_path))
    for number in range(2):
        file = tmp_path / "mine" / "search" / "csv" / f"version_{number}" / "metrics.csv"
        with file.open(newline="") as lines:
            assert [float(row["expected_cost/block2.conv"]) for row in csv.DictReader(lines)] == [
                0.5,
                0.25,
            ]


@pytest.mark.parametrize("trial", [False, True])
def test_a_trials_tensorboard_files_are_where_nnis_page_looks(tmp_path, monkeypatch, trial):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    home = tmp_path / "environments" / "local-env" / "trials" / "o9bSd"
    if trial:
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(home))
        where = tmp_path / "trials" / "o9bSd" / "output" / "tensorboard" / "search"
    else:
        where = home / "mine" / "search"
    log("tensorboard", place(home))
    events = accumulator.EventAccumulator(str(where)).Reload()
    values = [event.value for event in events.Scalars("expected_cost/block2.conv")]
    assert values == [0.5, 0.25]


def test_mlflow_keeps_each_training_as_a_run_in_one_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for title in ("search", "fine-tuning"):
        log("mlflow", place(tmp_path, title))
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path / 'mine' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"search", "fine-tuning"}
    for run in runs.values():
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "expected_cost/block2.conv")
        assert [(each.step, each.value) for each in history] == [(0, 0.5), (1, 0.25)]


def test_wandb_is_offline_and_each_training_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for title in ("search", "fine-tuning"):
        log("wandb", place(tmp_path, title))
    runs = sorted((tmp_path / "mine" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    files = [run / f"run-{run.name.rpartition('-')[2]}.wandb" for run in runs]
    for file in files:
        for _ in range(300):  # its service writes in a process of its own
            if b"expected_cost/block2.conv" in file.read_bytes():
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{file}: nothing was logged")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_package_that_is_not_installed_is_one_line(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(loggers, "find_spec", lambda wanted: None if wanted == name else find(name))
    missing = rf"trainer\.logger: {name} needs the package {name}, which is not installed "
    with pytest.raises(MissingPackage, match=rf"{missing}\(pip install 'nni-haloc\[{name}\]'\)$"):
        check_logger(name)


def test_another_packages_logger_is_made_and_its_error_is_one_line(tmp_path, monkeypatch):
    seen = []

    def broken(where):
        seen.append(where)
        raise RuntimeError("no key\nlog in")

    monkeypatch.setitem(LOGGERS._added, "broken", broken)
    with pytest.raises(SettingsError, match=r"^trainer\.logger: broken: no key$"):
        make_logger("broken", place(tmp_path))
    assert seen == [place(tmp_path)]


@given(st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True).filter(lambda name: name.strip(".")))
def test_a_trials_run_has_the_trials_name(name):
    for run in (Path("/runs") / name, Path("/runs") / name / "haloc"):
        if name != "haloc":
            assert Place(run, run, "search").name == name
