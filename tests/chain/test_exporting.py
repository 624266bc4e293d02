"""Networks as files for other runtimes, and their times: against torch, and with a run's folder."""

import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.paths import DIGITS
from torch import nn

from nni_haloc.chain.exporting import OnnxNetwork, export_onnx, export_program, quantize_onnx
from nni_haloc.costs.counts import count_macs
from nni_haloc.costs.device import exporting, onnx_files
from nni_haloc.costs.device.onnx_runtime import OnnxRuntime
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.inputs.config import load_config, parse_config
from nni_haloc.inputs.data import digits
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.compression import compress
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.results.bench import bench, print_bench
from nni_haloc.results.export import export
from nni_haloc.runs.finished import Finished
from nni_haloc.runs.saved import load, save
from nni_haloc.training.finetuning import accuracy
from nni_haloc.utils.errors import HalocError, MissingPackage

PLAN = RankPlan({"block2.conv": (16, 16), "block3.conv": (24, 24), "block4.conv": (32, 32)})


def images(batch, *shape):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a finished run of the digits leaves, with one further stage."""
    folder = tmp_path_factory.mktemp("run")
    original = build_model("digits_cnn")
    load_weights(original, DIGITS.with_name("digits.safetensors"))
    calibration = digits(0.2).images("plain", 512)
    smaller = RankPlan({"block4.conv": (16, 16)})
    for plan, stage in ((PLAN, folder), (smaller, folder / "pruned")):
        save(
            stage,
            compress(original, plan, calibration),
            plan,
            {"name": "digits_cnn", "arguments": {}},
        )
    config = load_config(DIGITS).model_dump(mode="json")
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": {}, "parameters": {}, "config": config})
    )
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The files of all formats."""
    out = tmp_path_factory.mktemp("exported")
    before = content_of(run)
    export(run, out=out)
    assert content_of(run) == before
    return out


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def session_outputs(file, x):
    """Of ONNX Runtime as a user calls it."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def operators(file):
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def test_the_onnx_file_computes_what_torch_computes_at_any_batch_size(exported, run):
    network = load(run)
    for batch in (1, 3, 7):
        x = images(batch, 1, 8, 8)
        with torch.inference_mode():
            expected = network(x)
        torch.testing.assert_close(
            session_outputs(exported / "model.onnx", x), expected, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            OnnxNetwork(exported / "model.onnx", 1)(x), expected, atol=1e-4, rtol=1e-4
        )
    assert operators(exported / "model.onnx")["Conv"] == 4 + 2 * 3
    assert "BatchNormalization" not in operators(exported / "model.onnx")


def test_a_network_that_was_trained_in_channels_last_is_exported_and_left_as_it_was(net, tmp_path):
    net.train().to(memory_format=torch.channels_last)
    modes, state = (
        [m.training for m in net.modules()],
        {k: v.clone() for k, v in net.state_dict().items()},
    )
    difference = export_onnx(net, images(1, 3, 8, 8), tmp_path / "net.onnx")
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    x = images(7, 3, 8, 8)
    with torch.inference_mode():
        expected = net.eval()(x)
    found = session_outputs(tmp_path / "net.onnx", x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert difference < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


class Fixed(nn.Module):
    """Its batch size is written into it."""

    def forward(self, x):
        return x.view(2, 3, 64).sum(1)


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_of_one_batch_size_keeps_it_and_says_so(tmp_path, caplog):
    export_onnx(Fixed(), images(2, 3, 8, 8), tmp_path / "fixed.onnx")
    assert "Fixed: exported for batches of 2 alone" in caplog.text
    assert OnnxNetwork(tmp_path / "fixed.onnx").batch == 2
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(session_outputs(tmp_path / "fixed.onnx", x), Fixed()(x))


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_what_torch_cannot_export_is_one_line_and_loses_nothing(write, tmp_path, capfd):
    file = tmp_path / "kept.onnx"
    file.write_text("earlier")
    with pytest.raises(
        ValueError, match="^Undecided: torch can't export it: .*data-dependent"
    ) as raised:
        write(Undecided(), images(2, 3, 8, 8), file)
    assert "\n" not in str(raised.value)
    assert content_of(tmp_path) == {file: b"earlier"}
    assert capfd.readouterr() == ("", "")


class Unknown(nn.Module):
    """ONNX has no such operation."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_what_onnx_does_not_have_is_one_line(tmp_path, capfd):
    with pytest.raises(
        ValueError, match=r"net\.onnx: the network can't be exported to ONNX: .*bessel_j0"
    ) as raised:
        export_onnx(Unknown(), images(2, 3, 8, 8), tmp_path / "net.onnx")
    assert "\n" not in str(raised.value)
    assert content_of(tmp_path) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("write", "damage"), [(export_onnx, 0.01), (export_program, 0.01), (export_program, torch.nan)]
)
def test_a_file_that_differs_from_torch_is_refused(write, damage, net, tmp_path, monkeypatch):
    """The exporter's fault is put in by hand: what it traces is another network."""
    traced = onnx_files.traced

    def damaged(network, example):
        with torch.no_grad():
            network.head.bias[1] += damage
        try:
            return traced(network, example)
        finally:
            network.head.bias.data.copy_(bias)

    bias = net.head.bias.detach().clone()
    for home in (onnx_files, exporting):
        monkeypatch.setattr(home, "traced", damaged)
    with pytest.raises(
        ValueError, match=r"net\.\w+: expected torch's outputs.*they differ by (0.01|inf)"
    ):
        write(net, images(2, 3, 8, 8), tmp_path / "net.onnx")
    assert content_of(tmp_path) == {}


def test_the_exported_program_comes_back(exported, run):
    loaded = torch.export.load(exported / "model.pt2").module()
    for batch in (1, 7):
        x = images(batch, 1, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(x), load(run)(x))


def test_the_exported_folder_is_loaded_as_the_run_is(exported, run):
    x = images(7, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(load(exported)(x), load(run)(x))
    assert (exported / "ranks.json").read_bytes() == (run / "ranks.json").read_bytes()


def test_the_int8_file_is_smaller_and_nearly_as_accurate(exported, run):
    """An error of rounding moves some images across a boundary: of 360, one percent."""
    plain, small = exported / "model.onnx", exported / "model-int8.onnx"
    assert small.stat().st_size < 0.5 * plain.stat().st_size
    assert operators(small)["QuantizeLinear"] > 0
    weights = {w.name: w for w in onnx.load(small).graph.initializer}
    convolutions = [n for n in onnx.load(small).graph.node if n.op_type == "Conv"]
    makers = {n.output[0]: n for n in onnx.load(small).graph.node}
    for node in convolutions:  # 8 bits, and a scale for each output channel
        source = makers[node.input[1]]
        assert weights[source.input[0]].data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        assert (
            np.abs(onnx.numpy_helper.to_array(weights[source.input[0]]).astype(int)).max() <= 64
        )  # 7 of them: sums of 16 bits hold
        assert list(weights[source.input[1]].dims) == [weights[source.input[0]].dims[0]]
    test = digits(0.2).loader("test", 64)
    (before,) = accuracy(load(run), test)
    (found,) = accuracy(OnnxNetwork(small, 1), test)
    assert abs(found - before) <= 0.01
    x = digits(0.2).images("test", 200)
    with torch.inference_mode():
        assert (
            session_outputs(small, x).argmax(1) == load(run)(x).argmax(1)
        ).float().mean() >= 0.98


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate_method": "guess"}, "model.onnx: can't be quantized: .*guess"),
        (
            {"images": torch.zeros(0, 1, 8, 8)},
            "quantization: expected training images to calibrate on, found none",
        ),
        (
            {"images": torch.zeros(4, 3, 8, 8)},
            "model.onnx: can't be quantized: ONNX Runtime: .*Got invalid dimensions",
        ),
        ({"source": DIGITS}, "run.yml: ONNX Runtime: "),
        ({"source": DIGITS.with_name("none.onnx")}, "none.onnx: no such file"),
    ],
)
def test_quantization_refuses_in_one_line(exported, tmp_path, options, message):
    arguments = {
        "source": exported / "model.onnx",
        "images": torch.zeros(4, 1, 8, 8),
        "file": tmp_path / "out.onnx",
    } | options
    with pytest.raises((ValueError, OSError), match=message) as raised:
        quantize_onnx(**arguments)
    assert "\n" not in str(raised.value)
    assert content_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("package", "format_", "message"),
    [
        ("onnxscript", "onnx", "export to ONNX: needs the package onnxscript"),
        ("onnx", "int8", "needs the package onnx"),
        ("onnxruntime", "onnx", "needs the package onnxruntime"),
    ],
)
def test_a_missing_package_is_one_line_and_the_run_is_unharmed(
    run, tmp_path, monkeypatch, package, format_, message
):
    monkeypatch.setitem(sys.modules, package, None)  # what makes an import of it fail
    before = content_of(run)
    with pytest.raises(
        HalocError,
        match=message + r", which is not installed \(pip install 'nni-haloc\[onnx\]'\)$",
    ):
        export(run, [format_], tmp_path)
    assert content_of(tmp_path) == {}
    assert content_of(run) == before


@pytest.fixture
def damaged(run, tmp_path):
    """Copies of the run, each with something wrong."""

    def make(kind):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        if kind == "no settings":
            (folder / "metrics.json").unlink()
        elif kind == "no JSON":
            (folder / "metrics.json").write_text("{")
        elif kind == "nothing":
            shutil.rmtree(folder)
        elif kind == "a setting":
            text = (folder / "metrics.json").read_text()
            (folder / "metrics.json").write_text(text.replace('"digits_cnn"', "7"))
        elif kind == "weights":
            (folder / "weights.safetensors").write_bytes(b"none")
        elif kind == "data":
            text = (folder / "metrics.json").read_text()
            (folder / "metrics.json").write_text(
                text.replace('"weights": "', '"weights": "/nowhere')
            )
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "run: no such folder; expected that of a finished run$"),
        (
            "no settings",
            "metrics.json: expected the settings of a finished run, found none; "
            "is the run finished\\?$",
        ),
        ("no JSON", "metrics.json: not a JSON file"),
        ("a setting", "metrics.json: model.name: .*found 7"),
        ("weights", "weights.safetensors: "),
        ("data", "metrics.json: weights: no such file or folder: /nowhere"),
    ],
)
@pytest.mark.parametrize("command", [export, bench])
def test_a_folder_that_is_no_run_is_one_line(command, damaged, kind, message):
    folder = damaged(kind)
    before = content_of(folder)
    with pytest.raises(HalocError, match=message) as raised:
        command(folder)
    assert "\n" not in str(raised.value)
    assert content_of(folder) == before


def test_formats_without_images_need_no_files_of_the_settings(damaged, tmp_path):
    rows = export(damaged("data"), ["program"], tmp_path / "out")
    assert [(name, file.name) for name, file, _ in rows] == [("program", "model.pt2")]


def test_a_stage_is_exported_with_the_settings_of_its_run(run, tmp_path):
    export(run / "pruned", ["safetensors"], tmp_path)
    assert RankPlan.load(tmp_path / "ranks.json").ranks == {"block4.conv": (16, 16)}
    assert Finished(run / "pruned").config == Finished(run).config


def test_a_run_is_not_exported_into_itself(run):
    with pytest.raises(HalocError, match="--out: expected another folder than the run's"):
        export(run, out=run / "pruned" / "..")


def test_settings_give_the_shape_of_an_image(run):
    content = load_config(DIGITS).model_dump(mode="json")
    assert Finished(run).example(2).shape == (2, *digits().images("test", 1).shape[1:])
    for data, shape in (
        ({"name": "cifar10"}, (3, 32, 32)),
        ({"name": "folder", "size": 224}, (3, 224, 224)),
    ):
        config = parse_config(
            {**content, "data": {**data, "root": "/nowhere"}}, "kept", files=False
        )
        assert config.data.shape == shape


@pytest.fixture
def calls(monkeypatch):
    """The passes that are timed, in their order."""
    seen = []
    for kind in (TorchRuntime, OnnxRuntime):

        def once(self, run):
            seen.append(run)
            run()
            return 0.25e-3

        monkeypatch.setattr(kind, "once", once)
    return seen


@pytest.fixture
def quickly(monkeypatch):
    """The exporter in `bench` replaced by torch's former one, which takes a tenth of the time."""

    def export(network, example, file):
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        options = {
            "input_names": ["x"],
            "output_names": ["y"],
            "dynamic_axes": axes,
            "dynamo": False,
            "opset_version": 17,
        }
        torch.onnx.export(network, (example,), str(file), **options)

    monkeypatch.setattr("nni_haloc.costs.device.onnx_files.export_onnx", export)


def test_bench_has_a_row_for_each_stage_timed_in_alternation(run, quickly, calls, capsys):
    shutil.copytree(
        run, run / "export", ignore=shutil.ignore_patterns("export")
    )  # an export is no stage
    content = bench(
        run, [1, 64], 1, "val", runtimes=["torch", "onnxruntime"], rounds=2, min_run_time=0
    )
    shutil.rmtree(run / "export")
    assert content == json.loads((run / "bench.json").read_text())
    (run / "bench.json").unlink()
    forms = [("torch", "float32"), ("onnxruntime", "float32"), ("onnxruntime", "int8")]
    expected = [
        (stage, *form, size)
        for size in (1, 64)
        for stage in ("original", "compressed", "pruned")
        for form in forms
    ]
    rows = content["rows"]
    assert [
        (row["stage"], row["runtime"], row["precision"], row["batch_size"]) for row in rows
    ] == expected
    assert len(calls) == 2 * 2 * 6 * 9  # batch sizes, rounds, passes of each, rows
    for start in range(0, len(calls), 9):
        assert len(set(calls[start : start + 9])) == 9
    assert all(row["latency_ms"] == 0.25 and row["spread_ms"] == 0 for row in rows)
    assert [row["images_per_s"] for row in rows] == [4000] * 9 + [256000] * 9
    networks = {
        "original": Finished(run).networks()["original"],
        "compressed": load(run),
        "pruned": load(run / "pruned"),
    }
    for row in rows:
        network = networks[row["stage"]]
        assert row["macs"] == count_macs(network, images(1, 1, 8, 8))
        assert row["params"] == sum(p.numel() for p in network.parameters())
        (top1,) = accuracy(network, digits(0.2).loader("val", 64))
        assert row["top1"] == pytest.approx(top1, abs=0.011 if row["precision"] == "int8" else 1e-6)
    assert rows[3]["file_bytes"] == (run / "weights.safetensors").stat().st_size
    print_bench("title", content)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("pruned", "int8", "256,000", "top-1 (val)"))


def test_bench_without_data_or_onnx_runtime_still_times_torch(damaged, calls, monkeypatch):
    def missing(*arguments):
        raise ValueError("export to ONNX: needs the package onnxscript")

    monkeypatch.setattr("nni_haloc.costs.device.onnx_files.export_onnx", missing)
    folder = damaged("")
    shutil.rmtree(folder / "pruned")
    content = bench(folder, runtimes=["torch", "onnxruntime"], data=False, rounds=1, min_run_time=0)
    assert [(row["stage"], row.get("reason")) for row in content["rows"]] == [
        (stage, reason)
        for stage in ("original", "compressed")
        for reason in (None, "export to ONNX: needs the package onnxscript")
    ]
    assert len(calls) == 6 * 2
    assert not any("top1" in row for row in content["rows"])


def test_bench_has_rows_for_the_runtimes_that_are_named(damaged):
    """One that can't be had here says why, and in 8 bits the classes are those of float32."""
    pytest.importorskip("nncf")
    folder = damaged("")
    shutil.rmtree(folder / "pruned")
    content = bench(
        folder, [3], 1, "val", runtimes=["openvino", "tensorrt"], rounds=1, min_run_time=0
    )
    rows = {(row["stage"], row["runtime"], row["precision"]): row for row in content["rows"]}
    assert set(rows) == {
        (stage, *form)
        for stage in ("original", "compressed")
        for form in (("openvino", "float32"), ("openvino", "int8"), ("tensorrt", "float32"))
    }
    assert list(content["runtimes"]) == ["openvino"]
    (expected,) = accuracy(Finished(folder).networks()["original"], digits(0.2).loader("val", 64))
    for (stage, runtime, precision), row in rows.items():
        assert ("latency_ms" in row) == (runtime == "openvino")
        if runtime == "tensorrt":
            assert row["reason"].startswith("runtime tensorrt: device: expected 'cuda'")
        elif stage == "original":
            near = 0.011 if precision == "int8" else 1e-6
            assert row["top1"] == pytest.approx(expected, abs=near)


def test_bench_refuses_a_named_runtime_whose_package_is_missing(run, monkeypatch):
    def missing(name, **options):
        raise MissingPackage(f"runtime {name}: needs the package {name}")

    monkeypatch.setattr("nni_haloc.results.bench.make_runtime", missing)
    with pytest.raises(HalocError, match="^runtime openvino: needs the package"):
        bench(run, threads=1, runtimes=["openvino"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": [0]}, r"batch sizes: expected numbers above 0, found \[0\]"),
        ({"threads": 0}, "threads: expected numbers above 0, found 0"),
        ({"runtimes": ["openvin"]}, "runtimes: expected one of torch, .*found 'openvin'.*openvino"),
        ({"split": "train"}, "split: expected one of val, test, found 'train'"),
    ],
)
def test_bench_refuses_in_one_line(run, options, message):
    with pytest.raises(HalocError, match=message):
        bench(run, **{"threads": 1} | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["export", "none"],
            "haloc: none: no such folder; expected that of a finished run",
        ),
        (
            ["bench", "none"],
            "haloc: none: no such folder; expected that of a finished run",
        ),
        (
            ["export", "none", "--format", "onnx,tf"],
            "haloc: --format: expected some of onnx, program, safetensors, int8, openvino, "
            "openvino-int8, executorch, executorch-int8, found 'tf'",
        ),
        (
            ["bench", "none", "--batch", "1,x"],
            "haloc: --batch: expected numbers separated by commas, found '1,x'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, message, capsys, monkeypatch):
    from nni_haloc.cli.main import main

    monkeypatch.setattr(sys, "argv", ["haloc", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_the_commands_print_what_they_made(run, tmp_path, capsys, monkeypatch):
    from nni_haloc.cli.main import main

    monkeypatch.setattr(
        sys,
        "argv",
        ["haloc", "export", str(run), "--format", "safetensors,program", "--out", str(tmp_path)],
    )
    main()
    printed = capsys.readouterr().out
    assert re.search(
        r"program +│ .*model.pt2 +│ +[\d,]+ │ loaded back, (\d.\de[+-]\d\d from|identical)",
        printed,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.json",
        "model.pt2",
        "ranks.json",
        "weights.safetensors",
    ]
