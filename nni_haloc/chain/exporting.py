"""Write networks for other runtimes: what a program of your own calls.

Each file is checked against torch.
"""

from nni_haloc.costs.device.exporting import export_program
from nni_haloc.costs.device.onnx_files import OnnxNetwork, export_onnx, needed, quantize_onnx

__all__ = ["OnnxNetwork", "export_onnx", "export_program", "needed", "quantize_onnx"]
