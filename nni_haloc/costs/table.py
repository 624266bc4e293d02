"""`CostTable` and its file ``costs.json``: all that the search knows of hardware."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from nni_haloc.costs.device.costs_file import UNITS, costs_content, read_costs
from nni_haloc.space.names import DENSE, Rank
from nni_haloc.utils.files import is_number, write_json


@dataclass(frozen=True)
class CostTable:
    """Cost of every candidate of every layer, in the metric's unit, and ``fixed``, that of everything else in the network.

    ``metric``: one of `UNITS`. ``costs``: layer to candidate name to cost; every layer has ``dense``. ``identity``: what the numbers hold
    for (device, batch, memory format, dtype, threads, versions, ...); two tables are comparable only where it agrees. ``spread``: for what
    was measured, how far its runs lie apart (interquartile range over median).
    """

    metric: str
    costs: Mapping[str, Mapping[str, float]]
    fixed: float
    identity: Mapping[str, Any] = field(default_factory=dict)
    spread: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric not in UNITS:
            raise ValueError(f"metric: expected one of {', '.join(UNITS)}, found {self.metric!r}")
        for layer, row in self.costs.items():
            if DENSE not in row:
                raise ValueError(f"layer {layer!r}: the table has no {DENSE!r} entry")
            for candidate, cost in row.items():
                if not (is_number(cost) and cost > 0):
                    raise ValueError(
                        f"layer {layer!r}, candidate {candidate!r}: expected a positive cost, found {cost!r}"
                    )
        if not (is_number(self.fixed) and self.fixed >= 0):
            raise ValueError(f"fixed cost: expected a number >= 0, found {self.fixed!r}")

    @property
    def original(self) -> float:
        """Cost of the uncompressed network."""
        return self.total(dict.fromkeys(self.costs, DENSE))

    def total(self, choice: Mapping[str, str]) -> float:
        """Exact cost of a network, correctly rounded: ``choice`` maps layer to candidate; layers that it does not name are dense."""
        unknown = set(choice) - set(self.costs)
        if unknown:
            raise ValueError(f"layer {min(unknown)!r} is not in the cost table")
        return math.fsum(self.terms(choice))

    def terms(self, choice: Mapping[str, str]) -> list[float]:
        """What `total` sums up."""
        return [self.fixed, *(row[choice.get(layer, DENSE)] for layer, row in self.costs.items())]

    def restrict(
        self, candidates: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, dict[str, float]], float]:
        """Costs of just these candidates, and the cost of all the rest with unnamed layers dense.

        ValueError names the first candidate that the table does not know.
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
        """Write ``costs.json``."""
        write_json(
            path, costs_content(self.metric, self.identity, self.fixed, self.costs, self.spread)
        )

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Read ``costs.json``, or a CSV file of one's own measurements (`_read_csv`); ValueError names the file and what is wrong in it."""
        content = _read_csv(Path(path)) if Path(path).suffix == ".csv" else read_costs(path)
        try:
            if "costs" not in content and "runs" in content:
                raise ValueError(
                    "not finished: `haloc measure` with the same options goes on where it stopped"
                )
            if not isinstance(content.get("identity", {}), Mapping):
                raise ValueError(f"identity: expected a mapping, found {content['identity']!r}")
            rows = {layer: dict(row) for layer, row in content["costs"].items()}
            return cls(
                content["metric"],
                rows,
                content["fixed"],
                content.get("identity", {}),
                content.get("spread", {}),
            )
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}: missing") from None
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def _read_csv(path: Path) -> dict[str, Any]:
    """What a CSV file of measurements says: the header ``layer,candidate,METRIC``, and one line each.

    A line without a candidate is for the network as it was (``network``) or for all but its searched layers (``fixed``).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark at the beginning
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None
    with StringIO(text, newline="") as file:
        csv.field_size_limit(len(text) + 1)
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if len(header) != 3 or header[:2] != ["layer", "candidate"] or header[2] not in UNITS:
            raise ValueError(
                f"{path}: line 1: expected layer,candidate and one of {', '.join(UNITS)}, found {','.join(header)!r}"
            )
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
    """The candidates that cost less than the dense layer in any of the tables, and why the other layers are left alone.

    ``candidates``: layer to candidate name to rank; layers in ``pinned`` stay as they are. ValueError names what a table does not know.
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
            left_alone[layer] = (
                f"no rank is cheaper than the dense layer in {' or '.join(table.metric for table in tables)}"
            )
    return kept, left_alone
