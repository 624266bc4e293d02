"""What each candidate of each layer costs: `CostTable` and the predictors that fill it."""

from ..device.measuring import Timing
from ..device.torch_runtime import TorchRuntime
from .analytic import count_macs, mac_table, param_table
from .measured import latency_table, measure_latency
from .specification import specify
from .table import CostTable, worthwhile

__all__ = [
    "CostTable",
    "Timing",
    "TorchRuntime",
    "count_macs",
    "latency_table",
    "mac_table",
    "measure_latency",
    "param_table",
    "specify",
    "worthwhile",
]
