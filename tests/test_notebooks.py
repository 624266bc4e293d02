"""The notebooks of the documentation run as they are, and what they show is what a run showed."""

import re

import nbformat
import pytest
from helpers.paths import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def shown(notebook):
    """Return all that its cells have printed or ended with."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    texts = [each.get("text") or each.get("data", {}).get("text/plain", "") for each in outputs]
    return "\n".join(texts)


def change(text, row):
    """Return the change in percent of a row of the table that a report is."""
    return float(re.search(rf"^{row} .* ([-+][\d.]+) %$", text, re.MULTILINE)[1])


def test_there_are_notebooks():
    assert NAMES == ["own_device", "quick_start"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_published_as_it_ran(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = shown(notebook)
    assert change(text, "MACs") < -30
    for place in ("/tmp", "/home", "/root", "/work"):
        assert place not in str(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    notebook = read(name)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    text = shown(notebook)
    assert change(text, "MACs") < -30
    accuracies = [float(share) for share in re.findall(r"([\d.]+)% of the", text)]
    assert accuracies[0] > 90
    assert list(tmp_path.iterdir()) == []
