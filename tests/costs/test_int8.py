"""Int8 as the aim: entries, tables, whole networks and files of every runtime that has it."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from helpers.paths import DIGITS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_haloc import compress_model
from nni_haloc.costs.device import onnx_runtime
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.onnx_int8 import quantize_model
from nni_haloc.costs.device.runtime import Timing, make_runtime
from nni_haloc.costs.from_settings import allowed_ranks_of, cost_table, runtime_of
from nni_haloc.costs.latency import forward_pass
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.inputs.weights import load_weights
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import MissingPackage, SettingsError
from nni_haloc.utils.versions import processor

PACKAGES = {"onnxruntime": "onnx", "openvino": "nncf", "executorch": "torchao"}
"""The runtimes that have int8, and the package that each needs for it beside its own."""


def runtime_here(name, dtype="int8"):
    pytest.importorskip(name)
    pytest.importorskip(PACKAGES[name])
    return make_runtime(name, threads=1, dtype=dtype)


class Net(nn.Module):
    """Two convolutions, one of them called on inputs of two sizes, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.norm(self.twice(self.twice(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


class Kernels:
    """What computes the convolutions of a pass, by the runtime's own account of it."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.opened = folder, []
        opens = onnx_runtime.open_session

        def opened(model, threads=None):
            self.opened.append(model)
            return opens(model, threads)

        monkeypatch.setattr(onnx_runtime, "open_session", opened)

    def onnxruntime(self, run):
        """The nodes of the model that was opened last, as ONNX Runtime has fused them."""
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(self.folder / "optimized.onnx")
        onnxruntime.InferenceSession(self.opened[-1], options, ["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
        return [node.op_type for node in nodes if "Conv" in node.op_type]

    def openvino(self, run):
        """The precisions of the compiled kernels."""
        operations = run().get_compiled_model().get_runtime_model().get_ops()
        facts = [each.get_rt_info() for each in operations]
        return [
            fact["runtimePrecision"].astype(str)
            for fact in facts
            if fact["layerType"].astype(str) == "Convolution"
        ]

    def executorch(self, run):
        """The types of the weights in the graphs that the program has for XNNPACK."""
        from executorch.backends.xnnpack import serialization
        from executorch.data import bin as tools
        from executorch.exir._serialize._program import deserialize_pte_binary

        cells = [cell.cell_contents for cell in run.__closure__]
        (program,) = [each for each in cells if hasattr(each, "meta")]
        flatc, schema = (next(iter(package.__path__)) for package in (tools, serialization))
        types = []
        for blob in deserialize_pte_binary(program._content).program.backend_delegate_data:
            start, size = struct.unpack("<II", bytes(blob.data[10:18]))
            file = self.folder / "graph.bin"
            file.write_bytes(bytes(blob.data[start : start + size]))
            command = [f"{flatc}/flatc", "--json", "--strict-json", "--raw-binary"]
            command += ["-o", self.folder, f"{schema}/schema.fbs", "--", file]
            subprocess.run(command, check=True)
            text = file.with_suffix(".json").read_text().replace("inf", "Infinity")
            graph = json.loads(text)
            values = [each["xvalue_union"] for each in graph["xvalues"]]
            values = {each.get("tensor_value", each).get("id_out", 0): each for each in values}
            types += [
                values[node["xnode_union"]["filter_id"]]["tensor_value"]["datatype"]
                for node in graph["xnodes"]
                if "Conv2d" in node["xnode_union_type"]
            ]
        return types


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    return Kernels(monkeypatch, tmp_path)


INT8 = {
    "onnxruntime": {"QLinearConv"},
    "openvino": {"i8", "u8"},
    "executorch": {"xnn_datatype_qcint8"},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "int8") for name in PACKAGES),
        *((name, "float32") for name in ("onnxruntime", "openvino")),
    ],
)
def test_a_low_rank_is_timed_with_int8_kernels(name, dtype, net, kernels):
    """Three convolutions in each of two calls, all in int8; in float32, none is."""
    runtime = runtime_here(name, dtype)
    spec = specify(net, torch.zeros(1, 3, 16, 16), AllowedRanks(step=4))
    row = spec.layers["twice"]
    rank = next(candidate for candidate in row if candidate != DENSE)
    with runtime.pinned():
        run = runtime.entry(runtime.prepare(spec, net), row[rank])
        found = getattr(kernels, name)(run)
        assert len(found) == 6
        assert set(found) <= INT8[name] if dtype == "int8" else not set(found) & INT8[name]
        assert runtime.once(run) > 0


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_the_whole_network_is_timed_with_int8_kernels_where_settings_say_so(
    name, dtype, net, kernels
):
    """It is the pass that the promise, the finished network and the original are timed by."""
    runtime_here(name)
    cost = {"metric": "latency_ms", "runtime": name, "dtype": dtype, "memory_format": "contiguous"}
    config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
    run = forward_pass(runtime_of(config), net, (1, 3, 16, 16))
    found = getattr(kernels, name)(run)
    assert len(found) == 3
    assert set(found) <= INT8[name] if dtype == "int8" else not set(found) & INT8[name]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_table_says_its_precision_and_is_not_gone_on_with_in_another(name, net, tmp_path):
    quick, out = Timing(rounds=1, min_run_time=0), tmp_path / "costs.json"
    runtime = runtime_here(name)
    spec = specify(net, torch.zeros(1, 3, 8, 8), AllowedRanks(step=8))
    spec = runtime.prepare(spec, net)
    measure(spec, runtime, out, quick)
    assert CostTable.load(out).identity["dtype"] == "int8"
    with pytest.raises(ValueError, match="another dtype: 'int8', now 'float32'"):
        measure(spec, runtime_here(name, "float32"), out, quick)


def table(path, dtype, device, step=None):
    """Write a table of the digits network, with stairs of a width if one is given."""
    model, x = build_model("digits_cnn"), torch.zeros(1, 1, 8, 8)
    allowed = AllowedRanks(step=1)
    costs = {
        layer: {
            name: 1.0 if name == DENSE else 0.01 * -(-int(name[1:]) // (step or 1)) for name in row
        }
        for layer, row in specify(model, x, allowed).layers.items()
    }
    identity = {"runtime": "onnxruntime 1", "device": device, "dtype": dtype}
    identity |= {"memory_format": "contiguous", "threads": 1, "input": [1, 1, 8, 8]}
    CostTable("latency_ms", costs, 0.1, identity).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("asked", "found", "device", "refused"),
    [
        ("int8", "int8", "here", False),
        ("int8", "float32", "here", True),
        ("float32", "int8", "here", True),
        ("int8", "int8", "a phone", False),
        ("int8", "float32", "a phone", True),
        ("int8", "float16", "a phone", True),
    ],
)
def test_a_run_takes_tables_of_its_precision_alone(tmp_path, asked, found, device, refused):
    pytest.importorskip("onnx")
    file = table(tmp_path / "t.json", found, processor() if device == "here" else device)
    cost = {"metric": "latency_ms", "runtime": "onnxruntime", "dtype": asked, "table": file}
    cost |= {"batch_size": 1, "memory_format": "contiguous", "threads": 1}
    config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
    model, x = build_model("digits_cnn"), torch.zeros(1, 1, 8, 8)

    def read():
        allowed = AllowedRanks()
        return cost_table(config, "cost", "latency_ms", file, model, x, allowed, tmp_path / "own")

    if not refused:
        assert read().identity["dtype"] == found
        return
    with pytest.raises(
        SettingsError, match=f"dtype '{found}', but this run uses '{asked}'"
    ) as error:
        read()
    assert "\n" not in str(error.value)


def test_a_run_takes_tables_of_its_runtime_alone(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("nncf")
    file = table(tmp_path / "t.json", "int8", processor())
    model, x = build_model("digits_cnn"), torch.zeros(1, 1, 8, 8)
    cost = {"metric": "latency_ms", "runtime": "openvino", "dtype": "int8", "table": file}
    cost |= {"batch_size": 1, "memory_format": "contiguous", "threads": 1}
    config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
    with pytest.raises(SettingsError, match="the runtime 'onnxruntime', but .* uses 'openvino'"):
        cost_table(config, "cost", "latency_ms", file, model, x, AllowedRanks(), tmp_path / "own")


def test_ranks_follow_the_stairs_of_an_int8_table(tmp_path):
    file = table(tmp_path / "t.json", "int8", processor(), step=8)
    changes = {"rank_space.step": "auto", "cost.metric": "latency_ms", "cost.table": file}
    changes |= {"cost.runtime": "onnxruntime", "cost.dtype": "int8"}
    changes |= {"cost.memory_format": "contiguous"}
    allowed = allowed_ranks_of(load_config(DIGITS, changes))
    assert set(allowed.stairs.values()) == {8}
    assert "block3.conv" in allowed.stairs


WITHOUT = sorted({*RUNTIMES.own()} - {*PACKAGES})


@pytest.mark.parametrize("name", WITHOUT)
def test_a_runtime_without_int8_refuses_it_in_one_line(name):
    device = "cuda" if name == "tensorrt" else "cpu"
    with pytest.raises(ValueError, match=r"^runtime \S+: dtype: expected .*, found 'int8'") as e:
        make_runtime(name, device=device, dtype="int8")
    assert "\n" not in str(e.value)
    if name != "tensorrt":
        assert str(e.value).endswith("choose onnxruntime, openvino, executorch for it")


def test_every_runtime_says_in_which_precisions_it_deploys():
    assert {n for n in RUNTIMES.own() if "int8" in RUNTIMES[n].precisions} == {*PACKAGES}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_quantizer_is_one_line_with_its_remedy(name, monkeypatch):
    pytest.importorskip(name)
    package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"in int8: needs the package {package}, .*\(pip "):
        make_runtime(name, dtype="int8")
    assert make_runtime(name).identity()["dtype"] == "float32"


@pytest.fixture(scope="module")
def trained():
    """The trained network of the digits, its validation images, and calibration images."""
    model = build_model("digits_cnn")
    load_weights(model, DIGITS.with_name("digits.safetensors"))
    splits = digits(0.2)
    loader = splits.loader("val", 1000)
    images, labels = next(iter(loader))
    return model.eval(), images, labels, splits.images("plain", 64)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_trained_network_in_int8_has_the_accuracy_of_float32(name, trained, tmp_path):
    model, images, labels, calibration = trained
    runtime = runtime_here(name, "float32")
    assert "int8" in runtime.precisions
    deployed = runtime.deploy(model, calibration[:2], tmp_path / "net", calibration)
    with torch.inference_mode():
        expected = model(images)
        found = torch.cat([deployed.network(x) for x in images.split(deployed.batch or 500)])
    right, before = (float((y.argmax(1) == labels).float().mean()) for y in (found, expected))
    assert before > 0.95  # or nothing would be shown
    assert right >= before - 0.011
    assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
    # A weight has a byte, and not four; the graph takes the rest.
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(file.stat().st_size for file in deployed.files) < 2 * parameters
    assert runtime.once(deployed.ready((1, *images.shape[1:]))) > 0


@pytest.mark.parametrize("name", PACKAGES)
def test_a_layer_that_is_called_twice_is_right_in_int8(name, net, tmp_path):
    """Normalisation follows the second call alone, and may not get into the first one's weights."""
    runtime, images = runtime_here(name, "float32"), torch.randn(32, 3, 16, 16)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.2, 3)
    deployed = runtime.deploy(net, images[:2], tmp_path / "net", images)
    with torch.inference_mode():
        expected = net(images)
        found = torch.cat([deployed.network(x) for x in images.split(deployed.batch or 32)])
    assert 0 < float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_executorch_needs_a_whole_batch_of_images_to_calibrate_on(trained, tmp_path):
    runtime_here("executorch")
    from nni_haloc.costs.device.executorch_runtime import export_executorch

    model, images, *_ = trained
    for few, told in ((images[:0], "none"), (images[:2], "2")):
        with pytest.raises(ValueError, match=f"images to calibrate on, 3 or more, found {told}$"):
            export_executorch(model, images[:3], tmp_path / "net.pte", few)
    assert not (tmp_path / "net.pte").exists()


def test_a_budget_in_int8_is_kept_by_whole_networks_in_int8(net, tmp_path, monkeypatch):
    """The promise times original and plan, and the end original and result: each in int8."""
    pytest.importorskip("onnx")
    made = []

    def quantize(source, batches, file, **options):
        quantize_model(source, batches, file, **options)
        made.append(file)

    monkeypatch.setattr(onnx_runtime, "quantize_model", quantize)
    monkeypatch.setattr("nni_haloc.runs.promise._MOST", 6)
    images, allowed = torch.randn(16, 3, 8, 8), AllowedRanks(step=8)
    rows = {
        layer: {name: 1.0 if name == DENSE else 0.1 for name in row}
        for layer, row in specify(net, images[:1], allowed).layers.items()
    }
    identity = {"device": processor(), "dtype": "int8", "runtime": "onnxruntime 1"}
    options = {"budget": 0.5, "epochs": 0, "runtime": "onnxruntime", "check": "warn"}
    options |= {"allowed": allowed, "costs": CostTable("latency_ms", rows, 0.1, identity)}
    loader = DataLoader(TensorDataset(images), 16)
    result = compress_model(net, loader, dtype="int8", **options)
    assert result.timing["dtype"] == "int8"
    assert "timed" in result.plan.chosen_by
    assert len(made) == 2 * (1 + 1)
    with pytest.raises(ValueError, match="^costs: expected a table measured in float32, found one"):
        compress_model(net, loader, **options)
