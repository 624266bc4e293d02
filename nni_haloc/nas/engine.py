"""Running a search in the process at hand."""

from __future__ import annotations

from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace

from .space import RankSpace
from .strategy import Haloc


class InProcess(SequentialExecutionEngine):
    """NNI's sequential engine, less its habit of swallowing what a trial reports: results go on to the experiment manager."""

    def _run_single_model(self, model: ExecutableModelSpace) -> None:
        model.execute()


def run_search(space: RankSpace, evaluator: Lightning, strategy: Haloc) -> Haloc:
    """Run a search in this process, registering no experiment of its own, so that a trial of an NNI experiment can report while it runs."""
    strategy(RawFormatModelSpace.from_model(space, evaluator), InProcess())
    return strategy
