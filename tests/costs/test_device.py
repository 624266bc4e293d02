"""Measuring on a device: what is timed and kept; neither NNI nor a second runtime is needed."""

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.clock import Clock
from helpers.commands import haloc
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nni_haloc.cli.main import app
from nni_haloc.costs.analytic import param_table
from nni_haloc.costs.device.measure import measure
from nni_haloc.costs.device.measured_file import NETWORK, merge
from nni_haloc.costs.device.onnx_models import with_layers, with_onnx
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.device.replay import Replay, record
from nni_haloc.costs.device.runtime import Timing
from nni_haloc.costs.device.spec import Specification, share
from nni_haloc.costs.device.torch_runtime import TorchRuntime, layer_spec
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.nn_meter import predicted_table
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.models import build_model
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks


class Forked(nn.Module):
    """Two convolutions alike, one of them called twice, functional calls, and control flow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        x = nn.functional.gelu(self.b(x)) + x
        x = self.b(x)
        return self.last(x.mean((2, 3)) if x.shape[0] > 1 else x.amax((2, 3)))


def spec_of(model, shape, **kwargs):
    return specify(model, torch.randn(shape), AllowedRanks(step=2, **kwargs))


@pytest.fixture
def spec():
    return spec_of(Forked(), (2, 8, 6, 6))


@pytest.fixture
def clock(spec):
    return Clock(spec, {i: 1.0 + i / 8 for i in range(len(spec.entries))})


def test_a_replayed_network_is_the_network():
    model = build_model("resnet20", {}).eval()
    x = torch.randn(2, 3, 32, 32)
    layers = specify(model, x, AllowedRanks()).layers
    tensors: dict[int, torch.Tensor] = {}
    replay = Replay(
        record(model, x, layers, tensors),
        {n: LayerSpec.of(n, m) for n, m in model.named_modules() if n in layers},
    ).eval()
    for number in replay.constants:
        setattr(replay, f"constant{number}", tensors[number])
    for name in layers:
        replay.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(replay(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121"]
)
def test_torchvisions_networks_are_replayed(name):
    """With their concatenations, shuffles, gates and functional calls."""
    model, x = build_model(f"torchvision:{name}").eval(), torch.randn(2, 3, 64, 64)
    spec = specify(model, x, AllowedRanks(kinds=("conv", "pointwise", "linear")))
    counts = []
    for network in (
        model,
        Replay(
            spec.program,
            {n: layer_spec(n, spec.entries[row[DENSE]].layer) for n, row in spec.layers.items()},
        ).eval(),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert network(x).shape == (2, 1000)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_freed_memory_is_kept_while_measuring():
    """A pass takes no megabytes from the system anew (20 ms a pass here instead of 7)."""
    layer = LayerSpec("", "conv", 16, 16, ((64, 16, 32, 32),), False, (3, 3), padding=(1, 1))
    runtime = TorchRuntime(memory_format="channels_last", threads=1)
    with runtime.pinned():
        run = runtime.ready(layer.build((14, 14)), *layer.input_shapes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            run()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1000  # 64 x 14 x 32 x 32 floats are 896 pages


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_replayed_network_does_the_same_work_whatever_its_layers_become(memory_format):
    model, shape = Forked(), (2, 8, 6, 6)
    spec = spec_of(model, shape)
    replay = Replay(
        spec.program,
        {n: layer_spec(n, spec.entries[row[DENSE]].layer) for n, row in spec.layers.items()},
    )
    plan = RankPlan({"a": (2, 2), "b": (4, 4)})
    counts = []
    for network in (model, replay, restructure(model, plan), restructure(replay, plan)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = network.eval().to(memory_format=memory_format)(
                torch.randn(shape).contiguous(memory_format=memory_format)
            )
        assert y.shape == (2, 3)
        assert y.isfinite().all()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > counts[2] == counts[3]


def test_recording_leaves_the_model_as_it_was():
    model = Forked().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record(model, torch.randn(2, 8, 6, 6), ["a"])
    assert model.training
    assert not model.a._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.default",
        "os.system.default",
        "aten.no_such_thing.default",
        "prim.device.default",
    ],
)
def test_a_program_runs_no_more_than_torchs_operations_on_tensors(op):
    with pytest.raises(ValueError, match=op):
        Replay([{"input": [1], "out": 0}, {"op": op, "args": ["/tmp/file"], "out": [1]}], {})


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.__dict__.clear", []),
        ("aten.relu.__call__", [{"tensor": 0}]),
        ("aten.from_file.default", [{"key": "/tmp/file"}]),
        ("aten.relu.default", [{"tensor": 0, "torch": "load"}]),
        ("aten.relu.default", [{"unknown": "Generator"}]),
    ],
)
def test_what_is_no_operation_and_no_recorded_value_is_refused(op, args):
    with pytest.raises(ValueError, match="cannot be run from a file"):
        Replay([{"input": [1], "out": 0}, {"op": op, "args": args, "out": [1]}], {})


@pytest.mark.parametrize(
    "program",
    [[], [{}], [{"op": "aten.relu.default"}], [7], {"op": 1}, [{"layer": "a", "args": []}]],
)
def test_a_program_that_is_none_is_one_line(program):
    with pytest.raises(ValueError, match="program: expected the operations of a forward pass"):
        Replay(program, {})


@pytest.mark.parametrize(
    "line",
    [
        {"op": "aten.from_file.default", "args": [["/tmp/file"]], "out": [1]},
        {"constant": [2], "dtype": "load", "out": 1},
    ],
)
def test_a_programs_texts_and_types_are_no_way_round(line):
    with pytest.raises(ValueError, match=r"cannot be run from a file|expected a type"):
        Replay([{"input": [1], "out": 0}, line], {})


def test_a_specification_round_trips(tmp_path, spec):
    full = with_onnx(spec, Forked())
    full.save(tmp_path / "spec.json")
    assert Specification.load(tmp_path / "spec.json") == full
    assert (
        len(spec.entries) == len({id(e) for e in spec.entries}) == 2 * len(spec.layers["a"])
    )  # b is called twice, so is not like a


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=7), "version 7"),
        (lambda c: c["layers"]["a"].update(r4=99), "layer 'a'"),
        (lambda c: c["layers"]["a"].pop("dense"), "layer 'a'"),
        (lambda c: c.pop("entries"), "entries: missing"),
        (lambda c: c.update(onnx="!"), "spec.json"),
        (lambda c: c.update(input=None), "spec.json"),
    ],
)
def test_a_bad_specification_is_one_line_that_names_the_file(tmp_path, spec, change, message):
    path = tmp_path / "spec.json"
    spec.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Specification.load(path)
    assert "spec.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["alone", "in-place"])
def test_a_table_has_what_each_entry_takes_and_the_rest_of_the_network(
    tmp_path, spec, clock, where
):
    measure(spec, clock, tmp_path / "costs.json", Timing(where, rounds=3, min_run_time=0))
    table = CostTable.load(tmp_path / "costs.json")
    for layer, row in spec.layers.items():
        assert table.costs[layer] == pytest.approx(
            {name: clock.cost[index] for name, index in row.items()}
        )
    assert table.fixed == pytest.approx(clock.fixed)
    assert all(
        value == pytest.approx(0, abs=1e-9)
        for row in table.spread.values()
        for value in row.values()
    )
    assert table.identity["where"] == where


def test_layers_alike_share_an_entry_and_what_they_gain_in_place(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    spec = spec_of(model, (1, 8, 6, 6))
    assert spec.layers["0"] == spec.layers["1"]
    clock = Clock(spec, {i: 2.0 + i for i in range(len(spec.entries))})
    content = measure(spec, clock, None, Timing("in-place", rounds=1, min_run_time=0))
    assert content["costs"]["0"] == pytest.approx(
        {name: clock.cost[index] for name, index in spec.layers["0"].items()}
    )
    assert content["costs"]["1"] == content["costs"]["0"]


def test_measuring_goes_on_where_it_stopped_and_measures_nothing_twice(tmp_path, spec, clock):
    out, timing = tmp_path / "costs.json", Timing(rounds=2, min_run_time=0)
    clock.stop = 5
    with pytest.raises(KeyboardInterrupt):
        measure(spec, clock, out, timing)
    with pytest.raises(ValueError, match="not finished"):
        CostTable.load(out)
    before = json.loads(out.read_text())["runs"]
    assert (
        sum(len(values) for row in before.values() for values in row.values())
        == 5 - clock.timed.count(NETWORK)
        > 0
    )
    clock.stop, first = None, clock.timed
    clock.timed = []
    measure(spec, clock, out, timing)
    timed = [what for what in first + clock.timed if what != NETWORK]
    assert sorted(timed) == sorted(2 * [*range(len(spec.entries))])
    after = json.loads(out.read_text())["runs"]
    assert all(
        after[layer][name][: len(values)] == values
        for layer, row in before.items()
        for name, values in row.items()
    )
    clock.timed = []
    content = measure(spec, clock, out, timing)
    assert not clock.timed
    assert content == json.loads(out.read_text())


def test_the_network_is_timed_all_along_a_round_and_not_in_one_moment(spec, clock):
    """Timed once a round, at its end, ResNet-18 was measured at 47 to 57 ms.

    All its predictions were 6 ms too long with it.
    """
    content = measure(spec, clock, None, Timing(rounds=2, min_run_time=0))
    found, between = clock.timed.count(NETWORK), math.ceil(len(spec.entries) / 8)
    assert found == len(content["network"]) == 2 * math.ceil(len(spec.entries) / between)
    assert clock.timed[between :: between + 1] == found * [NETWORK]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "another"),
        ("input", (4, 8, 6, 6)),
        ("device", "other"),
        ("memory_format", "x"),
        ("graph", True),
        ("tf32", False),
        ("where", "in-place"),
    ],
)
def test_another_things_measurements_are_refused(tmp_path, spec, clock, key, value):
    out = tmp_path / "costs.json"
    measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    before = out.read_bytes()
    timing = Timing(value if key == "where" else "alone", rounds=2, min_run_time=0)
    if key in ("model", "input"):
        spec = Specification(**{**vars(spec), key: value})
    elif key != "where":
        identity = clock.identity() | {key: value}
        clock.identity = lambda: identity
    with pytest.raises(ValueError, match=f"costs.json: measured for another {key}: "):
        measure(spec, clock, out, timing)
    assert out.read_bytes() == before


def test_a_device_that_disappears_is_one_line_and_loses_nothing(tmp_path, spec, clock):
    out, once = tmp_path / "costs.json", clock.once

    def gone(run):
        if len(clock.timed) > 6:
            raise RuntimeError("CUDA error: device unavailable\nand much more")
        return once(run)

    clock.once = gone
    with pytest.raises(
        ValueError,
        match=r"layer '.', candidate '.*': CUDA error: device unavailable; "
        r"what was measured .*costs.json$",
    ):
        measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    before = json.loads(out.read_text())["runs"]
    clock.once = once
    after = measure(spec, clock, out, Timing(rounds=1, min_run_time=0))["runs"]
    assert all(
        after[layer][name] == values
        for layer, row in before.items()
        for name, values in row.items()
        if values
    )
    assert [len(values) for row in after.values() for values in row.values()] == [1] * len(
        spec.entries
    )


def test_a_model_that_has_changed_under_its_name_is_refused(tmp_path, spec, clock):
    out, timing = tmp_path / "costs.json", Timing(rounds=1, min_run_time=0)
    measure(spec, clock, out, timing)
    wider = Forked()
    wider.a = nn.Conv2d(8, 8, 5, padding=2)
    changed = spec_of(wider, (2, 8, 6, 6))
    for again in (lambda: measure(changed, clock, out, timing), lambda: merge(changed, [out])):
        with pytest.raises(
            ValueError,
            match=r"costs\.json: measured for another network: its layer 'a' had another geometry",
        ):
            again()


def test_more_ranks_of_the_same_model_are_added(tmp_path, spec, clock):
    out, timing = tmp_path / "costs.json", Timing(rounds=1, min_run_time=0)
    measure(spec, clock, out, timing)
    finer = specify(Forked(), torch.randn(2, 8, 6, 6), AllowedRanks(step=1))
    more = Clock(finer, dict.fromkeys(range(len(finer.entries)), 1.0))
    measure(finer, more, out, timing)
    timed = {finer.first_users()[i][1] for i in more.timed if i != NETWORK}
    assert timed == {"r1", "r3", "r5", "r7"}
    assert set(CostTable.load(out).costs["a"]) == set(finer.layers["a"]) >= {"dense", "r1", "r2"}


def test_a_table_that_is_measured_once_more_stays_one_meanwhile(tmp_path, spec, clock):
    out = tmp_path / "costs.json"
    measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    before, clock.timed, clock.stop = CostTable.load(out).costs, [], 3
    with pytest.raises(KeyboardInterrupt):
        measure(spec, clock, out, Timing(rounds=2, min_run_time=0))
    assert CostTable.load(out).costs == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("unit"), "unit: missing"),
        (lambda c: c.update(identity=[]), "list"),
        (lambda c: c.pop("network"), "network: missing"),
        (
            lambda c: c.update(metric="cycles", unit="cycles"),
            "expected latency_ms in milliseconds, found cycles",
        ),
    ],
)
def test_a_file_that_is_no_state_is_one_line(tmp_path, spec, clock, change, message):
    out = tmp_path / "costs.json"
    content = measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    change(content)
    out.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"costs\.json: .*{message}"):
        measure(spec, clock, out, Timing(rounds=2, min_run_time=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"^rounds: expected 1 or more, found 0$"),
        ({"min_run_time": -1.0}, r"^min_run_time: expected 0 or more, found -1\.0$"),
    ],
)
def test_no_rounds_and_negative_times_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Timing(**options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("device", "meta"), ("device", "warp"), ("memory_format", "channels-last"), ("dtype", "int8")],
)
def test_a_device_or_form_that_torch_does_not_have_is_one_line(option, value):
    with pytest.raises(ValueError, match=option):
        TorchRuntime(**{option: value})


def test_onnx_runtimes_errors_are_one_line(tmp_path, spec):
    full = with_onnx(spec, Forked())
    broken = Specification(**{**vars(full), "onnx": b"no model"})
    with pytest.raises(ValueError, match="the network: ONNX Runtime: "):
        measure(
            broken,
            OnnxRuntime(1),
            tmp_path / "costs.json",
            Timing(rounds=1, min_run_time=0),
            indices=[],
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "0.5", "--part", "0/2"], "--sample"),
        (["--sample", "0.5", "--where", "in-place"], "--sample"),
        (["--runtime", "onnxruntime", "--device", "cuda"], "runtime onnxruntime: device: expected"),
        (["--runtime", "onnxruntime", "--dtype", "bfloat16"], "runtime onnxruntime: dtype"),
        (["--runtime", "tflite"], "executorch, tensorrt, found 'tflite'"),
        (["--rounds", "0"], "rounds"),
        (["--graph"], "graph: expected a CUDA device, such as cuda, found 'cpu'; leave graph out"),
        (["--runtime", "onnxruntime", "--graph"], "runtime onnxruntime: graph: expected False"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_measured(
    tmp_path, spec, arguments, message
):
    spec.save(tmp_path / "spec.json")
    with pytest.raises(ValueError, match=message):
        measure_main(
            [
                "--spec",
                str(tmp_path / "spec.json"),
                "--out",
                str(tmp_path / "costs.json"),
                *arguments,
            ]
        )
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize("value", [0, -1.5, "fast", None])
def test_a_file_with_times_that_are_none_is_refused(tmp_path, spec, clock, value):
    out = tmp_path / "costs.json"
    measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    content = json.loads(out.read_text())
    content["runs"]["a"]["r2"] = [1.0, value]
    out.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="costs.json: runs: layer 'a', candidate 'r2': expected numbers above 0"
    ):
        measure(spec, clock, out, Timing(rounds=3, min_run_time=0))
    out.write_text(out.read_text()[:100])
    with pytest.raises(ValueError, match=r"costs.json: not a JSON file"):
        measure(spec, clock, out, Timing(rounds=3, min_run_time=0))


def test_workers_share_the_entries_and_their_files_are_put_together(tmp_path, spec, clock):
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for i, file in enumerate(files):
        measure(spec, clock, file, Timing(rounds=1, min_run_time=0), indices=share(spec, i, 3))
        with pytest.raises(ValueError, match="not finished"):
            CostTable.load(file)
    candidates = [
        what for what in clock.timed if what != NETWORK and spec.first_users()[what][1] != DENSE
    ]
    assert sorted(candidates) == sorted(set(candidates))  # each by one worker
    content = merge(spec, files)
    assert content["costs"] == pytest.approx(
        {
            layer: pytest.approx({name: clock.cost[index] for name, index in row.items()})
            for layer, row in spec.layers.items()
        }
    )
    with pytest.raises(ValueError, match="measured in none of"):
        merge(spec, files[:2])


def test_workers_of_different_speed_are_told_of(tmp_path, spec, clock):
    files = [tmp_path / f"{part}.json" for part in range(2)]
    for part, file in enumerate(files):
        clock.cost = {index: (1 + part) * cost for index, cost in clock.cost.items()}
        measure(spec, clock, file, Timing(rounds=1, min_run_time=0), indices=share(spec, part, 2))
    with pytest.warns(
        match=r"1\.json, .*0\.json: expected workers that are alike, found .* 2\.00 times as long"
    ):
        merge(spec, files)


def uniform_weights(module, value=0.01):
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        tensor.data.fill_(value)
    return module.eval()


def run_onnx(model, x):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, (3, 5), padding="same", dilation=2, bias=False),
        nn.Conv2d(6, 8, 1, stride=2),
        nn.Linear(6, 8),
        nn.Linear(6, 8, bias=False),
    ],
)
def test_an_entrys_onnx_model_is_the_layer(layer):
    shape = (2, 6) if isinstance(layer, nn.Linear) else (2, 6, 9, 11)
    model = nn.Sequential(layer)
    spec = with_onnx(
        specify(
            model, torch.randn(shape), AllowedRanks(step=2, kinds=("conv", "pointwise", "linear"))
        ),
        model,
    )
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    for entry in spec.entries:
        built = uniform_weights(layer_spec("", entry.layer).build(entry.rank))
        torch.testing.assert_close(run_onnx(entry.onnx, x), built(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", [{}, {"a": "r2"}, {"a": "r4", "b": "r2"}])
def test_a_networks_onnx_model_is_the_network_whatever_its_layers_become(choice):
    network, shape = Forked(), (2, 8, 6, 6)
    spec = with_onnx(spec_of(network, shape), network)
    plan = RankPlan(
        {layer: spec.entries[spec.layers[layer][name]].rank for layer, name in choice.items()}
    )
    x = torch.randn(shape)
    expected = uniform_weights(restructure(network, plan))(x).detach()
    torch.testing.assert_close(
        run_onnx(with_layers(spec, choice), x), expected, rtol=1e-4, atol=1e-5
    )


class ByWork:
    """Stands for an nn-Meter predictor, which would be downloaded.

    It returns milliseconds by the weights of an ONNX model.
    """

    def __init__(self, lost=()):
        self.lost = lost

    def predict(self, model, model_type):
        assert model_type == "onnx"
        onnx.checker.check_model(model)
        sizes = [math.prod(t.dims) for t in model.graph.initializer]
        return 0 if len(sizes) in self.lost else 1e-3 * sum(sizes)


def test_a_predictor_of_onnx_models_is_given_whole_candidates_and_a_zero_is_an_error():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    table = predicted_table(model, torch.randn(2, 8, 6, 6), ByWork(), AllowedRanks(step=2), "phone")
    params = param_table(model, torch.randn(2, 8, 6, 6), AllowedRanks(step=2))
    for layer, row in params.costs.items():
        assert table.costs[layer] == pytest.approx(
            {name: 1e-3 * cost for name, cost in row.items()}
        )
    assert table.original == pytest.approx(1e-3 * params.original)
    assert (table.metric, table.identity["device"]) == ("latency_ms", "phone")
    with pytest.raises(
        ValueError,
        match="layer '0', candidate 'r6': expected a latency above 0 from ByWork, found 0",
    ):
        predicted_table(model, torch.randn(2, 8, 6, 6), ByWork(lost={3}), AllowedRanks(step=2))


def test_a_device_needs_onnx_runtime_or_pytorch_and_nothing_of_nni(tmp_path):
    spec = with_onnx(spec_of(build_model("digits_cnn"), (1, 1, 8, 8)), build_model("digits_cnn"))
    spec.save(tmp_path / "spec.json")
    common = {
        "nni",
        "pytorch_lightning",
        "torchmetrics",
        "torchvision",
        "sklearn",
        "tensorly",
        "scipy",
        "pydantic",
        "typer",
        "rich",
    }
    for runtime, missing in (
        ("torch", common | {"onnx", "onnxruntime"}),
        ("onnxruntime", common | {"torch", "onnx"}),
    ):
        out = tmp_path / f"{runtime}.json"
        program = (
            f"import sys\nfor name in {sorted(missing)}: sys.modules[name] = None\n"
            "from nni_haloc.costs.measure import main\n"
            f"sys.argv = ['measure', '--spec', {str(tmp_path / 'spec.json')!r},"
            f" '--out', {str(out)!r}, '--runtime', {runtime!r},"
            " '--rounds', '1', '--min-run-time', '0.0001', '--threads', '1']\nmain()\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        table = CostTable.load(out)
        assert table.identity["runtime"].startswith(runtime)
        assert {layer: set(row) for layer, row in table.costs.items()} == {
            layer: set(row) for layer, row in spec.layers.items()
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "nowhere.json"], "no such file"),
        (["--model", "resnet20"], "--model and --input"),
        (["--model", "resnet20", "--input", "3x32"], "3x32"),
        (["--model", "resnet20", "--input", "3x32x32", "--device", "cuda:77"], "cuda:77"),
        (["--model", "resnet20", "--input", "3x32x32", "--dtype", "int8"], "int8"),
        (["--model", "resnet20", "--input", "3x32x32", "--part", "4/4"], "--part"),
        (["--model", "resnet20", "--input", "3x32x32", "--threads", "0"], "--threads"),
        (["--model", "resnet21", "--input", "3x32x32"], "resnet21"),
    ],
)
def test_bad_options_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        measure_main(arguments)
    assert "\n" not in str(error.value)


def test_what_was_measured_in_one_precision_is_timed_in_it(spec):
    runtime = TorchRuntime(dtype="bfloat16")
    run = runtime.network(runtime.prepare(spec, Forked()), {"a": "r2"})
    assert [y.dtype for y in run()] == [torch.bfloat16]


def measured(*arguments, cwd):
    done = haloc(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


QUICK = ("--rounds", "1", "--min-run-time", "0.0001", "--threads", "1")


def test_one_command_measures_a_model_and_goes_on_with_what_is_missing(tmp_path):
    model = ("--model", "digits_cnn", "--input", "1x8x8", "--batch", "2")
    said = measured("measure", *model, *QUICK, cwd=tmp_path)
    assert "costs.json: the network takes" in said
    before = (tmp_path / "costs.json").read_bytes()
    measured("measure", *model, *QUICK, cwd=tmp_path)
    assert (tmp_path / "costs.json").read_bytes() == before
    done = haloc("measure", "--model", "digits_cnn", "--input", "1x8x8", *QUICK, cwd=tmp_path)
    assert done.returncode == 2
    assert "costs.json: measured for another input: [2, 1, 8, 8], now [1, 1, 8, 8]" in done.stderr
    done = haloc("measure", *model, "--fast", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_table_of_workers_is_put_together_by_the_command(tmp_path):
    measured("spec", "--model", "digits_cnn", "--input", "1x8x8", "--onnx", cwd=tmp_path)
    for i in range(2):
        measured(
            "measure",
            "--spec",
            "spec.json",
            *QUICK,
            "--part",
            f"{i}/2",
            "--out",
            f"{i}.json",
            "--runtime",
            "onnxruntime",
            cwd=tmp_path,
        )
    measured("measure", "--spec", "spec.json", "--merge", "0.json", "1.json", cwd=tmp_path)
    assert CostTable.load(tmp_path / "costs.json").identity["runtime"].startswith("onnxruntime")


@pytest.mark.parametrize(
    ("arguments", "metric"),
    [
        (["--predictor", "analytic", "--metric", "activation_bytes"], "activation_bytes"),
        (["--predictor", "roofline", "--flops", "1e9", "--bandwidth", "1e9"], "latency_ms"),
    ],
)
def test_a_table_may_be_predicted(tmp_path, arguments, metric):
    measured("predict", "--model", "digits_cnn", "--input", "1x8x8", *arguments, cwd=tmp_path)
    assert CostTable.load(tmp_path / "costs.json").metric == metric
    done = haloc(
        "predict",
        "--model",
        "digits_cnn",
        "--input",
        "1x8x8",
        "--predictor",
        "roofline",
        "--metric",
        "cycles",
        cwd=tmp_path,
    )
    assert (done.returncode, "--metric" in done.stderr) == (2, True)


def test_onnx_runtime_folds_batch_normalisation_into_convolutions_without_bias(tmp_path):
    """Biases computed at run time, as the exporter adds them, kept it from that.

    ResNet-20 took three times as long.
    """
    model = build_model("resnet20").eval()
    spec = with_onnx(
        specify(model, torch.randn(2, 3, 32, 32), AllowedRanks(kinds=("conv",))), model
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(spec.onnx, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert not {"BatchNormalization", "Expand"} & set(kinds)


def test_a_workers_file_counts_once(tmp_path, spec, clock):
    out = tmp_path / "costs.json"
    measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    with pytest.raises(ValueError, match=r"costs\.json: the same file is given twice"):
        merge(spec, [out, tmp_path / "." / "costs.json"])


def test_nothing_to_measure_is_said(clock):
    nothing = specify(Forked(), torch.randn(2, 8, 6, 6), AllowedRanks(exclude=("*",)))
    with pytest.raises(ValueError, match="expected layers to measure, found none"):
        measure(nothing, clock, None, Timing(rounds=1, min_run_time=0))


@pytest.mark.parametrize("field", [{"kind": "foo"}, {"in_channels": "x"}, {"input_shapes": None}])
def test_a_specification_that_makes_no_sense_is_one_line(spec, field):
    wrong = Specification(
        **{
            **vars(spec),
            "entries": tuple(replace(e, layer={**e.layer, **field}) for e in spec.entries),
        }
    )
    with pytest.raises(
        ValueError, match="layer '.*': (kind: expected one of|.*the specification is damaged)"
    ):
        measure(wrong, TorchRuntime(), None, Timing(rounds=1, min_run_time=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "spec.json", "--batch", "128"], "--spec and --batch: expected one of the two"),
        (
            ["--spec", "spec.json", "--rank-space", "x.yml"],
            "--spec and --rank-space: expected one of the two",
        ),
    ],
)
def test_a_specification_says_what_is_measured_and_no_option_does(
    tmp_path, monkeypatch, spec, arguments, message
):
    monkeypatch.chdir(tmp_path)
    spec.save("spec.json")
    with pytest.raises(ValueError, match=message):
        measure_main(arguments)


def test_measurements_are_not_overwritten_by_what_is_counted(tmp_path, spec, clock):
    out = tmp_path / "costs.json"
    measure(spec, clock, out, Timing(rounds=1, min_run_time=0))
    before = out.read_bytes()
    arguments = [
        "--predictor",
        "analytic",
        "--model",
        "digits_cnn",
        "--input",
        "1x8x8",
        "--out",
        str(out),
    ]
    with pytest.raises(
        ValueError, match=r"costs\.json: already holds measurements; choose another --out$"
    ):
        app(["predict", *arguments], standalone_mode=False)
    assert out.read_bytes() == before


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path):
    program = (
        "import sys; from nni_haloc.utils.files import write_json\n"
        "for i in range(300): write_json(sys.argv[1], {'version': i})"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "a.json")], stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert [process.communicate()[1] for process in running] == [b"", b""]
    assert json.loads((tmp_path / "a.json").read_text()) == {"version": 299}
