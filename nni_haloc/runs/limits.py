"""The limits of a run, and where their cost tables lie in its folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from nni_haloc.costs.from_settings import cost_table
from nni_haloc.inputs.config import Config
from nni_haloc.plan.budget import Limit
from nni_haloc.runs.folder import COSTS_FILE
from nni_haloc.space.ranks import RankRules
from nni_haloc.utils.files import whole
from nni_haloc.utils.processes import is_first


def limits_of(
    config: Config, model: nn.Module, example: Tensor, rules: RankRules, folder: Path
) -> list[Limit]:
    """The limits of a run; their tables are left in ``folder``. What the first of several processes measured there, the others read."""
    files = table_files(folder, config)
    main = cost_table(
        config, "cost", config.cost.metric, config.cost.table, model, example, rules, files[0]
    )
    limits = [Limit(main, config.budget.of(main.original))]
    for i, (also, path) in enumerate(zip(config.budget.also, files[1:], strict=True)):
        table = cost_table(
            config, f"budget.also.{i}", also.metric, also.table, model, example, rules, path
        )
        limits.append(Limit(table, also.of(table.original)))
    if is_first():
        for limit, path in zip(limits, files, strict=True):
            if str(path) not in (config.cost.table, *(also.table for also in config.budget.also)):
                limit.costs.save(path)
    return limits


def table_files(folder: Path, config: Config) -> list[Path]:
    """Where the cost tables of a run's limits lie."""
    return [
        folder / COSTS_FILE,
        *(folder / f"costs-also{i}.json" for i in range(len(config.budget.also))),
    ]


def with_tables(config: Config, folder: Path, tables: list[str]) -> Config:
    """The settings with the cost tables of an earlier start of the run: a latency measured again is never quite the same."""
    files = table_files(folder, config)
    if is_first():
        for path, content in zip(files, tables, strict=True):
            if (
                not path.exists() or path.read_text(encoding="utf-8") != content
            ):  # the folder of a finished search may be read-only
                with whole(path) as part:
                    part.write_text(content, encoding="utf-8")
    cost = config.cost.model_copy(update={"table": str(files[0])})
    also = [
        limit.model_copy(update={"table": str(path)})
        for limit, path in zip(config.budget.also, files[1:], strict=True)
    ]
    return config.model_copy(
        update={"cost": cost, "budget": config.budget.model_copy(update={"also": also})}
    )
