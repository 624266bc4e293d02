"""Cost tables from what runtimes' own benchmark programs print, on devices without Python.

``benchmark_output`` has what the programs print. That of OpenVINO's ``benchmark_app`` was recorded.
The others can't run here: the lines of ``trtexec`` are as users posted them (NVIDIA/TensorRT,
issues 3747 and 4177), those of ``executor_runner`` as its source writes them (pytorch/executorch,
examples/portable/executor_runner/executor_runner.cpp).
"""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_haloc.cli.main import app
from nni_haloc.costs.device.benchmark_logs import measured_by_logs, write_models
from nni_haloc.costs.device.benchmark_tools import BenchmarkTool, Reading
from nni_haloc.costs.measure import measure_main
from nni_haloc.costs.specify import specify
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.registries import BENCHMARK_TOOLS
from nni_haloc.space.names import DENSE
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError

OUTPUT = Path(__file__).parent / "benchmark_output"


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    )


def specified(shape=(1, 3, 12, 12)):
    return specify(network(), torch.randn(shape), AllowedRanks(step=4))


SPEC = specified()
FILES = [None, *range(len(SPEC.entries))]


RECORDED = {path.stem: path.read_text() for path in OUTPUT.glob("*.txt")}


def printed(runtime, ms):
    """Return what a runtime's program prints of a time: its recorded output with another number."""
    if runtime == "openvino":
        text = RECORDED["benchmark_app"]
        unit, number = ("us", 1e3 * ms) if ms < 1 else ("ms", ms)
        return re.sub(r"(Median: +)\S+ us", rf"\g<1>{number!r} {unit}", text)
    if runtime == "tensorrt":
        text = RECORDED["trtexec"]
        return re.sub(r"(GPU Compute Time: .*median = )\S+", rf"\g<1>{ms!r}", text)
    return f"I 00:00:00.0 executorch:executor_runner.cpp:1] Iteration 1 of 1: {ms!r} ms\n"


def call(index, ms, runtime="openvino", **changes):
    """Return a call in a log, as run.sh writes it."""
    ending = "pte" if runtime == "executorch" else "onnx"
    facts = {
        "runtime": runtime,
        "spec": SPEC.digest(),
        "threads": 2,
        "file": f"network.{ending}" if index is None else f"entry-{index:04}.{ending}",
        "device": "a phone",
        "text": printed(runtime, ms),
        "status": 0,
    } | changes
    return (
        "#haloc runtime={runtime} spec={spec} threads={threads} round=1 file={file} "
        "date=2026-01-02 device={device}\n{text}\n#haloc status={status}\n"
    ).format(**facts)


def log_of(folder, *calls, name="haloc.log"):
    path = folder / name
    path.write_text("".join(calls))
    return path


def whole_round(**changes):
    return [call(index, 1.0 + (index or 0), **changes) for index in FILES]


@pytest.mark.parametrize(
    ("runtime", "program", "expected"),
    [
        ("openvino", "benchmark_app", Reading(0.01141, "2026.4.1")),
        ("tensorrt", "trtexec", Reading(7.14139, "10.5.0", "NVIDIA GeForce RTX 2080")),
        ("executorch", "executor_runner", Reading((0.201250 + 0.204375) / 2)),
    ],
)
def test_what_the_programs_print_is_read(runtime, program, expected):
    assert BENCHMARK_TOOLS[runtime].read(RECORDED[program]) == expected


@pytest.mark.parametrize(
    ("runtime", "text", "ms"),
    [
        # Of OpenVINO 2023, which always printed milliseconds.
        ("openvino", "[ INFO ] Latency:\n[ INFO ]    Median:     8.72 ms\n", 8.72),
        # Of ExecuTorch 1.0, which printed the sum alone.
        ("executorch", "I 0 x.cpp:3] Model executed successfully 4 time(s) in 10.0 ms.", 2.5),
        # Of the first versions, which printed no time.
        ("executorch", "I 0 x.cpp:3] Model executed successfully.", None),
        ("tensorrt", "&&&& FAILED TensorRT.trtexec", None),
        ("openvino", "", None),
    ],
)
def test_what_other_versions_print_is_read(runtime, text, ms):
    assert BENCHMARK_TOOLS[runtime].read(text).ms == ms


@settings(max_examples=20, deadline=None)
@given(
    random=st.randoms(use_true_random=False),
    runtime=st.sampled_from(["openvino", "tensorrt", "executorch"]),
    rounds=st.integers(1, 3),
)
def test_a_table_of_a_log_has_the_times_of_the_log(random, runtime, rounds, tmp_path_factory):
    """Whatever the order of the calls, and in as many logs as there are."""
    times = {
        index: [float(f"{10 ** random.uniform(-3, 4):.6g}") for _ in range(rounds)]
        for index in FILES
    }
    calls = [(index, ms) for index, row in times.items() for ms in row]
    random.shuffle(calls)
    cut = random.randrange(1, len(calls))
    folder = tmp_path_factory.mktemp("logs")
    parts = [[call(i, ms, runtime) for i, ms in part] for part in (calls[:cut], calls[cut:])]
    logs = [log_of(folder, *part, name=f"{n}.log") for n, part in enumerate(parts)]
    content = measured_by_logs(SPEC, logs)
    close = {"rel": 1e-9}
    for layer, row in SPEC.layers.items():
        for candidate, index in row.items():
            expected = median(times[index])
            assert content["costs"][layer][candidate] == pytest.approx(expected, **close)
    for index, (layer, candidate) in SPEC.first_users().items():
        assert sorted(content["runs"][layer][candidate]) == pytest.approx(
            sorted(times[index]), **close
        )
    dense = sum(median(times[row[DENSE]]) for row in SPEC.layers.values())
    fixed = max(0.0, median(times[None]) - dense)
    assert content["fixed"] == pytest.approx(fixed, abs=1e-6 * dense)
    assert content["quality"]["rounds"] == content["identity"]["runs"] == rounds


def test_the_table_is_one_that_a_measurement_here_writes(tmp_path, capsys):
    SPEC.save(tmp_path / "spec.json")
    log, out = log_of(tmp_path, *(3 * whole_round())), tmp_path / "costs.json"
    measure_main(["--spec", str(tmp_path / "spec.json"), "--from-log", str(log), "--out", str(out)])
    assert "standard error" in capsys.readouterr().out
    table = CostTable.load(out)
    assert table.costs.keys() == SPEC.layers.keys()
    content = json.loads(out.read_text())
    assert (
        content["identity"].items()
        >= {
            "model": "Sequential",
            "input": [1, 3, 12, 12],
            "runtime": "openvino 2026.4.1",
            "device": "a phone",
            "dtype": "float32",
            "memory_format": "contiguous",
            "threads": 2,
            "where": "alone",
            "date": "2026-01-02",
            "runs": 3,
        }.items()
    )
    assert content["quality"]["standard_error"] == 0.0
    with pytest.raises(ValueError, match="already holds measurements; choose another --out"):
        measure_main(
            ["--spec", str(tmp_path / "spec.json"), "--from-log", str(log), "--out", str(out)]
        )


def test_a_call_that_was_cut_off_is_left_out_with_a_warning(tmp_path, caplog):
    cut = call(2, 99.0).split("#haloc status")[0]
    log = log_of(tmp_path, *whole_round(), cut, *whole_round(), cut)
    layer, candidate = SPEC.first_users()[2]
    assert measured_by_logs(SPEC, [log])["runs"][layer][candidate] == [3.0, 3.0]
    assert "2 of the calls were cut off" in caplog.text


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "expected lines '#haloc runtime=...' of run.sh, found none"),
        (["some other file\n"], "expected lines '#haloc runtime=...' of run.sh, found none"),
        (
            whole_round()[:-1],
            r"layer '4', candidate '.*' was not measured, and 0 others; let run.sh run",
        ),
        (whole_round()[1:], "the network was not measured; let run.sh run through a round"),
        (
            [call(0, 1.0, runtime="abacus", file="entry-0000.onnx")],
            "line 1: expected a runtime of openvino, executorch, tensorrt, found 'abacus'",
        ),
        (
            [call(0, 1.0, status=1, text="[ ERROR ] no such operator\n")],
            r"line 1: benchmark_app failed on entry-0000.onnx with status 1; it printed "
            r"'\[ ERROR \] no such operator' last",
        ),
        ([call(0, 1.0, spec="0" * 12)], "line 1: measured for another specification, 000000000000"),
        ([call(0, 0.0)], "entry-0000.onnx: expected a time above 0, found 0 ms; if the program"),
        ([call(0, -2.5)], "entry-0000.onnx: expected a time above 0, found -2.5 ms$"),
        ([call(0, math.nan)], "entry-0000.onnx: expected a time above 0, found nan ms$"),
        ([call(0, math.inf)], "entry-0000.onnx: expected a time above 0, found inf ms$"),
        ([call(0, 1e-300)], "entry-0000.onnx: expected a time above 0, found 1e-300 ms$"),
        (
            [call(0, 1.0, text="Latency:\n Median: fast ms\n")],
            "entry-0000.onnx: expected a number .*'fast'",
        ),
        ([call(0, 1.0, text="")], "expected the time that benchmark_app prints, found none"),
        ([call(999, 1.0)], "expected network.onnx or one of the [0-9]+ files entry-0000.onnx"),
        ([call(0, 1.0, file="entry-0.onnx")], "expected network.onnx or .*'entry-0.onnx'"),
        ([call(0, 1.0, file="entry-0000.pte")], "expected network.onnx or .*'entry-0000.pte'"),
        (
            [call(0, 1.0), call(1, 1.0, device="a board")],
            "expected device 'a phone', as in the calls before, found 'a board'",
        ),
        (
            [call(0, 1.0), call(1, 1.0, runtime="executorch")],
            "expected runtime 'openvino 2026.4.1', as .*, found 'executorch'",
        ),
        ([call(0, 1.0), call(1, 1.0, threads=4)], "expected threads 2, as .*, found 4; give each"),
    ],
)
def test_a_log_that_makes_no_table_is_one_clear_line(tmp_path, calls, message):
    log = log_of(tmp_path, *calls)
    with pytest.raises(ValueError, match=message) as caught:
        measured_by_logs(SPEC, [log])
    assert str(caught.value).startswith(str(log))
    assert "\n" not in str(caught.value)


def test_a_specification_has_another_digest_if_anything_that_is_measured_differs():
    others = [
        specified((2, 3, 12, 12)),
        specified((1, 3, 13, 12)),
        specify(network(), torch.randn(1, 3, 12, 12), AllowedRanks(step=2)),
        specify(network()[:3], torch.randn(1, 3, 12, 12), AllowedRanks(step=4)),
        specify(network(), torch.randn(1, 3, 12, 12), AllowedRanks(step=4), "another"),
    ]
    assert SPEC.digest() == specified().digest()
    assert len({spec.digest() for spec in [SPEC, *others]}) == 1 + len(others)


def test_a_log_of_a_specification_that_was_written_and_read_is_of_the_same(tmp_path):
    SPEC.save(tmp_path / "spec.json")
    assert type(SPEC).load(tmp_path / "spec.json").digest() == SPEC.digest()


PROGRAM = """#!/bin/sh
echo "$1" >> {calls}
echo "ms $(wc -c < "$1")"
[ "$1" != "{bad}" ]
"""
"""A benchmark program: the larger a file, the more milliseconds."""


def abacus(spec, model):
    for index in FILES:
        yield index, b"x" * (7 if index is None else 10 + index)


def read_abacus(text):
    found = re.search(r"^ms +(\d+)", text, re.MULTILINE)
    return Reading(float(found[1]) if found else None, "1.0")


@pytest.fixture
def beads(monkeypatch):
    """Register another package's program: a function that reads it, and how it is called."""
    tool = BenchmarkTool("beads", "bead", lambda threads: '"$file"', abacus, read_abacus)
    monkeypatch.setitem(BENCHMARK_TOOLS._added, "abacus", tool)


def run_script(folder, *arguments, bad="none", **environment):
    program = folder / "beads"
    program.write_text(PROGRAM.format(calls=folder / "calls.txt", bad=bad))
    program.chmod(0o755)
    return subprocess.run(
        ["sh", str(folder / "run.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


def test_the_script_times_every_model_in_rounds_of_alternating_order(tmp_path, beads):
    assert write_models(SPEC, network(), tmp_path, "abacus", 3) == len(FILES)
    assert run_script(tmp_path, "2", DEVICE="a phone; with `odd` $name").returncode == 0
    calls = (tmp_path / "calls.txt").read_text().split()
    once = calls[: len(calls) // 2]
    assert calls == once + once[::-1]
    assert {name for name in once if name != "network.bead"} == {
        f"entry-{index:04}.bead" for index in FILES[1:]
    }
    assert once.count("network.bead") > 1  # it is in every prediction
    content = measured_by_logs(SPEC, [tmp_path / "haloc.log"])
    for index, (layer, candidate) in SPEC.first_users().items():
        assert content["runs"][layer][candidate] == [10.0 + index] * 2
    assert set(content["network"]) == {7.0}
    identity = content["identity"]
    assert (identity["runtime"], identity["threads"]) == ("abacus 1.0", 3)
    assert identity["device"] == "a phone; with `odd` $name"


def test_the_script_notes_a_program_that_fails_and_goes_on(tmp_path, beads):
    write_models(SPEC, network(), tmp_path, "abacus")
    assert run_script(tmp_path, "1", bad="entry-0001.bead").returncode == 0
    assert (tmp_path / "calls.txt").read_text().split()[-1] != "entry-0001.bead"
    with pytest.raises(ValueError, match=r"beads failed on entry-0001.bead with status 1; it "):
        measured_by_logs(SPEC, [tmp_path / "haloc.log"])


def test_the_script_says_where_its_program_is_to_be(tmp_path, beads):
    write_models(SPEC, network(), tmp_path, "abacus")
    ended = run_script(tmp_path, PROGRAM="/nowhere/beads")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "run.sh: /nowhere/beads: not found; say where it is by PROGRAM=/path/to/beads\n"
    )
    assert not (tmp_path / "haloc.log").exists()


@pytest.mark.parametrize("runtime", ["openvino", "tensorrt"])
def test_onnx_models_are_files_that_a_runtime_reads(tmp_path, runtime):
    onnxruntime = pytest.importorskip("onnxruntime")
    write_models(SPEC, network(), tmp_path, runtime)
    for index in FILES:
        name = "network" if index is None else f"entry-{index:04}"
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"]
        )
        shapes = [SPEC.input]
        if index is not None:
            shapes = [tuple(shape) for shape in SPEC.entries[index].layer["input_shapes"]]
        assert [tuple(x.shape) for x in session.get_inputs()] == shapes


def test_programs_are_files_that_executorch_reads(tmp_path):
    pytest.importorskip("executorch")
    from nni_haloc.costs.device.executorch_runtime import open_executorch

    model, x = network()[2:3], torch.ones(1, 8, 6, 6)
    spec = specify(model, x, AllowedRanks(step=4))
    count = write_models(spec, model, tmp_path, "executorch", 2)
    assert len(list(tmp_path.glob("*.pte"))) == count == 1 + len(spec.entries)
    torch.testing.assert_close(
        open_executorch(tmp_path / "network.pte")(x), model(x), rtol=1e-4, atol=1e-5
    )
    assert open_executorch(tmp_path / "entry-0000.pte")(x).shape == (1, 8, 4, 4)
    assert "--cpu_threads=2" in (tmp_path / "run.sh").read_text()


def test_benchmark_app_itself_makes_a_table(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    if shutil.which("benchmark_app") is None:
        pytest.skip("OpenVINO's benchmark_app is not on the path")
    monkeypatch.chdir(tmp_path)
    Path("space.yml").write_text("kinds: [conv]\nstep: 32\nexclude: [block2.conv, block3.conv]\n")
    words = ["--model", "digits_cnn", "--input", "1x8x8", "--rank-space", "space.yml"]
    models = ["--models", "models", "--runtime", "openvino", "--threads", "1"]
    app(["spec", *words, *models], standalone_mode=False)
    subprocess.run(["sh", "models/run.sh", "1", "1"], check=True, stderr=subprocess.DEVNULL)
    measure_main(["--spec", "spec.json", "--from-log", "models/haloc.log"])
    table = CostTable.load("costs.json")
    assert table.costs["block4.conv"].keys() == {DENSE, "r32"}
    assert all(0 < cost < 1000 for cost in table.costs["block4.conv"].values())
    assert re.fullmatch(r"openvino \d+\.\d+\.\d+", table.identity["runtime"])
    assert table.identity["threads"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "m"], "expected a folder and a runtime, or none of them"),
        (["--runtime", "openvino"], "expected a folder and a runtime, or none of them"),
        (["--threads", "2"], "expected a folder and a runtime, or none of them"),
        (["--models", "m", "--runtime", "torch"], "expected one of openvino, executorch, tensorrt"),
        (["--models", "full", "--runtime", "openvino"], "full: expected a new or empty folder"),
        (["--models", "m", "--runtime", "openvino", "--threads", "0"], "--threads: expected a nu"),
    ],
)
def test_models_for_no_program_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/entry-0000.onnx").touch()
    with pytest.raises(SettingsError, match=message):
        app(["spec", "--model", "digits_cnn", "--input", "1x8x8", *words], standalone_mode=False)
    assert not Path("spec.json").exists()


def test_a_network_without_layers_to_measure_is_refused(tmp_path):
    spec = specify(nn.ReLU(), torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="^ReLU: expected layers to measure, found none in its r"):
        write_models(spec, nn.ReLU(), tmp_path, "openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["--threads", "1"], ["--runtime", "openvino"], ["--sample", "0.5"], ["--metric", "energy_mj"]],
)
def test_options_of_measuring_have_no_meaning_beside_a_log(tmp_path, words):
    log = log_of(tmp_path, *whole_round())
    with pytest.raises(ValueError, match=f"--from-log and {words[0]}: expected one of the two"):
        measure_main(["--spec", str(tmp_path / "spec.json"), "--from-log", str(log), *words])
