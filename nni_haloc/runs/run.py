"""Compress one trained network, from settings to a folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nni_haloc.inputs.config import Config, dump_config
from nni_haloc.inputs.schema.data import Data
from nni_haloc.inputs.schema.objective import Objective
from nni_haloc.runs.folder import Figures, hold
from nni_haloc.runs.job import Job
from nni_haloc.runs.objective import objective_value
from nni_haloc.runs.plausibility import doubt_figures, warn_of_doubts
from nni_haloc.runs.stages import all_stages, stages_of
from nni_haloc.runs.stages.choose_ranks import search
from nni_haloc.runs.stages.chosen_format import with_chosen_format
from nni_haloc.runs.stages.stage import Outcome, Report, Reports, Stage, ignore
from nni_haloc.runs.summary import summary_line
from nni_haloc.search.strategy import Haloc
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, wait_for_all
from nni_haloc.utils.versions import versions

RESULT = "finetune"
"""The stage whose network is the run's own result."""


def run(
    config: Config,
    folder: str | Path,
    report: Reports = ignore,
    parameters: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> Figures:
    """Compress the network of the settings and leave everything in ``folder``.

    Args:
        config: the settings (`nni_haloc.load_config`).
        folder: receives the results (`nni_haloc.runs.folder.RunFolder`).
        report: called after each epoch of the search and of every training, and before the first
            of a training, with the stage's name, figures whose ``default`` is the top-1 on
            validation images, and the point's place in the stage's curve. Curves of different
            stages don't compare: they are of different networks.
        parameters: what a tuner has set; ``metrics.json`` keeps it.
        resume: whether to go on from what an interrupted run left in ``folder``.

    Returns:
        The final figures, flat as NNI takes them (see `flatten`). Of several processes the first
        one reports and leaves the results; the others return nothing.

    Raises:
        SettingsError: if a setting turns out not to fit.
        DataError: if the data do not.
        InfeasibleBudget: if no network of the rank space fits the budget.
        UnusableCheckpoint: if ``folder`` holds the state of other settings.
        Diverged: if the search or a training diverges.
        HalocError: if another process works in ``folder``.
    """
    return run_job(Job(config, folder), report, parameters, resume=resume)


def run_job(
    job: Job,
    report: Reports = ignore,
    parameters: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> Figures:
    """Run a job that is made already; see `run`."""
    report = report if is_first() else ignore
    with hold(job.folder), job.active():
        stages = prepare(job)
        job = with_chosen_format(job, resume)
        facts = {
            "parameters": dict(parameters or {}),
            "config": dump_config(job.config),
            "versions": versions(),
            "timing": job.timing,
        }
        original = {**job.score(job.model), **job.count(job.model)}
        original |= job.guessing(job.config.data.score)
        logger.info("original: %s", summary_line(original))
        log_normalisation(job.config.data)
        figures: dict[str, Figures] = {"original": original}
        told = warn_of_doubts(figures)
        outcome: Outcome | None = None
        for stage in stages:
            curve: Report = partial(report, stage.name)
            if stage.name == RESULT and job.config.objective.costs and is_first():
                curve = _with_costs(job, outcome, original, curve)
            outcome = stage.run(job, outcome, curve, resume)
            if is_first():
                original |= outcome.original
                figures[stage.name] = outcome.figures
                for title, row in stage.rows(outcome.figures).items():
                    logger.info("%s: %s", title, summary_line(row))
                if RESULT in figures:  # a finished run's, whatever becomes of further stages
                    job.folder.write_metrics(figures, **facts)
                told = warn_of_doubts(figures, told)
            wait_for_all()
    if not is_first():
        return {}
    return flatten(figures, job.config.objective)


def log_normalisation(data: Data) -> None:
    """Log which of ImageNet's numbers images of a folder are normalised by, for want of others."""
    missing = [key for key in ("mean", "std") if getattr(data, key) is None]
    if data.name == "folder" and missing:
        keys = ", ".join(f"data.{key}" for key in missing)
        logger.info("images normalised by ImageNet's %s (%s)", " and ".join(missing), keys)


def prepare(job: Job) -> list[Stage]:
    """Return a run's stages; what is sure to fail in one of them fails here.

    Raises:
        HalocError: with one line on what can't be done.
    """
    stages = stages_of(job.config)
    for stage in stages:
        stage.check(job)
    return stages


def search_only(config: Config, folder: str | Path, *, resume: bool = False) -> Haloc:
    """Run the search of a run without what follows it; returns the strategy.

    Args:
        config: the settings.
        folder: receives the plan, the network with the searched weights, and the search's state.
        resume: whether to go on from the state in ``folder``.
    """
    job = Job(config, folder)
    with hold(job.folder), job.active():
        job = with_chosen_format(job, resume)
        top1 = job.accuracy(job.model, job.loader("val"))["top1"]
        logger.info("original: %s", job.top1_line(top1))
        log_normalisation(config.data)
        warn_of_doubts({"original": {"top1": top1, **job.guessing("val")}})
        return search(job, ignore, resume=resume)[0]


def flatten(figures: Mapping[str, Figures], objective: Objective = Objective()) -> Figures:
    """Put the figures of all stages into one flat dict, as NNI takes them.

    ``default``, which a tuner maximises, is the objective's value for the last stage's headline,
    top-1, and for its costs; those that it lacks are the result's. ``original_...`` are the
    original's; figures without a prefix are those of the fine-tuned network, and ``speedup``,
    ``macs_reduction`` and ``params_reduction`` are its gains over the original;
    ``original_at_chance`` and ``far_above_original`` are 1 where `doubts` doubts the accuracies.

    Args:
        figures: stage to its figures, as ``metrics.json`` has them; ``original`` among them.
        objective: what ``default`` is.
    """
    original, result = figures.get("original", {}), figures.get(RESULT, {})
    flat = {f"original_{key}": value for key, value in original.items()}
    flat |= {**gains(original, result), **doubt_figures(figures)}
    default = None
    for stage in all_stages():
        if stage.name in figures:
            flat |= stage.flatten(figures[stage.name])
            headline = stage.headline(figures[stage.name])
            if headline is not None:
                costs = {**result, **figures[stage.name]}
                known = all(cost in costs and cost in original for cost in objective.costs)
                own = objective if known else Objective()
                default = objective_value(own, headline, costs, original)
    return flat if default is None else {"default": default, **flat}


def gains(original: Figures, result: Figures) -> Figures:
    """Return what a network gains over the original, as far as both were measured.

    ``speedup`` is how many times as fast it is; ``macs_reduction`` and ``params_reduction`` are
    shares, 0 to 1.
    """
    known = {key for key in original if original[key] and result.get(key)}
    found = {}
    if "latency_ms" in known:
        found["speedup"] = original["latency_ms"] / result["latency_ms"]
    for key in ("macs", "params"):
        if key in known:
            found[f"{key}_reduction"] = 1 - result[key] / original[key]
    return found


def _with_costs(job: Job, before: Outcome | None, original: Figures, report: Report) -> Report:
    """Return a report of the objective's value, of which the costs are known before a training."""
    assert before is not None
    costs, own = job.count(before.network), original
    if "latency_ms" in job.config.objective.costs:
        times = job.time(original=job.model, network=before.network)
        costs["latency_ms"], own = times["network"], {**original, "latency_ms": times["original"]}

    def with_value(figures: Figures, place: int) -> None:
        top1 = figures["default"]
        value = objective_value(job.config.objective, top1, costs, own)
        report({**figures, "default": value, "top1": top1}, place)

    return with_value
