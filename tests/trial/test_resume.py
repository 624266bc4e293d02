"""A trial that NNI starts again: each result is reported once.

After `nnictl resume` an experiment ends as one ends that nobody disturbed.
"""

import signal
import subprocess
import sys

import nni
import psutil
import pytest
from helpers.commands import haloc
from helpers.nni_experiments import (
    created,
    digits_code,
    folders,
    get,
    manager_of,
    reaping,
    resume,
    until_done,
    wait_for,
    with_budgets,
)

from nni_haloc.experiments.results import trial_results
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.run import flatten
from nni_haloc.trial import Reports
from nni_haloc.utils.errors import HalocError

BUDGETS = [0.5, 0.3]
TRIED = [0.5, 0.5, 0.3]
"""NNI's GridSearch does not count the trial that runs when the manager is killed.

It draws its parameters again.
"""
EPOCHS = 4


@pytest.fixture
def sent(monkeypatch):
    """Return what reached the manager: (sequence, metrics); the final result has None."""
    found = []
    monkeypatch.setattr(
        nni, "report_intermediate_result", lambda metrics: found.append((_sequence(), metrics))
    )
    monkeypatch.setattr(nni, "report_final_result", lambda metrics: found.append((None, metrics)))
    return found


def _sequence():
    number = nni.trial._intermediate_seq
    nni.trial.overwrite_intermediate_seq(number + 1)
    return number


def point(number):
    return {"default": number / 10}


def test_a_trial_started_again_sends_what_is_missing_and_numbers_on(sent, tmp_path):
    first = Reports(tmp_path / "reported.json", {"seed": 0})
    for place in range(3):
        first.point(point(place), place)
    again = Reports(tmp_path / "reported.json", {"seed": 0})
    for place in range(1, 5):  # from the last checkpoint on
        again.point(point(place), place)
    again.final(point(9))
    Reports(tmp_path / "reported.json", {"seed": 0}).final(point(9))
    assert sent == [*((place, point(place)) for place in range(5)), (None, point(9))]


def test_a_result_that_went_out_unnoted_is_sent_again_and_none_is_missing(
    sent, tmp_path, monkeypatch
):
    reports = Reports(tmp_path / "reported.json", {})
    monkeypatch.setattr(Reports, "_note", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reports.point(point(0), 0)
    monkeypatch.undo()
    monkeypatch.setattr(
        nni, "report_intermediate_result", lambda metrics: sent.append((_sequence(), metrics))
    )
    Reports(tmp_path / "reported.json", {}).point(point(0), 0)
    assert sent == [(0, point(0)), (0, point(0))]  # the same place of the curve


@pytest.mark.parametrize(
    "noted",
    [
        '{"identity": "of other settings", "intermediate": 2, "final": true}',
        "",
        "[]",
        '{"identity": 1',
        "{}",
    ],
)
def test_other_settings_or_a_damaged_note_send_everything(sent, tmp_path, noted):
    (tmp_path / "reported.json").write_text(noted)
    reports = Reports(tmp_path / "reported.json", {"seed": 1})
    reports.point(point(0), 0)
    reports.final(point(1))
    assert sent == [(0, point(0)), (None, point(1))]


def test_a_manager_that_does_not_answer_is_one_line_and_the_result_is_not_noted(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(
        nni,
        "report_intermediate_result",
        lambda metrics: (_ for _ in ()).throw(ConnectionRefusedError("in many words")),
    )
    reports = Reports(tmp_path / "reported.json", {})
    with pytest.raises(
        HalocError,
        match=r"^NNI's manager does not answer \(ConnectionRefusedError\); `nnictl resume` goes on",
    ):
        reports.point(point(0), 0)
    assert not (tmp_path / "reported.json").exists()


def test_a_second_process_in_a_trials_folder_waits_for_the_first(tmp_path):
    program = (
        "import sys; from nni_haloc.runs.folder import RunFolder\n"
        "from nni_haloc.utils.log import log_to; from nni_haloc.utils.locks import hold_folder\n"
        "folder = RunFolder(sys.argv[1])\n"
        "with log_to(folder.log), hold_folder(folder.path, wait=True):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"in\n"
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
            wait_for(
                lambda: (
                    f"waiting for the process that works here (pid {first.pid} on"
                    in (tmp_path / "log.txt").read_text()
                ),
                60,
            )
            first.kill()
            assert second.stdout.readline() == b"in\n"
            second.stdin.close()


def test_a_trial_ends_when_the_process_that_started_it_is_killed(tmp_path):
    program = (
        "import os, time; from nni_haloc.trial import _end_with; _end_with(os.getppid())\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as manager:
        trial = psutil.Process(int(manager.stdout.readline()))
        manager.kill()
        wait_for(lambda: not trial.is_running() or trial.status() == psutil.STATUS_ZOMBIE, 20)


@pytest.fixture
def orphans():
    with reaping():
        yield


def test_nnictl_resume_after_the_manager_was_killed_ends_as_if_it_had_not_been(tmp_path, orphans):
    """All processes are killed in the first search, the manager alone in the second fine-tuning.

    The experiment is resumed on the same port both times.
    """
    code = digits_code(tmp_path / "digits", EPOCHS)
    expected = {}
    for budget in BUDGETS:
        out = tmp_path / str(budget)
        words = ["run", code / "run.yml", "--out", out, "--set", f"budget.fraction={budget}"]
        assert (done := haloc(*words)).returncode == 0, done.stderr
        expected[budget] = out

    with created(
        tmp_path, with_budgets(code / "haloc.yml", BUDGETS, maxTrialNumber=len(TRIED))
    ) as (port, number):

        def kill(state, trials, all_):
            """End the manager, or all its processes.

            At that time so many trials have begun, and the last one has left ``state``.
            """
            wait_for(lambda: len(folders(tmp_path, number)) == trials)
            folder = max(folders(tmp_path, number).values(), key=lambda path: path.stat().st_ctime)
            wait_for((folder / state).exists)
            manager = manager_of(tmp_path, number)
            processes = [manager, *manager.children(recursive=True)]
            assert any("nni_haloc.trial" in process.cmdline() for process in processes)
            for process in processes if all_ else [manager]:
                process.send_signal(signal.SIGKILL)
            # The trial, and NNI's tuner, which would else answer the new manager on the same port:
            for process in processes:
                wait_for(lambda process=process: not process.is_running(), 60)
            assert not (folder / "metrics.json").exists(), (
                "killed too late for this test to mean anything"
            )
            resume(tmp_path, number, port)

        kill("search/checkpoint.ckpt", 1, True)
        kill("finetuning/checkpoint.ckpt", 2, False)
        until_done(port)
        assert [trial["status"] for trial in get(port, "trial-jobs")] == ["SUCCEEDED"] * len(TRIED)
        metrics = get(port, "metric-data")
        rows = trial_results(tmp_path / "nni-experiments", number)
        assert [row["budget.fraction"] for row in rows] == TRIED
        for row in rows:
            mine = [m for m in metrics if m["trialJobId"] == row["trial"]]
            assert [m["sequence"] for m in mine if m["type"] == "PERIODICAL"] == list(
                range(1 + EPOCHS)
            )
            assert sum(m["type"] == "FINAL" for m in mine) == 1
            folder, undisturbed = (
                folders(tmp_path, number)[row["trial"]],
                expected[row["budget.fraction"]],
            )
            for name in ("ranks.json", "weights.safetensors"):
                assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
            counted = {
                key: value
                for key, value in flatten(RunFolder(undisturbed).metrics()).items()
                if not any(word in key for word in ("latency", "speedup", "images_per_s"))
            }
            assert {"default", "top1", "macs", "original_top1", "bytes"} <= counted.keys()
            assert counted.items() <= row.items()
            log = (folder / "log.txt").read_text()
            assert log.count("search epoch 1:") == 1, "it began anew"
