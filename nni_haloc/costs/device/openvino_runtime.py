"""Timing with OpenVINO on the processor, in float32 and in 8 bits, and its files (``.xml``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nni_haloc.costs.device.onnx_based import RANDOM_BATCHES, OnnxBased, random_inputs
from nni_haloc.costs.device.runtime import Deployed, Run, check_options, check_threads
from nni_haloc.utils.errors import first_line, needs
from nni_haloc.utils.files import scratch, whole
from nni_haloc.utils.quiet import quietly
from nni_haloc.utils.versions import processor

if TYPE_CHECKING:
    from torch import Tensor, nn

_INSTALL = "nni-haloc[openvino]"
_CALIBRATION_BATCH = 32


def _openvino() -> ModuleType:
    """Import OpenVINO; if it is not installed, say so on one line."""
    with needs("openvino", what="OpenVINO", install=_INSTALL):
        import openvino
    return openvino


@dataclass(frozen=True)
class OpenVinoRuntime(OnnxBased):
    """Times with OpenVINO's CPU plugin, which computes in float32 where that is asked for.

    Without the hint, a processor with bfloat16 would compute in that.

    Attributes:
        threads: processor threads (None: OpenVINO's own choice).
        dtype: ``float32``, or ``int8``: each entry and the network are quantized by NNCF, by the
            ranges of random activations, so the times are right and the outputs are not.
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
    ) -> OpenVinoRuntime:
        """Make the runtime; see `Runtime.from_options`. A processor has no TF32.

        Raises:
            ValueError: if an option asks for anything but the processor, float32 or int8, and
                contiguous images, or for a CUDA graph.
            MissingPackage: if OpenVINO is not installed, or for int8 NNCF.
        """
        check_options(
            "openvino",
            device=(device, ("cpu",)),
            dtype=(dtype, cls.precisions),
            memory_format=(memory_format, ("contiguous",)),
            graph=(graph, (False,)),
        )
        check_threads(threads)
        _openvino()
        if dtype == "int8":
            _check_nncf()
        return cls(threads, dtype)

    def identity(self) -> dict[str, Any]:
        """Return what the times hold for; see `Runtime.identity`."""
        return {
            "runtime": f"openvino {_openvino().__version__.partition('-')[0]}",
            "device": processor(),
            "dtype": self.dtype,
            "memory_format": "contiguous",
            "threads": self.threads or "default",
        }

    def deploy(
        self, network: nn.Module, example: Tensor, stem: Path, images: Tensor | None = None
    ) -> Deployed:
        """Make a trained network ready, as OpenVINO's files; see `Runtime.deploy`."""
        file = stem.with_name(f"{stem.name}{'.xml' if images is None else '-int8.xml'}")
        export_openvino(network, example, file, images, threads=self.threads, onnx=stem)
        files = (file, file.with_suffix(".bin"))
        opened = open_openvino(file, self.threads)
        return Deployed(
            opened, lambda shape: self._pass_of(_read(file), [shape]), files, opened.batch
        )

    def ready(self, model: bytes | str, batch: int | None = None) -> Run:
        """Return a forward pass of an ONNX model; see `OnnxBased.ready`."""
        read = _read(model)
        shapes = [
            tuple(n.get_length() if n.is_static else batch or 1 for n in x.partial_shape)
            for x in read.inputs
        ]
        if self.dtype == "int8":
            _reshape(read, shapes)
            batches = random_inputs(_by_place(shapes), RANDOM_BATCHES)
            read = quantized(read, [list(batch.values()) for batch in batches])
        return self._pass_of(read, shapes)

    def _pass_of(self, model: Any, shapes: Sequence[tuple[int, ...]]) -> Run:
        """Return a forward pass of an OpenVINO model on random inputs, warmed up."""
        model = model.clone()
        _reshape(model, shapes)
        request = _compiled(model, self.threads).create_infer_request()
        (feeds,) = random_inputs(_by_place(shapes))
        for i, x in enumerate(feeds.values()):
            request.set_input_tensor(i, _openvino().Tensor(x))

        def run() -> Any:
            request.infer(share_outputs=True)
            return request

        for _ in range(2):
            run()
        return run


def _by_place(shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {str(i): shape for i, shape in enumerate(shapes)}


def export_openvino(
    network: nn.Module,
    example: Tensor,
    file: str | Path,
    images: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    threads: int | None = None,
    onnx: Path | None = None,
) -> float:
    """Write a network as OpenVINO's files: ``.xml``, and its weights beside it, ``.bin``.

    It is exported to ONNX first. In float32 its outputs are compared with torch's.

    Args:
        network: what to export; it is left as it is.
        example: an input, ``(N, ...)``, of which only the shape counts.
        file: the file, ``.xml``; it keeps its old content if something fails.
        images: training images, not augmented, ``(N, ...)``: by the ranges of their activations
            NNCF quantizes the network to 8 bits (None: it stays in float32).
        tolerance: largest difference in float32, as a share of the largest output (or of 1).
        threads: processor threads of the comparison (None: OpenVINO's own choice).
        onnx: path without ending of the network's ONNX file, which is used if it is there and
            written if not (None: it is written into a scratch folder).

    Returns:
        The largest difference of any output; in 8 bits on the images.

    Raises:
        ValueError: if the network can't be exported, an output differs by more, or there are no
            images.
        MissingPackage: if OpenVINO, NNCF or one of ONNX's packages is not installed.
    """
    from nni_haloc.costs.device.exporting import checked, difference_of, plain_copy
    from nni_haloc.costs.device.onnx_files import deployed_onnx

    file = Path(file)
    if images is not None:
        _check_nncf()
        if not len(images):
            raise ValueError("quantization: expected training images to calibrate on, found none")
    with scratch(file) as folder:
        model = _read(deployed_onnx(network, example, onnx or folder / "network"))
        if images is not None:
            size = model.inputs[0].partial_shape[0]
            batch = size.get_length() if size.is_static else _CALIBRATION_BATCH
            batches = [b for b in images.split(batch) if size.is_dynamic or len(b) == batch]
            model = quantized(model, [[b.contiguous().numpy()] for b in batches])
        part = folder / "model.xml"
        _openvino().save_model(model, part, compress_to_fp16=False)
        written = open_openvino(part, threads)
        if images is None:
            dynamic = written.batch is None
            difference = checked(network, written, example, dynamic, file, tolerance)
        else:
            few = images[: written.batch or _CALIBRATION_BATCH]
            difference = difference_of(plain_copy(network, example), written, [few], file)
        for ending in (".bin", ".xml"):
            with whole(file.with_suffix(ending)) as place:
                shutil.copyfile(part.with_suffix(ending), place)
    return difference


def open_openvino(file: str | Path, threads: int | None = None) -> Any:
    """Open an OpenVINO file as a network that OpenVINO runs on the processor.

    Args:
        file: the file, ``.xml``, beside its ``.bin``; or an ONNX file.
        threads: processor threads (None: OpenVINO's own choice).

    Returns:
        A `nni_haloc.costs.device.exporting.OpenedNetwork`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none that OpenVINO can read.
        MissingPackage: if OpenVINO is not installed.
    """
    from nni_haloc.costs.device.exporting import OpenedNetwork

    _openvino()
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        model = _read(file)
    except RuntimeError as error:
        raise ValueError(f"{file}: {first_line(error)}") from None
    compiled = _compiled(model, threads)
    size = model.inputs[0].partial_shape[0]

    def run(x: Any) -> list[Any]:
        with _clear_errors():
            return list(compiled([x]).values())

    names = [output.any_name for output in model.outputs]
    return OpenedNetwork(run, names, size.get_length() if size.is_static else None)


def quantized(model: Any, batches: Sequence[Sequence[Any]]) -> Any:
    """Quantize an OpenVINO model to 8 bits by NNCF's post-training quantization.

    Weights have 7 bits, because a processor without VNNI adds pairs of products in 16 bits.

    Args:
        model: an `openvino.Model`.
        batches: inputs, which give the activations their ranges: an array for each of the model's.

    Raises:
        MissingPackage: if NNCF is not installed.
    """
    nncf = _check_nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    advanced = AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)
    with quietly(), _clear_errors():
        # NNCF looks for weights in constants; those of a specification's models are computed.
        from openvino.passes import ConstantFolding, Manager

        passes = Manager()
        passes.register_pass(ConstantFolding())
        passes.run_passes(model)
        return nncf.quantize(
            model,
            nncf.Dataset(list(batches)),
            subset_size=len(batches),
            advanced_parameters=advanced,
        )


def _check_nncf() -> ModuleType:
    """Import NNCF; if it is not installed, say so on one line."""
    with needs("nncf", what="OpenVINO in int8", install=_INSTALL):
        import nncf
    return nncf


def _read(model: bytes | str | Path) -> Any:
    """Read an ONNX model or an OpenVINO file as an `openvino.Model`."""
    with _clear_errors():
        return _core().read_model(model)


def _reshape(model: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    with _clear_errors():
        model.reshape({i: list(shape) for i, shape in enumerate(shapes)})


def _compiled(model: Any, threads: int | None) -> Any:
    """Compile a model for the processor, for the shortest time of one pass, in float32."""
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    with _clear_errors():
        return _core().compile_model(model, "CPU", properties)


@cache
def _core() -> Any:
    return _openvino().Core()


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Give OpenVINO's errors, whose first lines are places in its sources, their reason as one."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        told = [line for line in lines if line and not line.startswith("Exception from")]
        raise RuntimeError(f"OpenVINO: {told[-1] if told else first_line(error)}") from None
