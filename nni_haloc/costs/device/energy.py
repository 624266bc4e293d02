"""Measure what a pass consumes, by a counter of the device that moves on in steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from nni_haloc.utils.errors import needs
from nni_haloc.utils.files import why_unreadable

POWERCAP = Path("/sys/class/powercap")
"""Where Linux has the counters of processors (RAPL)."""

BETWEEN_READINGS = 0.01
"""Seconds of passes between two readings of the counter."""
_SHORTEST = 0.5
"""Seconds for which passes run at least: a board's counter moves on every 20 to 100 ms."""
_STILL = 10.0
"""Seconds after which a counter that has not moved on is broken."""


def energy_counter(device: str) -> Callable[[], float]:
    """Return a function that reads how many millijoules a device has consumed until now.

    Of an NVIDIA device it is the counter of the driver's management library, NVML, which counts the
    whole board; of the processor that of RAPL, see `processor_counter`.

    Args:
        device: torch's name of the device.

    Raises:
        ValueError: if the device has no such counter, or it may not be read.
        MissingPackage: if the package nvidia-ml-py is not installed, for an NVIDIA device.
    """
    if device == "cpu":
        return processor_counter()
    needed = "energy_mj: expected an NVIDIA device whose driver counts energy"
    if not device.startswith("cuda"):
        raise ValueError(
            f"{needed}, or a processor that counts it, found device {device!r}; "
            "choose cuda or cpu, or measure latency_ms"
        )
    with needs("pynvml", what="energy_mj", install="nni-haloc[energy]"):
        import pynvml
        import torch
    found = torch.cuda.get_device_properties(device)
    try:
        pynvml.nvmlInit()
        # Not by its number: CUDA_VISIBLE_DEVICES gives torch's devices other numbers than NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{found.uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise ValueError(
            f"{needed}, found {found.name} ({device}), whose driver says: {error}; "
            "measure latency_ms there"
        ) from None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def processor_counter(folder: Path | None = None) -> Callable[[], float]:
    """Return a function that reads how many millijoules the processors have consumed until now.

    It adds the counters of all packages (RAPL's domains of that name), with everything that runs on
    them. A counter that has come to the end of its range begins again at 0; it is to be read once
    a range at least, which lasts minutes.

    Args:
        folder: has a folder for each domain (None: `POWERCAP`).

    Raises:
        ValueError: if there is no counter, or it may not be read.
    """
    folder = folder or POWERCAP
    counters = [_Package(domain) for domain in sorted(folder.glob("*")) if _is_package(domain)]
    if not counters:
        raise ValueError(
            f"energy_mj: expected a processor that counts its energy (RAPL), found no counter of a "
            f"package in {folder}; measure on the machine itself, not a virtual one, choose "
            "cuda, or measure latency_ms"
        )
    return lambda: sum(counter.read() for counter in counters)


def _is_package(domain: Path) -> bool:
    """Tell whether a folder is the domain of a whole package, and not a part of one."""
    if not re.fullmatch(r"intel-rapl:[0-9]+", domain.name):
        return False
    return _text(domain / "name").startswith("package")


class _Package:
    """The counter of one package.

    Args:
        domain: the package's folder, with the files ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        ValueError: if one of them can't be read.
    """

    def __init__(self, domain: Path) -> None:
        self._file = domain / "energy_uj"
        self._range = _microjoules(domain / "max_energy_range_uj")
        self._last, self._total = _microjoules(self._file), 0

    def read(self) -> float:
        """Return the millijoules since this object was made."""
        now = _microjoules(self._file)
        self._total += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return 1e-3 * self._total


def _microjoules(file: Path) -> int:
    text = _text(file)
    if not text.isdecimal():
        raise ValueError(f"energy_mj: {file}: expected microjoules, found {text[:20]!r}")
    return int(text)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise ValueError(
            f"energy_mj: expected a counter that may be read, found {file}: "
            f"{why_unreadable(error)}; let everybody read it (sudo chmod a+r "
            f"{file.parent.parent}/intel-rapl:*/energy_uj), or measure latency_ms"
        ) from None


def energy_of_passes(
    run: Callable[[], object],
    seconds: float,
    read: Callable[[], float],
    min_run_time: float = 0.0,
    wait: Callable[[], None] = lambda: None,
) -> float:
    """Return the millijoules of one pass, of passes that run without a pause.

    Args:
        run: runs a pass, or starts it.
        seconds: about how long it takes.
        read: reads a counter, in millijoules.
        min_run_time: see `energy_of_a_pass`.
        wait: waits for the end of passes.

    Raises:
        RuntimeError: if the counter stands still.
    """
    few = max(1, round(BETWEEN_READINGS / seconds)) if seconds > 0 else 1

    def launch() -> int:
        for _ in range(few):
            run()
        return few

    return energy_of_a_pass(launch, wait, read, min_run_time)


def energy_of_a_pass(
    launch: Callable[[], int],
    wait: Callable[[], None],
    read: Callable[[], float],
    min_run_time: float = 0.0,
) -> float:
    """Return the millijoules of one pass, counted from one step of a counter to another.

    Args:
        launch: starts a few passes and returns their number.
        wait: waits for their end.
        read: reads the counter, in millijoules.
        min_run_time: seconds between the two steps at least, and never less than half a second.

    Raises:
        RuntimeError: if the counter stands still.
    """

    def run_until_a_step(seconds: float) -> tuple[float, int]:
        passes, value, end = 0, read(), perf_counter() + seconds
        while True:
            passes += launch()
            before, value = value, read()  # while the device works, so that it draws no less
            wait()
            now = perf_counter()
            if value > before and now >= end:
                return value, passes
            if now > end + _STILL:
                raise RuntimeError(f"energy_mj: the device's counter stands still at {value:g} mJ")

    first, _ = run_until_a_step(0.0)
    last, passes = run_until_a_step(max(min_run_time, _SHORTEST))
    return (last - first) / passes
