"""The cost tables and the runtime that a run's settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nni_haloc.costs.analytic import COUNTED
from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.costs.device.runtime import Runtime, known_formats, make_runtime
from nni_haloc.costs.device.torch_runtime import hardware
from nni_haloc.costs.stairs import rank_stairs
from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.options import MemoryFormat
from nni_haloc.inputs.registries import PREDICTORS
from nni_haloc.inputs.schema.space import Space
from nni_haloc.space.ranks import AllowedRanks
from nni_haloc.utils.errors import SettingsError, as_one_line
from nni_haloc.utils.files import why_unreadable
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, start_together
from nni_haloc.utils.progress import logged_progress

_DOING = {
    **dict.fromkeys(("macs", "params", "activation_bytes"), "counting"),
    "roofline": "modelling",  # by rates that are measured
}
"""The log's word for what these predictors do."""
_FEWER = "a larger rank_space.step has fewer candidates; haloc measure can go on where it stops"


def allowed_ranks_of(
    config: Config, *, every_rank: bool = False, pairs: bool = False
) -> AllowedRanks:
    """Return which layers and ranks a run's rank space allows.

    Args:
        config: the settings; ``rank_space.step: auto`` takes the stairs of their cost table.
        every_rank: allow every rank, if the settings leave the step between them open.
        pairs: let r1 and r2 differ, as far as `may_differ` says so.

    Raises:
        SettingsError: if the step is ``auto`` and there is no cost table.
    """
    space = config.rank_space
    if space.equal is None:
        space = space.model_copy(update={"equal": not (pairs and may_differ(config))})
    step: Literal["every"] | None = "every" if every_rank else None
    if space.step != "auto":
        return allowed_ranks(space, step)
    if config.cost.table is None:
        needed = "cost.table (make one with haloc measure)"
        raise SettingsError(f"rank_space.step: 'auto' needs {needed}")
    stairs = rank_stairs(_load("cost", config.cost.metric, config.cost.table))
    widths = {layer: stair.width for layer, stair in stairs.items() if stair.width > 1}
    logger.info("stairs of the cost table: %s", widths or "none")
    return replace(allowed_ranks(space.model_copy(update={"step": None}), step), stairs=widths)


def may_differ(config: Config) -> bool:
    """Tell whether r1 and r2 may differ where the settings leave it to the rule.

    They may where every cost is counted, because each pair that is measured takes its time; not
    where the settings set the step between ranks, which is then one for few candidates.
    """
    metrics = {config.cost.metric, *(also.metric for also in config.budget.also)}
    return config.rank_space.step is None and metrics <= set(COUNTED)


def allowed_ranks(space: Space, step: Literal["every"] | None = None) -> AllowedRanks:
    """Return what a rank space allows; ``step`` is for one that leaves it open."""
    if space.step == "auto":
        needed = "cost.table, which only a run has; expected a number"
        raise SettingsError(f"rank_space.step: 'auto' needs {needed}")
    return AllowedRanks(
        space.step or step,
        space.dense,
        space.equal is not False,
        tuple(space.kinds),
        tuple(space.exclude),
        space.pin,
    )


def cost_table(
    config: Config,
    key: str,
    metric: str,
    file: str | None,
    model: nn.Module,
    example: Tensor,
    allowed: AllowedRanks,
    path: Path,
) -> CostTable:
    """Return the cost table of one limit: read from its file, or made by a predictor.

    Args:
        config: the settings.
        key: the limit's section, for messages: ``cost``, ``budget.also.0``.
        metric: the limit's metric.
        file: the table to read (None: make one).
        model: the original network.
        example: one input.
        allowed: the rank space.
        path: where the first of several processes leaves what it measured, for the others to read.

    Raises:
        SettingsError: if the table does not fit the settings, or can't be made.
    """
    if file is not None:
        costs = _load(key, metric, file)
        if metric in MEASURED:
            _check_measured_alike(costs.identity, config, example, f"{key}.table: {file}")
        return costs
    predictor = predictor_of(config, key, metric)
    maker = PREDICTORS[predictor]
    if maker.measured and not is_first():
        return CostTable.load(path)
    doing = _DOING.get(predictor) or ("measuring" if maker.measured else "modelling")
    logger.info("%s %s of every candidate", doing, metric)
    example = latency_input(config, example) if metric in MEASURED else example
    with as_one_line(where=f"{key}.metric"):
        told = logged_progress(f"{doing} {metric}", _FEWER)
        return maker.table(model, example, allowed, runtime_of(config), told)


def predictor_of(config: Config, key: str, metric: str) -> str:
    """Return the name of the predictor that makes the table of a limit without one.

    Args:
        config: the settings.
        key: the limit's section, for messages: ``cost``, ``budget.also.0``.
        metric: the limit's metric.

    Raises:
        SettingsError: if it is one of another metric, or can't measure for several processes.
    """
    predictor = (config.cost.predictor if key == "cost" else None) or metric
    maker = PREDICTORS[predictor]
    if maker.metric != metric:
        expected = f"expected a predictor of {metric}"
        raise SettingsError(
            f"{key}.predictor: {expected}, found {predictor!r}, which gives {maker.metric}"
        )
    if maker.measured and (config.trainer.num_nodes > 1 or start_together()):
        raise SettingsError(
            f"{key}.table: several processes need a measured table: make one with haloc measure"
        )
    return predictor


def _check_measured_alike(
    identity: Mapping[str, Any], config: Config, example: Tensor, where: str
) -> None:
    """Raise `SettingsError` if a measured table does not hold for what the run measures.

    It must be of the same batch, for a run in int8 of int8, and, if it is of this very device, of
    the same runtime, memory format, precision and threads, or use of CUDA graphs.
    """
    cost = config.cost
    expected: dict[str, Any] = {"input": list(latency_input(config, example).shape)}
    if cost.dtype != "float32":  # on any device
        expected |= {"dtype": cost.dtype}
    if identity.get("device") == hardware(cost.device):
        expected |= {"dtype": cost.dtype}
        if cost.memory_format != "auto":
            expected |= {"memory_format": cost.memory_format}
        if cost.device.startswith("cuda"):
            expected |= {"graph": cost.graph, "tf32": cost.tf32}
        elif cost.threads is not None:
            expected |= {"threads": cost.threads}
        here, there = (
            str(facts.get("runtime", "")).partition(" ")[0]  # without its version
            for facts in (runtime_of(config).identity(), identity)
        )
        if there not in ("", here):
            raise SettingsError(
                f"{where}: measured with the runtime {there!r}, but this run uses {here!r} "
                "(cost.runtime)"
            )
    for key, value in expected.items():
        if (
            "runtime" in identity or (key == "input" and identity.get("kind") == "roofline")
        ) and identity.get(key) != value:
            setting = f"cost.{key}"
            if key == "input":
                same_image = list(identity.get(key) or [])[1:] == list(value)[1:]
                setting = "cost.batch_size" if same_image else "data.size or data.channels"
            raise SettingsError(
                f"{where}: measured with {key} {identity.get(key)!r}, but this run uses {value!r}; "
                f"set {setting} to what was measured, or measure a table with it (haloc measure)"
            )


def _load(key: str, metric: str, file: str) -> CostTable:
    """Read a table from its file; ``key`` names its section in messages."""
    try:
        costs = CostTable.load(file)
    except OSError as error:
        raise SettingsError(
            f"{key}.table: expected a file of costs, found {file}: {why_unreadable(error)}"
        ) from None
    if costs.metric != metric:
        raise SettingsError(
            f"{key}.table: expected a table of {metric}, found {costs.metric} in {file}"
        )
    return costs


def runtime_of(config: Config, memory_format: MemoryFormat | None = None) -> Runtime:
    """Return the runtime that latency and energy are measured with.

    Args:
        config: the settings.
        memory_format: the format (None: that of the settings; ``auto`` stands for contiguous as
            long as none is chosen).

    Raises:
        ValueError: if it can't be used as the settings say.
        MissingPackage: if a package that it needs is not installed.
    """
    cost = config.cost
    return make_runtime(
        cost.runtime,
        device=cost.device,
        dtype=cost.dtype,
        memory_format=memory_format or cost.layout,
        threads=cost.threads,
        graph=cost.graph,
        tf32=cost.tf32,
    )


def with_memory_format(config: Config, memory_format: MemoryFormat) -> Config:
    """Return the settings with another memory format."""
    cost = config.cost.model_copy(update={"memory_format": memory_format})
    return config.model_copy(update={"cost": cost})


def with_known_format(config: Config) -> Config:
    """Return the settings with a memory format in the place of ``auto``, if none is to be chosen.

    It is that of a measured table that the settings name. Without one it is contiguous, but where
    one process measures latency in a runtime that knows several formats: there ``auto`` stays.

    Raises:
        SettingsError: if a table can't be read.
    """
    if config.cost.memory_format != "auto":
        return config
    limits = [("cost", config.cost), *_further_limits(config)]
    for key, limit in limits:
        if limit.table is not None and limit.metric in MEASURED:
            known = _load(key, limit.metric, limit.table).identity.get("memory_format")
            if known in formats_of(config):
                return with_memory_format(config, known)
    cost, trainer = config.cost, config.trainer
    measured = cost.table is None and cost.metric == (cost.predictor or cost.metric) == "latency_ms"
    several = trainer.devices * trainer.num_nodes > 1 or start_together()
    if measured and not several and len(formats_of(config)) > 1:
        return config
    return with_memory_format(config, "contiguous")


def _further_limits(config: Config) -> list[tuple[str, Any]]:
    return [(f"budget.also.{i}", limit) for i, limit in enumerate(config.budget.also)]


def formats_of(config: Config) -> list[MemoryFormat]:
    """Return the memory formats that the settings' runtime can time networks in."""
    return known_formats(lambda memory_format: runtime_of(config, memory_format))


def latency_input(config: Config, example: Tensor) -> Tensor:
    """Return the batch that is measured: ``cost.batch_size`` times the example."""
    return example.repeat(config.cost.batch_size, *[1] * (example.dim() - 1))
