"""A file where a folder is expected, and the reverse: one line that names it, status 2."""

import pytest
from helpers.commands import haloc
from helpers.paths import DIGITS

MODEL = ["--model", "digits_cnn", "--input", "1x8x8"]
FOLDER_WANTED = {
    "run": ["run", DIGITS, "--out", "{file}"],
    "search": ["search", DIGITS, "--out", "{file}/below"],
    "throughput": ["throughput", DIGITS, "--on", "torch", "--out", "{file}"],
    "front": ["front", "{file}", "--budgets", "0.5"],
    "prune": ["prune", "{file}"],
    "export": ["export", "{file}"],
    "bench": ["bench", "{file}"],
    "report": ["report", "{file}"],
    "plot": ["plot", "{file}"],
    "measure": ["measure", *MODEL, "--out", "{file}/below"],
}
FILE_WANTED = {
    "run": ["run", "{folder}"],
    "train": ["train", "{folder}"],
    "rank space": ["run", DIGITS, "--set", "rank_space={folder}"],
    "check": ["check", "{folder}"],
    "measure": ["measure", *MODEL, "--out", "{folder}"],
    "measure a space": ["measure", *MODEL, "--rank-space", "{folder}"],
    "measure a specification": ["measure", "--spec", "{folder}"],
    "merge": ["measure", *MODEL, "--merge", "{folder}", "--out", "{folder}/x.json"],
    "predict": ["predict", "--predictor", "analytic", *MODEL, "--out", "{folder}"],
    "spec": ["spec", *MODEL, "--out", "{folder}"],
    "steps": ["steps", "{folder}"],
    "table": ["table", *MODEL, "--plan", "{folder}"],
    "costs": ["run", DIGITS, "--set", "cost.table={folder}", "--out", "{folder}/run"],
}


@pytest.mark.parametrize("name", FOLDER_WANTED)
def test_a_file_in_the_place_of_a_folder(tmp_path, name):
    file = tmp_path / "file"
    file.write_text("precious")
    done = haloc(*(str(word).format(file=file) for word in FOLDER_WANTED[name]), cwd=tmp_path)
    assert one_line(done, file)
    assert file.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", FILE_WANTED)
def test_a_folder_in_the_place_of_a_file(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    done = haloc(*(str(word).format(folder=folder) for word in FILE_WANTED[name]), cwd=tmp_path)
    assert one_line(done, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def one_line(done, path):
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert line.startswith("haloc: ")
    return str(path) in line
