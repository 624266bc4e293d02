"""Define how entries of a specification are run and timed: `Runtime`, `Run`, `Timing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nni_haloc.costs.device.spec import Specification

if TYPE_CHECKING:
    from torch import nn

Run = Callable[[], Any]
"""A forward pass, ready to be timed."""
Where = Literal["alone", "in-place"]


class Runtime(Protocol):
    """Run the entries of a specification, so that they can be timed.

    Another package adds a runtime by a class with these methods and an entry point in the group
    ``nni_haloc.runtimes``. A class that derives from this one has `prepare`, `once` and `pinned`
    already and writes the other four.
    """

    @classmethod
    def from_options(
        cls,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        memory_format: str = "contiguous",
        threads: int | None = None,
    ) -> Runtime:
        """Make the runtime that ``haloc measure`` and a run's settings ask for.

        Args:
            device: the name that torch has for it: ``cpu``, ``cuda:1``, ...
            dtype: the name that torch has for the number format.
            memory_format: ``contiguous`` or ``channels_last``.
            threads: processor threads (None: the runtime's own choice).

        Raises:
            ValueError: if it can't do what an option says; the message names the option.
            MissingPackage: if a package that it needs is not installed.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for.

        The keys are ``runtime`` (name and version), ``device``, ``dtype``, ``memory_format`` and
        ``threads``; tables are comparable where they agree.
        """
        ...

    def prepare(self, spec: Specification, model: nn.Module) -> Specification:
        """Add to a specification what this runtime needs of the network: by default the network."""
        return replace(spec, module=model)

    def entry(self, spec: Specification, index: int) -> Run:
        """Return a forward pass of one entry on random inputs, warmed up."""
        ...

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        """Return a forward pass of the whole network, warmed up.

        Args:
            spec: the specification, which may have no layers.
            choice: layer name to candidate name; other layers are dense.
        """
        ...

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def pinned(self) -> AbstractContextManager[None]:
        """Return a context in which the runtime has its number of threads."""
        return nullcontext()


@dataclass(frozen=True)
class Timing:
    """Options of a measurement.

    Attributes:
        where: ``alone`` times each entry by itself; ``in-place`` times the network with the
            candidate swapped in against the network as it was, in alternation.
        rounds: passes over all entries.
        min_run_time: seconds for which each entry is timed in a round.
    """

    where: Where = "alone"
    rounds: int = 5
    min_run_time: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, found {self.rounds}")
        if self.min_run_time < 0:
            raise ValueError(f"min_run_time: expected 0 or more, found {self.min_run_time}")
