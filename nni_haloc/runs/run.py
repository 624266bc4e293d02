"""The main job: ranks by the search or by a rule, compression and fine-tuning of one trained network, from settings to a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nni_haloc.costs.analytic import param_table
from nni_haloc.costs.from_settings import rules_of
from nni_haloc.inputs import data as datasets
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.schema import SearchOptions
from nni_haloc.plan.budget import cheapest, check_feasible
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.sensitivity import sensitivities
from nni_haloc.runs.by_rule import by_rule
from nni_haloc.runs.chain_stages import chain, check
from nni_haloc.runs.folder import (
    CHECKPOINT_FILE,
    FINETUNING_FOLDER,
    METRICS_FILE,
    SEARCH_FOLDER,
    clear,
)
from nni_haloc.runs.identity import finetuning_identity, identity
from nni_haloc.runs.job import Job, trainer_options
from nni_haloc.runs.limits import limits_of, table_files, with_tables
from nni_haloc.runs.training import Report, checkpoint, place_of, recipe_of, trained
from nni_haloc.search.evaluator import classification
from nni_haloc.search.history import History
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.ranks import Layers
from nni_haloc.space.summary import by_reason
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.curves import HISTORY_FILE
from nni_haloc.training.finetuning import EpochEnd, Forecast
from nni_haloc.utils.errors import Diverged, SettingsError, reason_of
from nni_haloc.utils.files import write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, wait_for_all
from nni_haloc.utils.progress import TimeLeft
from nni_haloc.utils.versions import versions


def run(
    config: Config,
    folder: str | Path,
    report: Report = lambda metrics, place: None,
    parameters: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> dict[str, float]:
    """Compress the network of ``config`` and leave everything in ``folder``; returns the final metrics, a flat dict.

    ``report`` is called after each epoch of search and fine-tuning with a flat dict whose ``default`` is the top-1 on validation images,
    and its place in the curve.
    ``parameters``: what a tuner set, kept in ``metrics.json``. ``resume``: go on from what an interrupted run left in ``folder``.
    Of several processes the first one reports and leaves the results; the others return no metrics. Raises `SettingsError` for settings
    that turn out not to fit, `UnusableCheckpoint` where ``folder`` holds the state of other settings.
    """
    return run_job(Job(config, folder), report, parameters, resume=resume)


def run_job(
    job: Job,
    report: Report = lambda metrics, place: None,
    parameters: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> dict[str, float]:
    """`run`, of a job that is made already."""
    config, report = job.config, report if is_first() else lambda metrics, place: None
    check(job)
    test = job.loader(config.data.score)
    baseline = job.accuracy(job.model, test)
    logger.info(
        "original: %.2f %% top-1, %d MACs, %d parameters", 100 * baseline[0], *job.size(job.model)
    )
    plan, network = choose_ranks(job, report, resume=resume)
    network = train(job, plan, network, report, resume=resume)

    metrics = job.metrics(network, job.accuracy(network, test), baseline) if is_first() else {}
    job.save(network, plan)
    content = {
        "metrics": metrics,
        "parameters": dict(parameters or {}),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    if is_first():
        write_json(
            job.folder / METRICS_FILE, content
        )  # a finished run's, whatever becomes of its stages
    wait_for_all()
    metrics = chain(job, plan, network, metrics, report, resume=resume)
    if not is_first():
        return {}
    write_json(job.folder / METRICS_FILE, content | {"metrics": metrics})
    for name, value in metrics.items():
        logger.info("%s: %.6g", name, value)
    return metrics


def choose_ranks(
    job: Job, report: Report = lambda metrics, place: None, *, resume: bool = False
) -> tuple[RankPlan, nn.Module]:
    """The plan, by the search or by the settings' rule, and its network, not fine-tuned; ``report`` and ``resume`` as for `run`."""
    if job.config.rule != "search":
        return by_rule(job, resume)
    strategy = search(job, report, resume=resume)
    plan = strategy.plan()
    return plan, strategy.network(plan)


def search(
    job: Job, report: Report = lambda metrics, place: None, *, resume: bool = False
) -> Haloc:
    """The search alone: leaves its plan, the network with the searched weights, the costs, and in ``search/`` its own state.

    ``report`` and ``resume`` as for `run`; a search that is already finished is read back and not repeated, and its network left as it is.
    """
    strategy = searched(job, report, resume=resume)
    plan = strategy.plan()
    for fact in (plan.chosen_by, *plan.chosen_by["also"]):
        logger.info(
            "plan: cost %.6g of %.6g %s, budget %.6g",
            *(fact[k] for k in ("cost", "original_cost", "metric", "budget")),
        )
    if not (
        resume and job.has(plan)
    ):  # what is there may be fine-tuned already: it stays until there is something better
        job.save(strategy.network(plan), plan)
    return strategy


def searched(job: Job, report: Report = lambda metrics, place: None, *, resume: bool) -> Haloc:
    """The finished search; one that is read back (``resume``) leaves the folder's results as they are."""
    config, state, saved = job.config, job.folder / SEARCH_FOLDER / CHECKPOINT_FILE, None
    if resume and state.exists():
        saved = checkpoint.read(state)
        checkpoint.check_same(state, saved["identity"], identity(config))
        config = with_tables(config, job.folder, saved["costs"])
        logger.info(
            "search: %d of %d epochs are done: %s", saved["epochs"], config.search.epochs, state
        )
    elif resume:
        logger.info("no state of an earlier run in %s: starting from the beginning", job.folder)
    unfinished = saved is None or saved["epochs"] < config.search.epochs
    tensorboard = _tensorboard(job.folder) if config.search.tensorboard and unfinished else None
    try:
        strategy, space = _prepare(config, job.splits, job.model, job.example, job.folder)
    except (OSError, ValueError) as error:
        raise SettingsError(reason_of(error)) from None
    if saved is None:
        clear(job.folder)  # of an earlier run; not before this one's settings have proved good
    facts = {
        "identity": identity(job.config),
        "config": job.config.model_dump(mode="json"),
        "costs": [path.read_text(encoding="utf-8") for path in table_files(job.folder, config)],
    }
    # A finished search is read back by each process for itself.
    options = trainer_options(job.config, searching=True) if unfinished else {}
    _search(
        job,
        strategy,
        space,
        report,
        facts,
        {**options, "logger": tensorboard or False},
        saved is not None,
    )
    return strategy


def _prepare(
    config: Config, splits: datasets.Splits, model: nn.Module, example: Tensor, folder: Path
) -> tuple[Haloc, RankSpace]:
    """The cost tables, the rank space and the strategy; an impossible budget is refused here, before any training."""
    r, s, rules = config.rank_space, config.search, rules_of(config)
    limits = limits_of(config, model, example, rules, folder)
    calibration = (
        splits.images("plain", r.calibration_images, config.seed)
        if r.decomposition in ("auto", "data")
        else None
    )
    shown = 0 if calibration is None else len(calibration)
    logger.info(
        "to come: %d calibration images, search %d epochs, fine-tuning %d epochs",
        shown,
        s.epochs,
        config.finetune.epochs,
    )
    costs = [limit.costs for limit in limits]
    space = RankSpace(
        model,
        example,
        costs,
        rules,
        calibration,
        None if r.decomposition == "auto" else r.decomposition,
    )
    check_feasible(space.candidates, limits)
    alone = by_reason(space.left_alone) or "none"
    logger.info(
        "%d layers to search, %.3g networks; left alone: %s",
        len(space.candidates),
        space.size(),
        alone,
    )
    for limit in limits:
        least = limit.costs.total(cheapest(space.candidates, limit.costs))
        logger.info(
            "cheapest network: %.6g %s; budget %.6g, original %.6g",
            least,
            limit.costs.metric,
            limit.budget,
            limit.costs.original,
        )
    start = None
    if s.start == "sensitivity":
        images, labels = splits.labelled("plain", r.calibration_images, config.seed)
        number = sum(map(len, space.candidates.values()))
        logger.info("sensitivities: %d candidates on %d images (search.start)", number, len(images))
        left = TimeLeft("sensitivities")
        start = sensitivities(
            model,
            space.modules_by_layer,
            images,
            labels,
            bf16=s.precision == "bf16-mixed",
            progress=left,
        )
    options = s.model_dump(include=set(SearchOptions.model_fields))
    return Haloc(limits, seed=config.seed, start=start, **options), space


def _search(
    job: Job,
    strategy: Haloc,
    space: RankSpace,
    report: Report,
    facts: dict[str, Any],
    options: dict[str, Any],
    resume: bool,
) -> None:
    """Search, from the folder's checkpoint where ``resume`` says so; ``options``: Lightning's."""

    def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
        cost = metrics.get("search/expected_cost_epoch", float("nan")) / strategy.costs.original
        top1 = metrics.get("search/val_top1", metrics["search/train_top1"])
        logger.info(
            "search epoch %d: top-1 of sampled networks %.2f %%, expected cost %.1f %% of the original",
            epoch + 1,
            100 * top1,
            100 * cost,
        )
        searched = (
            {"expected_cost": cost} if math.isfinite(cost) else {}
        )  # not in epochs of warm-up
        report({"default": top1, **searched, "train_loss": metrics["search/train_loss"]}, epoch)

    train, val = (
        job.loader(split, shuffle=True, seed=i) for i, split in enumerate(("train", "val"))
    )
    state = EpochCheckpoint(job.folder / SEARCH_FOLDER / CHECKPOINT_FILE, facts, train, val)
    parameters = param_table(
        space.original, job.example, rules_of(job.config), Layers(space.specs, space.left_alone)
    )
    past = History(state.path.with_name(HISTORY_FILE), strategy, parameters)
    evaluator = classification(
        train,
        val,
        recipe_of(job.config.search),
        state.path if resume else None,
        callbacks=[Forecast("search"), EpochEnd(on_epoch), *([past] if is_first() else []), state],
        precision=job.config.search.precision,
        log_every_n_steps=min(10, max(len(train), len(val))),
        **state.options,
        **options,
    )
    try:
        run_search(space, evaluator, strategy)
    except Diverged as error:
        raise SettingsError(f"search: {error}") from None


def train(
    job: Job,
    plan: RankPlan,
    network: nn.Module,
    report: Report = lambda metrics, place: None,
    *,
    resume: bool = False,
) -> nn.Module:
    """Recalibration and fine-tuning, from the folder's checkpoint where ``resume`` says so and the settings are still the same."""
    section = job.config.finetune
    options: dict[str, Any] = {}
    if section.distill_features:
        options = {"teacher": job.model, "distill": section.distill}
        options |= {"layers": list(plan.ranks), "feature_weight": section.distill_features}
    same = {**finetuning_identity(job.config), "ranks": plan.names}
    return trained(
        job,
        network,
        section,
        job.folder / FINETUNING_FOLDER / CHECKPOINT_FILE,
        same,
        report,
        place_of(job.config, "finetune"),
        resume=resume,
        **options,
    )


def _tensorboard(folder: Path) -> Any:
    from pytorch_lightning.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name=SEARCH_FOLDER, version="")
    except ModuleNotFoundError:
        raise SettingsError(
            "search.tensorboard: needs the package tensorboard (pip install 'nni-haloc[tensorboard]')"
        ) from None
