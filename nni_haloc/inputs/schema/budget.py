"""The section ``budget``."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nni_haloc.inputs.schema.paths import ExistingPath
from nni_haloc.inputs.schema.section import Section, Words
from nni_haloc.inputs.schema.values import Amount, Metric
from nni_haloc.utils.errors import brief


def check_fraction(value: Any) -> Any:
    """Check a budget that is a fraction of the original's cost; numbers above 1 get a remedy.

    Raises:
        ValueError: says what was expected, what was found, and what may be meant.
    """
    percentage = re.fullmatch(r"\s*([0-9]{1,2}(?:\.[0-9]+)?)\s*%\s*", str(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:
        return value
    remedy = ""
    if percentage:
        remedy = f"; write {float(percentage[1]) / 100:.6g}"
    elif is_number and 1 < value < math.inf:
        share = f"{value / 100:.6g} for {value:g} %, or " if value < 100 else ""
        remedy = (
            f"; write {share}budget: {{absolute: {brief(value)}}}, a number in the metric's unit"
        )
    expected = "expected a fraction of the original's cost, above 0 to 1"
    raise ValueError(f"{expected}, found {brief(value)}{remedy}")


class Limit(Section):
    """A limit on the whole network's cost, either relative or absolute."""

    fraction: Annotated[float, Field(gt=0, le=1), BeforeValidator(check_fraction)] | None = None
    """The limit as a fraction of the original's cost."""
    absolute: Amount | None = None
    """The limit as a number in the metric's unit, in the place of `fraction`."""

    @model_validator(mode="after")
    def _one(self) -> Limit:
        if (self.fraction is None) == (self.absolute is None):
            raise ValueError("expected either 'fraction' or 'absolute'")
        return self

    def of(self, original: float) -> float:
        """Return the limit in the metric's unit, for an original that costs ``original``."""
        return self.fraction * original if self.fraction is not None else float(self.absolute or 0)


class FurtherLimit(Limit):
    """A limit in another metric, or by another table."""

    metric: Metric
    """What this limit is in."""
    table: Annotated[ExistingPath, Words("file")] | None = None
    """A cost table made before, as `cost.table`."""


class Budget(Limit):
    """The limit in `cost.metric`, and any number of others; every one holds."""

    check: Literal["refuse", "warn", "skip"] = "refuse"
    """What becomes of a plan that misses a latency budget when its network, untrained, is
    [timed as a whole](how-to/latency-budget.md#the-promise), after up to three further plans:
    `refuse` ends the run before anything is trained, `warn` goes on, `skip` does not time it."""
    also: Annotated[list[FurtherLimit], Words("list of limits")] = []
    """Further limits: `[{metric: params, fraction: 0.4}]`, each with `fraction` or `absolute`, and
    with `table` where it has one. Candidates are kept if they are cheaper than the dense layer in
    at least one of the metrics. A run keeps their tables in `costs-also0.json` and so on."""
