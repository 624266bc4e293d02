"""Imports point one way, and NNI stays where it belongs."""

import ast
import importlib
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE, ROOT
from importlinter.cli import lint_imports

ENTRIES = 16
"""Files and folders at the root of the package: about a dozen folders and a few files."""


def test_every_folder_imports_only_from_the_folders_below_it():
    assert lint_imports(str(ROOT / ".importlinter"), no_cache=True) == 0


def test_the_package_root_is_a_table_of_contents():
    found = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(found) <= ENTRIES, found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "benchmarks").rglob("*.py")), ids=lambda path: path.stem
)
def test_what_a_benchmark_imports_is_there(path):
    """A change may break a benchmark unseen, because benchmarks are run by hand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nni_haloc"):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


def loaded_by(program):
    """The top-level modules that a fresh process has loaded after it ran ``program``."""
    program += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_ci_finds_the_test_line_in_a_long_readme(tmp_path):
    """A `grep -m1` behind a pipe ends its writer with SIGPIPE, and CI with status 141."""
    readme = (ROOT / "README.md").read_text() + "pip install 'another line'\n" * 20_000
    (tmp_path / "README.md").write_text(readme)
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    line = next(line for line in script if line.startswith("line="))
    found = subprocess.run(
        ["bash", "-c", f'set -euo pipefail\n{line}\nprintf "%s" "$line"'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == "pip install -e '.[test]' && pytest"
