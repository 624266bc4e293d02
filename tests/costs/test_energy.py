"""Energy by a device's counter: from step to step, in tables, in runs; by counters of ours."""

import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.clock import Clock
from helpers.paths import DIGITS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_haloc.costs.device import energy, torch_runtime
from nni_haloc.costs.device.energy import energy_counter, energy_of_a_pass, processor_counter
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import NETWORK, merge
from nni_haloc.costs.device.runtime import Runtime, Timing
from nni_haloc.costs.device.spec import share
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.from_settings import cost_table
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import MissingPackage, SettingsError
from nni_haloc.utils.versions import processor

QUICK = Timing(rounds=1, min_run_time=0)


class Meter:
    """A device that takes 3 mJ and a hundredth of a second a pass; its counter moves in steps."""

    def __init__(self, step):
        self.step, self.passes, self.calls = step, 5, []

    def launch(self):
        self.calls.append("launch")
        self.passes += 1
        return 1

    def wait(self):
        self.calls.append("wait")

    def read(self):
        self.calls.append("read")
        return 1000 + 3.0 * self.step * (self.passes // self.step)

    def now(self):
        return self.passes / 100


@pytest.mark.parametrize("step", [1, 7, 40, 90])
@pytest.mark.parametrize(("asked", "least"), [(0.0, 0.5), (2.0, 2.0)])
def test_passes_are_counted_from_step_to_step_however_long_those_are(
    monkeypatch, step, asked, least
):
    meter = Meter(step)
    monkeypatch.setattr(energy, "perf_counter", meter.now)
    found = energy_of_a_pass(meter.launch, meter.wait, meter.read, asked)
    assert found == pytest.approx(3.0, rel=1e-12)
    assert 100 * least <= meter.passes <= 100 * least + 2 * step + 5 + 1
    assert meter.calls[1:4] == ["launch", "read", "wait"]  # it is read while the device works


def test_a_counter_that_stands_still_is_an_error(monkeypatch):
    meter = Meter(10**9)
    monkeypatch.setattr(energy, "perf_counter", meter.now)
    with pytest.raises(RuntimeError, match="energy_mj: the device's counter stands still at 1000"):
        energy_of_a_pass(meter.launch, meter.wait, meter.read)


@pytest.fixture
def counted(monkeypatch):
    """Devices whose counters move on by 2 mJ each millisecond: they draw two watts."""
    monkeypatch.setattr(energy, "_SHORTEST", 0.0)
    monkeypatch.setattr(energy, "BETWEEN_READINGS", 1e-4)
    counter = lambda: 2e3 * torch_runtime.perf_counter()  # noqa: E731
    monkeypatch.setattr(torch_runtime, "energy_counter", lambda device: counter)


def test_a_runtime_divides_by_the_number_of_its_passes(device, monkeypatch):
    """The device takes 3 mJ a pass by a counter that counts the passes themselves."""
    monkeypatch.setattr(energy, "_SHORTEST", 0.01)
    passes = []
    monkeypatch.setattr(torch_runtime, "energy_counter", lambda name: lambda: 3.0 * len(passes))
    x = torch.ones(8, device=device)
    runtime = TorchRuntime(str(device))
    assert runtime.energy(lambda: passes.append(x + 1)) == pytest.approx(3.0)
    assert len(passes) > 2


@pytest.fixture
def spec():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return specify(model, torch.randn(2, 8, 6, 6), AllowedRanks(step=4))


@pytest.fixture
def clock(spec):
    return Clock(spec, {i: 1.0 + i / 8 for i in range(len(spec.entries))})


@pytest.mark.parametrize("where", ["alone", "in-place"])
def test_a_table_has_what_each_entry_consumes_and_the_rest_of_the_network(
    tmp_path, spec, clock, where
):
    """Two watts: in millijoules each entry costs twice what it costs in milliseconds."""
    out, timing = tmp_path / "costs.json", Timing(where, rounds=3, min_run_time=0)
    measure(spec, clock, out, timing, metric="energy_mj")
    content, table = json.loads(out.read_text()), CostTable.load(out)
    assert (table.metric, content["unit"]) == ("energy_mj", "millijoules")
    for layer, row in spec.layers.items():
        expected = {name: 2 * clock.cost[index] for name, index in row.items()}
        assert table.costs[layer] == pytest.approx(expected)
    assert table.fixed == pytest.approx(2 * clock.fixed)


def test_energy_is_gone_on_with_and_does_not_mix_with_time(tmp_path, spec, clock):
    out = tmp_path / "costs.json"
    clock.stop = 3
    with pytest.raises(KeyboardInterrupt):
        measure(spec, clock, out, QUICK, metric="energy_mj")
    clock.stop, before = None, len([what for what in clock.timed if what != NETWORK])
    clock.timed = []
    measure(spec, clock, out, QUICK, metric="energy_mj")
    assert len([what for what in clock.timed if what != NETWORK]) == len(spec.entries) - before
    with pytest.raises(
        ValueError, match=r"costs\.json: expected latency_ms in milliseconds, found energy_mj in"
    ):
        measure(spec, clock, out, QUICK)


def test_workers_files_of_energy_are_joined_and_not_with_those_of_time(tmp_path, spec, clock):
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for i, metric in enumerate(("energy_mj", "energy_mj", "latency_ms")):
        part = share(spec, i % 2, 2)
        measure(spec, clock, files[i], QUICK, indices=part, metric=metric)
    joined = merge(spec, files[:2])
    assert (joined["metric"], joined["fixed"]) == ("energy_mj", pytest.approx(2 * clock.fixed))
    with pytest.raises(ValueError, match=r"2\.json: expected energy_mj in millijoules, found lat"):
        merge(spec, [files[0], files[2]])


def table_of(path, **cost):
    cost = {"batch_size": 1, **cost}
    config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
    model, x, file = build_model("digits_cnn"), torch.randn(1, 1, 8, 8), config.cost.table
    return cost_table(config, "cost", "energy_mj", file, model, x, AllowedRanks(step=16), path)


def test_the_command_and_a_run_make_tables_of_energy(tmp_path, capsys, counted):
    out = tmp_path / "costs.json"
    arguments = ["--model", "digits_cnn", "--input", "1x8x8", "--out", str(out)]
    measure_main([*arguments, "--metric", "energy_mj", "--rounds", "1", "--min-run-time", "0"])
    assert capsys.readouterr().out.count(" mJ; ") == 1
    table = CostTable.load(out)
    assert (table.metric, table.identity["input"]) == ("energy_mj", [1, 1, 8, 8])
    assert table_of(tmp_path, metric="energy_mj", table=str(out)) == table
    with pytest.raises(SettingsError, match=r"cost\.table: .*: measured with input \[1, 1, 8, 8\]"):
        table_of(tmp_path, metric="energy_mj", table=str(out), batch_size=2)
    own = table_of(tmp_path, metric="energy_mj", batch_size=2)
    assert (own.metric, own.identity["input"]) == ("energy_mj", [2, 1, 8, 8])
    with pytest.raises(ValueError, match="measured for another input|expected latency_ms"):
        measure_main([*arguments, "--rounds", "1"])


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_a_processor_that_counts_no_energy_is_refused_in_one_line(tmp_path, monkeypatch, runtime):
    pytest.importorskip(runtime)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    refused = r"energy_mj: expected a processor that counts its energy \(RAPL\), found no counter"
    with pytest.raises(SettingsError, match=rf"^cost\.metric: {refused} .*/none; ") as error:
        table_of(tmp_path, metric="energy_mj", runtime=runtime)
    assert "\n" not in str(error.value)


def test_another_device_counts_no_energy():
    needed = "energy_mj: expected an NVIDIA device whose driver counts energy, or a processor"
    with pytest.raises(ValueError, match=rf"^{needed} .*, found device 'mps'; choose cuda or cpu"):
        energy_counter("mps")


class Machine:
    """A folder as Linux has it for RAPL: packages with parts, and what is no package."""

    def __init__(self, folder, ranges, values):
        self.folder, self.ranges = folder, ranges
        for number, (most, value) in enumerate(zip(ranges, values, strict=True)):
            self._domain(f"intel-rapl:{number}", f"package-{number}", most, value)
            self._domain(f"intel-rapl:{number}:0", "core", most, 1)  # in the package already
            self._domain(f"intel-rapl-mmio:{number}", f"package-{number}", most, value)  # again
        self._domain(f"intel-rapl:{len(ranges)}", "psys", 10**9, 5)  # the whole board
        (folder / "dtpm").mkdir()

    def _domain(self, place, name, most, value):
        (self.folder / place).mkdir()
        for file, content in (("name", name), ("max_energy_range_uj", most), ("energy_uj", value)):
            (self.folder / place / file).write_text(f"{content}\n")

    def set(self, number, value):
        (self.folder / f"intel-rapl:{number}" / "energy_uj").write_text(f"{value}\n")


@settings(max_examples=50, deadline=None)
@given(data=st.data(), ranges=st.lists(st.integers(2, 262_143_328_850), min_size=1, max_size=3))
def test_counters_that_begin_again_add_up_to_what_was_consumed(tmp_path_factory, data, ranges):
    """The counter shows the true sum modulo its range; it is read once a range at least."""
    true = [data.draw(st.integers(0, most - 1)) for most in ranges]
    start = sum(true)
    machine = Machine(tmp_path_factory.mktemp("rapl"), ranges, true)
    read = processor_counter(machine.folder)
    assert read() == 0
    for _ in range(data.draw(st.integers(1, 6))):
        for number, most in enumerate(ranges):
            true[number] += data.draw(st.integers(0, most - 1))
            machine.set(number, true[number] % most)
        assert read() == pytest.approx((sum(true) - start) / 1000, rel=1e-12)


def test_a_runtime_on_the_processor_divides_its_counters_by_the_passes(tmp_path, monkeypatch):
    """Two packages take 3 mJ and 1 mJ a pass; the first one's counter begins again all the time."""
    monkeypatch.setattr(energy, "_SHORTEST", 0.01)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "BETWEEN_READINGS", 1e-4)
    machine, passes = Machine(tmp_path, [10_000_019, 10**9], [10_000_000, 0]), []

    class Here(Runtime):
        @classmethod
        def from_options(cls, **options):
            return cls()

        def identity(self):
            return {"runtime": "here", "device": processor()}

        def entry(self, spec, index): ...

        def network(self, spec, choice): ...

    def run():
        passes.append(None)
        machine.set(0, (10_000_000 + 3000 * len(passes)) % 10_000_019)
        machine.set(1, 1000 * len(passes))

    for runtime in (Here(), TorchRuntime()):
        assert runtime.energy(run) == pytest.approx(4.0, rel=1e-9)


@contextmanager
def without_privileges():
    """Be nobody for a block's time, where the tests run as root, who may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the permissions of POSIX")
def test_counters_that_may_not_be_read_are_one_line_with_the_remedy():
    """As Linux has them since 2020: for root alone."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder), [1000], [5])
        machine.folder.chmod(0o755)
        (machine.folder / "intel-rapl:0" / "energy_uj").chmod(0o000)
        remedy = rf"sudo chmod a\+r {folder}/intel-rapl:\*/energy_uj"
        refused = rf"found {folder}/intel-rapl:0/energy_uj: Permission denied; .*\({remedy}\)"
        with without_privileges(), pytest.raises(ValueError, match=refused) as error:
            processor_counter(machine.folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj"])
def test_a_counter_that_says_something_else_is_one_line(tmp_path, file):
    machine = Machine(tmp_path, [1000], [5])
    (tmp_path / "intel-rapl:0" / file).write_text("-1\n2")
    with pytest.raises(ValueError, match=rf"{file}: expected microjoules, found '-1") as error:
        processor_counter(machine.folder)
    assert "\n" not in str(error.value)


def test_a_runtime_that_measures_no_energy_says_so(spec):
    class Abacus(Clock):
        energy = Runtime.energy

    abacus = Abacus(spec, dict.fromkeys(range(len(spec.entries)), 1.0))
    with pytest.raises(ValueError, match="^energy_mj: expected a runtime .*found clock; measure "):
        measure(spec, abacus, None, QUICK, metric="energy_mj")


@pytest.fixture
def nvml(monkeypatch):
    """A driver of two devices; torch sees them in the other order, and the second has no counter.

    It counts 70 mJ for the first one.
    """

    class NVMLError(Exception):
        pass

    def consumed(handle):
        if handle != "first":
            raise NVMLError("Not Supported")
        return 70

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-1a2b": "first", "GPU-3c4d": "second"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=consumed,
    )
    devices = {
        "cuda:0": SimpleNamespace(name="Tesla K80", uuid="3c4d"),
        "cuda:1": SimpleNamespace(name="H100", uuid="1a2b"),
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", driver)


def test_a_device_is_found_by_its_identifier_whatever_its_number(nvml):
    assert energy_counter("cuda:1")() == 70.0
    with pytest.raises(ValueError, match=r"found Tesla K80 \(cuda:0\), whose driver says: Not Sup"):
        energy_counter("cuda:0")


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingPackage, match=r"energy_mj: .*pip install 'nni-haloc\[energy\]'"):
        energy_counter("cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [False, True])
def test_a_cuda_device_gives_a_table_of_energy(spec, graph):
    runtime = TorchRuntime("cuda", graph=graph)
    try:
        energy_counter("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    content = measure(spec, runtime, None, QUICK, metric="energy_mj")
    assert content["identity"]["graph"] is graph
    assert all(cost > 0 for row in content["costs"].values() for cost in row.values())
