"""Cost tables: counts against torch's counter, measurements by the calls made, the file."""

import json

import pytest
import torch
from torch import nn

from nni_haloc.costs import analytic
from nni_haloc.costs.analytic import (
    activation_table,
    mac_table,
    measure_peaks,
    param_table,
    roofline_table,
)
from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device import measure as measuring
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.latency import latency_table, measure_latency  # fmt: skip
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.names import parse_rank
from nni_haloc.space.ranks import AllowedRanks


def plan_of(table, pick):
    names = {layer: pick(list(row)) for layer, row in table.costs.items()}
    return names, RankPlan({layer: parse_rank(name, "conv") for layer, name in names.items()})


@pytest.mark.parametrize(
    "pick", [lambda row: row[0], lambda row: row[-1], lambda row: row[len(row) // 2]]
)
@pytest.mark.parametrize(
    ("make", "count"), [(mac_table, count_macs), (param_table, lambda m, x: count_params(m))]
)
def test_a_plans_cost_is_that_of_the_network_it_makes(make, count, pick):
    model, x = build_model("resnet20"), torch.randn(1, 3, 32, 32)
    table = make(model, x, AllowedRanks(exclude=("conv1",)))
    names, plan = plan_of(table, pick)
    assert table.total(names) == count(restructure(model, plan), x)
    assert table.original == count(model, x)


def test_resnet20_has_its_published_size():
    model = build_model("resnet20")
    assert (count_params(model), count_macs(model, torch.randn(2, 3, 32, 32))) == (
        269_722,
        40_551_040,
    )


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x))[:, :, ::2])


def test_each_distinct_shape_and_rank_is_timed_once_a_round(monkeypatch):
    calls = []

    def timed(runs, *_):
        calls.append(runs)
        return dict.fromkeys(runs, 1e-3 * len(calls))

    monkeypatch.setattr(measuring, "time_together", timed)
    table = latency_table(
        Twins(), torch.randn(2, 8, 8, 8), AllowedRanks(step=2), timing=Timing(rounds=2)
    )
    distinct = 2 * len(table.costs["a"])  # a and b are alike, c sees another shape
    assert len(calls) == 2 * (distinct + min(8, distinct))  # the network eight times a round
    assert table.costs["a"] == table.costs["b"] != table.costs["c"]
    assert table.metric == "latency_ms"
    assert {
        "memory_format",
        "dtype",
        "threads",
        "input",
        "runtime",
        "device",
        "date",
        "runs",
    } <= set(table.identity)
    assert table.spread["a"].keys() == table.costs["a"].keys()


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_latency_is_measured_on_copies(memory_format):
    model, x = Twins().train(), torch.randn(2, 8, 8, 8)
    runtime = TorchRuntime(memory_format=memory_format, threads=1)
    table = latency_table(
        model, x, AllowedRanks(step=4), runtime, Timing(rounds=1, min_run_time=1e-4)
    )
    times = measure_latency({"original": model}, x, runtime, min_run_time=1e-4, rounds=1)
    assert all(cost > 0 for row in table.costs.values() for cost in row.values())
    assert times["original"] > 0
    assert model.training
    assert model.a.weight.is_contiguous()
    assert table.identity["memory_format"] == memory_format


def test_everything_is_timed_in_the_runtimes_precision(monkeypatch):
    seen = set()
    monkeypatch.setattr(
        TorchRuntime, "once", lambda self, run: seen.update(y.dtype for y in run()) or 1.0
    )
    table = latency_table(
        Twins(),
        torch.randn(2, 8, 8, 8),
        AllowedRanks(step=4),
        TorchRuntime(dtype="float64"),
        Timing(rounds=1),
    )
    assert seen == {torch.float64}
    assert table.identity["dtype"] == "float64"


def table():
    return CostTable(
        "macs", {"a": {"dense": 8.0, "r2": 3.0}, "b": {"dense": 6.0}}, 1.5, {"batch": 1}
    )


def test_a_table_round_trips_through_costs_json(tmp_path):
    table().save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == table()


def test_totals_and_restrictions_keep_the_rest_dense():
    assert table().original == 15.5
    assert table().total({"a": "r2"}) == 10.5
    assert table().restrict({"a": ["r2"]}) == ({"a": {"r2": 3.0}}, 7.5)
    with pytest.raises(ValueError, match="layer 'c'"):
        table().total({"c": "dense"})
    with pytest.raises(ValueError, match="no entry for layer 'a', candidate 'r4'"):
        table().restrict({"a": ["r4"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(metric="joules"), "metric.*'joules'"),
        (
            lambda c: c["costs"]["a"].update(r2=-1),
            "layer 'a', candidate 'r2': expected a positive cost, found -1",
        ),
        (lambda c: c["costs"]["a"].update(r2=0), "found 0"),
        (lambda c: c["costs"]["a"].update(r2=float("nan")), "found nan"),
        (
            lambda c: c["costs"]["a"].update(r2="3"),
            "candidate 'r2': expected a positive cost, found '3'",
        ),
        (lambda c: c["costs"]["a"].update(r2=None), "found None"),
        (lambda c: c["costs"]["b"].clear(), "layer 'b'.*no 'dense'"),
        (
            lambda c: c.update(unit="seconds"),
            "unit: expected 'multiply-accumulates' for macs, found 'seconds'",
        ),
        (lambda c: c.pop("fixed"), "fixed: missing"),
        (lambda c: c.update(fixed=-1), "fixed cost.*-1"),
        (lambda c: c.update(costs=None), "costs.json"),
    ],
)
def test_a_bad_table_is_one_line_that_names_the_file(tmp_path, change, message):
    path = tmp_path / "costs.json"
    table().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        CostTable.load(path)
    assert "costs.json" in str(error.value)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="not a JSON file"):
        CostTable.load(path)


def test_a_device_without_nni_can_measure_and_load():
    import subprocess
    import sys

    program = (
        "import sys\n"
        "for name in ('nni', 'pytorch_lightning', 'torchmetrics', 'torchvision', 'sklearn',"
        " 'tensorly'): sys.modules[name] = None\n"
        "import torch, nni_haloc\n"
        "from nni_haloc.inputs.models import build_model\n"
        "x = torch.randn(1, 1, 8, 8)\n"
        "timing = nni_haloc.Timing(rounds=1, min_run_time=1e-4)\n"
        "t = nni_haloc.latency_table(build_model('digits_cnn'), x, timing=timing)\n"
        "nni_haloc.load\n"
        "print(t.metric)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "latency_ms", done.stderr


def outputs(network, x):
    """Bytes for one image of what each module without children gives."""
    seen = []
    for module in network.eval().modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda m, a, y: seen.append(y.numel() * y.element_size() // len(y))
            )
    network(x)
    return sum(seen)


@pytest.mark.parametrize("pick", [lambda row: row[0], lambda row: row[-1]])
def test_activations_take_what_hooks_see_on_the_networks_that_plans_make(pick):
    model, x = build_model("resnet20"), torch.randn(2, 3, 32, 32)
    table = activation_table(model, x, AllowedRanks(exclude=("conv1",)))
    names, plan = plan_of(table, pick)
    assert table.total(names) == outputs(restructure(model, plan), x)


def test_a_roofline_is_the_longer_of_work_and_traffic():
    model, x = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()), torch.randn(4, 8, 10, 10)
    work, weights = 4 * 100 * 16 * 8 * 9, 16 * 8 * 9
    traffic = 4 * (4 * 100 * (8 + 16) + weights)
    relu = 2 * 4 * 4 * 100 * 16
    for flops, bandwidth in ((1e9, 1e15), (1e15, 1e9)):
        table = roofline_table(model, x, AllowedRanks(step=4), flops=flops, bandwidth=bandwidth)
        assert table.metric == "latency_ms"
        assert table.costs["0"]["dense"] == pytest.approx(
            1e3 * max(2 * work / flops, traffic / bandwidth)
        )
        assert table.fixed == pytest.approx(1e3 * relu / bandwidth)
    assert table.costs["0"]["r4"] == pytest.approx(  # three convolutions, each by its traffic
        1e3
        * 4
        * (4 * 100 * (8 + 4) + 8 * 4 + 4 * 100 * (4 + 4) + 4 * 4 * 9 + 4 * 100 * (4 + 16) + 4 * 16)
        / bandwidth
    )


def test_a_devices_peaks_are_rates(monkeypatch):
    monkeypatch.setattr(analytic, "time_together", lambda runs, *_: dict.fromkeys(runs, 0.5))
    assert measure_peaks(size=32) == (2 * 32**3 / 0.5, 2 * 4 * 32 * 32**2 / 0.5)


CSV = "layer,candidate,latency_ms\na,dense,8\na, r2 ,3.5\nb,dense,6\nnetwork,,15.5\n"


def test_measurements_of_ones_own_come_from_a_csv_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(CSV)
    found = CostTable.load(path)
    assert (found.metric, found.costs, found.fixed) == (
        "latency_ms",
        {"a": {"dense": 8.0, "r2": 3.5}, "b": {"dense": 6.0}},
        1.5,
    )
    path.write_text(CSV.replace("network,,15.5", "fixed,,2"))
    assert CostTable.load(path).original == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("latency_ms", "seconds"), "line 1: expected layer,candidate"),
        ((CSV, ""), "line 1"),
        (("3.5", "fast"), "line 3: expected .*found 'a, r2 ,fast'"),
        (("b,dense,6", "b,dense"), "line 4"),
        (("b,dense,6", "a,dense,6"), "line 4: .*once each"),
        (("3.5", "-3.5"), "candidate 'r2': expected a positive cost"),
        (("3.5", "nan"), "candidate 'r2': expected a positive cost"),
        (("a,dense,8\n", ""), "layer 'a'.*no 'dense'"),
        (("network,,15.5", "fixed,,-1"), "fixed cost"),
        (("network,,15.5\n", ""), "expected one line network"),
    ],
)
def test_a_bad_csv_file_is_one_line_that_names_it(tmp_path, change, message):
    path = tmp_path / "mine.csv"
    path.write_text(CSV.replace(*change))
    with pytest.raises(ValueError, match=message) as error:
        CostTable.load(path)
    assert "mine.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_csv_file_as_spreadsheets_write_it_is_read(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(
        b"\xef\xbb\xbflayer,candidate,latency_ms\r\na,dense,2\r\na,r4,1\r\nnetwork,,5\r\n\r\n"
    )
    assert CostTable.load(path).total({"a": "r4"}) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "costs.json",
            '{"version": 1, "metric": "macs", "identity": [], "costs": {}, "fixed": 1}',
            "identity",
        ),
        ("costs.csv", "layer,candidate,latency_ms\na,dense," + "9" * 140_000 + "x\n", "line 2"),
    ],
)
def test_odd_files_are_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        CostTable.load(tmp_path / name)
