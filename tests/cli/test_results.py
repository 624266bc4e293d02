"""What `haloc results` and `haloc check` print, without an NNI experiment that runs."""

import json
import sqlite3

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS

from nni_haloc.experiments.results import trial_folders, trial_results
from nni_haloc.utils.errors import SettingsError

TABLES = (
    "CREATE TABLE TrialJobEvent (trialJobId, event, data, logPath)",
    "CREATE TABLE MetricData (trialJobId, parameterId, type, data)",
    "CREATE TABLE ExperimentProfile (params, revision)",
)


@pytest.fixture
def database(tmp_path):
    """Call with statements; they make the database of the experiment ``abc`` in the folder."""

    def make(*statements):
        file = tmp_path / "abc" / "db" / "nni.sqlite"
        file.parent.mkdir(parents=True)
        with sqlite3.connect(file) as connection:
            for statement, *values in statements:
                connection.execute(statement, *values)
        connection.close()
        return tmp_path

    return make


def filled(database):
    parameters = json.dumps({"parameter_id": 0, "parameters": {"budget.fraction": 0.5}})
    final = json.dumps(json.dumps({"default": 0.98, "macs": 373408}))
    event = "INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)"
    return database(
        *((table,) for table in TABLES),
        (event, ("t1", "WAITING", parameters, "")),
        (event, ("t1", "SUCCEEDED", None, "/trials/t1")),
        ("INSERT INTO MetricData VALUES ('t1', '0', 'FINAL', ?)", (final,)),
    )


def test_an_experiment_without_tables_is_one_line(database):
    folder = database()
    done = haloc("results", "abc", "--folder", folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("haloc: experiment 'abc': ")
    assert "no such table: TrialJobEvent" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_database_that_is_none_is_one_line(database):
    folder = database()
    (folder / "abc" / "db" / "nni.sqlite").write_text("not a database" * 100)
    with pytest.raises(SettingsError, match="^experiment 'abc': .*not a database"):
        trial_results(folder, "abc")


def test_an_experiment_without_a_profile_has_local_folders(database):
    assert trial_folders(filled(database), "abc") == {"t1": "/trials/t1/haloc"}


def test_results_are_a_table_or_json(database):
    folder = filled(database)
    done = haloc("results", "abc", "--folder", folder)
    assert "budget.fraction" in done.stdout
    assert "0.98" in done.stdout
    done = haloc("results", "abc", "--folder", folder, "--json")
    assert done.stderr == ""
    assert json.loads(done.stdout) == [
        {
            "trial": "t1",
            "status": "SUCCEEDED",
            "budget.fraction": 0.5,
            "default": 0.98,
            "macs": 373408,
        }
    ]
    done = haloc("results", "abc", "--folder", folder, "--folders", "--json")
    assert json.loads(done.stdout) == {"t1": "/trials/t1/haloc"}


@pytest.mark.parametrize("command", ["run", "search", "train", "throughput"])
def test_an_experiments_file_is_no_run_file(command):
    file = DIGITS.with_name("haloc.yml")
    done = haloc(command, file)
    assert done.returncode == 2
    assert done.stderr == (
        f"haloc: {file}: this is an NNI experiment's file, not a run's settings: start it with "
        f"`nnictl create --config {file}`; `haloc check {file}` checks it first\n"
    )


def test_a_run_file_is_checked_like_a_trial(tmp_path):
    done = haloc("check", DIGITS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{DIGITS}: ready (a run; haloc run starts it)\n"
    weights = DIGITS.with_name("digits.safetensors")
    file = tmp_path / "run.yml"
    text = DIGITS.read_text().replace("digits.safetensors", str(weights))
    file.write_text(text.replace("kinds: [conv]", "exclude: [conv9]"))
    done = haloc("check", file)
    assert done.returncode == 2
    line = f"haloc: {file}: rank_space.exclude: no layer of DigitsCNN matches 'conv9'; expected"
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_run_file_is_no_experiments_file():
    done = haloc("create", DIGITS)
    assert done.returncode == 2
    assert done.stderr == (
        f"haloc: {DIGITS}: these are a run's settings, not an NNI experiment's file: "
        f"`haloc run {DIGITS}` runs them\n"
    )


def of_three_trials(database):
    finals = {0: (0.98, 50.0), 1: (0.97, 60.0), 2: (0.9, 20.0)}
    statements = [(table,) for table in TABLES]
    for number, (top1, macs) in finals.items():
        parameters = {"parameter_id": number, "parameters": {"budget.fraction": macs / 100}}
        event = (f"t{number}", "SUCCEEDED", json.dumps(parameters), "")
        statements.append(("INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)", event))
        figures = {"default": top1, "top1": top1, "macs": macs, "original_macs": 100.0}
        figures["original_top1"] = 0.99
        final = (f"t{number}", str(number), json.dumps(json.dumps(figures)))
        statements.append(("INSERT INTO MetricData VALUES (?, ?, 'FINAL', ?)", final))
    waits = ("t3", "WAITING", json.dumps({"parameter_id": 3, "parameters": {}}), "")
    return database(*statements, ("INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)", waits))


def test_what_all_finished_trials_have_in_common_stands_below_the_table(database):
    """A trial that waits has no figures, and changes nothing of it."""
    done = haloc("results", "abc", "--folder", of_three_trials(database))
    table, _, below = done.stdout.partition("the same in all finished trials: ")
    assert below == "original_macs 100, original_top1 0.99\n"
    assert "original" not in table
    assert all(text in table for text in ("budget.fraction", "default", "0.98", "t3", "WAITING"))


def test_the_command_prints_the_best_trials_and_draws_all(database, tmp_path):
    folder = of_three_trials(database)
    picture = tmp_path / "front.png"
    done = haloc("results", "abc", "--folder", folder, "--pareto", picture, "--by", "macs")
    assert done.returncode == 0, done.stderr
    assert "2 best of 3 finished trials" in done.stdout
    assert "left out, without figures: 1 waiting\n" in done.stdout
    assert "t1" not in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = haloc("results", "abc", "--folder", folder, "--pareto", picture, "--by", "mac")
    assert done.returncode == 2
    assert "expected one of latency_ms, macs, params, found 'mac'" in done.stderr


def test_a_front_counts_failed_trials_and_says_why_they_failed(database, tmp_path):
    folder, picture = of_three_trials(database), tmp_path / "front.png"
    log = tmp_path / "t4" / "haloc" / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("10:00:01 ERROR budget: it is too slow; raise the budget\n")
    with sqlite3.connect(folder / "abc" / "db" / "nni.sqlite") as connection:
        event = (
            "t4",
            "FAILED",
            json.dumps({"parameter_id": 4, "parameters": {}}),
            str(tmp_path / "t4"),
        )
        connection.execute("INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)", event)
    connection.close()
    words = ["results", "abc", "--folder", folder, "--pareto", picture, "--by", "macs"]
    done = haloc(*words)
    said = [
        "left out, without figures: 1 waiting, 1 failed",
        f"t4 failed: budget: it is too slow; raise the budget ({log})",
    ]
    assert done.stdout.splitlines()[-2:] == said
    done = haloc(*words, "--json")
    assert [point["trial"] for point in json.loads(done.stdout)] == ["t2", "t0", "t1"]
    assert done.stderr.splitlines() == said


def test_a_front_before_any_trial_has_finished_says_so(database, tmp_path):
    event = "INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)"
    parameters = json.dumps({"parameter_id": 0, "parameters": {"budget.fraction": 0.5}})
    folder = database(*((table,) for table in TABLES), (event, ("t1", "RUNNING", parameters, "")))
    done = haloc("results", "abc", "--folder", folder, "--pareto", tmp_path / "front.png")
    message = "haloc: experiment 'abc': no trial has finished yet (1 running)\n"
    assert (done.returncode, done.stderr) == (2, message)


@pytest.mark.parametrize("metric", ["macs", "params", "energy_pj", None])
def test_a_front_is_over_the_experiments_own_cost(database, tmp_path, metric):
    cost = "" if metric is None else f"cost: {{metric: {metric}}}\n"
    (tmp_path / "run.yml").write_text(f"{cost}budget: 0.5\n")
    profile = {"trialCommand": "python3 -m nni_haloc.trial run.yml"}
    profile["trialCodeDirectory"] = str(tmp_path)
    event = "INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)"
    figures = {"default": 0.9, "top1": 0.9, "original_top1": 0.95}
    for each in ("macs", "params", "latency_ms"):
        figures |= {each: 1.0, f"original_{each}": 2.0}
    parameters = json.dumps({"parameter_id": 0, "parameters": {"budget.fraction": 0.5}})
    final = json.dumps(json.dumps(figures))
    folder = database(
        *((table,) for table in TABLES),
        (event, ("t1", "SUCCEEDED", parameters, "")),
        ("INSERT INTO MetricData VALUES ('t1', '0', 'FINAL', ?)", (final,)),
        ("INSERT INTO ExperimentProfile VALUES (?, 1)", (json.dumps(profile),)),
    )
    done = haloc("results", "abc", "--folder", folder, "--pareto", tmp_path / "front.png")
    assert done.returncode == 0, done.stderr
    assert f"{metric if metric in ('macs', 'params') else 'latency_ms'}, % of" in done.stdout


@pytest.mark.parametrize(
    ("file", "text", "cause"),
    [
        (
            "haloc/log.txt",
            "10:00:00 INFO a\n10:00:01 ERROR budget: 1 ms is below\n",
            "budget: 1 ms",
        ),
        (
            "trial.stderr",
            "Traceback\n  x\nModuleNotFoundError: No module named 'shapes'\n",
            "Module",
        ),
        ("stderr", "haloc: weights: no such file\n", "weights: no such file"),
        ("haloc/log.txt", "10:00:00 INFO a\n", "no error is in its log"),
    ],
)
def test_each_failed_trial_is_told_with_its_cause_and_its_log(
    database, tmp_path, file, text, cause
):
    log = tmp_path / "trials" / "t1" / file
    log.parent.mkdir(parents=True)
    log.write_text(text)
    event = "INSERT INTO TrialJobEvent VALUES (?, ?, ?, ?)"
    rows = [
        (event, (f"t{i}", status, json.dumps({"parameter_id": i, "parameters": {"a": i}}), path))
        for i, status, path in (
            (1, "RUNNING", str(tmp_path / "trials" / "t1")), (1, "FAILED", ""), (2, "WAITING", ""),
        )
    ]  # fmt: skip
    folder = database(*((table,) for table in TABLES), *rows)
    done = haloc("results", "abc", "--folder", folder)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if " failed: " in line]
    assert line.startswith(f"t1 failed: {cause}")
    assert line.endswith(f"({log})")
