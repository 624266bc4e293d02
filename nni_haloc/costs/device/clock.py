"""Time passes on a machine that is not idle: what the processor gives to others is left out."""

from __future__ import annotations

import time
from functools import cache

from nni_haloc.costs.device.runtime import Run, Runtime
from nni_haloc.utils.versions import processor

_NOISE = 0.02
"""Share of a pass, and below it `_TICK`, by which wall time and processor time differ anyway."""
_TICK = 2e-5
"""Seconds."""
_SAME = 0.2
"""Share by which a runtime's own time of a pass may be below the time of the call."""
_LEAST = 0.02
"""A pass that needs less processor time than this share of its wall time runs elsewhere."""


class PassClock:
    """Time the passes of a runtime, beside the processor time of this process.

    On one thread, a pass that is interrupted takes longer by the clock on the wall, not by that of
    the processor: the processor's counts where the two differ. On several threads, which may wait
    for each other, `cores` tells a round in which others used the processor.

    A runtime whose passes do not run in this process, on this processor, or that counts its time
    otherwise, is believed.

    Attributes:
        wall: seconds of all passes so far, as far as both clocks hold for them.
        spent: seconds of processor time of the same passes, of all threads together.
    """

    def __init__(self, runtime: Runtime) -> None:
        facts = runtime.identity()
        self.runtime = runtime
        self.is_here = facts.get("device") == _processor() and _is_fine()
        self.is_single = facts.get("threads") == 1
        self.wall = self.spent = 0.0

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds.

        Args:
            run: a forward pass of the runtime.
        """
        if not self.is_here:
            return self.runtime.once(run)
        start, before = time.perf_counter(), time.process_time()
        seconds = self.runtime.once(run)
        spent, wall = time.process_time() - before, time.perf_counter() - start
        return self.judge(seconds, wall, spent)

    def judge(self, seconds: float, wall: float, spent: float) -> float:
        """Return the seconds of a pass.

        Args:
            seconds: by the runtime.
            wall: by the clock on the wall, around the runtime.
            spent: processor time in between.
        """
        own_clock = not -_TICK <= wall - seconds <= max(_SAME * wall, _TICK)
        if own_clock or spent < _LEAST * seconds:
            return seconds
        self.wall += seconds
        self.spent += spent
        if self.is_single and seconds - spent > max(_NOISE * seconds, _TICK):
            return spent
        return seconds

    def take_cores(self) -> float | None:
        """Return how many cores the passes since the last call have kept busy.

        Returns:
            None where that says nothing: on a single thread, or by another clock.
        """
        wall, spent = self.wall, self.spent
        self.wall = self.spent = 0.0
        return None if self.is_single or wall <= 0 else spent / wall


@cache
def _processor() -> str:
    return processor()


def _is_fine() -> bool:
    """Tell whether the clock of the processor's time is fine enough for a pass."""
    return time.get_clock_info("process_time").resolution <= _TICK
