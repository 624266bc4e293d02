"""Every name that settings and commands take, and the code that it stands for.

To add a rule, a predictor, a runtime, a network or a data set to this package: write its file, and
add its line here. To add one from another package: see `nni_haloc.utils.registry.Registry`.
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
        "error-knapsack": f"{_RULES}.knapsacks:error_knapsack",
        "sensitivity-knapsack": f"{_RULES}.knapsacks:sensitivity_knapsack",
        "random": f"{_RULES}.knapsacks:random",
        "learned": f"{_RULES}.learned:learned",
    },
)
"""Ways to choose ranks without a search: a function of a `Problem` that returns a `Choice`."""

PREDICTORS: Registry[Any] = Registry(
    "predictor",
    "nni_haloc.predictors",
    {
        "macs": "nni_haloc.costs.analytic:mac_table",
        "params": "nni_haloc.costs.analytic:param_table",
        "activation_bytes": "nni_haloc.costs.analytic:activation_table",
    },
)
"""Cost tables by metric: a function of a network, an example input and `RankRules`."""

RUNTIMES: Registry[Any] = Registry(
    "runtime",
    "nni_haloc.runtimes",
    {
        "torch": "nni_haloc.costs.device.torch_runtime:TorchRuntime",
        "onnxruntime": "nni_haloc.costs.device.onnx_runtime:OnnxRuntime",
    },
)
"""What runs and times networks: a class that implements `nni_haloc.costs.device.measuring.Runtime`."""

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

DATA: Registry[Any] = Registry(
    "data set",
    "nni_haloc.data",
    {
        "digits": "nni_haloc.inputs.data:digits",
        "cifar10": "nni_haloc.inputs.data:cifar10",
        "folder": "nni_haloc.inputs.data:image_folder",
    },
)
"""Data sets: a function that returns `nni_haloc.inputs.data.Splits`."""

STAGES: Registry[Any] = Registry(
    "stage",
    "nni_haloc.stages",
    {
        "pretrain": "nni_haloc.runs.stages.pretrain:Pretrain",
        "search": "nni_haloc.runs.stages.search:ChooseRanks",
        "finetune": "nni_haloc.runs.stages.finetune:Finetune",
        "prune": "nni_haloc.runs.stages.prune:Prune",
        "quantize": "nni_haloc.runs.stages.quantize:Quantize",
    },
)
"""Steps of a run in their order: subclasses of `nni_haloc.runs.stages.stage.Stage`."""
