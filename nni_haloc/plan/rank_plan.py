"""The chosen rank of every layer, `RankPlan`, and its file ``ranks.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nni_haloc.space.names import DENSE, Rank, is_rank, rank_name
from nni_haloc.utils.files import read_json, why_unreadable, write_json

PLAN_VERSION = 1


@dataclass(frozen=True)
class RankPlan:
    """The chosen candidate of every searched layer, and how it was chosen.

    Attributes:
        ranks: layer name to rank; None is dense.
        chosen_by: facts for the reader (rule, budget, cost, seed); the values must be JSON.
    """

    ranks: Mapping[str, Rank]
    chosen_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Name of each layer's candidate, as cost tables and NNI samples use it."""
        return {layer: rank_name(rank) for layer, rank in self.ranks.items()}

    def save(self, path: str | Path) -> None:
        """Write ``ranks.json``.

        Args:
            path: the file.

        Raises:
            OSError: if it can't be written.
        """
        ranks = {layer: DENSE if rank is None else list(rank) for layer, rank in self.ranks.items()}
        content = {"version": PLAN_VERSION, "ranks": ranks, "chosen_by": dict(self.chosen_by)}
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read ``ranks.json``.

        Args:
            path: the file.

        Returns:
            The plan.

        Raises:
            OSError: if the file can't be read; the message names it.
            ValueError: if it holds something else; the message names file and layer.
        """
        try:
            content = read_json(path, "rank plan", PLAN_VERSION, finite=False)
        except OSError as error:
            raise type(error)(f"{path}: {why_unreadable(error)}") from None
        if not isinstance(content.get("ranks"), dict):
            kind = type(content.get("ranks")).__name__
            raise ValueError(f"{path}: ranks: expected layers and their ranks, found {kind}")
        ranks: dict[str, Rank] = {}
        for layer, value in content["ranks"].items():
            if value != DENSE and not is_rank(value):
                raise ValueError(
                    f"{path}: layer {layer!r}: expected {DENSE!r}, [r] or [r1, r2], found {value!r}"
                )
            ranks[layer] = None if value == DENSE else tuple(value)
        return cls(ranks, content.get("chosen_by", {}))
