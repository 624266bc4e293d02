"""The section ``objective``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nni_haloc.inputs.schema.section import Section
from nni_haloc.inputs.schema.values import Amount, Positive

CostName = Literal["latency_ms", "macs", "params"]


class Objective(Section):
    """What a tuner maximises: the number `default` of a trial, by [one of three
    formulas](how-to/tune.md#what-a-tuner-maximises)."""

    kind: Literal["metric", "limit", "sum"] = "metric"
    """`metric`: the task's own, top-1. `limit`: the metric, less where the network costs more than
    a limit. `sum`: the metric and shares of the original's costs, each times its weight."""
    cost: CostName = "latency_ms"
    """What `limit` limits."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The limit as a fraction of the original's cost. A latency is then compared with one that was
    measured in the same minute, whatever else the machine does."""
    absolute: Amount | None = None
    """The limit as a number, such as milliseconds, in the place of `fraction`."""
    penalty: Literal["soft", "hard"] = "soft"
    """`soft`: the metric times (limit / cost) to the power of `strength`. `hard`: 1 - cost / limit
    in the place of the metric, so that every network above the limit is below all within it."""
    strength: Positive = 1.0
    """The exponent of the `soft` penalty."""
    weights: dict[Literal["metric", "latency_ms", "macs", "params"], float] = {}
    """The weights of `sum`: `{metric: 1, latency_ms: -0.2}`. Costs are shares of the
    original's."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Objective:
        limits = [key for key in ("fraction", "absolute") if getattr(self, key) is not None]
        if (self.kind == "limit") != (len(limits) == 1):
            expected = "either 'fraction' or 'absolute'" if self.kind == "limit" else "no limit"
            found = " and ".join(limits) or "neither"
            raise ValueError(f"kind: expected {expected} with {self.kind!r}, found {found}")
        if (self.kind == "sum") != bool(self.weights):
            expected = "weights" if self.kind == "sum" else "no weights"
            raise ValueError(f"weights: expected {expected} with kind {self.kind!r}")
        return self

    @property
    def costs(self) -> list[CostName]:
        """The costs that it takes to know its value."""
        if self.kind == "limit":
            return [self.cost]
        return [key for key in self.weights if key != "metric"]
