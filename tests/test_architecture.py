"""Imports point one way, and NNI stays where it belongs."""

import ast
import importlib
import subprocess
import sys

import pytest
import torch
from helpers.paths import PACKAGE, ROOT

from nni_haloc.costs.device.onnx_models import with_onnx
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.saved import save
from nni_haloc.space.ranks import AllowedRanks, find_layers

ENTRIES = 16
"""Files and folders at the root of the package: about a dozen folders and a few files."""


def test_every_folder_imports_only_from_the_folders_below_it():
    # In a process of its own: it configures logging, and disables the loggers of others.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def parts_of_nni(path):
    """Yield the dotted names that a file imports or uses of NNI."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    ("part", "home"),
    [
        ("nni.nas", "search"),
        ("nni.compression", "chain"),
        ("nni.report_", "trial.py"),
        ("nni.get_next_parameter", "trial.py"),
    ],
)
def test_each_part_of_nni_is_used_in_one_place_alone(part, home):
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith(part) for name in parts_of_nni(path))
    }
    assert users == {home}


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
    """Return the top-level modules that a fresh process has loaded after it ran ``program``."""
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "nni", "pytorch_lightning", "torchmetrics", "typer", "rich", "pydantic", "scipy", "sklearn",
    "matplotlib", "tensorly", "torchvision", "pandas", "jinja2", "filelock", "huggingface_hub",
}  # fmt: skip
"""What neither a device that measures nor one that runs a compressed network needs."""
SHAPES = {"digits_cnn": (1, 1, 8, 8), "torchvision:squeezenet1_1": (1, 3, 64, 64)}


@pytest.mark.parametrize(
    "module",
    [
        "costs",
        "costs.measure",
        "costs.device",
        "costs.device.measure",
        "costs.device.runtime",
        "costs.device.onnx_runtime",
        "costs.device.openvino_runtime",
        "costs.device.tensorrt_runtime",
        "chain",
        "inputs.registries",
    ],
)
def test_a_module_that_a_bare_device_imports_is_cheap(module):
    assert not loaded_by(f"import nni_haloc.{module}") & (
        HEAVY | {"torch", "numpy", "onnxruntime", "openvino", "nncf", "tensorrt"}
    )


@pytest.mark.parametrize(("runtime", "other"), [("torch", "onnxruntime"), ("onnxruntime", "torch")])
def test_a_device_that_measures_loads_its_runtime_and_nothing_heavy(tmp_path, runtime, other):
    model, shape = build_model("digits_cnn"), SHAPES["digits_cnn"]
    spec = specify(model, torch.randn(shape), AllowedRanks())
    with_onnx(spec, model).save(tmp_path / "spec.json")
    arguments = ["measure", "--spec", str(tmp_path / "spec.json"), "--runtime", runtime]
    arguments += ["--rounds", "1", "--min-run-time", "0.0001", "--out", str(tmp_path / "c.json")]
    loaded = loaded_by(
        f"import runpy, sys; sys.argv = {arguments!r}\n"
        "runpy.run_module('nni_haloc.costs.measure', run_name='__main__')"
    )
    assert runtime in loaded
    assert not loaded & (HEAVY | {other, "onnx"})
    assert CostTable.load(tmp_path / "c.json").identity["runtime"].startswith(runtime)


@pytest.mark.parametrize("name", SHAPES)
def test_loading_a_compressed_network_needs_torch_and_safetensors_alone(tmp_path, name):
    model, x = build_model(name), torch.randn(SHAPES[name])
    layers = find_layers(model, x, AllowedRanks(kinds=("conv",)))
    plan = RankPlan(dict.fromkeys(layers.specs, (2, 2)))
    save(tmp_path, restructure(model, plan), plan, {"name": name, "arguments": {}})
    loaded = loaded_by(
        f"import nni_haloc, torch; nni_haloc.load({str(tmp_path)!r})(torch.zeros({SHAPES[name]}))"
    )
    assert {"torch", "safetensors"} <= loaded
    allowed = {"torchvision"} if name.startswith("torchvision") else set()
    assert not loaded & (HEAVY | {"onnx", "onnxruntime"}) - allowed


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
