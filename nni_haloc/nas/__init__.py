"""The search on NNI: the only folder that imports `nni.nas`."""

import warnings

with warnings.catch_warnings():
    # NNI wraps every class of torch.nn and wonders at those that are newer than itself.
    warnings.filterwarnings("ignore", ".*is found to be not a nn.Module.*", RuntimeWarning)
    # First of all of NNI's: whoever imports its one-shot strategies before this finds stubs in their place here, for good.
    import nni.nas.strategy  # noqa: F401

from .engine import run_search
from .evaluator import classification
from .profiler import TableProfiler
from .space import RankSpace
from .strategy import Haloc
from .updates import SearchDiverged

__all__ = ["Haloc", "RankSpace", "SearchDiverged", "TableProfiler", "classification", "run_search"]
