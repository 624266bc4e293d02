"""Code beside the settings is imported if they name it, and never in the place of a package."""

import importlib
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml
from helpers.paths import DIGITS, ROOT

from nni_haloc.cli.compress import _settings
from nni_haloc.cli.options import trust
from nni_haloc.costs.measure import named_model
from nni_haloc.inputs.models import add_code, build_model, is_factory

NETWORK = """
from torch import nn
def network(classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, classes))
"""
TRAPS = ["sklearn", "torch", "numpy", "yaml", "scipy", "nni", "random", "csv", "email", "packaging"]


@pytest.fixture
def path(monkeypatch):
    """A copy of the places where Python looks for modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return sys.path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Settings with a network of their own and files named like packages, all in one folder."""
    (tmp_path / "their_network.py").write_text(NETWORK)
    for name in TRAPS:
        mark = tmp_path / "imported"
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ')")
    content = yaml.safe_load(DIGITS.read_text())
    content["weights"] = str(DIGITS.parent / content["weights"])
    for file, name in (("run.yml", "digits_cnn"), ("own.yml", "their_network:network")):
        settings = content | {"model": {"name": name}, "rank_space": {}}
        (tmp_path / file).write_text(yaml.safe_dump(settings))
    monkeypatch.delitem(sys.modules, "their_network", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("digits_cnn", False),
        ("torchvision:resnet18", False),
        ("their_network:network", True),
        ("package.module:factory", True),
        ("torchvision.models:resnet18", True),
    ],
)
def test_a_factory_is_a_name_with_a_module_of_ones_own(name, code):
    assert is_factory(name) is code


def test_the_folder_of_settings_that_name_no_code_is_not_on_the_path(folder, path):
    before = list(path)
    _settings(folder / "run.yml", None, None)
    assert sys.path == before


def test_the_folder_of_a_factory_comes_last(folder, path):
    before = list(path)
    for _ in range(2):
        _settings(folder / "own.yml", None, None)
        assert sys.path == [*before, str(folder)]
    assert len(build_model("their_network:network")) == 3
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("name", [name for name in TRAPS if name not in sys.builtin_module_names])
def test_no_file_beside_a_factory_takes_the_place_of_a_package(folder, path, name):
    """Asked is Python itself, which has most of them imported already."""
    add_code(folder)
    importlib.invalidate_caches()
    found = PathFinder.find_spec(name, sys.path)
    assert found is not None
    assert Path(str(found.origin)).parent != folder
    assert PathFinder.find_spec("their_network", sys.path).origin == str(
        folder / "their_network.py"
    )


def test_an_option_for_code_puts_it_last_too(folder, path):
    before = list(path)
    assert trust(None) is False
    assert sys.path == before
    assert trust(folder) is True
    assert sys.path == [*before, str(folder)]


def test_the_current_folder_is_for_a_factory_alone(folder, path, monkeypatch):
    monkeypatch.chdir(folder)
    before = list(path)
    named_model("digits_cnn")
    assert sys.path == before
    named_model("their_network:network")
    assert sys.path == [*before, str(folder)]


def test_a_module_that_is_another_one_is_told_by_its_file(folder, path):
    """The user's own json.py, say, is not the one that is found."""
    (folder / "json.py").write_text(NETWORK)
    add_code(folder)
    with pytest.raises(
        ValueError, match=r"model 'json:network': json, which is /.*, has no 'network'"
    ):
        build_model("json:network")


WRONG_FACTORIES = {
    "their_network:networc": r"their_network, .*\.py, has no 'networc'; .*mean 'network'\?$",
    "their_netwrk:network": r"no module 'their_netwrk' in .*; did you mean 'their_network'\?$",
    "number:three": "expected a function or class that makes the network, found int$",
    "number:four": "number, which is .*, has no 'four'$",
    "needing:network": "needing imports a_package_that_is_not_there, which is not installed$",
    "their_network.models:network": "no module 'their_network.models'|is not a package",
}


@pytest.mark.parametrize("name", WRONG_FACTORIES)
def test_a_factory_that_is_none_is_told_with_the_likely_name(folder, path, name):
    (folder / "number.py").write_text("three = 3\n")
    (folder / "needing.py").write_text("import a_package_that_is_not_there\n")
    add_code(folder)
    with pytest.raises(ValueError, match=f"^model {name!r}: {WRONG_FACTORIES[name]}"):
        build_model(name)


@pytest.mark.parametrize(
    "words", [["nni_haloc.costs.measure", "--help"], ["nni_haloc.trial", "measure", "--help"]]
)
def test_a_program_of_ours_imports_packages_not_the_current_folder(folder, words):
    """``python -m`` puts that first. As NNI runs it: in the user's folder."""
    environment = {**os.environ, "NNI_HALOC_PARAMETERS": "{}", "NNI_OUTPUT_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "usage: haloc measure" in done.stdout, done.stderr
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_a_program_of_somebody_else_that_uses_us_finds_its_own_folder_first(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import nni_haloc")
    (tmp_path / "theirs" / "main.py").write_text("import sys; print(sys.path[0])")
    words = [sys.executable, "-m", "theirs.main"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path)


@pytest.mark.parametrize("place", ["pathlib.Path('x')", "pathlib.PurePosixPath('/')"])
def test_places_that_are_no_text_are_no_hindrance(folder, tmp_path, place):
    """Python itself takes no notice of them."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import pathlib, sys\nsys.path[1:1] = [{place}]\nsys.path.append({place})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "nni_haloc.costs.measure", "--help"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_the_folder_of_code_is_added_beside_a_path_of_the_same_name(folder, path):
    sys.path.insert(0, folder)
    add_code(folder)
    assert sys.path[-1] == str(folder)
