"""NNI's pruners and quantizers, applied to a compressed network."""

from .pruning import prune
from .quantizing import Simulated, simulate
from .workarounds import traced

__all__ = ["Simulated", "prune", "simulate", "traced"]
