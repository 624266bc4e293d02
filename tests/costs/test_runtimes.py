"""Every registered runtime, against torch in float32: layers, networks, tables, and bad options."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.runtime import Runtime, Timing, make_runtime
from nni_haloc.costs.specify import specify
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results import export as exports
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import MissingPackage

PACKAGES = {
    "torch": None, "torch-compile": None, "onnxruntime": "onnxruntime", "openvino": "openvino",
    "executorch": "executorch", "tensorrt": "tensorrt",
}  # fmt: skip
HERE = ["torch", "torch-compile", "onnxruntime", "openvino", "executorch"]
"""Those that run on a processor."""
EXACT = 1e-4
"""Share of the largest output that kernels of other orders of summation may differ by."""


class Net(nn.Module):
    """Two convolutions, one of them with stride and batch normalisation, and a linear layer."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def random_net(seed, channels=8, rank=None):
    torch.manual_seed(seed)
    net = Net(channels)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    if rank is not None:
        net = restructure(net, RankPlan({"second": rank}))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def runtime_here(name, **options):
    if PACKAGES[name]:
        pytest.importorskip(PACKAGES[name])
    return make_runtime(name, threads=1, **options)


def close(found, expected):
    return float((found - expected).abs().max()) <= EXACT * max(1, float(expected.abs().max()))


def test_every_registered_runtime_is_in_the_tables_here():
    assert set(RUNTIMES.own()) == set(PACKAGES)
    assert set(HERE) | {"tensorrt"} == set(PACKAGES)


def outputs_of(found):
    """What a pass has computed: each runtime's own form of it as a list of tensors."""
    if hasattr(found, "output_tensors"):  # a request of OpenVINO's
        found = [tensor.data.copy() for tensor in found.output_tensors]
    return [torch.as_tensor(each) for each in found]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("rank", [None, (4, 6)])
def test_a_deployed_network_computes_what_torch_does(name, rank, tmp_path):
    """Both what accuracies are taken of, and the timed pass, on the inputs that it draws."""
    net, runtime = random_net(0, rank=rank), runtime_here(name)
    deployed = runtime.deploy(net, torch.zeros(2, 3, 9, 9), tmp_path / "net")
    x = torch.randn(deployed.batch or 3, 3, 9, 9)
    with torch.inference_mode():
        assert close(deployed.network(x), net(x))
    assert all(file.stat().st_size > 0 for file in deployed.files)
    shape = (1, 3, 9, 9)
    torch.manual_seed(7)
    run = deployed.ready(shape)
    torch.manual_seed(7)
    drawn = {
        "torch": torch.randn(shape),
        "numpy": torch.tensor(np.random.default_rng(0).standard_normal(shape, dtype=np.float32)),
    }
    x = drawn["numpy" if name in ("onnxruntime", "openvino") else "torch"]
    with runtime.pinned():
        (found,) = outputs_of(run())
        assert runtime.once(run) > 0
    with torch.inference_mode():
        assert close(found, net(x))


@pytest.mark.parametrize("name", HERE)
def test_an_entry_and_the_network_have_the_shapes_of_the_layers(name):
    """The weights of a table's entries are of no matter; what is computed has to be the layer."""
    net, runtime = random_net(2), runtime_here(name)
    spec = specify(net, torch.zeros(2, 3, 9, 9), AllowedRanks())
    prepared = runtime.prepare(spec, net)
    row = spec.layers["second"]
    candidate = next(each for each in row if each != DENSE)
    with runtime.pinned():
        for index in (row[DENSE], row[candidate])[name == "torch-compile" :]:  # it takes seconds
            (found,) = outputs_of(runtime.entry(prepared, index)())
            assert found.shape == (2, 16, 5, 5)
        for choice in ({}, {"second": candidate})[name == "torch-compile" :]:
            (found,) = outputs_of(runtime.network(prepared, choice)())
            assert found.shape == (2, 5)


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_a_table_is_what_its_runtimes_clock_says(name, monkeypatch):
    """The clock is ours: an entry takes as many seconds as its place among the passes."""
    net, runtime = random_net(3), runtime_here(name)
    spec = specify(net, torch.zeros(1, 3, 9, 9), AllowedRanks())
    kind, made = type(runtime), []
    entry, network = kind.entry, kind.network

    def as_entry(self, spec, index):
        run = entry(self, spec, index)
        made.append((run, 1e-3 * (index + 1)))
        return run

    def as_network(self, spec, choice):
        run = network(self, spec, choice)
        made.append((run, 1.0))
        return run

    monkeypatch.setattr(kind, "entry", as_entry)
    monkeypatch.setattr(kind, "network", as_network)
    monkeypatch.setattr(
        kind, "once", lambda self, run: next(seconds for each, seconds in made if each is run)
    )
    state = measure(runtime.prepare(spec, net), runtime, None, Timing(rounds=1, min_run_time=0))
    for layer, row in spec.layers.items():
        assert state["costs"][layer] == pytest.approx(
            {candidate: index + 1 for candidate, index in row.items()}
        )
    assert state["original"] == pytest.approx(1000)
    assert state["identity"]["runtime"].startswith(kind.__module__.split(".")[-1].split("_")[0][:4])


@pytest.mark.parametrize("name", sorted(set(PACKAGES) - {"torch", "torch-compile"}))
def test_a_missing_package_is_one_line_with_its_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    device = "cuda" if name == "tensorrt" else "cpu"
    with pytest.raises(MissingPackage, match=r"needs the package \w+.*\(pip install ") as caught:
        make_runtime(name, device=device)
    assert "\n" not in str(caught.value)


WORDS = st.text("abcdefgxyz_0123456789:", min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PACKAGES)),
    option=st.sampled_from(["device", "dtype", "memory_format"]),
    value=WORDS,
)
def test_an_unknown_value_of_an_option_is_one_line(name, option, value):
    known = {"cpu", "cuda", "mps", "meta", "float", "double", "half", "int8", "contiguous"}
    if value in known or value.startswith(("float", "bfloat", "cuda:")):
        return
    with pytest.raises(ValueError, match=f"{option}|device") as caught:
        make_runtime(name, **{option: value})
    assert "\n" not in str(caught.value)


def test_a_runtime_without_deploy_says_so(tmp_path):
    class Abacus(Runtime):
        @classmethod
        def from_options(cls, **options):
            return cls()

        def identity(self):
            return {}

        def entry(self, spec, index):
            return lambda: None

        def network(self, spec, choice):
            return lambda: None

    with pytest.raises(ValueError, match="Abacus: expected a runtime that takes whole networks"):
        Abacus().deploy(random_net(0), torch.zeros(1, 3, 9, 9), tmp_path / "net")


def test_passes_of_torch_compile_stay_compiled_however_many_there_are():
    """torch.compile keeps eight compiled forms of a function, and runs others eagerly, unseen."""
    from torch._dynamo.utils import counters

    runtime = make_runtime("torch-compile", threads=1)
    layer = nn.Conv2d(1, 1, 1)
    with runtime.pinned():
        runs = [runtime.ready(layer, (1, 1, 2 + n, 2)) for n in range(10)]
        before = dict(counters["stats"])
        outputs = [run() for run in runs]
    assert dict(counters["stats"]) == before  # nothing is compiled anew
    assert before["unique_graphs"] >= 10
    for n, (y,) in enumerate(outputs):
        assert y.shape == (1, 1, 2 + n, 2)


def test_programs_of_executorch_never_lose_their_threads():
    """They hold on to their threads; to run on others that are gone would end the process."""
    pytest.importorskip("executorch")
    one, two = (make_runtime("executorch", threads=n) for n in (1, 2))
    with one.pinned():
        run = one.ready(nn.Conv2d(1, 1, 1), (1, 1, 4, 4))
    with pytest.raises(RuntimeError, match="threads: expected 1, .*found 2"), two.pinned():
        pass
    with one.pinned():
        assert run()[0].shape == (1, 1, 4, 4)
    del run
    with two.pinned():
        assert two.ready(nn.Conv2d(1, 1, 1), (1, 1, 4, 4))()[0].shape == (1, 1, 4, 4)
    with one.pinned():  # the other tests' number
        pass


def test_formats_of_exports_are_written_whole(tmp_path):
    """The written files are opened by the runtimes themselves, away from this package."""
    openvino = pytest.importorskip("openvino")
    from nni_haloc.costs.device.openvino_runtime import export_openvino

    net, x = random_net(5, rank=(3, 5)), torch.randn(2, 3, 9, 9)
    assert export_openvino(net, x, tmp_path / "model.xml") < EXACT
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    compiled = openvino.Core().compile_model(
        tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    with torch.inference_mode():
        assert close(torch.tensor(compiled(x.numpy())[0]), net(x))
    # Weights of 32 bits: they are the numbers of the network, not their nearest of 16.
    assert (tmp_path / "model.bin").stat().st_size >= 4 * net.head.weight.numel()
    with pytest.raises(ValueError, match="expected training images"):
        export_openvino(net, x, tmp_path / "int8.xml", x[:0])
    assert not (tmp_path / "int8.xml").exists()
    assert {"openvino", "openvino-int8", "executorch", "executorch-int8"} <= set(exports.FORMATS)


@pytest.mark.parametrize("ending", [".xml", ".pte"])
def test_a_damaged_file_is_one_line(ending, tmp_path):
    file = tmp_path / f"net{ending}"
    file.write_bytes(b"nothing of the kind")
    if ending == ".xml":
        pytest.importorskip("openvino")
        from nni_haloc.costs.device.openvino_runtime import open_openvino as opened
    else:
        pytest.importorskip("executorch")
        from nni_haloc.costs.device.executorch_runtime import open_executorch as opened
    with pytest.raises(ValueError, match=f"net{ending}") as caught:
        opened(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "missing")
