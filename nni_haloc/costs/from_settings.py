"""The cost tables of a run's limits, counted, measured or read, and where they lie in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.accelerator import CACHE, accelerator_table
from nni_haloc.costs.analytic import activation_table, mac_table, param_table
from nni_haloc.costs.device.torch_runtime import TorchRuntime
from nni_haloc.costs.measured import latency_table
from nni_haloc.costs.stairs import rank_stairs
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema import Metric, Space
from nni_haloc.space.ranks import RankRules
from nni_haloc.utils.errors import SettingsError
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, start_together
from nni_haloc.utils.versions import processor


def rules_of(config: Config, step: int | None = None) -> RankRules:
    """The rules of a run's rank space; ``step`` where the settings leave it open, and with ``auto`` the stairs of its cost table."""
    space = config.rank_space
    if space.step != "auto":
        return rank_rules(space, step)
    if config.cost.table is None:
        raise SettingsError("rank_space.step: 'auto' is read off cost.table, which is not set")
    stairs = rank_stairs(_load("cost", config.cost.metric, config.cost.table))
    found = {layer: stair.width for layer, stair in stairs.items() if stair.width > 1}
    logger.info("stairs of the cost table: %s", found or "none")
    return replace(rank_rules(space.model_copy(update={"step": None}), step), stairs=found)


def rank_rules(space: Space, step: int | None = None) -> RankRules:
    """The rules of a rank space; ``step`` where it leaves it open."""
    if space.step == "auto":
        raise SettingsError("rank_space.step: 'auto' is for runs with a cost.table")
    return RankRules(
        space.step or step,
        space.dense,
        space.equal,
        tuple(space.kinds),
        tuple(space.exclude),
        space.pin,
    )


def cost_table(
    config: Config,
    key: str,
    metric: Metric,
    file: str | None,
    model: nn.Module,
    example: Tensor,
    rules: RankRules,
    path: Path,
) -> CostTable:
    """One limit's table: from its file, measured or counted; ``key`` names its section in messages; ``path``: where it will lie."""
    if file is not None:
        costs = _load(key, metric, file)
        if metric == "latency_ms":
            _check_measured_alike(costs.identity, config, example, f"{key}.table: {file}")
        return costs
    if metric == "latency_ms":
        if config.trainer.num_nodes > 1 or start_together():
            raise SettingsError(
                f"{key}.table: each of the processes would measure another latency; name a table (haloc measure)"
            )
        if not is_first():
            return CostTable.load(path)
        logger.info("measuring the latency of every candidate")
        return latency_table(model, latency_input(config, example), rules, runtime_of(config))
    if metric == "cycles" or metric == "energy_pj":
        logger.info("modelling every candidate on an Eyeriss-like array")
        try:
            return accelerator_table(model, example, rules, metric, cache=CACHE)
        except ValueError as error:
            raise SettingsError(f"{key}.metric: {error}") from None
    counted = {"macs": mac_table, "params": param_table, "activation_bytes": activation_table}
    return counted[metric](model, example, rules)


def _check_measured_alike(
    identity: Mapping[str, Any], config: Config, example: Tensor, where: str
) -> None:
    """`SettingsError` where a latency was measured for another batch, or on this very device in another way than the run measures."""
    expected: dict[str, Any] = {"input": list(latency_input(config, example).shape)}
    if config.cost.device == "cpu" and identity.get("device") == processor():
        expected |= {"memory_format": config.cost.memory_format, "dtype": runtime_of(config).dtype}
        expected |= {"threads": config.cost.threads} if config.cost.threads is not None else {}
    for key, value in expected.items():
        if (
            "runtime" in identity or (key == "input" and identity.get("kind") == "roofline")
        ) and identity.get(key) != value:
            raise SettingsError(
                f"{where}: measured with {key} {identity.get(key)!r}, the run's is {value!r} (cost.batch_size and others)"
            )


def _load(key: str, metric: str, file: str) -> CostTable:
    """A table from its file; ``key`` names its section in messages."""
    try:
        costs = CostTable.load(file)
    except OSError as error:
        raise SettingsError(
            f"{key}.table: expected a file of costs, found {file}: {error.strerror}"
        ) from None
    if costs.metric != metric:
        raise SettingsError(
            f"{key}.table: expected a table of {metric}, found {costs.metric} in {file}"
        )
    return costs


def runtime_of(config: Config, model: nn.Module | None = None) -> TorchRuntime:
    """What latency is measured with; ``model``: see `TorchRuntime`."""
    return TorchRuntime(
        config.cost.device,
        memory_format=config.cost.memory_format,
        threads=config.cost.threads,
        model=model,
    )


def latency_input(config: Config, example: Tensor) -> Tensor:
    """The batch that latency is measured with."""
    return example.repeat(config.cost.batch_size, *[1] * (example.dim() - 1))
