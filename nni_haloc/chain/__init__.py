"""NNI's pruners and quantizers, applied to a compressed network."""

from .pruning import prune
from .quantizing import Simulated, simulate

__all__ = ["Simulated", "prune", "simulate"]
