"""NNI's advisors, so that they run: name one by ``className`` in an experiment's file.

NNI 3.0 asks of each result whether its trial is one of before a resume, and compares the trial's
parameter id with a number. Those of Hyperband and BOHB are text: the first result ends them.
"""

from __future__ import annotations

from typing import Any

import nni
from nni.algorithms.hpo.hyperband_advisor import Hyperband as _Hyperband


class _KnowsItsTrials:
    """Tell trials of before a resume by their parameter ids, such as ``0-1_0_3``."""

    _earlier: frozenset[str] = frozenset()

    def recover_parameter_id(self, data: Any) -> int:
        """Return the number of the last parameters that were given out before a resume."""
        trials = [nni.load(each) if isinstance(each, str) else each for each in _listed(data)]
        self._earlier = frozenset(str(trial["parameter_id"]) for trial in trials)
        return max((int(each.rpartition("_")[2]) for each in self._earlier), default=0)

    def is_created_in_previous_exp(self, param_id: str | None) -> bool:
        """Return whether parameters were given out before a resume."""
        return param_id in self._earlier


class Hyperband(_KnowsItsTrials, _Hyperband):
    """NNI's Hyperband, with the same arguments."""


def __getattr__(name: str) -> Any:
    """Make ``BOHB`` of NNI's when it is asked for: it needs packages that NNI does not install."""
    if name != "BOHB":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nni.algorithms.hpo.bohb_advisor import BOHB

    return type("BOHB", (_KnowsItsTrials, BOHB), {"__doc__": "NNI's BOHB, its arguments too."})


def _listed(data: Any) -> list[Any]:
    return data if isinstance(data, list) else [data]
