"""Time layers and networks with PyTorch, on any of its devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from nni_haloc.costs.device.energy import energy_counter, energy_of_passes
from nni_haloc.costs.device.replay import Replay
from nni_haloc.costs.device.runtime import Deployed, Run, Runtime, check_threads
from nni_haloc.costs.device.spec import Specification
from nni_haloc.inputs.options import Kind, MemoryFormat
from nni_haloc.inputs.registries import RUNTIMES
from nni_haloc.space.layers import LayerSpec
from nni_haloc.space.modules import copy_of, replace_modules, set_precision
from nni_haloc.space.names import DENSE
from nni_haloc.utils.errors import SettingsError, first_line
from nni_haloc.utils.memory import keep_freed
from nni_haloc.utils.versions import processor

_BEFORE_CAPTURE = 3
"""Passes before one is captured: in it no library may choose its algorithms any more."""


@dataclass(frozen=True)
class TorchRuntime(Runtime):
    """Time layers and networks with PyTorch.

    Attributes:
        device: torch's name of the device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        dtype: torch's name of a floating-point type.
        memory_format: ``contiguous`` or ``channels_last``.
        threads: processor threads (None: as torch is set). Other devices ignore it.
        graph: whether a pass is captured as a CUDA graph once and replayed; else the processor
            launches each of its operations, as in a program that is not captured.
        tf32: whether a CUDA device may compute float32 convolutions and matrix products in TF32.
            It does so by default in torch in convolutions, and in a run of this package in both.
            Other devices ignore it.

    Raises:
        ValueError: if torch can't use the device or the type here, or the device has no graphs.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_format: MemoryFormat = "contiguous"
    threads: int | None = None
    graph: bool = False
    tf32: bool = True

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
    ) -> TorchRuntime:
        """Make the runtime that ``haloc measure`` and a run's settings ask for.

        Args:
            device: torch's name of the device.
            dtype: torch's name of a floating-point type.
            memory_format: ``contiguous`` or ``channels_last``.
            threads: processor threads (None: as torch is set).
            graph: whether a pass is replayed as a CUDA graph.
            tf32: whether a CUDA device may compute float32 in TF32.

        Raises:
            ValueError: if torch can't use the device or the type here, or the device has no graphs.
        """
        return cls(device, dtype, cast(MemoryFormat, memory_format), threads, graph, tf32)

    def __post_init__(self) -> None:
        if self.memory_format not in get_args(MemoryFormat):
            raise ValueError(
                f"memory_format: expected one of {', '.join(get_args(MemoryFormat))}, "
                f"found {self.memory_format!r}"
            )
        check_threads(self.threads)
        if self.graph and not self._is_cuda:
            raise ValueError(
                f"graph: expected a CUDA device, such as cuda, found {self.device!r}; "
                "leave graph out, or choose such a device"
            )
        if self.dtype == "int8":
            able = ", ".join(n for n in RUNTIMES.own() if "int8" in RUNTIMES[n].precisions)
            raise ValueError(
                "runtime torch: dtype: expected a floating-point type of torch's, found 'int8'; "
                f"choose {able} for it"
            )
        try:
            torch.empty(1, device=self.device, dtype=self._dtype)
            self._wait()
        except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
            reason = first_line(error)
            raise ValueError(
                f"device {self.device!r}, dtype {self.dtype!r}: torch cannot use it here ({reason})"
            ) from None

    @property
    def _is_cuda(self) -> bool:
        return self.device.startswith("cuda")

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
            "device": hardware(self.device),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "threads": (self.threads or torch.get_num_threads()) if cpu else self.device,
            "memory": "kept" if cpu and keep_freed() else "default",
            **({"graph": self.graph, "tf32": self.tf32} if self._is_cuda else {}),
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
        return self.ready(network_of(spec, choice), spec.input, copied=True)

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready: as it is, with a file of its weights."""
        from safetensors.torch import save_model

        file = stem.with_name(f"{stem.name}.safetensors")
        save_model(network, str(file))
        return Deployed(network, lambda shape: self.ready(network, shape, copied=False), (file,))

    def ready(self, module: nn.Module, *shapes: tuple[int, ...], copied: bool = True) -> Run:
        """Return a forward pass of a module on random inputs, warmed up.

        Args:
            module: it is moved and set to evaluation mode, unless it is copied.
            shapes: one input shape for each call in a pass.
            copied: whether ``module`` is a copy already.

        Returns:
            A function that runs the passes and returns their outputs.

        Raises:
            SettingsError: if a CUDA graph of the passes is asked for and can't be captured.
        """
        model = (module if copied else copy_of(module)).eval().to(self.device)
        set_precision(model, self._dtype)
        inputs = [torch.randn(shape).to(self.device, self._dtype) for shape in shapes]
        if self.memory_format == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            inputs = [
                x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                for x in inputs
            ]

        run = self._pass_of(model, inputs)
        ready = _Captured(run, self.device) if self.graph else run
        for _ in range(2):  # memory is allocated, and the library chooses its algorithms
            ready()
        self._wait()
        return ready

    def _pass_of(self, model: nn.Module, inputs: list[Tensor]) -> Run:
        """Return a forward pass of a model and inputs that are ready on the device."""

        def run() -> list[Tensor]:
            with torch.inference_mode():
                return [model(x) for x in inputs]

        return run

    def once(self, run: Run) -> float:
        """Run one pass and return its seconds, on a CUDA device by the device's own clock.

        There another pass goes before it without a pause, as in a program that runs batch after
        batch: the time is then that of launching or of computing, whichever is longer, and a layer
        alone takes what it adds to a network.

        Args:
            run: a forward pass of this runtime.
        """
        if self._is_cuda:
            with torch.cuda.device(self.device):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                run()
                before.record()
                run()
                after.record()
                after.synchronize()
            return 1e-3 * before.elapsed_time(after)
        start = perf_counter()
        run()
        self._wait()
        return perf_counter() - start

    def energy(self, run: Run, min_run_time: float = 0.0) -> float:
        """Return the millijoules that the device consumes for one pass.

        Passes run without a pause for half a second or more; what the device draws when it does
        nothing is in the result for the time that a pass takes.

        Args:
            run: a forward pass of this runtime.
            min_run_time: seconds for which passes run at least.

        Raises:
            ValueError: if the device counts no energy.
            MissingPackage: if the package nvidia-ml-py is not installed.
        """
        read = energy_counter(self.device)
        return energy_of_passes(run, self.once(run), read, min_run_time, self._wait)

    def _wait(self) -> None:
        kind = torch.device(self.device).type
        if kind == "cuda":
            torch.cuda.synchronize(self.device)
        elif kind != "cpu":
            getattr(torch, kind).synchronize()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Set torch's number of threads, on a CUDA device also its TF32, for a block's time."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        keep_freed()
        try:
            with _tf32(self.tf32) if self._is_cuda else nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


class _Captured:
    """Replay a forward pass as a CUDA graph; return its outputs, which each replay overwrites.

    Args:
        run: the pass. Its inputs and weights stay where they are, and the graph reads them there.
        device: torch's name of the device.

    Raises:
        SettingsError: if the pass can't be captured.
    """

    def __init__(self, run: Run, device: str) -> None:
        self._run = run  # it keeps inputs and weights alive
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        stream = _side_stream(current.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_BEFORE_CAPTURE):
                run()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self._outputs = run()
            except RuntimeError as error:
                raise SettingsError(
                    "graph: expected a pass that a CUDA graph can capture, which never waits for "
                    f"the device, found another ({first_line(error.__context__ or error)}); "
                    "leave graph out"
                ) from None

    def __call__(self) -> Any:
        self._graph.replay()
        return self._outputs


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which passes are captured: each stream has a workspace of cuBLAS's."""
    return torch.cuda.Stream(device)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in convolutions and matrix products, or forbid it, for a block's time.

    Torch has an older and a newer way to set it, which do not mix. Lightning and the runs of this
    package use the older one, and so does this function.
    """

    def allow(convolutions: bool, products: str) -> None:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*new API settings to control TF32.*")
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        try:
            allow(allowed, "high" if allowed else "highest")
            yield
        finally:
            allow(*before)


def hardware(device: str) -> str:
    """Return the name of the hardware behind a device: the processor's unless it is a CUDA device.

    Args:
        device: torch's name of the device.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return processor()


def network_of(spec: Specification, choice: Mapping[str, str]) -> nn.Module:
    """Build a specification's network: a copy of itself, or its recorded program without it.

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
    return model


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
