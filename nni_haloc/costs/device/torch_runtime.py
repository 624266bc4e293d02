"""Time layers and networks with PyTorch, on any of its devices."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from nni_haloc.costs.device.replay import Replay
from nni_haloc.costs.device.runtime import Run, Runtime
from nni_haloc.costs.device.spec import Specification
from nni_haloc.inputs.options import Kind, MemoryFormat
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import copy_of, replace_modules
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import first_line
from nni_haloc.utils.versions import processor

_MALLOC = ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28))
"""glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, and the bytes that they are set to."""
_HEAD_START = 10_000_000
"""Cycles of a CUDA device for which it is kept busy: some milliseconds."""


@dataclass(frozen=True)
class TorchRuntime(Runtime):
    """Time layers and networks with PyTorch.

    Attributes:
        device: torch's name of the device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        dtype: torch's name of a floating-point type.
        memory_format: ``contiguous`` or ``channels_last``.
        threads: processor threads (None: as torch is set). Other devices ignore it.

    Raises:
        ValueError: if torch can't use the device or the type here.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_format: MemoryFormat = "contiguous"
    threads: int | None = None

    @classmethod
    def from_options(
        cls,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        memory_format: str = "contiguous",
        threads: int | None = None,
    ) -> TorchRuntime:
        """Make the runtime that ``haloc measure`` and a run's settings ask for.

        Args:
            device: torch's name of the device.
            dtype: torch's name of a floating-point type.
            memory_format: ``contiguous`` or ``channels_last``.
            threads: processor threads (None: as torch is set).

        Raises:
            ValueError: if torch can't use the device or the type here.
        """
        return cls(device, dtype, cast(MemoryFormat, memory_format), threads)

    def __post_init__(self) -> None:
        if self.memory_format not in get_args(MemoryFormat):
            raise ValueError(
                f"memory_format: expected one of {', '.join(get_args(MemoryFormat))}, "
                f"found {self.memory_format!r}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: expected a number above 0, found {self.threads}")
        try:
            torch.empty(1, device=self.device, dtype=self._dtype)
            self._wait()
        except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(
                f"device {self.device!r}, dtype {self.dtype!r}: torch cannot use it here ({reason})"
            ) from None

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise AttributeError("not a floating-point type of torch's")
        return dtype

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for.

        Returns:
            The keys of `Runtime.identity`, and ``memory``: ``kept`` where freed memory is kept.
        """
        cpu = self.device == "cpu"
        return {
            "runtime": f"torch {torch.__version__}",
            "device": torch.cuda.get_device_name(self.device)
            if self.device.startswith("cuda")
            else processor(),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "threads": (self.threads or torch.get_num_threads()) if cpu else self.device,
            "memory": "kept" if cpu and _keep_memory() else "default",
        }

    def entry(self, spec: Specification, index: int) -> Run:
        """Return a forward pass of one entry on random inputs, warmed up.

        Args:
            spec: the specification.
            index: of the entry.

        Raises:
            ValueError: if the entry makes no sense.
        """
        entry = spec.entries[index]
        layer = layer_spec("", entry.layer)
        layer.check_rank(entry.rank)
        return self.ready(layer.build(entry.rank), *layer.input_shapes)

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        """Return a forward pass of the network itself, or of its recorded program without it.

        Args:
            spec: the specification, which may have no layers.
            choice: layer name to candidate name; other layers are dense.

        Raises:
            ValueError: if the specification has neither network nor program.
        """
        entries = {
            layer: spec.entries[row[choice.get(layer, DENSE)]] for layer, row in spec.layers.items()
        }
        specs = {layer: layer_spec(layer, entry.layer) for layer, entry in entries.items()}
        if spec.module is not None:
            model = copy_of(spec.module)
        elif spec.program is not None:
            model = Replay(spec.program, specs)
        else:
            raise ValueError("the specification has no program of the network")
        replace_modules(
            model,
            {
                layer: specs[layer].build(entries[layer].rank)
                for layer, name in choice.items()
                if name != DENSE
            },
        )
        return self.ready(model, spec.input, copied=True)

    def ready(self, module: nn.Module, *shapes: tuple[int, ...], copied: bool = True) -> Run:
        """Return a forward pass of a module on random inputs, warmed up.

        Args:
            module: it is moved and set to evaluation mode, unless it is copied.
            shapes: one input shape for each call in a pass.
            copied: whether ``module`` is a copy already.

        Returns:
            A function that runs the passes and returns their outputs.
        """
        model = (module if copied else copy_of(module)).eval().to(self.device, self._dtype)
        inputs = [torch.randn(shape).to(self.device, self._dtype) for shape in shapes]
        if self.memory_format == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            inputs = [
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                for x in inputs
            ]

        def run() -> list[Tensor]:
            with torch.inference_mode():
                return [model(x) for x in inputs]

        for _ in range(2):  # memory is allocated, and the library chooses its algorithms
            run()
        self._wait()
        return run

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds, on a CUDA device by the device's own clock.

        Args:
            run: a forward pass of this runtime.
        """
        if self.device.startswith("cuda"):
            # The device is kept busy while the host prepares the pass that is timed.
            with torch.cuda.device(self.device):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(_HEAD_START)
                before.record()
                run()
                after.record()
                after.synchronize()
            return 1e-3 * before.elapsed_time(after)
        start = perf_counter()
        run()
        self._wait()
        return perf_counter() - start

    def _wait(self) -> None:
        kind = torch.device(self.device).type
        if kind == "cuda":
            torch.cuda.synchronize(self.device)
        elif kind != "cpu":
            getattr(torch, kind).synchronize()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Set torch's number of threads for the time of a block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        _keep_memory()
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _keep_memory() -> bool:
    """Have glibc keep freed memory for the rest of the process, if there is glibc.

    By default it may give an activation of some megabytes back to the system and take it anew in
    each pass, zeroed page by page. Whether it does depends on what was allocated before, and it can
    treble a layer's time.
    """
    try:
        library = ctypes.CDLL(None)
        return all(library.mallopt(option, size) for option, size in _MALLOC)
    except (OSError, AttributeError, TypeError):
        return False


def layer_spec(name: str, fields: Mapping[str, Any]) -> LayerSpec:
    """Read a layer's geometry from the fields of a specification.

    Raises:
        ValueError: if the fields do not fit; the message says which.
    """

    def pairs(value: Any) -> Any:
        return tuple(pairs(v) for v in value) if isinstance(value, (list, tuple)) else value

    if fields.get("kind") not in get_args(Kind):
        raise ValueError(
            f"layer {name!r}: kind: expected one of {', '.join(get_args(Kind))}, "
            f"found {fields.get('kind')!r}"
        )
    try:
        return LayerSpec(name=name, **{key: pairs(value) for key, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"layer {name!r}: {error}") from None
