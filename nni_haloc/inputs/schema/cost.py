"""The section ``cost``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nni_haloc.inputs.options import FormatSetting, MemoryFormat, Precision
from nni_haloc.inputs.schema.paths import ExistingPath
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import Device, Metric, Predictor, Processes, RuntimeName


class Cost(Section):
    """The cost that the budget limits, and how latency and energy are measured."""

    metric: Metric = "macs"
    """What the budget limits. `energy_mj` is of an NVIDIA device (`nni-haloc[energy]`) or of a
    processor that counts it; `cycles` and `energy_pj` are of an Eyeriss-like array
    ([predictors](how-to/measure-your-device.md))."""
    predictor: Predictor | None = None
    """What makes the cost table if `table` names none. Without it: the predictor of the metric's
    name. [Another package](how-to/measure-your-device.md#a-runtime-or-predictor-of-your-own) may
    add some."""
    table: Annotated[ExistingPath, Words("file")] | None = None
    """A `costs.json` made before (`haloc measure`), or a CSV file of your own measurements. Without
    it the run counts or measures."""
    runtime: RuntimeName = "torch"
    """What runs networks while they are timed. `onnxruntime`, `openvino` and `executorch` are for
    processors, in float32 or int8 and contiguous, `tensorrt` for NVIDIA devices; each needs
    [an extra](how-to/measure-your-device.md#runtimes)."""
    dtype: Precision = "float32"
    """In what networks are timed. With [`int8`](how-to/latency-budget.md#a-budget-in-int8), which
    `onnxruntime`, `openvino` and `executorch` have, each layer and the network are quantized by the
    runtime's own quantizer. A `table` must have been measured alike."""
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    """Images in a batch while latency is measured."""
    memory_format: FormatSetting = "auto"
    """How torch lays images and kernels out in memory. `auto` takes the format of a measured
    `table`. Without one it [is chosen](how-to/latency-budget.md#the-memory-format) where latency is
    measured here in a runtime that knows both, and else is `contiguous`."""
    device: Device = "cpu"
    """The device that is measured."""
    threads: Processes | None = None
    """Processor threads while latency is measured. Without it: as many as torch takes."""
    graph: bool = False
    """Whether passes on a CUDA device are replayed as
    [CUDA graphs](how-to/measure-your-device.md#on-a-cuda-device), without gaps between launches. A
    `table` of the same device must have been measured alike."""
    tf32: bool = True
    """Whether a CUDA device may compute float32 in TF32. A `table` of the same device must have
    been measured alike."""

    @property
    def layout(self) -> MemoryFormat:
        """The memory format; contiguous as long as ``auto`` has not chosen one."""
        return "contiguous" if self.memory_format == "auto" else self.memory_format
