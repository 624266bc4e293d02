"""The stage ``search``: choose the rank of every layer, by the search or by a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Callback

from nni_haloc.costs.analytic import param_table
from nni_haloc.costs.from_settings import allowed_ranks_of
from nni_haloc.inputs.config import Config, dump_config
from nni_haloc.inputs.schema.search import Search, SearchOptions
from nni_haloc.plan.budget import Limit, Scores, cheapest, check_feasible, choose_least
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.earlier import started_plan
from nni_haloc.runs.folder import SEARCH_VERSION, Figures, RunFolder, Training
from nni_haloc.runs.identity import search_identity
from nni_haloc.runs.job import Job, trainer_options
from nni_haloc.runs.limits import table_files, with_tables
from nni_haloc.runs.stages import clear
from nni_haloc.runs.stages.by_rule import by_rule
from nni_haloc.runs.stages.given_plan import RULE, fit_plan
from nni_haloc.runs.stages.promised import promised_plan
from nni_haloc.runs.stages.stage import Outcome, Report, Stage
from nni_haloc.runs.stages.training import recipe_of
from nni_haloc.runs.summary import cost_line
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.history import History, describe_search, epoch_figures
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.ranks import Layers
from nni_haloc.space.summary import by_reason
from nni_haloc.training import checkpoint
from nni_haloc.training.checkpoint import EpochCheckpoint
from nni_haloc.training.finetuning import EpochEnd, Forecast
from nni_haloc.utils.errors import Diverged, as_one_line
from nni_haloc.utils.files import read_json, write_json
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first
from nni_haloc.utils.progress import TimeLeft


class ChooseRanks(Stage):
    """Choose ranks by the settings' ``rule``, and decompose the network at them.

    The rule ``search`` is HALOC's search; its network has the searched weights.
    """

    name = "search"
    settings = Search
    title = "searched"
    training_title = "search"

    def check(self, job: Job) -> None:
        """Check that a given plan fits; warn of settings of the search that a rule does not use."""
        if job.config.rule == RULE:
            fit_plan(job.config, job.model, job.example)
        if unused := _unused(job.config):
            keys, rule = ", ".join(f"search.{key}" for key in unused), job.config.rule
            logger.warning("%s: not used by the rule %r; 'rule: search' searches", keys, rule)

    def run(self, job: Job, before: Outcome | None, report: Report, resume: bool) -> Outcome:
        """Choose the ranks, or read back those that an interrupted run has chosen."""
        if resume and (started := started_plan(job)) is not None:
            plan, network = started
        elif job.config.rule == "search":
            strategy, plan = search(job, report, resume=resume)
            network = strategy.network(plan)
        else:
            plan, network = by_rule(job, resume)
        facts = {key: plan.chosen_by[key] for key in ("cost", "original_cost", "budget")}
        return Outcome(plan, network, facts if is_first() else {})

    def files(self, folder: RunFolder) -> Training:
        """Return the folder's own search."""
        return folder.searching

    def rows(self, figures: Figures) -> dict[str, Figures]:
        """Return nothing: tables speak of the fine-tuned network."""
        return {}

    def headline(self, figures: Figures) -> float | None:
        """Return None: the network is not measured before it is fine-tuned."""
        return None

    def flatten(self, figures: Figures) -> Figures:
        """Return nothing: NNI gets the figures of the fine-tuned network."""
        return {}


def _unused(config: Config) -> list[str]:
    """List what is set of the search where the ranks are chosen by a rule."""
    if config.rule == "search":
        return []
    used = {"precision", "compile", "tensorboard"}
    scaled = set() if config.scale == 1 else {"epochs", "warmup_epochs"}  # set by ``scale``
    return sorted(config.search.model_fields_set - used - scaled)


def search(job: Job, report: Report, *, resume: bool = False) -> tuple[Haloc, RankPlan]:
    """Search, and leave the plan, the network with the searched weights and the costs.

    A search that is already finished is read back, and its network is left as it is.

    Args:
        job: the run's settings, data, network and folder.
        report: takes the figures of each epoch.
        resume: whether to go on from the state in the folder.

    Returns:
        The search and its plan.

    Raises:
        BudgetMissed: if the plan's network, timed as a whole, misses its latency budget.
    """
    strategy = run_or_read_search(job, report, resume=resume)
    plan = _plan_in_training(job) if resume else None
    if plan is None:
        plan = promised_plan(
            job,
            strategy.limits,
            lambda limits: strategy.plan(limits=limits),
            strategy.supernet.candidates,
        )
    for fact in (plan.chosen_by, *plan.chosen_by["also"]):
        logger.info("plan: %s", cost_line(fact))
    if not (resume and job.holds(plan)):  # the network there may be fine-tuned already
        job.save(strategy.network(plan), plan)
    if is_first() and not (resume and _is_described(job.folder)):
        write_json(job.folder.search_file, describe_search(strategy))
    return strategy, plan


def _plan_in_training(job: Job) -> RankPlan | None:
    """Return the plan that a fine-tuning has begun with, where it was timed; else None.

    Timed again, it might be another one.
    """
    if not job.folder.finetuning.checkpoint.exists():
        return None
    try:
        plan = RankPlan.load(job.folder.ranks)
    except (OSError, ValueError):
        return None
    return plan if "timed" in plan.chosen_by else None


def _is_described(folder: RunFolder) -> bool:
    """Tell whether an earlier start left the ``search.json`` of a finished search."""
    try:
        content = read_json(folder.search_file, "search", SEARCH_VERSION)
    except (OSError, ValueError):
        return False
    return content.get("finished", True) is True


def run_or_read_search(job: Job, report: Report, *, resume: bool) -> Haloc:
    """Run the search to its end, or read it back if it is finished. Reading writes no results.

    Raises:
        UnusableCheckpoint: if the folder holds the state of other settings.
        InfeasibleBudget: if no network of the rank space fits the budget.
        Diverged: if the search diverges.
        SettingsError: if a setting does not fit the network.
    """
    config, state, saved = job.config, job.folder.searching.checkpoint, None
    if resume and state.exists():
        saved = checkpoint.read(state, checkpoint.REMEDY, costs=list)
        checkpoint.check_same(state, saved["identity"], search_identity(config))
        config = with_tables(config, job.folder, saved["costs"])
        done, epochs = saved["epochs"], recipe_of(config.search).rounds
        logger.info("search: %d of %d epochs are done: %s", done, epochs, state)
    elif resume:
        logger.info("no state of an earlier run in %s: starting from the beginning", job.folder)
    with as_one_line():
        strategy, space, known = _prepare(job.at(config, job.folder.path), first=saved is None)
    if saved is None:
        clear(job.folder)  # only now: the settings have proved good
        if is_first():
            known.save(job.folder.layers)
    unfinished = saved is None or saved["epochs"] < recipe_of(config.search).rounds
    # Each process reads a finished search back for itself.
    options = {}
    if unfinished:
        options = trainer_options(job.config, searching=True)
        options["logger"] = job.logger(job.folder.searching.path, ChooseRanks.training_title)
    facts = {
        "identity": search_identity(job.config),
        "config": dump_config(job.config),
        "costs": [path.read_text(encoding="utf-8") for path in table_files(job.folder, config)],
    }
    _search(job, strategy, space, report, facts, options, saved is not None)
    return strategy


def _prepare(job: Job, *, first: bool) -> tuple[Haloc, RankSpace, KnownLayers]:
    """Make the cost tables, the rank space and the strategy; refuse an impossible budget.

    The first start of a search also refuses a latency budget that proves too low for the clock.
    """
    config = job.config
    r, s, allowed = config.rank_space, config.search, allowed_ranks_of(config)
    limits = job.limits(allowed)
    calibration = None
    if r.decomposition in ("auto", "data"):
        calibration = job.splits.images("plain", r.calibration_images, config.seed)
    logger.info(
        "to come: %d calibration images, search %g epochs, fine-tuning %d epochs",
        0 if calibration is None else len(calibration),
        s.epochs,
        config.finetune.epochs,
    )
    costs = [limit.costs for limit in limits]
    method = None if r.decomposition == "auto" else r.decomposition
    nested = s.supernet == "nested"
    space = RankSpace(job.model, job.example, costs, allowed, calibration, method, nested)
    check_feasible(space.candidates, limits, space.left_alone)
    _log_space(space, limits)
    start = _sensitivities(job, space) if s.start == "sensitivity" else None
    if first:
        _check_promise(job, space, limits, start)
    options = s.model_dump(include=set(SearchOptions.model_fields))
    pinned = [name for name in space.candidates if allowed.pins(name)]
    known = KnownLayers.of(space.specs, space.candidates, start, pinned, space.left_alone)
    return Haloc(limits, seed=config.seed, start=start, **options), space, known


def _check_promise(
    job: Job, space: RankSpace, limits: Sequence[Limit], start: Scores | None
) -> None:
    """Refuse a latency budget that no plan near the search's keeps, before the search is paid for.

    The plan that is timed is the one of the least loss by the sensitivities that the search starts
    from; without them, the cheapest one.
    """

    def make(limits: Sequence[Limit]) -> RankPlan:
        choice = (
            check_feasible(space.candidates, limits, space.left_alone)
            if start is None
            else choose_least(start, limits, job.config.search.min_use, space.left_alone)
        )
        first, *also = (limit.facts(choice) for limit in limits)
        ranks = {layer: space.candidates[layer][name] for layer, name in choice.items()}
        return RankPlan(ranks, {"rule": "sensitivity", **first, "also": also})

    promised_plan(job, limits, make, space.candidates)


def _log_space(space: RankSpace, limits: list[Limit]) -> None:
    alone = by_reason(space.left_alone) or "none"
    number, size = len(space.candidates), space.size()
    logger.info("%d layers to search, %.3g networks; left alone: %s", number, size, alone)
    for limit in limits:
        least = cheapest(space.candidates, limit.costs)
        logger.info("cheapest network: %s", cost_line(limit.facts(least)))


def _sensitivities(job: Job, space: RankSpace) -> Scores:
    config = job.config
    images = job.splits.images("plain", config.rank_space.calibration_images, config.seed)
    number = sum(map(len, space.candidates.values()))
    logger.info("sensitivities: %d candidates, %d images (search.start)", number, len(images))
    bf16 = config.search.precision == "bf16-mixed"
    left = TimeLeft("sensitivities")
    return space.sensitivities(images, bf16=bf16, progress=left)


def _search(
    job: Job,
    strategy: Haloc,
    space: RankSpace,
    report: Report,
    facts: dict[str, Any],
    options: dict[str, Any],
    resume: bool,
) -> None:
    """Search, from the folder's state if ``resume``; ``options`` are Lightning's."""

    def on_epoch(epoch: int, metrics: Figures) -> None:
        figures = epoch_figures(metrics, strategy.costs.original)
        top1 = figures.pop("top1")
        logger.info(
            "search epoch %d: top-1 of sampled networks %.2f %%, expected cost %.1f %% of the "
            "original",
            epoch + 1,
            100 * top1,
            100 * figures.get("expected_cost", math.nan),
        )
        report({"default": top1, **figures}, epoch)

    section = job.config.search
    train, val = (
        job.loader(split, shuffle=True, seed=i) for i, split in enumerate(("train", "val"))
    )
    files = job.folder.searching
    state = EpochCheckpoint(files.checkpoint, facts, train, val)
    layers = Layers(space.specs, space.left_alone)
    parameters = param_table(space.original, job.example, allowed_ranks_of(job.config), layers)
    callbacks: list[Callback] = [Forecast("search"), EpochEnd(on_epoch)]
    if is_first():
        callbacks.append(History(files.history, job.folder.search_file, strategy, parameters))
    evaluator = Classification(
        train,
        val,
        recipe_of(section),
        files.checkpoint if resume else None,
        callbacks=[*callbacks, state],
        precision=section.precision,
        log_every_n_steps=min(10, max(len(train), len(val))),
        **state.options,
        **options,
    )
    try:
        run_search(space, evaluator, strategy)
    except Diverged as error:
        raise Diverged(f"search: {error}") from None
