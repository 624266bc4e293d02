"""`CostTable` and its file ``costs.json``: all that the search knows of hardware."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from nni_haloc.costs.device.costs_file import (
    LARGEST,
    MEASURED,
    MOST_BYTES,
    costs_content,
    read_costs,
    unit_of,
)
from nni_haloc.costs.device.quality import doubts_about, quality_of
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.utils.errors import brief
from nni_haloc.utils.files import is_number, read_text, write_json


@dataclass(frozen=True)
class CostTable:
    """The cost of every candidate of every layer, and of everything else in the network.

    Attributes:
        metric: a key of `UNITS`, or the metric of another package's predictor.
        costs: layer name to candidate name to cost, in the metric's unit; every layer has
            ``dense``.
        fixed: the cost of everything else in the network.
        identity: what the numbers hold for (device, batch, memory format, dtype, threads,
            versions, ...); two tables are comparable only where it agrees. Where the memory format
            was chosen by measurement, ``formats`` says how (`nni_haloc.runs.memory_format`).
        spread: for measured costs, how far the single times lie apart (interquartile range over
            median).
        quality: for measured costs, how far they can be trusted (`nni_haloc.costs.device.quality`).

    Raises:
        ValueError: if a cost is not positive, or a layer has no dense candidate.
    """

    metric: str
    costs: Mapping[str, Mapping[str, float]]
    fixed: float
    identity: Mapping[str, Any] = field(default_factory=dict)
    spread: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unit_of(self.metric)
        for layer, row in self.costs.items():
            if DENSE not in row:
                raise ValueError(f"layer {layer!r}: the table has no {DENSE!r} entry")
            for candidate, cost in row.items():
                if not (is_number(cost) and 1 / LARGEST <= cost <= LARGEST):
                    raise ValueError(
                        f"layer {layer!r}, candidate {candidate!r}: "
                        f"expected {_range(cost, 'a positive cost')}, found {brief(cost)}"
                    )
        if not (is_number(self.fixed) and 0 <= self.fixed <= LARGEST):
            expected = f"expected {_range(self.fixed, 'a number >= 0')}"
            raise ValueError(f"fixed cost: {expected}, found {brief(self.fixed)}")
        self._check_facts()
        floats = {layer: {c: float(x) for c, x in row.items()} for layer, row in self.costs.items()}
        object.__setattr__(self, "costs", floats)  # the file of a user may have integers

    def _check_facts(self) -> None:
        """Raise ValueError for a spread below 0, or a figure that is no number."""
        for layer, row in self.spread.items():
            for candidate, share in row.items():
                if not (is_number(share) and share >= 0):
                    raise ValueError(
                        f"spread: layer {layer!r}, candidate {candidate!r}: "
                        f"expected a number >= 0, found {brief(share)}"
                    )
        for name, figure in self.quality.items():
            if not is_number(figure):
                raise ValueError(f"quality: {name}: expected a number, found {brief(figure)}")
        formats = self.identity.get("formats", {})
        cost = formats.get("original", 1) if isinstance(formats, Mapping) else formats
        if not (is_number(cost) and cost > 0):
            raise ValueError(
                f"identity: formats: original: expected a positive cost, found {brief(cost)}"
            )

    @property
    def original(self) -> float:
        """Cost of the original network, in the metric's unit.

        Where it is faster in another memory format than the table's, that is its cost there, by
        the clock of this table: what the user has for free counts as no gain.
        """
        if self.elsewhere is not None:
            return self.elsewhere
        return self.total(dict.fromkeys(self.costs, DENSE))

    @property
    def elsewhere(self) -> float | None:
        """Cost of the original network in the faster memory format, where that is not this one."""
        formats = self.identity.get("formats")
        cost = formats.get("original") if isinstance(formats, Mapping) else None
        return None if cost is None else float(cost)

    def total(self, choice: Mapping[str, str]) -> float:
        """Return the exact cost of a network, correctly rounded.

        Args:
            choice: layer name to candidate name; other layers are dense.

        Returns:
            The cost in the metric's unit.

        Raises:
            ValueError: if a layer is not in the table.
        """
        unknown = set(choice) - set(self.costs)
        if unknown:
            raise ValueError(f"layer {min(unknown)!r} is not in the cost table")
        return math.fsum(self.terms(choice))

    def terms(self, choice: Mapping[str, str]) -> list[float]:
        """Return the numbers that `total` sums up.

        Args:
            choice: layer name to candidate name; other layers are dense.

        Returns:
            The fixed cost, then the cost of each layer, in the metric's unit.
        """
        return [self.fixed, *(row[choice.get(layer, DENSE)] for layer, row in self.costs.items())]

    def doubts(self) -> list[str]:
        """Say what makes a measured table doubtful, each with its numbers and the remedy."""
        if self.metric not in MEASURED:
            return []
        return doubts_about(self.metric, self.costs, self.fixed, dict(self.quality))

    def restrict(
        self, candidates: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, dict[str, float]], float]:
        """Return the costs of some candidates, and the cost of the rest of the network.

        Args:
            candidates: layer name to a mapping whose keys are candidate names. Other layers are
                dense in the rest.

        Returns:
            Layer name to candidate name to cost, and the cost of the rest, both in the metric's
            unit.

        Raises:
            ValueError: if the table does not know a candidate; the message names it.
        """
        for layer, names in candidates.items():
            for name in names:
                if name not in self.costs.get(layer, {}):
                    raise ValueError(
                        f"the cost table has no entry for layer {layer!r}, candidate {name!r}"
                    )
        rest = math.fsum(
            [
                self.fixed,
                *(row[DENSE] for layer, row in self.costs.items() if layer not in candidates),
            ]
        )
        return {
            layer: {name: self.costs[layer][name] for name in names}
            for layer, names in candidates.items()
        }, rest

    def save(self, path: str | Path) -> None:
        """Write ``costs.json``.

        Args:
            path: the file.

        Raises:
            OSError: if it can't be written.
        """
        write_json(
            path,
            costs_content(
                self.metric, self.identity, self.fixed, self.costs, self.spread, self.quality
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read ``costs.json``, or a CSV file of the user's own measurements.

        The CSV file has the header ``layer,candidate,METRIC``, a line for each candidate, and one
        line ``network,,NUMBER`` or ``fixed,,NUMBER``.

        Args:
            path: the file; a name that ends in ``.csv`` is read as CSV.

        Returns:
            The table.

        Raises:
            OSError: if the file can't be read.
            ValueError: if the file is damaged; the message names it and what is wrong.
        """
        content = _read_csv(Path(path)) if Path(path).suffix == ".csv" else read_costs(path)
        try:
            if "costs" not in content and "runs" in content:
                raise ValueError(
                    "not finished: `haloc measure` with the same options goes on where it stopped"
                )
            if not isinstance(content.get("identity", {}), Mapping):
                raise ValueError(f"identity: expected a mapping, found {content['identity']!r}")
            rows = {layer: dict(row) for layer, row in content["costs"].items()}
            table = cls(
                content["metric"],
                rows,
                content["fixed"],
                content.get("identity", {}),
                content.get("spread", {}),
            )
            return replace(table, quality=_quality(content))
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}: missing") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _quality(content: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the figures of a measured table; files of earlier versions hold what they are of."""
    if "quality" in content:
        return dict(content["quality"])
    return quality_of(content) if content["metric"] in MEASURED and "runs" in content else {}


def _range(cost: Any, kind: str) -> str:
    """Say what was expected in the place of a cost: its kind or, of one out of range, the range."""
    if isinstance(cost, (int, float)) and not isinstance(cost, bool) and 0 < cost < math.inf:
        return f"a cost from {1 / LARGEST:g} to {LARGEST:g}"
    return kind


def _read_csv(path: Path) -> dict[str, Any]:
    """Read a CSV file of measurements.

    A line without a candidate is for the original network (``network``), or for all of it but its
    searched layers (``fixed``).
    """
    try:
        text = read_text(path, MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with StringIO(text, newline="") as file:
        csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))  # it holds for all readers
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if len(header) != 3 or header[:2] != ["layer", "candidate"]:
            raise ValueError(
                f"{path}: line 1: expected layer,candidate and a metric, found {','.join(header)!r}"
            )
        try:
            unit_of(header[2])
        except ValueError as error:
            raise ValueError(f"{path}: line 1: expected layer,candidate and a {error}") from None
        costs: dict[str, dict[str, float]] = {}
        whole: dict[str, float] = {}
        for row in filter(None, reader):
            try:
                layer, candidate, cost = (cell.strip() for cell in row)
                target, key = (
                    (costs.setdefault(layer, {}), candidate) if candidate else (whole, layer)
                )
                if key in target or not (candidate or layer in ("network", "fixed")):
                    raise ValueError
                target[key] = float(cost)
            except ValueError:
                expected = "layer,candidate,number, once each, or network,,number or fixed,,number"
                raise ValueError(
                    f"{path}: line {reader.line_num}: expected {expected}, found {','.join(row)!r}"
                ) from None
    if len(whole) != 1:
        raise ValueError(
            f"{path}: expected one line network,,number or fixed,,number, found {len(whole)}"
        )
    dense = sum(row.get(DENSE, 0.0) for row in costs.values())
    fixed = whole["fixed"] if "fixed" in whole else whole["network"] - dense
    return {"metric": header[2], "costs": costs, "fixed": fixed, "identity": {"file": path.name}}


def worthwhile(
    candidates: Mapping[str, Mapping[str, Rank]],
    tables: Sequence[CostTable],
    pinned: Collection[str] = (),
) -> tuple[dict[str, dict[str, Rank]], dict[str, str]]:
    """Keep the candidates that cost less than the dense layer in any of the tables.

    Args:
        candidates: layer name to candidate name to rank.
        tables: the cost tables of all limits.
        pinned: layers whose candidates all stay.

    Returns:
        The kept candidates, and for each other layer the reason why it is left alone.

    Raises:
        ValueError: if a table does not know a candidate; the message names it.
    """
    kept, left_alone = {}, {}
    for layer, row in candidates.items():
        costs = [
            table.restrict({layer: dict.fromkeys([DENSE, *row])})[0][layer] for table in tables
        ]
        few = {
            c: r
            for c, r in row.items()
            if r is None or layer in pinned or any(cost[c] < cost[DENSE] for cost in costs)
        }
        if layer in pinned or any(few.values()):
            kept[layer] = few
        else:
            metrics = " or ".join(dict.fromkeys(table.metric for table in tables))
            left_alone[layer] = f"no rank is cheaper than the dense layer in {metrics}"
    return kept, left_alone
