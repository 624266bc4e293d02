"""`haloc results` of experiments that have none: one line says why."""

import json
import sqlite3
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nni_haloc.cli.main import app
from nni_haloc.experiments.results import trial_folders, trial_results
from nni_haloc.experiments.state import is_running, last_errors
from nni_haloc.utils.errors import SettingsError

TABLES = (
    "CREATE TABLE TrialJobEvent (trialJobId, event, data, logPath)",
    "CREATE TABLE MetricData (trialJobId, parameterId, type, data)",
    "CREATE TABLE ExperimentProfile (params, revision)",
)
EVENT = "INSERT INTO TrialJobEvent VALUES ('t', 'RUNNING', ?, '/trials/t')"
MANAGER_LOG = """\
[2026-11-27 05:46:46] INFO (NNIManager) Setup tuner...
[2026-11-27 05:46:56] ERROR (NNIManager) Error: tuner_command_channel: Tuner did not connect
    at Timeout._onTimeout (/nni_node/core/tuner_command_channel.js:47:41)
[2026-11-27 05:46:56] INFO (NNIManager) Change NNIManager status from: RUNNING to: ERROR
[2026-11-27 05:47:09] ERROR (ShutdownManager) Error during shutting down NniManager: TypeError: x
"""
TUNER_LOG = """\
[2026-11-27 05:46:47] ERROR (nni.main) 'max' is not a valid OptimizeMode
Traceback (most recent call last):
  File "/nni/tuner_factory.py", line 154, in create_builtin_class_instance
    instance = class_constructor(**class_args)
ValueError: 'max' is not a valid OptimizeMode
"""
NNICTL_LOG = """\
[2026-11-27 05:46:44] WARNING (nni.experiment) Timeout, retry...
[2026-11-27 05:46:47] ERROR (nni.experiment) Create experiment failed: Connection refused
"""
NODE_LOG = """\
node:events:491
      throw er; // Unhandled 'error' event
Error: listen EADDRINUSE: address already in use :::8080
    at Server.setupListenHandle [as _listen2] (node:net:1463:16)
"""


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Call with what an experiment ``abc`` left: logs, and statements of its database."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "experiments"

    def make(logs=None, statements=None, name="abc", **rows):
        own = folder / name
        for part in ("log", "db"):
            (own / part).mkdir(parents=True)
        for file, text in (logs or {}).items():
            (own / "log" / file).write_text(text)
        if statements is not None:
            with sqlite3.connect(own / "db" / "nni.sqlite") as connection:
                for statement, *values in statements:
                    connection.execute(statement, values)
            connection.close()
        return folder

    folder.mkdir()
    return make


@pytest.fixture
def running():
    """Call with an id; a process that looks like the experiment's manager runs until the end."""
    processes = []

    def start(number):
        words = [sys.executable, "-c", "input()", "--experiment-id", number]
        processes.append(subprocess.Popen(words, stdin=subprocess.PIPE))

    yield start
    for process in processes:
        process.stdin.close()
        process.wait()


def line(folder, experiment="abc", *words):
    """The one line that the command ends with."""
    options = ["results", experiment, "--folder", str(folder), *words]
    done = CliRunner().invoke(app, options)
    assert done.output == ""
    assert isinstance(done.exception, SettingsError)
    assert "\n" not in str(done.exception)
    return str(done.exception).removeprefix(f"experiment {experiment!r}: ")


NOTHING = {
    "no database and no word": (
        {},
        None,
        "it never came up (no database), and no log says why; nnictl create starts a new one",
    ),
    "an empty database": (
        {"experiment.log": NNICTL_LOG},
        [],
        "it never came up (no such table: TrialJobEvent); "
        "nnictl: Create experiment failed: Connection refused",
    ),
    "a port that was in use": (
        {"nnictl_stderr.log": NODE_LOG, "experiment.log": NNICTL_LOG},
        None,
        "it never came up (no database); its manager: Error: listen EADDRINUSE: address already in "
        "use :::8080; nnictl: Create experiment failed: Connection refused",
    ),
    "a tuner that could not be made": (
        {"nnimanager.log": MANAGER_LOG, "dispatcher.log": TUNER_LOG},
        [(table,) for table in TABLES],
        "no trial has begun; its tuner: ValueError: 'max' is not a valid OptimizeMode; "
        "its manager: Error: tuner_command_channel: Tuner did not connect",
    ),
    "a tuner that came too late": (
        {"nnimanager.log": MANAGER_LOG, "dispatcher.log": "[..] INFO (nni) Dispatcher started\n"},
        [(table,) for table in TABLES],
        "no trial has begun; its manager: Error: tuner_command_channel: Tuner did not connect",
    ),
    "a stop before the first trial": (
        {"nnimanager.log": "[2026-11-27 05:46:46] INFO (NNIManager) Setup tuner...\n"},
        [(table,) for table in TABLES],
        "it was stopped before a trial had begun",
    ),
    "logs that are no text": (
        {"nnimanager.log": "\0\ufffd" * 99},
        None,
        "it never came up (no database), and no log says why; nnictl create starts a new one",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("words", [(), ("--json",), ("--folders",)])
def test_an_experiment_that_never_came_up_says_why(left, name, words):
    logs, statements, expected = NOTHING[name]
    assert line(left(logs, statements), "abc", *words) == expected


@pytest.mark.parametrize(("statements", "lacks"), [(None, "no database"), ([], "no such table")])
def test_an_experiment_that_is_starting_is_no_failure_of_it(left, running, statements, lacks):
    running("abc")
    found = line(left({"nnimanager.log": ""}, statements))
    assert found.startswith(f"it is still starting ({lacks}")


def test_an_experiment_without_trials_that_runs_has_no_rows_yet(left, running):
    folder = left({}, [(table,) for table in TABLES])
    running("abc")
    for words, expected in {
        (): "experiment abc: no trial has begun yet\n",
        ("--json",): "[]\n",
        ("--folders", "--json"): "{}\n",
    }.items():
        done = CliRunner().invoke(app, ["results", "abc", "--folder", str(folder), *words])
        assert (done.exit_code, done.output) == (0, expected)


def test_only_an_experiments_own_manager_counts(running):
    running("abcd")
    assert is_running("abcd")
    assert not is_running("abc")
    assert not is_running("--experiment-id")


def test_nothing_is_left(left, tmp_path):
    folder = left()
    for part in ("log", "db"):
        (folder / "abc" / part).rmdir()
    assert line(folder) == f"nothing is left of it in {folder / 'abc'} (no database)"


def test_an_unknown_experiment_is_told_its_likely_name(left):
    for name in ("nmw37cyq", "izgj1t54"):
        folder = left(name=name)
    (folder / "_latest").symlink_to(folder / "izgj1t54")
    (folder / "notes").mkdir()
    assert line(folder, "nmw37cyg") == f"no such experiment in {folder}; did you mean 'nmw37cyq'?"
    assert line(folder, "xyz") == f"no such experiment in {folder}; it has izgj1t54, nmw37cyq"
    assert "; it has " in line(folder, "notes/..")
    assert "; it has " in line(folder, "..")
    for number in range(9):
        left(name=f"e{number}")
    assert line(folder, "zz").endswith("e0, e1, e2, e3, e4, e5, e6, e7 and 3 more")


def test_a_folder_without_experiments_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        line(tmp_path)
        == f"no such experiment in {tmp_path}, which has none; nnictl create makes one"
    )
    there = tmp_path / "there"
    assert (
        line(there) == f"no such experiment in {there}, which is no folder; name NNI's by --folder"
    )


def test_nnis_own_list_says_where_an_experiment_is_or_was(left, tmp_path):
    folder = left()
    home = tmp_path / "home" / "nni-experiments"
    home.mkdir(parents=True)
    entries = {"abc": {"id": "abc", "logDir": str(folder)}, "old": {"logDir": str(home)}, "x": 3}
    (home / ".experiment").write_text(json.dumps(entries))
    where = f"no such experiment in {home}"
    assert line(home) == f"{where}; it is in {folder}: --folder {folder}"
    assert line(home, "old") == f"{where}: NNI lists it, and nothing else is left of it"
    assert line(home, "x").startswith(f"{where}, which has none")
    (home / ".experiment").write_text("{")
    assert line(home, "old").startswith(f"{where}, which has none")


@pytest.mark.parametrize("data", ["", "no JSON", "[]", '{"parameter_id": 0}', '{"parameters": {}}'])
def test_other_values_than_nnis_are_one_line(left, data):
    folder = left({}, [*((table,) for table in TABLES), (EVENT, data)])
    if data:
        with pytest.raises(SettingsError, match=r"'abc': its database holds other values than NNI"):
            trial_results(folder, "abc")
    else:
        assert trial_results(folder, "abc") == []
    assert trial_folders(folder, "abc") == {"t": "/trials/t/haloc"}


def test_trials_that_ran_when_the_manager_ended_are_no_running_ones(left, running):
    data = json.dumps({"parameter_id": 0, "parameters": {"seed": 1}})
    folder = left({}, [*((table,) for table in TABLES), (EVENT, data)])
    words = ["results", "abc", "--folder", str(folder)]
    done = CliRunner().invoke(app, words)
    assert "haloc resume abc goes on with trials that were RUNNING" in done.stderr
    running("abc")
    assert CliRunner().invoke(app, words).stderr == ""


def test_of_a_long_log_the_end_is_read(left):
    own = left({"nnimanager.log": "[t] ERROR (A) first\n" + "x" * 200_000 + "\n"}) / "abc"
    assert last_errors(own) == []
    (own / "log" / "nnimanager.log").write_text("y\n" * 200_000 + "[t] ERROR (A) last\n")
    assert last_errors(own) == ["its manager: last"]
