"""Every name that settings and commands take, and the code that it stands for.

To add a rule, a predictor, a runtime, a network, a data set or a logger to this package: write its
file, and add its line here. To add one from another package: see
`nni_haloc.utils.registry.Registry`.
"""

from __future__ import annotations

from typing import Any

from nni_haloc.utils.registry import Registry

_RULES = "nni_haloc.plan.rules"
RULES: Registry[Any] = Registry(
    "rule",
    "nni_haloc.rules",
    {
        "uniform": f"{_RULES}.thresholds:uniform",
        "energy": f"{_RULES}.thresholds:energy",
        "alds": f"{_RULES}.thresholds:alds",
        "vbmf": f"{_RULES}.vbmf:vbmf",
        "error-knapsack": f"{_RULES}.scored:error_knapsack",
        "sensitivity-knapsack": f"{_RULES}.scored:sensitivity_knapsack",
        "random": f"{_RULES}.scored:random",
        "learned": f"{_RULES}.learned:learned",
        "nni-evolution": "nni_haloc.search.multitrial:evolution",
        "nni-random": "nni_haloc.search.multitrial:random_search",
    },
)
"""Ways to choose ranks without a search: a function of a `Problem` that returns a `Choice`."""

_PREDICTORS = "nni_haloc.costs.predictors"
PREDICTORS: Registry[Any] = Registry(
    "predictor",
    "nni_haloc.predictors",
    {
        "macs": f"{_PREDICTORS}:macs",
        "params": f"{_PREDICTORS}:params",
        "activation_bytes": f"{_PREDICTORS}:activation_bytes",
        "latency_ms": f"{_PREDICTORS}:latency_ms",
        "cycles": f"{_PREDICTORS}:cycles",
        "energy_pj": f"{_PREDICTORS}:energy_pj",
        "energy_mj": f"{_PREDICTORS}:energy_mj",
        "roofline": f"{_PREDICTORS}:roofline",
    },
)
"""Makers of a metric's cost table, each a `nni_haloc.costs.predictors.Predictor`."""

RUNTIMES: Registry[Any] = Registry(
    "runtime",
    "nni_haloc.runtimes",
    {
        "torch": "nni_haloc.costs.device.torch_runtime:TorchRuntime",
        "torch-compile": "nni_haloc.costs.device.compiled_runtime:CompiledRuntime",
        "onnxruntime": "nni_haloc.costs.device.onnx_runtime:OnnxRuntime",
        "openvino": "nni_haloc.costs.device.openvino_runtime:OpenVinoRuntime",
        "executorch": "nni_haloc.costs.device.executorch_runtime:ExecuTorchRuntime",
        "tensorrt": "nni_haloc.costs.device.tensorrt_runtime:TensorRtRuntime",
    },
)
"""Classes that run and time networks, like `nni_haloc.costs.device.runtime.Runtime`."""

_TOOLS = "nni_haloc.costs.device.benchmark_tools"
BENCHMARK_TOOLS: Registry[Any] = Registry(
    "runtime with a benchmark program",
    "nni_haloc.benchmark_tools",
    {
        "openvino": f"{_TOOLS}:OPENVINO",
        "executorch": f"{_TOOLS}:EXECUTORCH",
        "tensorrt": f"{_TOOLS}:TENSORRT",
    },
)
"""Programs that time model files on devices without Python, by their runtime's name: each a
`nni_haloc.costs.device.benchmark_tools.BenchmarkTool`."""

MODELS: Registry[Any] = Registry(
    "model",
    "nni_haloc.models",
    {
        "digits_cnn": "nni_haloc.inputs.models.digits_cnn:digits_cnn",
        "resnet20": "nni_haloc.inputs.models.resnet20:resnet20",
        "vgg16": "nni_haloc.inputs.models.vgg16:vgg16",
    },
)
"""Untrained networks: a factory."""

LAYER_CLASSES: Registry[Any] = Registry(
    "layer class",
    "nni_haloc.layers",
    {
        "timm.layers.linear.Linear": "torch.nn:Linear",
    },
)
"""Subclasses of `nn.Conv2d` and `nn.Linear` that have a ``forward`` of their own and compute what
the base class does: full name of the class to the base class."""

DATA: Registry[Any] = Registry(
    "data set",
    "nni_haloc.data",
    {
        "digits": "nni_haloc.inputs.data:load_digits",
        "cifar10": "nni_haloc.inputs.data:load_cifar10",
        "folder": "nni_haloc.inputs.data:load_folder",
    },
)
"""Data sets: a function of the section ``data`` that returns `nni_haloc.inputs.data.Splits`."""

_PRUNERS = "nni_haloc.chain.pruners"
PRUNERS: Registry[Any] = Registry(
    "pruner",
    "nni_haloc.pruners",
    {
        "l1": f"{_PRUNERS}:L1",
        "l2": f"{_PRUNERS}:L2",
        "fpgm": f"{_PRUNERS}:FPGM",
        "taylor": f"{_PRUNERS}:TAYLOR",
        "slim": f"{_PRUNERS}:SLIM",
        "movement": f"{_PRUNERS}:MOVEMENT",
        "level": f"{_PRUNERS}:LEVEL",
    },
)
"""NNI's pruners, each described by a `nni_haloc.chain.pruners.Pruner`."""

_QUANTIZERS = "nni_haloc.chain.quantizers"
QUANTIZERS: Registry[Any] = Registry(
    "quantizer",
    "nni_haloc.quantizers",
    {
        "ptq": f"{_QUANTIZERS}:PTQ",
        "qat": f"{_QUANTIZERS}:QAT",
        "lsq": f"{_QUANTIZERS}:LSQ",
        "lsq+": f"{_QUANTIZERS}:LSQ_PLUS",
        "dorefa": f"{_QUANTIZERS}:DOREFA",
        "bnn": f"{_QUANTIZERS}:BNN",
    },
)
"""NNI's quantizers, each described by a `nni_haloc.chain.quantizers.Quantizer`."""

_LOGGERS = "nni_haloc.training.loggers"
LOGGERS: Registry[Any] = Registry(
    "logger",
    "nni_haloc.loggers",
    {
        "tensorboard": f"{_LOGGERS}:tensorboard",
        "csv": f"{_LOGGERS}:csv",
        "mlflow": f"{_LOGGERS}:mlflow",
        "wandb": f"{_LOGGERS}:wandb",
    },
)
"""Makers of Lightning's loggers: a function of a `nni_haloc.training.loggers.Place`."""

STAGES: Registry[Any] = Registry(
    "stage",
    "nni_haloc.stages",
    {
        "pretrain": "nni_haloc.runs.stages.pretrain:Pretrain",
        "search": "nni_haloc.runs.stages.choose_ranks:ChooseRanks",
        "finetune": "nni_haloc.runs.stages.finetune:Finetune",
        "prune": "nni_haloc.runs.stages.prune:Prune",
        "quantize": "nni_haloc.runs.stages.quantize:Quantize",
    },
)
"""Steps of a run in their order: subclasses of `nni_haloc.runs.stages.stage.Stage`."""
