"""A cost table as NNI's own strategies and filters take it."""

from __future__ import annotations

from typing import Any

from nni.mutable import MutableExpression
from nni.nas.nn.pytorch import LayerChoice
from nni.nas.profiler import ExpressionProfiler

from ..predictors import CostTable
from .space import RankSpace


class TableProfiler(ExpressionProfiler):
    """The cost of any network of a rank space, in the unit of ``costs`` (None: the space's own table), as one of NNI's expressions.

    For ``RangeProfilerFilter``, ``ExpectationProfilerPenalty``, ``SampleProfilerPenalty``. Make it before a one-shot strategy changes the
    space. ValueError names a candidate that the table does not know.
    """

    def __init__(self, space: RankSpace, costs: CostTable | None = None) -> None:
        super().__init__(space)
        rows, rest = (costs or space.costs).restrict(space.candidates)
        choices = {str(m.label): m for m in space.modules() if isinstance(m, LayerChoice)}
        self.expression = rest + sum(MutableExpression.switch_case(choices[layer].choice, row) for layer, row in rows.items())

    def profile(self, sample: Any) -> float:
        """The cost of a sample, layer to candidate, or of a model that has one: NNI's `Filter` gives models to NNI's `ProfilerFilter`."""
        return float(super().profile(getattr(sample, "sample", sample)))
