"""A run's folder from somebody else: nothing outside of it is written, deleted or run."""

import json
import os
import shutil

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS
from helpers.short_runs import SHORT

from nni_haloc.runs.finished import Finished
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.stages import clear, further_stages
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.locks import hold_folder

ONCE = [*SHORT, "--set", "search.epochs=1", "--set", "finetune.epochs=1"]
COMMANDS = {
    "run": ["run", DIGITS, "--out", "{run}", *ONCE],
    "run to go on": ["run", DIGITS, "--out", "{run}", *ONCE, "--resume"],
    "run with another end": [
        "run", DIGITS, "--out", "{run}", *ONCE, "--resume", "--set", "finetune.lr=0.01"
    ],
    "search to go on": ["search", DIGITS, "--out", "{run}", *ONCE, "--resume"],
    "prune": ["prune", "{run}", "--epochs", 0],
    "quantize": ["quantize", "{run}", "--set", "quantize.int8=false"],
    "front": ["front", "{run}", "--budgets", "0.6"],
    "export": ["export", "{run}", "--format", "safetensors"],
    "plot": ["plot", "{run}"],
    "report": ["report", "{run}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    done = haloc("run", DIGITS, "--out", folder, *ONCE)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def everything(folder):
    """Return what is in a folder: path to content and time of change."""
    return {
        path: (os.readlink(path) if path.is_symlink() else path.read_bytes(), path.lstat().st_mtime)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def outside(tmp_path):
    """A folder with files of the names that a run has; all must stay as they are."""
    folder = tmp_path / "outside"
    names = ("log.txt", "checkpoint.ckpt", "history.csv", "ranks.json", "model.onnx", "front.json")
    for name in (*names, "pruned/metrics.json", "0.6/weights.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    before = everything(folder)
    yield folder
    assert everything(folder) == before


def command(name, run):
    """Run a command; it ends well, or with one line that names what is wrong in the folder."""
    done = haloc(*(str(word).format(run=run) for word in COMMANDS[name]))
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith(f"haloc: {run}")
    return done


@pytest.mark.parametrize(
    "name", ["run", "run to go on", "prune", "front", "export", "plot", "report"]
)
def test_links_in_the_place_of_results_are_replaced(run, outside, name):
    """Each file that a command may write, and that it does not read, is a link."""
    for file in ("report.html", "bench.json", "loss.png", "search.json", "metrics.json.part",
                 "ranks.json.part", "weights.safetensors.part", "search/history.csv",
                 "finetuning/history.csv", "front/front.json", "front/front.png",
                 "export/ranks.json", "export/weights.safetensors.part", "pruned/ranks.json",
                 "pruned/checkpoint.ckpt.part", "quantized/quantization.json"):  # fmt: skip
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).unlink(missing_ok=True)
        (run / file).symlink_to(outside / "history.csv")
    command(name, run)


@pytest.mark.parametrize(
    "name", ["run", "run with another end", "search to go on", "quantize", "front", "export"]
)
def test_links_in_the_place_of_folders_lead_nowhere(run, outside, name):
    read = ["search"] if "front" in name or "go on" in name or "end" in name else []
    for folder in ("search", "finetuning", "pruned", "quantized", "front", "export"):
        if folder in read:
            continue
        shutil.rmtree(run / folder, ignore_errors=True)
        (run / folder).symlink_to(outside)
    command(name, run)


@pytest.mark.parametrize("name", ["run", "prune"])
def test_a_log_that_is_a_link_is_refused_before_anything_else(run, outside, name):
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(outside / "log.txt")
    before = everything(run)
    done = command(name, run)
    line = f"haloc: {run / 'log.txt'}: expected a file, found a link; delete it"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, line)
    assert everything(run) == before


def test_clearing_removes_links_and_not_what_they_lead_to(run, outside):
    folder = RunFolder(run)
    for path in (folder.searching.path, folder.export, folder.ranks, run / "pruned"):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(outside / path.name if path == run / "pruned" else outside)
    (folder.finetuning.path / "inner").symlink_to(outside)
    clear(folder)
    assert not any(path.is_symlink() for path in run.rglob("*"))
    assert not folder.finetuning.path.exists()


def test_what_can_not_be_cleared_is_told(run):
    shutil.rmtree(run / "search")
    (run / "search").write_text("a file")
    with pytest.raises(NotADirectoryError):
        clear(RunFolder(run))


@pytest.mark.parametrize("name", ["..", "../other", "/", ".", "a/../..", ""])
def test_no_name_of_a_stage_leads_out_of_the_folder(tmp_path, name):
    """Names of stages come from other packages."""
    other = tmp_path / "other" / "file"
    other.parent.mkdir()
    other.touch()
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "run" / "file").touch()
    RunFolder(tmp_path / "run").clear(name)
    assert other.exists()
    assert (tmp_path / "run" / "file").exists()


def test_a_stages_folder_that_is_a_link_is_refused_where_a_run_goes_on(run, outside):
    for stage in further_stages():
        (run / stage.folder).symlink_to(outside)
        with hold_folder(run), pytest.raises(SettingsError, match=f"{stage.folder}: .*found a lin"):
            RunFolder(run / stage.folder).write_metrics({})


def test_nothing_is_downloaded_on_the_word_of_a_folder(run, tmp_path):
    """It would be put where the folder says."""
    content = json.loads((run / "metrics.json").read_text())
    content["config"]["data"] |= {"name": "cifar10", "root": str(tmp_path), "download": True}
    (run / "metrics.json").write_text(json.dumps(content))
    assert Finished(run).config.data.download is False


def test_names_in_the_files_forge_no_line_on_the_screen_or_in_the_log(run):
    """Of layers, stages and figures."""
    evil = "a\n00:00:00 INFO done \x1b[2J\r"
    for file, key in (("metrics.json", "stages"), ("ranks.json", "ranks")):
        content = json.loads((run / file).read_text())
        content[key][evil] = {"top1": 0.5, evil: 1} if key == "stages" else [1]
        (run / file).write_text(json.dumps(content))
    for name in ("run to go on", "report"):
        done = command(name, run)
        assert "\x1b" not in done.stderr + done.stdout
    assert "\x1b" not in (run / "log.txt").read_text()
