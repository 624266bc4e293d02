"""Runtimes and predictors by name: ours, and those that another package adds."""

import sys

import pytest
import torch
from helpers.paths import DIGITS
from torch import nn

from nni_haloc.costs.accelerator import accelerator_table
from nni_haloc.costs.analytic import mac_table
from nni_haloc.costs.device.costs_file import UNITS
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.onnx_models import with_onnx
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.device.runtime import Runtime, Timing
from nni_haloc.costs.device.spec import draw
from nni_haloc.costs.from_settings import cost_table, runtime_of
from nni_haloc.costs.latency import measure_latency
from nni_haloc.costs.measure import measure_main, predicted_table
from nni_haloc.costs.predictors import Predictor
from nni_haloc.costs.regression import complete
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import load_config
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.registries import PREDICTORS, RUNTIMES
from nni_haloc.inputs.schema.values import METRICS
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import MissingPackage, SettingsError

RULES = AllowedRanks(step=4)


class Abacus(Runtime):
    """Another package's runtime: a millisecond for each entry, ten for the network."""

    options = None

    @classmethod
    def from_options(cls, **options):
        if options["dtype"] != "float32":
            raise ValueError(f"dtype: an abacus has beads, found {options['dtype']}")
        cls.options = options
        return cls()

    def identity(self):
        facts = {"runtime": "abacus 1", "device": "beads", "dtype": "float32"}
        return facts | {"memory_format": "contiguous", "threads": 1}

    def entry(self, spec, index):
        return lambda: 1e-3

    def network(self, spec, choice):
        assert isinstance(spec.module, nn.Module)
        return lambda: 1e-2

    def once(self, run):
        return run()


@pytest.fixture
def abacus(monkeypatch):
    monkeypatch.setitem(RUNTIMES._added, "abacus", Abacus)


@pytest.fixture
def peaks(monkeypatch):
    """Another package's predictor of a metric of its own: a thousandth of the MACs."""

    def table(model, example, allowed, runtime, progress):
        macs = mac_table(model, example, allowed)
        costs = {
            layer: {name: cost / 1000 for name, cost in row.items()}
            for layer, row in macs.costs.items()
        }
        return CostTable("peak_kib", costs, macs.fixed / 1000)

    monkeypatch.setitem(PREDICTORS._added, "peak_kib", Predictor("peak_kib", "kibibytes", table))


def table_of(tmp_path, **cost):
    """The cost table of a run whose settings have these keys in their section ``cost``."""
    config = load_config(DIGITS, {f"cost.{key}": value for key, value in cost.items()})
    model, example = build_model("digits_cnn"), torch.randn(1, 1, 8, 8)
    metric, file = config.cost.metric, config.cost.table
    return cost_table(config, "cost", metric, file, model, example, RULES, tmp_path / "costs.json")


def test_every_metric_of_the_settings_has_a_unit_and_a_predictor():
    assert set(METRICS) == set(UNITS)
    for name in METRICS:
        assert (PREDICTORS[name].metric, PREDICTORS[name].unit) == (name, UNITS[name])


def test_another_packages_runtime_measures_by_the_command(tmp_path, abacus):
    out = tmp_path / "costs.json"
    arguments = ["--model", "digits_cnn", "--input", "1x8x8", "--out", str(out), "--rounds", "1"]
    measure_main([*arguments, "--min-run-time", "0", "--runtime", "abacus", "--threads", "3"])
    table = CostTable.load(out)
    assert table.identity["runtime"] == "abacus 1"
    assert {cost for row in table.costs.values() for cost in row.values()} == {1.0}
    assert table.original == pytest.approx(10)
    assert Abacus.options == {
        "device": "cpu",
        "dtype": "float32",
        "memory_format": "contiguous",
        "threads": 3,
    }
    with pytest.raises(ValueError, match="an abacus has beads, found float16"):
        measure_main([*arguments, "--runtime", "abacus", "--dtype", "float16"])


def test_a_run_measures_its_table_and_its_latencies_with_the_runtime_of_its_settings(
    tmp_path, abacus
):
    table = table_of(tmp_path, metric="latency_ms", runtime="abacus", memory_format="channels_last")
    assert table.identity["runtime"] == "abacus 1"
    assert {row[DENSE] for row in table.costs.values()} == {1.0}
    assert Abacus.options["memory_format"] == "channels_last"
    config = load_config(DIGITS, {"cost.runtime": "abacus"})
    networks = {"original": build_model("digits_cnn")}
    x = torch.randn(2, 1, 8, 8)
    assert measure_latency(networks, x, runtime_of(config)) == pytest.approx({"original": 10})


def test_a_run_measures_with_onnx_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxRuntime, "once", lambda self, run: bool(run()) * 1e-3)
    table = table_of(tmp_path, metric="latency_ms", runtime="onnxruntime", batch_size=2)
    assert table.identity["runtime"].startswith("onnxruntime")
    assert table.identity["input"] == [2, 1, 8, 8]
    networks = {"original": build_model("digits_cnn"), "other": nn.Sequential(nn.Conv2d(1, 2, 3))}
    times = measure_latency(networks, torch.randn(2, 1, 8, 8), OnnxRuntime(1), rounds=1)
    assert times == {"original": 1.0, "other": 1.0}


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"runtime": "tflite"}, r"cost\.runtime: expected one of torch, .*found 'tfl"),
        ({"predictor": "crystal"}, r"cost\.predictor: expected one of macs, .*found 'crystal'"),
        ({"metric": "joules"}, r"cost\.metric: expected one of macs, .*found 'joules'"),
        ({"metric": "roofline"}, r"cost\.metric: expected one of macs, .*found 'roofline'"),
        (
            {"metric": "params", "predictor": "macs"},
            r"cost\.predictor: expected a predictor of params, found 'macs', which gives macs",
        ),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(tmp_path, cost, message):
    with pytest.raises(SettingsError, match=message) as error:
        table_of(tmp_path, **cost)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["device", "dtype", "memory_format"])
def test_onnx_runtime_refuses_what_it_cannot_do(option):
    with pytest.raises(ValueError, match=f"runtime onnxruntime: {option}: expected"):
        OnnxRuntime.from_options(**{option: "other"})


def test_another_packages_metric_limits_a_run(tmp_path, peaks):
    table = table_of(tmp_path, metric="peak_kib")
    table.save(tmp_path / "peak.json")
    assert '"unit": "kibibytes"' in (tmp_path / "peak.json").read_text()
    assert CostTable.load(tmp_path / "peak.json") == table
    assert table_of(tmp_path, metric="peak_kib", table=str(tmp_path / "peak.json")) == table
    assert table.original == pytest.approx(table_of(tmp_path).original / 1000)
    (tmp_path / "mine.csv").write_text("layer,candidate,peak_kib\na,dense,2\na,r4,1\nfixed,,5\n")
    assert CostTable.load(tmp_path / "mine.csv").original == 7


def test_a_metric_that_no_package_here_gives_is_refused(tmp_path, peaks, monkeypatch):
    table_of(tmp_path, metric="peak_kib").save(tmp_path / "peak.json")
    monkeypatch.delitem(PREDICTORS._added, "peak_kib")
    with pytest.raises(ValueError, match=r"peak\.json: metric: expected one of .*'peak_kib'"):
        CostTable.load(tmp_path / "peak.json")


def test_another_predictor_of_the_same_metric_is_taken_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("nni_haloc.costs.predictors.measure_peaks", lambda runtime: (1e9, 1e9))
    table = table_of(tmp_path, metric="latency_ms", predictor="roofline", batch_size=3)
    assert table.identity["kind"] == "roofline"
    assert table.identity["input"] == [3, 1, 8, 8]


def test_a_predictor_must_use_the_metrics_unit():
    with pytest.raises(ValueError, match="unit of cycles: expected 'cycles', found 'ticks'"):
        Predictor("cycles", "ticks", lambda *_: None)


@pytest.mark.parametrize(
    ("predictor", "metric", "expected"),
    [
        ("analytic", None, "macs"),
        ("analytic", "params", "params"),
        ("params", None, "params"),
        ("peak_kib", None, "peak_kib"),
        ("peak_kib", "peak_kib", "peak_kib"),
    ],
)
def test_a_table_is_predicted_by_name(peaks, predictor, metric, expected):
    model, x = build_model("digits_cnn"), torch.randn(1, 1, 8, 8)
    assert predicted_table(model, x, RULES, predictor, metric).metric == expected


@pytest.mark.parametrize(
    ("predictor", "metric", "message"),
    [
        ("analytic", "cycles", "--metric: analytic gives macs or params or activation_bytes"),
        ("macs", "params", "--metric: macs gives macs, found 'params'"),
        ("crystal", None, "predictor: expected one of macs, .*, found 'crystal'"),
    ],
)
def test_a_metric_that_the_predictor_does_not_give_is_refused(predictor, metric, message):
    with pytest.raises(ValueError, match=message):
        predicted_table(
            build_model("digits_cnn"), torch.randn(1, 1, 8, 8), RULES, predictor, metric
        )


def some_measured(model, x):
    """A specification, and measurements of a sample of its entries."""
    spec = specify(model, x, AllowedRanks(step=1), program=False)
    spec = Abacus().prepare(spec, model)
    timing = Timing(rounds=1, min_run_time=0)
    return spec, measure(spec, Abacus(), None, timing, indices=draw(spec, 0.5))


def onnx_session(model, x):
    OnnxRuntime.from_options()


MISSING = [
    ("onnxruntime", onnx_session, r"\(pip install onnxruntime\)"),
    (
        "sklearn",
        lambda m, x: complete(*some_measured(m, x)),
        r"\(pip install 'nni-haloc\[sampling\]'\)",
    ),
    ("zigzag", accelerator_table, r"\(pip install 'nni-haloc\[accelerator\]'\)"),
    (
        "onnxscript",
        lambda m, x: with_onnx(specify(m, x), m),
        r"\(pip install 'nni-haloc\[onnx\]'\)",
    ),
]


@pytest.mark.parametrize(("package", "use", "remedy"), MISSING, ids=[row[0] for row in MISSING])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    monkeypatch, package, use, remedy
):
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3)), torch.randn(1, 16, 8, 8)
    loaded = [name for name in sys.modules if name.partition(".")[0] == package]
    for name in [package, *loaded]:
        monkeypatch.setitem(sys.modules, name, None)  # what makes an import of it fail
    with pytest.raises(MissingPackage, match=f"needs the package {package}.*{remedy}$") as error:
        use(model, x)
    assert "\n" not in str(error.value)
