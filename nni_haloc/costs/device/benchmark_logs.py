"""Measure on a device without Python: model files for its own benchmark program, and their log.

`write_models` fills a folder that is copied to the device. ``run.sh`` in it runs the program over
all files, a round after the other, and appends what it prints to a log. `measured_by_logs` makes
the cost table of that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.benchmark_tools import BenchmarkTool, Reading
from nni_haloc.costs.device.costs_file import COSTS_VERSION, LARGEST, UNITS
from nni_haloc.costs.device.measure import one_round
from nni_haloc.costs.device.measured_file import NETWORK, finished, subject, unmeasured
from nni_haloc.costs.device.runtime import check_threads
from nni_haloc.costs.device.spec import Specification
from nni_haloc.inputs.registries import BENCHMARK_TOOLS
from nni_haloc.utils.errors import brief
from nni_haloc.utils.files import make_folder, read_text, whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.progress import Progress

if TYPE_CHECKING:
    from torch import nn

SCRIPT, LOG = "run.sh", "haloc.log"
_MOST_BYTES = 1 << 30
"""Bytes that a log may have: some kilobytes for each of thousands of calls."""
_HEAD = re.compile(
    r"^#haloc runtime=(?P<runtime>\S+) spec=(?P<spec>\S+) threads=(?P<threads>\S+) "
    r"round=\d+ file=(?P<file>\S+) date=(?P<date>\S+) device=(?P<device>.*?)\s*$"
)
_TAIL = re.compile(r"^#haloc status=(?P<status>\d+)\s*$")
_TEMPLATE = """\
#!/bin/sh
# Times every model of this folder, and appends what {program} prints to {log}.
#   sh run.sh [ROUNDS] [SECONDS]
# {program} is looked for in this folder and on the path; PROGRAM=/path/to/it says where it is,
# and DEVICE=name what the device is called.
rounds=${{1:-5}}
seconds=${{2:-1}}
cd "$(dirname "$0")" || exit 1
program=${{PROGRAM:-{program}}}
[ -z "$PROGRAM" ] && [ -f ./{program} ] && program=./{program}
if ! command -v "$program" > /dev/null; then
  echo "run.sh: $program: not found; say where it is by PROGRAM=/path/to/{program}" >&2
  exit 1
fi
device=$DEVICE
[ -z "$device" ] && command -v getprop > /dev/null && device=$(getprop ro.product.model)
[ -z "$device" ] && [ -r /proc/device-tree/model ] &&
  device=$(tr -d '\\000' < /proc/device-tree/model)
[ -z "$device" ] && [ -r /proc/cpuinfo ] &&
  device=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
[ -z "$device" ] && device=$(uname -m)

forward='{files}'
backward=
for file in $forward; do backward="$file $backward"; done
round=1
while [ "$round" -le "$rounds" ]; do
  order=$forward
  [ $((round % 2)) -eq 0 ] && order=$backward
  for file in $order; do
    echo "#haloc runtime={runtime} spec={spec} threads={threads} round=$round file=$file\
 date=$(date +%Y-%m-%d) device=$device"
    "$program" {command} 2>&1 < /dev/null
    printf '\\n#haloc status=%s\\n' "$?"
  done
  echo "run.sh: round $round of $rounds" >&2
  round=$((round + 1))
done >> {log}
"""


def write_models(
    spec: Specification,
    model: nn.Module,
    folder: str | Path,
    runtime: str,
    threads: int | None = None,
    progress: Progress = lambda done, of: None,
) -> int:
    """Write a model file for each entry and for the network, and ``run.sh``, which times them.

    Args:
        spec: what is to be measured.
        model: the network.
        folder: a new or empty folder.
        runtime: a name of `nni_haloc.inputs.registries.BENCHMARK_TOOLS`.
        threads: processor threads on the device (None: the program's own choice).
        progress: called with the numbers of files written and to write.

    Returns:
        The number of model files.

    Raises:
        ValueError: if the folder is not empty, there is no such runtime, the rank space has no
            layers, or a model has no such form.
        MissingPackage: if a package that writes the files is not installed.
    """
    check_threads(threads, "--threads")
    tool: BenchmarkTool = BENCHMARK_TOOLS[runtime]
    if not spec.layers:
        raise ValueError(f"{spec.model}: expected layers to measure, found none in its rank space")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a new or empty folder, found files in it")
    make_folder(folder)
    count = 1 + len(spec.entries)
    for done, (index, content) in enumerate(tool.models(spec, model)):
        progress(done, count)
        with whole(folder / _file_of(index, tool)) as part:
            part.write_bytes(content)
    progress(count, count)
    order = [_file_of(index, tool) for index in one_round(list(spec.first_users()))]
    script = _TEMPLATE.format(
        program=tool.program,
        command=tool.command(threads),
        files="\n".join(order),
        runtime=runtime,
        spec=spec.digest(),
        threads=threads or "default",
        log=LOG,
    )
    with whole(folder / SCRIPT) as part:
        part.write_text(script, encoding="utf-8", newline="\n")
    return count


def measured_by_logs(spec: Specification, logs: Sequence[str | Path]) -> dict[str, Any]:
    """Make a cost table of what benchmark programs have printed.

    Args:
        spec: what was measured: the specification that `write_models` was given.
        logs: files that ``run.sh`` has written, all of one runtime and device.

    Returns:
        The content of ``costs.json``.

    Raises:
        ValueError: if a log is of another specification, runtime or device, a model failed or has
            no time above zero, or an entry was not measured; the message names log and line.
    """
    users = spec.first_users()
    runs: dict[str, dict[str, list[float]]] = {}
    network: list[float] = []
    identity: dict[str, Any] = {}
    dates: set[str] = set()
    for log in logs:
        for call in _calls(Path(log), spec):
            dates.add(call.date)
            _check_alike(identity, call)
            if call.index is None:
                network.append(call.ms)
            else:
                layer, candidate = users[call.index]
                runs.setdefault(layer, {}).setdefault(candidate, []).append(call.ms)
    named = ", ".join(map(str, logs))
    missing = unmeasured(spec, {"runs": runs})
    if missing:
        layer, candidate = users[missing[0]]
        raise ValueError(
            f"{named}: layer {layer!r}, candidate {candidate!r} was not measured, and "
            f"{len(missing) - 1} others; let {SCRIPT} run through a round"
        )
    if not network:
        raise ValueError(f"{named}: the network was not measured; let {SCRIPT} run through a round")
    state = {
        "version": COSTS_VERSION,
        "metric": "latency_ms",
        "unit": UNITS["latency_ms"],
        "identity": {
            **subject(spec),
            **identity,
            "where": "alone",
            "date": max(dates),
            "runs": min(len(values) for row in runs.values() for values in row.values()),
        },
        "runs": runs,
        NETWORK: network,
    }
    return state | finished(spec, state)


@dataclass(frozen=True)
class _Call:
    """A call of a benchmark program in a log."""

    where: str
    index: int | None
    ms: float
    date: str
    identity: dict[str, Any]


def _check_alike(identity: dict[str, Any], call: _Call) -> None:
    """Keep the first call's identity, and refuse a call of another."""
    for key, value in call.identity.items():
        if identity.setdefault(key, value) != value:
            raise ValueError(
                f"{call.where}: expected {key} {identity[key]!r}, as in the calls before, "
                f"found {value!r}; give each its own table"
            )


def _calls(log: Path, spec: Specification) -> Iterator[_Call]:
    """Yield the finished calls of a log; one that was cut off is left out, with a warning."""
    try:
        lines = read_text(log, _MOST_BYTES).splitlines()
    except ValueError as error:
        raise ValueError(f"{log}: {error}") from None
    digest, cut, found = spec.digest(), 0, False
    head, start = None, 0
    for number, line in enumerate(lines, 1):
        begins, ends = _HEAD.match(line), _TAIL.match(line)
        if begins:
            cut += head is not None
            head, start, found = begins, number, True
        elif ends and head is not None:
            where = f"{log}, line {start}"
            if head["spec"] != digest:
                raise ValueError(
                    f"{where}: measured for another specification, {head['spec']}, now {digest}; "
                    "give the one that the models were written with"
                )
            yield _call(where, head, lines[start : number - 1], int(ends["status"]), spec)
            head = None
    if not found:
        raise ValueError(f"{log}: expected lines '#haloc runtime=...' of {SCRIPT}, found none")
    cut += head is not None
    if cut:
        logger.warning("%s: %d of the calls were cut off, and are left out", log, cut)


def _call(
    where: str, head: re.Match[str], output: list[str], status: int, spec: Specification
) -> _Call:
    """Read one call.

    Raises:
        ValueError: if it failed or has no time above zero.
    """
    name, file = head["runtime"], head["file"]
    if name not in BENCHMARK_TOOLS:
        expected = ", ".join(BENCHMARK_TOOLS)
        raise ValueError(f"{where}: expected a runtime of {expected}, found {brief(name)}")
    tool: BenchmarkTool = BENCHMARK_TOOLS[name]
    if status:
        told = [line.strip() for line in output if line.strip()]
        reason = brief(told[-1], 200) if told else "nothing"
        raise ValueError(
            f"{where}: {tool.program} failed on {file} with status {status}; it printed {reason} "
            "last"
        )
    index = _index_of(file, tool, spec, where)
    try:
        reading = tool.read("\n".join(output))
    except ValueError as error:
        raise ValueError(f"{where}: {file}: expected a number ({error})") from None
    if reading.ms is None:
        raise ValueError(
            f"{where}: {file}: expected the time that {tool.program} prints, found none; "
            f"is the program another one, or built without its log?"
        )
    if not 1 / LARGEST <= reading.ms <= LARGEST:
        raise ValueError(
            f"{where}: {file}: expected a time above 0, found {reading.ms:g} ms"
            + ("; if the program rounds it off, measure with a larger --batch" * (not reading.ms))
        )
    return _Call(where, index, reading.ms, head["date"], _identity(tool, name, head, reading))


def _identity(
    tool: BenchmarkTool, name: str, head: re.Match[str], reading: Reading
) -> dict[str, Any]:
    """Return what the times of a call hold for; see `Runtime.identity`."""
    threads = head["threads"]
    return {
        "runtime": f"{name} {reading.version}" if reading.version else name,
        "device": reading.device or head["device"],
        "dtype": "float32",
        "memory_format": "contiguous",
        "threads": int(threads) if threads.isdecimal() else threads,
        **tool.identity,
    }


def _file_of(index: int | None, tool: BenchmarkTool) -> str:
    """Return the name of a model's file; None is the network."""
    return f"network.{tool.ending}" if index is None else f"entry-{index:04}.{tool.ending}"


def _index_of(file: str, tool: BenchmarkTool, spec: Specification, where: str) -> int | None:
    """Return the entry that a file is of, None for the network."""
    index = re.fullmatch(r"entry-(\d+)\..*", file)
    found = int(index[1]) if index and len(index[1]) < 10 else None
    if file != _file_of(found, tool) or (found is not None and found >= len(spec.entries)):
        raise ValueError(
            f"{where}: expected {_file_of(None, tool)} or one of the {len(spec.entries)} files "
            f"{_file_of(0, tool)} and so on, found {brief(file)}"
        )
    return found
