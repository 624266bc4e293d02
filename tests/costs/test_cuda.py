"""Measuring on a CUDA device: TF32, graphs, number formats, and what tables say of them."""

import copy
import gc
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.clock import Clock
from helpers.paths import DIGITS
from torch import nn

from nni_haloc.costs.device import torch_runtime
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import merge
from nni_haloc.costs.device.runtime import Timing, make_runtime
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.from_settings import cost_table, runtime_of
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.runs.devices import _config_for
from nni_haloc.runs.identity import search_identity
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError

QUICK = Timing(rounds=1, min_run_time=0)


@pytest.fixture
def pretended(monkeypatch):
    """A CUDA device as far as options, flags and tables are concerned: nothing runs on it."""
    monkeypatch.setattr(TorchRuntime, "__post_init__", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.fixture
def precision():
    """Torch's precision of convolutions and products, put back after the test."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def spec():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return specify(model, torch.randn(2, 8, 6, 6), AllowedRanks(step=4))


def clock_on(spec, **options):
    """A runtime of known times that says what a torch runtime of these options says."""
    clock = Clock(spec, {i: 1.0 + i / 8 for i in range(len(spec.entries))})
    clock.identity = TorchRuntime(**options).identity
    return clock


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("before", [(True, "highest"), (False, "medium")])
def test_a_block_has_the_precision_of_its_runtime_and_leaves_torchs(
    pretended, precision, tf32, before
):
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])
    inside = []
    with suppress(KeyboardInterrupt), TorchRuntime("cuda", tf32=tf32).pinned():
        inside.append(precision())
        raise KeyboardInterrupt
    assert inside == [(tf32, "high" if tf32 else "highest")]
    assert precision() == before
    with TorchRuntime("cpu", tf32=tf32).pinned():
        assert precision() == before


def test_a_table_says_what_was_allowed_where_it_makes_a_difference(pretended):
    plain = TorchRuntime("cuda:1").identity()
    other = TorchRuntime("cuda:1", "float16", "channels_last", graph=True, tf32=False).identity()
    keys = ("device", "dtype", "memory_format", "graph", "tf32")
    assert [plain[key] for key in keys] == ["a GPU", "float32", "contiguous", False, True]
    assert [other[key] for key in keys] == ["a GPU", "float16", "channels_last", True, False]
    assert not {"graph", "tf32"} & TorchRuntime("cpu").identity().keys()


@pytest.mark.parametrize("options", [{"graph": True}, {"tf32": False}])
@pytest.mark.parametrize("turned", [False, True])
def test_tables_of_different_options_do_not_mix(tmp_path, pretended, spec, options, turned):
    key = next(iter(options))
    first, second = ({}, options) if turned else (options, {})
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for file, some in zip(files, (first, second), strict=True):
        measure(spec, clock_on(spec, device="cuda", **some), file, QUICK)
    with pytest.raises(ValueError, match=rf"0\.json: measured for another {key}: "):
        measure(spec, clock_on(spec, device="cuda", **second), files[0], QUICK)
    with pytest.raises(ValueError, match=rf"1\.json: measured for another {key}: "):
        merge(spec, files)


@pytest.mark.parametrize("turned", [False, True])
def test_a_table_that_does_not_say_how_passes_were_launched_is_refused(
    tmp_path, pretended, spec, turned
):
    old, new = clock_on(spec, device="cuda"), clock_on(spec, device="cuda")
    facts = {key: v for key, v in old.identity().items() if key not in ("graph", "tf32")}
    old.identity = lambda: facts
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    measure(spec, old, files[0], QUICK)
    measure(spec, new, files[1], QUICK)
    with pytest.raises(ValueError, match=r"another graph: None, now False"):
        measure(spec, new, files[0], QUICK)
    with pytest.raises(ValueError, match=r"another graph: "):
        merge(spec, files[::-1] if turned else files)


@pytest.mark.parametrize(
    "setting",
    [{"graph": True}, {"tf32": False}, {"memory_format": "channels_last"}, {"batch_size": 2}],
)
def test_a_run_refuses_a_table_of_its_device_that_was_measured_otherwise(
    tmp_path, pretended, setting
):
    model, x, allowed = build_model("digits_cnn"), torch.randn(1, 1, 8, 8), AllowedRanks(step=8)
    spec = specify(model, x, allowed)
    file = tmp_path / "costs.json"
    measure(spec, clock_on(spec, device="cuda"), file, QUICK)

    def table(**cost):
        cost = {"table": str(file), "device": "cuda", "batch_size": 1, **cost}
        config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
        return cost_table(config, "cost", "latency_ms", str(file), model, x, allowed, tmp_path)

    assert table().identity["device"] == "a GPU"
    assert table(device="cpu").original == table().original  # a table of another device
    with pytest.raises(SettingsError, match=r"cost\.table: .*measured with ") as error:
        table(**setting)
    assert "\n" not in str(error.value)


def test_a_run_uses_the_options_of_its_settings(pretended):
    config = load_config(DIGITS, {"cost.device": "cuda", "cost.graph": True, "cost.tf32": False})
    assert runtime_of(config) == TorchRuntime("cuda", graph=True, tf32=False)
    assert runtime_of(load_config(DIGITS, {"cost.device": "cuda"})) == TorchRuntime("cuda")
    assert _config_for(config, "cuda").cost.graph
    for device in ("torch", "onnxruntime", "eyeriss"):
        assert not _config_for(config, device).cost.graph


def test_graphs_on_a_processor_are_refused_in_one_line():
    expected = "^graph: expected a CUDA device, such as cuda, found 'cpu'; leave graph out, or "
    with pytest.raises(ValueError, match=expected):
        runtime_of(load_config(DIGITS, {"cost.graph": True}))
    assert runtime_of(load_config(DIGITS, {"cost.tf32": False})).identity()  # it has none


def test_new_settings_leave_the_identity_of_earlier_searches_as_it_was():
    known = search_identity(load_config(DIGITS))
    assert not {"cost.graph", "cost.tf32"} & known.keys()
    changed = search_identity(load_config(DIGITS, {"cost.tf32": False}))
    assert changed == {**known, "cost.tf32": False}


def test_a_runtime_without_the_options_is_made_without_them(monkeypatch):
    class Older:
        @classmethod
        def from_options(cls, *, device="cpu", dtype="float32"):
            return device, dtype

    monkeypatch.setitem(RUNTIMES._added, "older", Older)
    assert make_runtime("older", device="npu", dtype="float16") == ("npu", "float16")
    with pytest.raises(ValueError, match="^runtime older: .*found graph: True .*leave it out$"):
        make_runtime("older", device="npu", graph=True)
    with pytest.raises(TypeError):
        make_runtime("older", speed=1)


class Block(nn.Module):
    """Convolutions, normalisation and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.last((self.b(x) + x).mean((2, 3)))


SHAPE = (4, 8, 10, 10)


def block():
    torch.manual_seed(0)
    return Block().eval()


def exact(model, shape):
    """The outputs in float64, of the inputs that a runtime draws after seed 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.randn(shape).double())


def outputs(model, shape, *options, **more):
    """What a pass gives in a runtime of these options, twice, on the processor in float64."""
    runtime = TorchRuntime(*options, **more)
    torch.manual_seed(1)
    with runtime.pinned():
        run = runtime.ready(model, shape, copied=False)
        found = [[y.clone() for y in run()] for _ in range(2)]
    assert [y.dtype for (y,) in found] == 2 * [getattr(torch, runtime.dtype)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    return found[0][0].double().cpu()


FORMS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)]
)
LAYOUTS = pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])


@FORMS
@LAYOUTS
def test_a_pass_computes_the_network_in_every_form(device, dtype, tolerance, memory_format):
    found = outputs(block(), SHAPE, str(device), dtype, memory_format, tf32=False)
    torch.testing.assert_close(found, exact(block(), SHAPE), rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@FORMS
@LAYOUTS
def test_a_replayed_pass_computes_what_the_network_computes(dtype, tolerance, memory_format):
    options = (SHAPE, "cuda", dtype, memory_format)
    replayed = outputs(block(), *options, graph=True, tf32=False)
    eager = outputs(block(), *options, tf32=False)
    torch.testing.assert_close(replayed, eager, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(replayed, exact(block(), SHAPE), rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
def test_a_replayed_pass_keeps_its_weights_and_inputs():
    runtime, network = TorchRuntime("cuda", graph=True, tf32=False), block()
    torch.manual_seed(1)  # of the inputs, see `exact`
    with runtime.pinned():
        run = runtime.ready(network, SHAPE)
    del network
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    (y,) = run()
    assert len(others) == 64
    torch.testing.assert_close(y.double().cpu(), exact(block(), SHAPE), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_a_network_that_waits_for_the_device_is_refused_in_one_line():
    """In a process of its own: older releases of torch capture nothing more after a failure."""
    program = (
        "import torch\n"
        "from nni_haloc.costs.device.torch_runtime import TorchRuntime\n"
        "class Waiting(torch.nn.Module):\n"
        "    def forward(self, x): return x * 2 if x.sum().item() > 0 else x\n"
        "before = torch.cuda.current_stream()\n"
        "try: TorchRuntime('cuda', graph=True).ready(Waiting(), (4, 4))\n"
        "except ValueError as error: print(error)\n"
        "assert torch.cuda.current_stream() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("graph: expected a pass that a CUDA graph can capture, which never")
    assert line.endswith("; leave graph out")


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [False, True])
def test_a_cuda_device_is_timed_by_its_own_events(monkeypatch, graph):
    runtime = TorchRuntime("cuda", graph=graph)
    with runtime.pinned():
        run = runtime.ready(block(), SHAPE)
        monkeypatch.setattr(torch_runtime, "perf_counter", None)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            assert runtime.once(run) > 0
        assert runtime.once(run) > 0


@pytest.mark.cuda
def test_tf32_is_what_the_table_says():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the device has no TF32")
    torch.manual_seed(0)
    layers = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(1024, 1024)
    for layer, shape in zip(layers, ((8, 64, 32, 32), (512, 1024)), strict=True):
        form = "cuda", "float32", "channels_last"
        errors = {
            tf32: (outputs(layer, shape, *form, tf32=tf32) - exact(layer, shape)).abs().max()
            for tf32 in (True, False)
        }
        assert 10 * errors[False] < errors[True], layer


@pytest.mark.cuda
def test_the_command_measures_captured_and_uncaptured_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", "digits_cnn", "--input", "1x8x8", "--device", "cuda"]
    quick = [*model, "--rounds", "1", "--min-run-time", "0"]
    assert measure_main([*quick, "--graph", "--no-tf32", "--dtype", "bfloat16"]) > 0
    table = CostTable.load("costs.json")
    facts = {key: table.identity[key] for key in ("graph", "tf32", "dtype")}
    assert facts == {"graph": True, "tf32": False, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"costs\.json: measured for another graph: True, now"):
        measure_main([*quick, "--no-tf32", "--dtype", "bfloat16"])
    assert measure_main([*quick, "--where", "in-place", "--out", "eager.json"]) > 0
    assert CostTable.load("eager.json").identity["graph"] is False
    assert Path("costs.json").exists()
