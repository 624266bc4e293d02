"""Imports point one way, and NNI stays where it belongs."""

import ast
import importlib
import subprocess
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nni_haloc"

ALLOWED = {  # what each file may import of ours; a folder stands for all its files
    "reduced_rank": set(),
    "tucker": {"reduced_rank"},
    "gates": {"execution", "layers"},
    "objective": set(),
    "budget": {"predictors"},
    "recipe": set(),
    "tensor_images": set(),
    "image_files": set(),
    "data": {"image_files", "tensor_images"},
    "errors": set(),
    "yaml_files": set(),
    "sections": set(),
    "processes": set(),
    "interruption": {"processes"},
    "environment": {"device"},
    "printing": set(),
    "config": {"sections", "yaml_files"},
    "log": {"processes"},
    "checkpoint": {"config", "device"},
    "models": set(),
    "modules": set(),
    "execution": {"layers", "ranks"},
    "layers": {"tucker"},
    "ranks": {"device", "layers", "modules", "watching"},
    "watching": {"modules"},
    "report": {"layers", "printing", "watching"},
    "candidates": {"layers", "log", "modules", "ranks", "tucker"},
    "device": {"layers", "modules"},
    "predictors": {"device", "layers", "modules", "ranks"},
    "compression": {"candidates", "device", "layers", "models", "modules", "ranks", "tucker"},
    "sensitivity": {"modules"},
    "rules": {"budget", "candidates", "finetuning", "layers", "log", "modules", "ranks", "sensitivity", "tucker"},
    "finetuning": {"log", "modules", "processes", "recipe"},
    "exporting": {"device", "log", "modules"},
    "experiment": {"config", "yaml_files"},
    "chain": {"log", "modules", "report"},
    "nas": {
        *(
            "budget",
            "candidates",
            "execution",
            "gates",
            "layers",
            "modules",
            "objective",
            "predictors",
            "processes",
            "ranks",
            "recipe",
            "report",
            "tucker",
        )
    },
}
FREE = {
    "job",
    "tables",
    "baselines",
    "run",
    "fronts",
    "trial",
    "cli",
    "cli_finished",
    "deployment",
    "stages",
    "training",
    "bench",
    "measure",
    "heatmap",
    "counts",
    "figures",
    "html_report",
    "history",
    "original",
    "throughput",
    "__init__",
}  # may import anything of ours; nothing but each other imports them
COMMON = {"errors"}  # everybody may import it; it imports none of ours
NNI = {"nas", "chain", "trial"}
LIMIT = 250


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(level, dotted module) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


def ours(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module in imports(path):
        if level == depth:
            yield module.split(".")[0]
        elif level == 0 and module.split(".")[0] == "nni_haloc":
            yield module.split(".")[1]


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        if room(path) in FREE:
            continue
        assert room(path) in ALLOWED, f"{path.name}: say in ALLOWED what it may import"
        extra = set(ours(path)) - ALLOWED[room(path)] - COMMON - {room(path)}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {extra}"


def test_nni_is_imported_in_its_rooms_alone():
    for path in PACKAGE.rglob("*.py"):
        if any(level == 0 and module.split(".")[0] == "nni" for level, module in imports(path)):
            assert room(path) in NNI, path


def test_a_file_can_be_read_in_one_go():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= LIMIT, path


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "tests" / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path):
    """Benchmarks are run by hand: one that a change has left behind would show on the day that it is needed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nni_haloc"):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_ci_finds_the_test_line_in_a_long_readme(tmp_path):
    """A `grep -m1` behind a pipe once ended its writer with SIGPIPE, and CI with status 141."""
    root = PACKAGE.parent
    (tmp_path / "README.md").write_text((root / "README.md").read_text() + "pip install 'another line'\n" * 20_000)
    line = next(line for line in (root / ".ci" / "run").read_text().splitlines() if line.startswith("line="))
    script = f'set -euo pipefail\n{line}\nprintf "%s" "$line"'
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found == "pip install -e '.[test]' && pytest"
