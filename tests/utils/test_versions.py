"""Unsupported versions of Python and of packages are refused when the package is imported."""

import importlib.metadata
import platform
import subprocess
import sys
from email.message import Message

import pytest

from nni_haloc.utils import versions as environment


@pytest.fixture
def installed(monkeypatch):
    """Call with what nni-haloc's metadata shall ask for, and what versions are there."""

    def use(python, requires, versions):
        class Own:
            version, metadata = "1.0", Message()

        Own.metadata["Requires-Python"], Own.requires = python, requires

        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(environment, "distribution", lambda name: Own)
        monkeypatch.setattr(environment, "version", version)

    return use


def test_what_is_installed_here_is_supported():
    environment.check_supported()
    done = subprocess.run(
        [sys.executable, "-c", "import nni_haloc"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("requires", "versions"),
    [
        (["torch>=2.9"], {"torch": "2.9.0"}),
        (["torch>=2.9"], {"torch": "2.14.1+cpu"}),
        (["torch>=2.9"], {}),  # a device that measures
        (
            ["onnx>=9; extra == 'onnx'", "nni==3.0; platform_machine == 'none'"],
            {"onnx": "1.0", "nni": "2.0"},
        ),
        (None, {}),
    ],
)
def test_what_is_allowed_is_not_refused(installed, requires, versions):
    installed(">=3.10", requires, versions)
    environment.check_supported()


def test_a_package_that_is_too_old_or_too_new_is_one_line(installed):
    for name, versions, there in (
        ("torch", ">=2.9", "2.8.1"),
        ("setuptools", "<82,>=77.0.3", "82.0"),
        ("nni", "==3.0", "3.1"),
    ):
        installed(">=3.10", ["six", name + versions], {name: there, "six": "1"})
        with pytest.raises(ImportError, match=f"^nni-haloc 1.0 needs {name} .*, found {there}$"):
            environment.check_supported()


def test_a_python_that_is_not_supported_is_one_line(installed):
    installed("<3.10", [], {})
    with pytest.raises(
        ImportError, match=f"^nni-haloc 1.0 needs Python <3.10, found {platform.python_version()}$"
    ):
        environment.check_supported()
