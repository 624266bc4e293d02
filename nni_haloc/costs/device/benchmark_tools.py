"""The benchmark programs that runtimes bring along: how they are called, and what they print.

They run on devices without Python. Each is a `BenchmarkTool`, under its runtime's name in
`nni_haloc.inputs.registries.BENCHMARK_TOOLS`: the function ``read`` is what a further one needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.spec import Specification

if TYPE_CHECKING:
    from torch import nn

_IN_A_MS = {"ns": 1e6, "us": 1e3, "ms": 1.0}
"""Units of time that tools print, in a millisecond."""


@dataclass(frozen=True)
class Reading:
    """What a tool has printed about one model.

    Attributes:
        ms: milliseconds of a pass, as it says; None if it says none.
        version: the runtime's version, if it says it.
        device: the name of the device, if it says it.
    """

    ms: float | None
    version: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class BenchmarkTool:
    """A runtime's own program that times a model file.

    Attributes:
        program: its file name.
        ending: of the model files that it takes, without the dot.
        command: returns the words of a shell that come after the program, for a number of
            processor threads (None: the program's own choice). ``"$file"`` is the model's file and
            ``"$seconds"`` how long it is timed.
        models: yields the files' contents, of the network (None) and of every entry (its index).
        read: reads the output of one call. ValueError if a number is none.
        identity: facts that a table of it has beside those of `read`.
    """

    program: str
    ending: str
    command: Callable[[int | None], str]
    models: Callable[[Specification, nn.Module], Iterator[tuple[int | None, bytes]]]
    read: Callable[[str], Reading]
    identity: Mapping[str, Any] = field(default_factory=dict)


def _found(pattern: str, text: str) -> str | None:
    """Return what the first group of a pattern matches, None if nothing does."""
    match = re.search(pattern, text, re.MULTILINE)
    return match and match[1]


def _read_openvino(text: str) -> Reading:
    """Read ``benchmark_app``, in Python or C++; it chooses a unit by the size of the number."""
    times = re.search(r"Latency:\s*\n.*?Median:\s+(\S+)\s+([num]s)\b", text)
    ms = float(times[1]) / _IN_A_MS[times[2]] if times else None
    return Reading(ms, _found(r"Build \.+ (\d[^-\s]*)", text))


def _read_tensorrt(text: str) -> Reading:
    """Read ``trtexec``: the time on the device, without copies to it and back."""
    ms = _found(r"GPU Compute Time:.*?median\s*=\s*(\S+)\s*ms", text)
    return Reading(
        None if ms is None else float(ms),
        _found(r"TensorRT version:\s*(\S+)", text),
        _found(r"Selected Device:\s*(.*\S)", text),
    )


def _read_executorch(text: str) -> Reading:
    """Read ``executor_runner``: the median of all passes, in older versions their mean."""
    passes = re.findall(r"Iteration \d+ of \d+: (\S+) ms", text)
    if passes:
        return Reading(median(map(float, passes)))
    total = re.search(r"Model executed successfully (\d+) time\(s\) in (\S+) ms", text)
    return Reading(float(total[2]) / max(1, int(total[1])) if total else None)


def _openvino_command(threads: int | None) -> str:
    # benchmark_app refuses a number of threads beside a hint.
    how = "-hint latency" if threads is None else f"-hint none -nstreams 1 -nthreads {threads}"
    return f'-m "$file" -d CPU {how} -nireq 1 -api sync -infer_precision f32 -t "$seconds"'


def _tensorrt_command(threads: int | None) -> str:
    return '--onnx="$file" --duration="$seconds" --noDataTransfers --useSpinWait'


def _executorch_command(threads: int | None) -> str:
    # It knows no duration. 50 passes of the networks that phones run are about a second.
    words = '--model_path="$file" --num_executions="$((50 * seconds))"'
    return words if threads is None else f"{words} --cpu_threads={threads}"


def _onnx_models(spec: Specification, model: nn.Module) -> Iterator[tuple[int | None, bytes]]:
    from nni_haloc.costs.device.onnx_models import with_onnx

    spec = with_onnx(spec, model)
    for index, content in [(None, spec.onnx), *enumerate(e.onnx for e in spec.entries)]:
        assert content is not None
        yield index, content


def _onnx_models_with_weights(
    spec: Specification, model: nn.Module
) -> Iterator[tuple[int | None, bytes]]:
    from nni_haloc.costs.device.onnx_models import with_initializers

    for index, content in _onnx_models(spec, model):
        yield index, with_initializers(content).SerializeToString()


def _executorch_programs(
    spec: Specification, model: nn.Module
) -> Iterator[tuple[int | None, bytes]]:
    from nni_haloc.costs.device.executorch_runtime import ExecuTorchRuntime

    runtime = ExecuTorchRuntime.from_options()
    prepared = runtime.prepare(spec, model)
    for index in (None, *range(len(spec.entries))):
        yield index, runtime.program(prepared, index)


OPENVINO = BenchmarkTool("benchmark_app", "onnx", _openvino_command, _onnx_models, _read_openvino)
TENSORRT = BenchmarkTool(
    "trtexec",
    "onnx",
    _tensorrt_command,
    _onnx_models_with_weights,
    _read_tensorrt,
    {"threads": "cuda", "graph": False, "tf32": True},
)
EXECUTORCH = BenchmarkTool(
    "executor_runner", "pte", _executorch_command, _executorch_programs, _read_executorch
)
