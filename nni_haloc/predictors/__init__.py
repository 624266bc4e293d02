"""What each candidate of each layer costs: `CostTable` and the predictors that fill it."""

from ..device.measuring import Timing
from ..device.torch_runtime import TorchRuntime
from .analytic import activation_table, count_macs, mac_table, measure_peaks, param_table, roofline_table
from .measured import latency_table, measure_latency
from .specification import specify
from .table import CostTable, worthwhile

__all__ = [
    "CostTable", "Timing", "TorchRuntime", "activation_table", "count_macs", "latency_table", "mac_table", "measure_latency",
    "measure_peaks", "param_table", "roofline_table", "specify", "worthwhile",
]  # fmt: skip
