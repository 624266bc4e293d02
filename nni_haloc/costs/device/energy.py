"""Measure what a pass consumes, by a counter of the device that moves on in steps."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from nni_haloc.utils.errors import needs

BETWEEN_READINGS = 0.01
"""Seconds of passes between two readings of the counter."""
_SHORTEST = 0.5
"""Seconds for which passes run at least: the counter moves on every 20 to 100 ms alone."""
_STILL = 10.0
"""Seconds after which a counter that has not moved on is broken."""


def energy_counter(device: str) -> Callable[[], float]:
    """Return a function that reads how many millijoules a device has consumed until now.

    It is the counter of the NVIDIA driver's management library, NVML. It counts the whole board.

    Args:
        device: torch's name of the device.

    Raises:
        ValueError: if the device has no such counter.
        MissingPackage: if the package nvidia-ml-py is not installed.
    """
    needed = "energy_mj: expected an NVIDIA device whose driver counts energy"
    if not device.startswith("cuda"):
        raise ValueError(f"{needed}, found device {device!r}; choose cuda, or measure latency_ms")
    with needs("pynvml", what="energy_mj", install="nni-haloc[energy]"):
        import pynvml
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
