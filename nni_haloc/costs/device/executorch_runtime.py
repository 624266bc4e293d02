"""Timing with ExecuTorch and XNNPACK, as phones run networks, and its files (``.pte``).

Both are in float32 or in 8 bits.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from nni_haloc.costs.device.exporting import OpenedNetwork, checked, difference_of, plain_copy
from nni_haloc.costs.device.runtime import Deployed, Run, Runtime, check_options, check_threads
from nni_haloc.costs.device.spec import Specification
from nni_haloc.costs.device.torch_runtime import layer_spec, network_of
from nni_haloc.utils.errors import MissingPackage, first_line, needs
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.quiet import quietly
from nni_haloc.utils.versions import processor

_INSTALL = "nni-haloc[executorch]"
_RANDOM_BATCHES = 2
"""Random inputs that give activations their ranges where only the time counts."""
_COMPARED = 32
"""Training images on which a program in 8 bits is compared with torch."""
_LOADED: WeakSet[_Program] = WeakSet()
"""The programs that are loaded."""


def _portable() -> ModuleType:
    """Import ExecuTorch's runtime for Python; if it is not installed, say so on one line."""
    with needs("executorch", what="ExecuTorch", install=_INSTALL), quietly():
        import executorch.extension.pybindings.portable_lib as portable
    return portable


@dataclass(frozen=True)
class ExecuTorchRuntime(Runtime):
    """Times with ExecuTorch, whose operations XNNPACK computes.

    Each entry, and the network, is exported and lowered by itself, which takes seconds. What
    XNNPACK has no kernel for is computed by ExecuTorch's portable ones.

    Attributes:
        threads: processor threads (None: ExecuTorch's own choice).
        dtype: ``float32``, or ``int8``: each entry and the network are quantized by XNNPACK's
            quantizer, by the ranges of random activations, so the times are right and the outputs
            are not.
    """

    precisions = ("float32", "int8")
    threads: int | None = None
    dtype: str = "float32"

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
    ) -> ExecuTorchRuntime:
        """Make the runtime; see `Runtime.from_options`. A processor has no TF32.

        Raises:
            ValueError: if an option asks for anything but the processor, float32 or int8, and
                contiguous images, or for a CUDA graph.
            MissingPackage: if ExecuTorch is not installed, or for int8 torchao.
        """
        check_options(
            "executorch",
            device=(device, ("cpu",)),
            dtype=(dtype, cls.precisions),
            memory_format=(memory_format, ("contiguous",)),
            graph=(graph, (False,)),
        )
        check_threads(threads)
        _portable()
        if dtype == "int8":
            with _needs_torchao(), quietly():
                pass
        return cls(threads, dtype)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        return {
            "runtime": f"executorch {version('executorch')}",
            "device": processor(),
            "dtype": self.dtype,
            "memory_format": "contiguous",
            "threads": self.threads or "default",
        }

    def entry(self, spec: Specification, index: int) -> Run:
        """Return a forward pass of one entry; see `Runtime.entry`."""
        return self._pass_of(self.program(spec, index), self._shapes(spec, index))

    def network(self, spec: Specification, choice: Mapping[str, str]) -> Run:
        """Return a forward pass of the whole network; see `Runtime.network`."""
        return self.ready(network_of(spec, choice), spec.input)

    def program(self, spec: Specification, index: int | None) -> bytes:
        """Return the program of one entry, or of the network for None: content of a ``.pte``.

        Raises:
            RuntimeError: if ExecuTorch can't lower it.
        """
        if index is None:
            module = network_of(spec, {})
        else:
            entry = spec.entries[index]
            layer = layer_spec("", entry.layer)
            layer.check_rank(entry.rank)
            module = _Calls(layer.build(entry.rank))
        return self._program_of(module, self._shapes(spec, index))

    @staticmethod
    def _shapes(spec: Specification, index: int | None) -> Sequence[tuple[int, ...]]:
        """Return the shapes of the inputs of one entry, or of the network."""
        if index is None:
            return [spec.input]
        return layer_spec("", spec.entries[index].layer).input_shapes

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready for one image, as a ``.pte``; see `Runtime.deploy`."""
        file = stem.with_name(f"{stem.name}{'.pte' if images is None else '-int8.pte'}")
        with self.pinned():
            export_executorch(network, example[:1], file, images)
            opened = open_executorch(file)
        shape = (1, *example.shape[1:])
        return Deployed(
            opened, lambda _: self._pass_of(file.read_bytes(), [shape]), (file,), opened.batch
        )

    def ready(self, module: nn.Module, *shapes: tuple[int, ...]) -> Run:
        """Return a forward pass of a module on random inputs, warmed up.

        Args:
            module: it is set to evaluation mode.
            shapes: of its inputs.
        """
        return self._pass_of(self._program_of(module, shapes), shapes)

    def _program_of(self, module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> bytes:
        """Return a module's program, for inputs of some shapes."""
        batches = [[torch.randn(shape) for shape in shapes] for _ in range(_RANDOM_BATCHES)]
        return _lowered(module.eval(), batches[0], batches if self.dtype == "int8" else None)

    def _pass_of(self, program: bytes, shapes: Sequence[tuple[int, ...]]) -> Run:
        """Return a forward pass of a program on random inputs, warmed up."""
        inputs = [torch.randn(shape) for shape in shapes]
        with self.pinned():
            loaded = _Program(program)
            for _ in range(2):
                loaded(inputs)
        return lambda: loaded(inputs)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Let ExecuTorch have this runtime's number of threads.

        It keeps them after the block, because programs that are loaded hold on to the threads.

        Raises:
            RuntimeError: if programs are loaded that run on another number of threads.
        """
        _set_threads(self.threads or _own_choice())
        yield


@cache
def _own_choice() -> int:
    """Return the number of threads that ExecuTorch takes by itself; before anybody changes it."""
    with _hushed():
        return _portable()._threadpool_get_thread_count()


def _set_threads(threads: int) -> None:
    """Let ExecuTorch have a number of threads: all its programs share them."""
    portable = _portable()
    own = _own_choice()
    found = portable._threadpool_get_thread_count()
    if found == threads:
        return
    gc.collect()
    if _LOADED:  # they would go on with threads that are gone, and the process would end
        raise RuntimeError(
            f"threads: expected {found}, which ExecuTorch's programs in this process run on, found "
            f"{threads} (by itself it takes {own}); let go of those programs first"
        )
    with _hushed():
        portable._unsafe_reset_threadpool(threads)


@contextmanager
def _hushed() -> Iterator[None]:
    """Hide what ExecuTorch's C++ code writes on standard error, for a block's time."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class _Program:
    """Runs a program that is in memory; called with its inputs, it returns its outputs.

    Args:
        content: of the ``.pte`` file. ExecuTorch reads it while it runs.

    Raises:
        RuntimeError: if it is no program.
    """

    def __init__(self, content: bytes) -> None:
        portable = _portable()
        self._content = content
        with _hushed():
            self._module = portable._load_for_executorch_from_buffer(content)
            self.meta = self._module.method_meta("forward")
        _LOADED.add(self)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        return self._module.run_method("forward", inputs)


class _Calls(nn.Module):
    """Calls a layer once for each of its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(x) for x in inputs)


def _lowered(
    module: nn.Module,
    inputs: Sequence[Tensor],
    batches: Iterable[Sequence[Tensor]] | None = None,
) -> bytes:
    """Export a module and lower it to XNNPACK; return the program.

    Args:
        module: in evaluation mode.
        inputs: of the shapes that the program takes.
        batches: inputs of these shapes, which give the activations their ranges: the program
            computes in 8 bits (None: in float32).
    """
    with needs("executorch", what="ExecuTorch", install=_INSTALL), quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    start = time.perf_counter()
    try:
        with quietly():
            program = torch.export.export(module, tuple(inputs))
            if batches is not None:
                rounded = _quantized(program.module(), batches)
                program = torch.export.export(rounded, tuple(inputs))
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            lowered = edge.to_executorch().buffer
    except MissingPackage:
        raise
    except Exception as error:  # of many kinds; some come from the network's own code
        raise RuntimeError(f"ExecuTorch can't lower it: {first_line(error)}") from None
    logger.debug("ExecuTorch: lowered in %.1f s", time.perf_counter() - start)
    return lowered


def _quantized(module: Any, batches: Iterable[Sequence[Tensor]]) -> Any:
    """Quantize an exported module to 8 bits by XNNPACK's quantizer; weights by channel.

    Args:
        module: of an exported program.
        batches: inputs, which give the activations their ranges.
    """
    with _needs_torchao():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    quantizer = XNNPACKQuantizer()
    # The others are of trainings, and take most of the time: normalisation is folded before.
    quantizer.SUPPORTED_PATTERNS = [
        each for each in quantizer.SUPPORTED_PATTERNS if not each.is_qat
    ]
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    _unshare(module)
    watched = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for batch in batches:
            watched(*batch)
    return convert_pt2e(watched)


def _unshare(module: Any) -> None:
    """Give each use of a tensor in an exported module a copy of its own.

    The quantizer leaves all calls of a layer but the first in float32.

    Args:
        module: of an exported program; it is changed.
    """
    graph = module.graph
    for node in [each for each in graph.nodes if each.op == "get_attr"]:
        value = attrgetter(node.target)(module)
        for number, user in enumerate(list(node.users)[1:], 1):
            name = f"{node.target.replace('.', '_')}_use_{number}"
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                module.register_buffer(name, value.clone())
            with graph.inserting_before(node):
                own = graph.get_attr(name)
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)
    module.recompile()


def _needs_torchao() -> AbstractContextManager[None]:
    """Return a context in which torchao is installed, which quantizes for ExecuTorch."""
    return needs("torchao", what="ExecuTorch in int8", install=_INSTALL)


def export_executorch(
    network: nn.Module,
    example: Tensor,
    file: str | Path,
    images: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
) -> float:
    """Write a network as an ExecuTorch program (``.pte``), whose operations XNNPACK computes.

    It takes the example's batch size alone. In float32 its outputs are compared with torch's.

    Args:
        network: what to export; it is left as it is.
        example: an input, ``(N, ...)``, of which only the shape counts.
        file: the file; it keeps its old content if something fails.
        images: training images, not augmented, ``(N, ...)``: by the ranges of their activations
            XNNPACK's quantizer rounds the network to 8 bits (None: it stays in float32).
        tolerance: largest difference in float32, as a share of the largest output (or of 1).

    Returns:
        The largest difference of any output; in 8 bits on some of the images.

    Raises:
        ValueError: if the network can't be exported, an output differs by more, or there are too
            few images.
        MissingPackage: if ExecuTorch, or for 8 bits torchao, is not installed.
    """
    batches = None
    if images is not None:
        size = len(example)
        batches = [[batch.contiguous()] for batch in images.split(size) if len(batch) == size]
        if not batches:
            raise ValueError(
                f"quantization: expected training images to calibrate on, {size} or more, "
                f"found {len(images) or 'none'}"
            )
    with whole(file) as part:
        copied = plain_copy(network, example)
        try:
            lowered = _lowered(copied, [torch.zeros_like(example)], batches)
        except RuntimeError as error:
            raise ValueError(f"{file}: {first_line(error)}") from None
        Path(part).write_bytes(lowered)
        written = open_executorch(part)
        if batches is None:
            return checked(network, written, example, False, file, tolerance)
        few = [batch for (batch,) in batches[: max(1, _COMPARED // len(example))]]
        return difference_of(copied, written, few, file)


def open_executorch(file: str | Path) -> OpenedNetwork:
    """Open a ``.pte`` file of one input as a network that ExecuTorch runs on the processor.

    Args:
        file: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if ExecuTorch can't read it.
        MissingPackage: if ExecuTorch is not installed.
    """
    _portable()
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        program = _Program(Path(file).read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{file}: {first_line(error)}") from None

    def run(x: Any) -> list[Any]:
        return [y.numpy() for y in program([torch.from_numpy(x)])]

    return OpenedNetwork(run, [], program.meta.input_tensor_meta(0).sizes()[0])
