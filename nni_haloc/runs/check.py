"""Check runs as far as they can be checked before anything is measured or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nni_haloc.costs.table import worthwhile
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.models import build_model, is_factory
from nni_haloc.inputs.registries import DATA
from nni_haloc.inputs.schema.training import Trainer
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.budget import check_feasible
from nni_haloc.runs.job import Job
from nni_haloc.runs.limits import limits_at_hand
from nni_haloc.runs.run import prepare
from nni_haloc.runs.stages.by_rule import known_candidates, rank_spaces
from nni_haloc.runs.stages.given_plan import RULE, fit_plan
from nni_haloc.space.modules import materialised
from nni_haloc.space.ranks import find_layers
from nni_haloc.space.summary import why_nothing
from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.utils.errors import InfeasibleBudget, as_one_line

_RUNTIME = {"runtime", "dtype", "device", "memory_format", "threads", "graph"}
_JOB: dict[str, Any] = dict.fromkeys(("model", "weights", "data", "trainer", "seed"), True)
_JOB |= {"search": {"compile", "tensorboard"}, "cost": _RUNTIME}
"""Settings that a job depends on."""
_NEVER_LOOKED_AT = {"search", "finetune", "train", "threads", "recalibration_batches", "scale"}
_NEVER_LOOKED_AT |= {"objective", "trial_budget"}
"""Settings that neither a job nor the check of its budgets depends on."""


def check_runs(configs: Sequence[Config], *, elsewhere: bool = False) -> None:
    """Load what the runs need, and check that some network is within the budget.

    Tables that a run would measure, or have modelled, are left to it, and so is what they limit.
    Nothing is written.

    Args:
        configs: the settings of the runs. What several of them have in common is loaded once.
        elsewhere: whether they are another machine's: files that are not here are then left out,
            and the device is not looked at.

    Raises:
        HalocError: with one line on the first thing that can't be done.
    """
    jobs: dict[str, Job] = {}
    seen = set()
    for number, config in enumerate(configs):
        config = _as_far_as_here(config) if elsewhere else config
        own = config.model_dump_json(include=_JOB)
        whole = own + config.model_dump_json(exclude=_NEVER_LOOKED_AT)
        if whole in seen or (elsewhere and not _is_importable(config)):
            continue
        seen.add(whole)
        with TemporaryDirectory() as folder, _numbered(number):
            if elsewhere and not _has_data(config):
                _check_network(config)
                continue
            if own not in jobs:
                trained = not elsewhere or Path(config.weights).exists()
                jobs[own] = Job(config, folder, trained=trained)
            job = jobs[own].at(config, folder)
            with job.active():
                prepare(job)
                _check_budgets(config, job.model, job.example)


@contextmanager
def _numbered(run: int) -> Iterator[None]:
    """Let a refused budget say which run it is of."""
    try:
        yield
    except InfeasibleBudget as error:
        error.run = run
        raise


def _check_budgets(config: Config, model: nn.Module, example: Tensor) -> None:
    """Check that there are layers to search, and a network within those budgets that are known.

    Of a given plan, check that it fits the network.
    """
    if config.rule == RULE:
        fit_plan(config, model, example)
        return
    with as_one_line():
        spaces = rank_spaces(config)
        limits = limits_at_hand(config, model, example, spaces[0])
        tables = [limit.costs for limit in limits]
        model = materialised(model, example)
        layers = find_layers(model, example, spaces[0])
        kept, left_alone = known_candidates(layers, spaces, tables), layers.left_alone
        if limits:
            pinned = [name for name in kept if spaces[0].pins(name)]
            kept, dropped = worthwhile(kept, tables, pinned)
            left_alone = {**left_alone, **dropped}
        if not kept:
            raise ValueError(why_nothing(model, left_alone))
        if limits:
            check_feasible(kept, limits, left_alone)


def _check_network(config: Config) -> None:
    """Check a network without data: its factory, its weights where they are here, its budgets."""
    with as_one_line(), isolated_random_states():
        model = build_model(config.model.name, config.model.arguments)
        if Path(config.weights).exists():
            load_weights(model, config.weights)
    if config.data.name not in DATA.foreign():
        _check_budgets(config, model, torch.zeros(1, *config.data.shape))


def _as_far_as_here(config: Config) -> Config:
    """Return another machine's settings without its device and the tables that it alone has."""

    def without_table(section: Any) -> Any:
        there = section.table is not None and not Path(section.table).exists()
        return section.model_copy(update={"table": None}) if there else section

    also = [without_table(limit) for limit in config.budget.also]
    device = {"device": "cpu", "runtime": "torch", "dtype": "float32", "graph": False}
    return config.model_copy(
        update={
            "trainer": Trainer(accelerator="cpu"),
            "cost": without_table(config.cost).model_copy(update=device),
            "budget": config.budget.model_copy(update={"also": also}),
        }
    )


def _is_importable(config: Config) -> bool:
    """Tell if the package of a model's factory of one's own is here; it may be there alone."""
    if not is_factory(config.model.name):
        return True
    return find_spec(config.model.name.partition(":")[0].partition(".")[0]) is not None


def _has_data(config: Config) -> bool:
    """Tell if the data are here, as far as their paths say."""
    paths = [path for path in (config.data.root, config.data.val_list) if path is not None]
    return all(Path(path).exists() for path in paths)
