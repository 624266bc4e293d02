"""Two commands for one folder: the second is told in one line which process works there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS
from helpers.short_runs import SHORT

from nni_haloc.inputs.config import load_config
from nni_haloc.runs.compress_model import Compressed
from nni_haloc.runs.run import run
from nni_haloc.runs.saved import save
from nni_haloc.utils.errors import HalocError

MODEL = ["--model", "digits_cnn", "--input", "1x8x8"]
COMMANDS = {
    "run": ["run", DIGITS, "--out", "{run}"],
    "run to go on": ["run", DIGITS, "--out", "{run}", *SHORT, "--resume"],
    "search": ["search", DIGITS, "--out", "{run}"],
    "throughput": ["throughput", DIGITS, "--on", "torch", "--out", "{run}"],
    "front": ["front", "{run}", "--budgets", "0.6"],
    "prune": ["prune", "{run}", "--epochs", 0],
    "prune, from elsewhere": ["prune", "{stage}", "--out", "{run}/again", "--epochs", 0],
    "quantize a stage": ["quantize", "{run}/pruned", "--set", "quantize.int8=false"],
    "export": ["export", "{run}", "--format", "safetensors"],
    "export to within": ["export", "{run}", "--out", "{run}/elsewhere", "--format", "safetensors"],
    "bench": ["bench", "{run}", "--no-data"],
    "plot": ["plot", "{run}"],
}  # fmt: skip
ELSEWHERE = {
    "export": ["export", "{run}", "--out", "{other}", "--format", "safetensors"],
    "report": ["report", "{run}", "--out", "{other}/page.html"],
    "plot": ["plot", "{run}", "--out", "{other}"],
}
HOLD = (
    "import sys; from nni_haloc.utils.locks import hold_file, hold_folder\n"
    "with {what}(sys.argv[1]):\n"
    "    print('in', flush=True); sys.stdin.read()"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run with a further stage."""
    folder = tmp_path_factory.mktemp("made") / "run"
    options = [*SHORT, "--set", "search.epochs=1", "--set", "finetune.epochs=0"]
    done = haloc("run", DIGITS, "--out", folder, *options, "--set", "prune={epochs: 0}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def held(folder):
    """The folder, in which another process works, and that process."""
    words = [sys.executable, "-c", HOLD.format(what="hold_folder"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout.readline() == b"in\n"
        yield folder, process.pid
        process.stdin.close()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_would_write_there_is_refused_on_one_line(held, tmp_path, name):
    run, pid = held
    stage = shutil.copytree(run / "pruned", tmp_path / "pruned")
    shutil.copy(run / "metrics.json", tmp_path)
    before = contents(run)
    done = haloc(*(str(word).format(run=run, stage=stage) for word in COMMANDS[name]))
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert re.match(
        rf"haloc: {run}: another process works here \(pid {pid} on .*, since 20", line
    ), line
    assert "Traceback" not in done.stderr
    assert contents(run) == before


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_command_that_writes_elsewhere_works(held, tmp_path, name):
    run, _ = held
    before = contents(run)
    done = haloc(*(str(word).format(run=run, other=tmp_path / "x") for word in ELSEWHERE[name]))
    assert done.returncode == 0, done.stderr
    assert contents(run) == before
    assert not any(path.name == "run.lock" for path in (tmp_path / "x").iterdir())


def test_a_function_raises(held, net):
    run_folder, pid = held
    config = load_config(DIGITS)
    for work in (
        lambda: run(config, run_folder),
        lambda: save(run_folder, net, None),
        lambda: Compressed(net, None, None, {}).save(run_folder),
    ):
        with pytest.raises(HalocError, match=f"another process works here .pid {pid} on"):
            work()


@pytest.mark.parametrize("words", [["measure", *MODEL], ["train", "{settings}"]])
def test_a_file_that_is_being_made_is_made_by_one_process(tmp_path, words):
    settings = tmp_path / "run.yml"
    settings.write_text(DIGITS.read_text().replace("digits.safetensors", "new.safetensors"))
    out = tmp_path / "costs.json"
    what, place = ("file", out) if words[0] == "measure" else ("folder", tmp_path / "new-training")
    program = [sys.executable, "-c", HOLD.format(what=f"hold_{what}"), str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, **pipes) as process:
        assert process.stdout.readline() == b"in\n"
        options = ["--out", out, "--rounds", 1] if words[0] == "measure" else []
        done = haloc(*(word.format(settings=settings) for word in words), *options)
        process.stdin.close()
    assert done.returncode == 2
    line = f"haloc: {place}: another process works here (pid {process.pid} on "
    assert done.stderr.splitlines()[-1].startswith(line)


def test_two_runs_that_begin_at_once_leave_one_whole_result(tmp_path, commands):
    """Whichever comes first; the other one ends without a trace of its own."""
    words = ["run", DIGITS, "--out", tmp_path / "run", *SHORT, "--rule", "uniform"]
    words += ["--set", "finetune.epochs=1"]
    pair = [commands.start(*words), commands.start(*words)]
    assert sorted(fork.wait() for fork in pair) == [0, 2]
    assert "another process works here" in commands.output.read_text()
    assert haloc("report", tmp_path / "run").returncode == 0
    assert not (tmp_path / "run" / "run.lock").exists()
    assert os.listdir(tmp_path) == ["run"]
