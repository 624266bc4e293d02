"""Define how entries of a specification are run and timed: `Runtime`, `Run`, `Timing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from nni_haloc.costs.device.energy import energy_counter, energy_of_passes
from nni_haloc.costs.device.spec import Specification
from nni_haloc.inputs.options import MOST_PROCESSES, MemoryFormat
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.utils.errors import MissingPackage, brief
from nni_haloc.utils.versions import processor

if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[[], Any]
"""A forward pass, ready to be timed."""
Where = Literal["alone", "in-place"]
_MOST_ROUNDS = 100_000
_LONGEST = 3600
"""Seconds that an entry may run for in a round."""


@dataclass(frozen=True)
class Deployed:
    """A whole network, made ready for a runtime.

    Attributes:
        network: computes the network's outputs for images ``(N, ...)``, as the runtime does it.
        ready: returns a forward pass on random inputs of a shape, batch included, warmed up.
        files: what was written of the network.
        batch: the only batch size that it takes (None: any).
    """

    network: nn.Module
    ready: Callable[[tuple[int, ...]], Run]
    files: tuple[Path, ...]
    batch: int | None = None


class Runtime(Protocol):
    """Run the entries of a specification, so that they can be timed.

    Another package adds a runtime by a class with these methods and an entry point in the group
    ``nni_haloc.runtimes``. A class that derives from this one has `prepare`, `once`, `energy` and
    `pinned` already and writes the other four; with `deploy`, it has rows in ``haloc bench``.

    Attributes:
        precisions: the number formats that `deploy` can give a network.
    """

    precisions: ClassVar[tuple[str, ...]] = ("float32",)

    @classmethod
    def from_options(
        cls,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        memory_format: str = "contiguous",
        threads: int | None = None,
        graph: bool = False,
        tf32: bool = True,
    ) -> Runtime:
        """Make the runtime that ``haloc measure`` and a run's settings ask for.

        Args:
            device: the name that torch has for it: ``cpu``, ``cuda:1``, ...
            dtype: the name that torch has for the number format.
            memory_format: ``contiguous`` or ``channels_last``. A run may choose between the two
                where the runtime takes both, and its identity says which one it has.
            threads: processor threads (None: the runtime's own choice).
            graph: whether a pass is replayed as a CUDA graph. This option and the next are passed
                only where they differ from the default, so a runtime may be without them.
            tf32: whether a CUDA device may compute float32 in TF32.

        Raises:
            ValueError: if it can't do what an option says; the message names the option.
            MissingPackage: if a package that it needs is not installed.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for.

        The keys are ``runtime`` (name and version), ``device``, ``dtype``, ``memory_format`` and
        ``threads``, on a CUDA device ``graph`` and ``tf32``, too; tables are comparable where they
        agree.
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

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready for this runtime, as a file of the runtime's own format.

        Args:
            network: what to deploy; it is left as it is.
            example: an input, ``(N, ...)``, of which only the shape counts.
            stem: path of the files that are written, without their ending. A file that is there
                already, of the same network, is used.
            images: training images, not augmented, by which the network is quantized to 8 bits
                (None: it stays in float32).

        Raises:
            ValueError: if the network can't be deployed, or its outputs are not torch's.
            MissingPackage: if a package that this needs is not installed.
        """
        raise ValueError(
            f"{type(self).__name__}: expected a runtime that takes whole networks from torch "
            "(the method deploy), found none"
        )

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def energy(self, run: Run, min_run_time: float = 0.0) -> float:
        """Return the millijoules that the device consumes for one pass.

        By default it is that of this processor, for a runtime whose passes run on it; see
        `nni_haloc.costs.device.energy.processor_counter`.

        Args:
            run: a forward pass of this runtime.
            min_run_time: seconds for which passes run at least.

        Raises:
            ValueError: if the runtime or the device measures no energy.
        """
        facts = self.identity()
        if facts.get("device") != processor():
            raise ValueError(
                "energy_mj: expected a runtime that measures energy, such as torch on a CUDA "
                f"device, found {facts['runtime']}; measure latency_ms with it"
            )
        return energy_of_passes(run, self.once(run), energy_counter("cpu"), min_run_time)

    def pinned(self) -> AbstractContextManager[None]:
        """Return a context in which the runtime has its number of threads and its precision."""
        return nullcontext()


def check_options(runtime: str, **options: tuple[Any, tuple[Any, ...]]) -> None:
    """Check the options of a runtime that can do only some of them.

    Args:
        runtime: its name.
        options: by its name, each option's value and the values that the runtime can do.

    Raises:
        ValueError: names the option and what was expected.
    """
    for option, (value, can) in options.items():
        if value not in can:
            expected = " or ".join(map(repr, can))
            raise ValueError(f"runtime {runtime}: {option}: expected {expected}, found {value!r}")


def check_threads(threads: int | None, name: str = "threads") -> None:
    """Check a number of processor threads, before a library that would end the program gets it.

    Args:
        threads: the number; None leaves it to the library.
        name: what messages call it.

    Raises:
        ValueError: unless it is None, or 1 to `MOST_PROCESSES`.
    """
    if threads is not None and not 1 <= threads <= MOST_PROCESSES:
        expected = "a number above 0" if threads < 1 else f"at most {MOST_PROCESSES}"
        raise ValueError(f"{name}: expected {expected}, found {brief(threads)}")


def make_runtime(name: str, *, graph: bool = False, tf32: bool = True, **options: Any) -> Runtime:
    """Make the runtime of a name.

    Args:
        name: a name of `nni_haloc.inputs.registries.RUNTIMES`.
        graph: see `Runtime.from_options`.
        tf32: see `Runtime.from_options`.
        options: the other options of `Runtime.from_options`.

    Raises:
        ValueError: if it can't do what an option says; the message names the option.
        MissingPackage: if a package that it needs is not installed.
    """
    others = {**({"graph": True} if graph else {}), **({} if tf32 else {"tf32": False})}
    try:
        return RUNTIMES[name].from_options(**options, **others)
    except TypeError as error:
        if not others:
            raise
        found = ", ".join(f"{option}: {value}" for option, value in others.items())
        raise ValueError(
            f"runtime {name}: expected options that it has, found {found} ({error}); leave it out"
        ) from None


def known_formats(in_format: Callable[[MemoryFormat], Runtime]) -> list[MemoryFormat]:
    """Return the memory formats that a runtime can time networks in.

    Args:
        in_format: makes the runtime in a format.
    """
    known: list[MemoryFormat] = []
    for memory_format in get_args(MemoryFormat):
        try:
            runtime = in_format(memory_format)
        except (ValueError, MissingPackage):  # whoever needs the runtime says what is wrong
            continue
        if runtime.identity().get("memory_format") == memory_format:
            known.append(memory_format)
    return known


@dataclass(frozen=True)
class Timing:
    """Options of a measurement.

    Attributes:
        where: ``alone`` times each entry by itself; ``in-place`` times the network with the
            candidate swapped in against the network as it was, in alternation.
        rounds: passes over all entries; there are more until `most_rounds`, as long as the standard
            error of a whole network is above 2 %.
        min_run_time: seconds for which each entry is timed in a round.
    """

    where: Where = "alone"
    rounds: int = 5
    min_run_time: float = 0.05

    @property
    def most_rounds(self) -> int:
        """Rounds after which measuring ends: three times `rounds`; of one or two no more than them.

        So few are a first look, which says nothing of its error.
        """
        return 3 * self.rounds if self.rounds > 2 else self.rounds

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            expected = "1 or more" if self.rounds < 1 else f"at most {_MOST_ROUNDS:,}"
            raise ValueError(f"rounds: expected {expected}, found {brief(self.rounds)}")
        if not 0 <= self.min_run_time <= _LONGEST:
            expected = "0 or more" if self.min_run_time < 0 else f"at most {_LONGEST:,} seconds"
            raise ValueError(f"min_run_time: expected {expected}, found {self.min_run_time}")
