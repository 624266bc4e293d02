"""The limits of a run, and where their cost tables lie in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.analytic import COUNTED
from nni_haloc.costs.device.quality import is_useless
from nni_haloc.costs.from_settings import cost_table, predictor_of
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema.budget import Limit as BudgetSection
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import RunFolder
from nni_haloc.runs.memory_format import Formats
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError, UnusableCheckpoint
from nni_haloc.utils.files import whole
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first


def limits_of(
    config: Config,
    model: nn.Module,
    example: Tensor,
    allowed: AllowedRanks,
    folder: RunFolder,
    formats: Formats | None = None,
) -> list[Limit]:
    """Return the limits of a run, and leave their cost tables in its folder.

    The first of several processes measures; the others read what it measured.

    Args:
        config: the settings.
        model: the original network.
        example: one input.
        allowed: the rank space.
        folder: receives the tables.
        formats: what is known of the memory formats, where that was measured.
    """
    limits = make_limits(config, model, example, allowed, folder, formats)
    keep_tables(config, limits, folder)
    return limits


def make_limits(
    config: Config,
    model: nn.Module,
    example: Tensor,
    allowed: AllowedRanks,
    folder: RunFolder,
    formats: Formats | None = None,
) -> list[Limit]:
    """Return the limits of a run; see `limits_of`. Nothing is written."""
    limits = []
    for (key, cost, budget), path in zip(
        _sections(config), table_files(folder, config), strict=True
    ):
        table = cost_table(config, key, cost.metric, cost.table, model, example, allowed, path)
        check_table(table, cost.table)
        if formats is not None and key == "cost" and cost.table is None:
            table = formats.told(table)
        limits.append(_limit(table, budget))
    return limits


def keep_tables(config: Config, limits: Sequence[Limit], folder: RunFolder) -> None:
    """Leave the cost tables of a run's limits in its folder, but for those that are there."""
    if is_first():
        given = {config.cost.table, *(also.table for also in config.budget.also)}
        for limit, path in zip(limits, table_files(folder, config), strict=True):
            if str(path) not in given:
                limit.costs.save(path)


def check_table(table: CostTable, file: str | None = None) -> None:
    """Warn of what makes a measured table doubtful; refuse one that says next to nothing.

    Args:
        table: the table.
        file: where it comes from (None: it was measured just now).

    Raises:
        SettingsError: if its error is far too large; says the number and the remedy.
    """
    where = f"cost table {file}" if file else "cost table"
    doubts = table.doubts()
    if doubts and is_useless(dict(table.quality)):
        raise SettingsError(f"{where}: {doubts[0]}")
    for doubt in doubts:
        logger.warning("%s: %s", where, doubt)


def limits_at_hand(
    config: Config, model: nn.Module, example: Tensor, allowed: AllowedRanks
) -> list[Limit]:
    """Return those limits of a run whose cost tables need not be measured or modelled.

    Raises:
        SettingsError: if a table does not fit the settings, or one of the others can't be made.
    """
    limits = []
    for key, cost, budget in _sections(config):
        if cost.table is not None or predictor_of(config, key, cost.metric) in COUNTED:
            where = Path()  # nothing is measured that would be left there
            table = cost_table(config, key, cost.metric, cost.table, model, example, allowed, where)
            limits.append(_limit(table, budget))
    return limits


def _sections(config: Config) -> list[tuple[str, Any, Any]]:
    """Return for each limit its key, and the sections that have its table and its budget."""
    also = [(f"budget.also.{i}", limit, limit) for i, limit in enumerate(config.budget.also)]
    return [("cost", config.cost, config.budget), *also]


def _limit(table: CostTable, budget: BudgetSection) -> Limit:
    """Return the limit that a section of the settings sets in a table's metric."""
    return Limit(table, budget.of(table.original), budget.fraction)


def table_files(folder: RunFolder, config: Config) -> list[Path]:
    """Return the files of the cost tables of a run's limits."""
    return [folder.costs, *(folder.further_costs(i) for i in range(len(config.budget.also)))]


def limits_of_plan(
    config: Config, plan: RankPlan, folder: RunFolder
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return what a run's plan says of each limit, and the identity of the limit's cost table.

    What it says has ``fraction``, too: the budget as a share of the original's cost, or None.

    Args:
        config: the settings.
        plan: the plan.
        folder: the run's folder, with its cost tables; where one is missing, the identity is empty.
    """
    facts = [plan.chosen_by, *plan.chosen_by.get("also", [])]
    files = table_files(folder, config)
    known = [CostTable.load(path).identity if path.is_file() else {} for path in files]
    asked = [budget.fraction for _, _, budget in _sections(config)]
    told = zip(facts, asked, known, strict=False)
    return [({**fact, "fraction": fraction}, identity) for fact, fraction, identity in told]


def with_tables(config: Config, folder: RunFolder, tables: list[str]) -> Config:
    """Point the settings at the cost tables that an earlier start wrote.

    A latency that is measured again is never quite the same.
    """
    files = table_files(folder, config)
    if len(files) != len(tables):
        state, expected = folder.searching.checkpoint, f"expected {len(files)} cost tables"
        raise UnusableCheckpoint(f"{state}: {expected}, found {len(tables)}")
    if is_first():
        for path, content in zip(files, tables, strict=True):
            # Written only if it differs: the folder of a finished search may be read-only.
            if not _holds(path, str(content)):
                with whole(path) as part:
                    part.write_text(str(content), encoding="utf-8")
    cost = config.cost.model_copy(update={"table": str(files[0])})
    also = [
        limit.model_copy(update={"table": str(path)})
        for limit, path in zip(config.budget.also, files[1:], strict=True)
    ]
    budget = config.budget.model_copy(update={"also": also})
    return config.model_copy(update={"cost": cost, "budget": budget})


def _holds(path: Path, content: str) -> bool:
    """Tell whether a file holds a text."""
    try:
        return path.read_text(encoding="utf-8") == content
    except (FileNotFoundError, UnicodeDecodeError):
        return False
