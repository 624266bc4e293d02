"""What is released: the sdist makes the wheel, and the wheel works away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest
from helpers.paths import EXAMPLES, PACKAGE, ROOT

import nni_haloc

NAME = f"nni_haloc-{nni_haloc.__version__}"
TEMPLATES = {f"nni_haloc/results/templates/{name}.html" for name in ("page", "front", "report")}
DATA = {"nni_haloc/py.typed", "nni_haloc/experiments/patience.cjs", *TEMPLATES}
FILES = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")} | DATA


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of sdist and wheel; the wheel is made of the sdist."""
    place = tmp_path_factory.mktemp("release")
    made = ["*.egg-info", "build", "dist", ".*", "__pycache__", "nni-experiments"]
    source = shutil.copytree(ROOT, place / "source", ignore=shutil.ignore_patterns(*made))
    words = ["-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(source)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "dist"


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        found = {*wheel.namelist()}
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    own = {name for name in found if not name.startswith(f"{NAME}.dist-info/")}
    assert own == FILES
    assert f"{NAME}.dist-info/licenses/LICENSE" in found
    for line in ("License: MIT", "Provides-Extra: hub", "Classifier: Typing :: Typed"):
        assert f"\n{line}\n" in metadata
    assert "](docs/" not in metadata


def test_the_sdist_has_the_sources_and_neither_tests_nor_pages(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        found = {each.name.partition("/")[2] for each in sdist if each.isfile()}
    told = {"setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    made = {name for name in found if ".egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert found - made == FILES | told


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel; other packages are read from the tests' own."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    wheel = built / f"{NAME}-py3-none-any.whl"
    words = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *words, str(wheel)], check=True, env=bare())
    (packages,) = place.glob("lib/python*/site-packages")
    others = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    # Files .pth in there are not followed: an editable install in there stays out of sight.
    (packages / "others.pth").write_text("\n".join(sorted(others)))
    return place


def bare():
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def test_the_quick_start_works_from_the_wheel_alone(installed, tmp_path):
    for name in ("compress.py", "digits.safetensors"):
        shutil.copy(EXAMPLES / "digits" / name, tmp_path)
    program = (
        "import runpy, nni_haloc; print(nni_haloc.__file__)\n"
        "runpy.run_path('compress.py', run_name='__main__')"
    )
    done = subprocess.run(
        [installed / "bin" / "python", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=bare(),
    )
    assert done.returncode == 0, done.stderr
    home, *lines = done.stdout.splitlines()
    assert home.startswith(str(installed))
    row = next(line.split() for line in lines if line.startswith("MACs"))
    assert row[-2].startswith("-7"), row  # at most 30 % are left
    assert (tmp_path / "compressed" / "weights.safetensors").is_file()


def test_the_wheel_brings_the_command(installed, tmp_path):
    haloc = installed / "bin" / "haloc"
    words = [haloc, "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=bare())
    assert nni_haloc.__version__ in done.stdout, done.stderr
    assert haloc.read_text().startswith(f"#!{installed}")
