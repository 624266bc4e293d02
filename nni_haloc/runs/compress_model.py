"""Compress a network in one call: no settings file, no NNI experiment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nni_haloc.costs.analytic import COUNTED
from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.costs_file import MEASURED
from nni_haloc.costs.device.runtime import Runtime, known_formats
from nni_haloc.costs.device.torch_runtime import hardware
from nni_haloc.costs.latency import measure_energy, measure_latency
from nni_haloc.costs.table import CostTable, worthwhile
from nni_haloc.inputs.labels import check_labels
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.options import FormatSetting, MemoryFormat
from nni_haloc.inputs.registries import PREDICTORS, RULES, RUNTIMES
from nni_haloc.inputs.schema.search import SearchOptions
from nni_haloc.plan.budget import Limit, Scores, choose_least
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.known_layers import KnownLayers
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules import plan as plan_by_rule
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.runs.folder import Figures, RunFolder, hold
from nni_haloc.runs.hub import push_to_hub
from nni_haloc.runs.kept import measured_of_budget
from nni_haloc.runs.limits import check_table
from nni_haloc.runs.memory_format import (
    Formats,
    fastest_original,
    formats_in,
    in_format,
    is_affected,
    judge_rule,
    laid_out,
    time_formats,
    with_formats,
)
from nni_haloc.runs.plausibility import guessing, warn_of_doubts
from nni_haloc.runs.promise import METRIC, Check, Rounds, keep_promise, time_rounds
from nni_haloc.runs.saved import save
from nni_haloc.runs.summary import cost_line, summary_line, summary_text
from nni_haloc.search.evaluator import Classification
from nni_haloc.search.space import RankSpace
from nni_haloc.search.strategy import Haloc, run_search
from nni_haloc.space.modules import evaluating
from nni_haloc.space.outputs import logits_of
from nni_haloc.space.ranks import AllowedRanks, find_layers
from nni_haloc.space.summary import why_nothing
from nni_haloc.training.finetuning import accuracy, finetune, predict, recalibrate, top_accuracy
from nni_haloc.training.random_states import isolated_random_states
from nni_haloc.training.recipe import Recipe
from nni_haloc.training.reconstruction import reconstruct_blocks
from nni_haloc.utils.errors import DataError, brief, expected_one_of, first_line, unknown_key
from nni_haloc.utils.log import log_to, logger
from nni_haloc.utils.progress import logged_progress, shows_bars, told_if_long
from nni_haloc.utils.quiet import quiet
from nni_haloc.utils.registry import Registry
from nni_haloc.utils.versions import versions
from nni_haloc.utils.wrapped import unwrapped

_LONG = "compress_model takes longer than a minute; verbose=True says how far it is"
_FEWER = "allowed=AllowedRanks(step=...) with a larger step has fewer candidates"
_RECALIBRATION_BATCHES = 50
_OR_WITHOUT = " to train with (epochs=0 needs none)"


@dataclass(frozen=True, repr=False)
class Compressed:
    """Hold a compressed network, its ranks, and figures before and after.

    Attributes:
        model: the compressed network, plain `torch.nn`, in evaluation mode.
        plan: the chosen rank of every layer.
        costs: what every candidate costs.
        metrics: figures of ``original`` and ``compressed``: ``macs`` (for one image), ``params``,
            ``latency_ms`` and, where labels are at hand, ``top1`` on the validation loader. Of the
            original also what that is judged by: ``images``, and ``chance``, the top-1 of guesses;
            of ``compressed``, where latency is the budget, also ``latency_ms_of_budget``: what it
            really takes, divided by the budget; ``measured_share``: the same divided by the
            original's latency; and ``budget_met``: 1 or 0.
        timing: what latencies were measured with: runtime, device, threads, shape of the input,
            ...; and ``formats``, by what the memory format was chosen, where it was. The original's
            latency is then the one in its faster format.
        call: the call of `compress_model` that made it, as Python is written.
        layers: what is known of every layer; ``haloc plan FOLDER`` shows it.
    """

    model: nn.Module
    plan: RankPlan
    costs: CostTable
    metrics: Mapping[str, Figures]
    timing: Mapping[str, Any] = field(default_factory=dict)
    call: str = ""
    layers: KnownLayers | None = None

    def __repr__(self) -> str:
        networks = (f"{name}: {summary_line(row)}" for name, row in self.metrics.items())
        return f"Compressed({'; '.join(networks)})"

    def report(self) -> str:
        """Return a small table: original, compressed, change; and how a format was chosen."""
        formats = formats_in(self.costs.identity)
        text = summary_text(self.metrics)
        return text if formats is None else f"{text}\n{formats}"

    def save(
        self,
        folder: str | Path,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ranks, weights, costs and figures into a folder.

        ``nni_haloc.load(folder, model)`` makes the network from them and an instance of the
        original one. With the name of a built-in network, ``nni_haloc.load(folder)`` will do; with
        that of a factory, ``nni_haloc.load(folder, factories=True)``.

        Args:
            folder: receives the files; it is made if it is not there.
            name: of the original network, as `build_model` takes it: ``torchvision:resnet18``,
                ``package.module:factory``, ...
            arguments: keyword arguments of that network's factory.

        Raises:
            ValueError: if the network of that name is another one.
        """
        model = None
        if name is not None:
            model = {"name": name, "arguments": dict(arguments or {})}
            _check_same(build_model(name, arguments), self.plan, unwrapped(self.model))
        files = RunFolder(folder)
        with hold(files):
            save(folder, self.model, self.plan, model)
            self.costs.save(files.costs)
            if self.layers is not None:
                self.layers.save(files.layers)
            original, compressed = (dict(self.metrics[key]) for key in ("original", "compressed"))
            compressed["bytes"] = files.weights.stat().st_size
            facts = {"timing": dict(self.timing), "call": self.call, "versions": versions()}
            files.write_metrics({"original": original, "finetune": compressed}, **facts)

    def push_to_hub(
        self,
        repo_id: str,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Push the network to the hub, with a page of its figures; see `push_to_hub`.

        Args:
            repo_id: ``user/name``.
            name: of the original network, see `save`.
            arguments: of that network's factory.
            options: ``private``, ``license``, ``message``, ``token`` and ``endpoint`` of
                `nni_haloc.push_to_hub`.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save(folder, name, arguments)
            return push_to_hub(folder, repo_id, **options)


def compress_model(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None = None,
    *,
    budget: float = 0.5,
    metric: str = "latency_ms",
    epochs: int = 10,
    rule: str | None = None,
    recipe: Recipe | None = None,
    search_recipe: Recipe | None = None,
    allowed: AllowedRanks | None = None,
    costs: CostTable | None = None,
    batch_size: int = 1,
    memory_format: FormatSetting = "auto",
    runtime: str = "torch",
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    calibration_images: int = 512,
    check: Check = "refuse",
    seed: int = 0,
    verbose: bool = False,
    **search_options: Any,
) -> Compressed:
    """Compress a trained classification network to a share of its cost.

    Args:
        model: the trained network; it is copied and never changed.
        train_loader: batches ``(images, labels)``. With ``epochs=0``, images alone will do.
        val_loader: batches for the search's probabilities and for the accuracies; needed with
            ``epochs`` above 0.
        budget: the share of the original's cost that the compressed network may have, above 0
            to 1.
        metric: the cost: ``latency_ms`` (measured here), ``macs``, ``params``, or another name of
            `nni_haloc.inputs.registries.PREDICTORS`.
        epochs: epochs of fine-tuning. 0 is the way that takes minutes and needs no labels:
            weights are decomposed for the data, and blocks trained to give the original's outputs
            (see `nni_haloc.reconstruct_blocks`).
        rule: how ranks are chosen: ``search``, or a rule of
            `nni_haloc.inputs.registries.RULES`. By default ``sensitivity-knapsack``, and the search
            where ``search_recipe`` or one of its options is given.
        recipe: how the fine-tuning goes; its epochs take the place of ``epochs``.
        search_recipe: how the weights are trained in the search (default: one epoch at 0.02).
        allowed: which layers and ranks are searched. By default, where the cost is counted here,
            every rank for rules that run no candidate, and for ``sensitivity-knapsack`` also
            pairs of r1 and r2; else those on the step grid, with r1 = r2.
        costs: a cost table that is at hand, in the place of one that is made here.
        batch_size: images in the batch that latency is measured with.
        memory_format: ``contiguous`` or ``channels_last``, for latency and for the result. ``auto``
            takes that of ``costs``; without a table it takes the one with the better plan, where
            ``metric`` is ``latency_ms`` and the runtime knows both, and is contiguous elsewhere.
        runtime: what latency is measured with: ``torch``, ``onnxruntime``, ...
        dtype: in what: ``float32``, or ``int8``, which ``onnxruntime``, ``openvino`` and
            ``executorch`` have. The result is in float32 in any case.
        device: what latency is measured on, by torch's name: ``cpu``, ``cuda``, ... Training takes
            the CUDA device, if there is one, in any case.
        threads: processor threads that latency is measured with (None: the runtime's own choice).
        calibration_images: training images for decomposition, sensitivities and blocks.
        check: what becomes of a plan that misses a latency budget when its network, untrained, is
            timed as a whole, after up to three further plans: ``refuse`` raises `BudgetMissed`,
            ``warn`` goes on, ``skip`` does not time it.
        seed: of path sampling and shuffling.
        verbose: whether to log what is done to standard error, as `haloc run` does, and to show
            progress bars.
        search_options: further options of `nni_haloc.Haloc`.

    Returns:
        The network with its plan, its cost table and its figures.

    Raises:
        DataError: if labels are not classes of the network's outputs.
        InfeasibleBudget: if no network of the rank space fits the budget; names the cheapest cost.
        BudgetMissed: if the plan's network misses its latency budget; the error has the ``plan``.
        ValueError: if nothing in the model can be searched, or labels are missing to train with.
        Diverged: if the search or the fine-tuning diverges.

    Examples:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
        >>> images = DataLoader(TensorDataset(torch.randn(64, 3, 8, 8)), 16)
        >>> result = compress_model(net, images, metric="macs", budget=0.8, epochs=0)
        >>> result.metrics["compressed"]["macs"] <= 0.8 * result.metrics["original"]["macs"]
        True
    """
    call = _call(locals())
    _check_arguments(model, train_loader, val_loader, device, search_options)
    _check_budget(budget, check)
    recipe = recipe or Recipe(epochs=epochs, lr=0.02, schedule="onecycle")
    asked = bool(search_options) or search_recipe is not None
    rule = rule or ("search" if asked else "sensitivity-knapsack")
    if rule not in ("search", *RULES):
        raise ValueError(f"rule: {expected_one_of(['search', *RULES], rule)}")
    if search_options and rule != "search":
        name = next(iter(search_options))
        raise ValueError(f"{name}: an option of the search, and the rule is {rule!r}")
    trained = recipe.epochs > 0 or rule == "search"
    with quiet(), isolated_random_states(), log_to() if verbose else told_if_long(_LONG):
        seed_everything(seed, verbose=False)
        images, labels = _calibration(train_loader, calibration_images)
        model = unwrapped(model)
        home = next(model.parameters()).device
        images = images.to(home)
        allowed = allowed or _ranks_for(rule, metric, costs, model, images[:1])
        if trained and labels is None:
            raise ValueError(f"train_loader: expected images and labels{_OR_WITHOUT}, found images")
        if trained and val_loader is None:
            raise ValueError(f"val_loader: expected images and labels{_OR_WITHOUT}, found None")
        _check_runs(model, images)
        labels = _classes(model, images, labels, needed=trained)
        before = _judged(model, val_loader)
        logger.info("original: %s", summary_line({**before, **_count(model, images[:1])}))
        told = warn_of_doubts({"original": before})
        example = images[:1].repeat(batch_size, *[1] * (images.dim() - 1))
        clocks = _Clocks(_known(RUNTIMES, "runtime", runtime), device, dtype, threads)
        clock = clocks.in_format("contiguous" if memory_format == "auto" else memory_format)
        if costs is not None:
            _check_precision(costs, clock)
        given = _Given(model, images, labels, train_loader, allowed, seed, clocks, example, metric)
        with isolated_random_states():  # what follows is the same in a given format
            settled = given.settle(memory_format, costs, budget, rule)
        costs, original, timing = settled.costs, settled.model, settled.timing
        layout = settled.memory_format
        here = timing.identity().get("device") or hardware(device)
        limit = Limit.of(costs, budget)
        beside = fastest_original(original, timing, clocks.in_format, costs.identity)
        promise = _Promise(original, tuple(example.shape), timing, here, check, *beside, layout)
        task = _Task(replace(given, model=original), limit, promise, settled.problem)
        logger.info("choosing ranks: %s, %d calibration images", rule, len(images))
        if rule == "search":
            how = search_recipe or Recipe(epochs=1, lr=0.02, schedule="constant")
            plan, network, known = task.search(val_loader, how, verbose, search_options)
        else:
            plan, network, known = task.apply_rule(rule)
        logger.info("%s: %s", rule, cost_line(plan.chosen_by))
        network.to(home)  # a search leaves it on the processor
        if not trained:
            reconstruct_blocks(network, original, images, list(plan.ranks), seed=seed)
        laid_out(network, layout)
        if trained:
            recalibrate(network, _pairs(train_loader), _RECALIBRATION_BATCHES)
        bars = verbose and shows_bars()
        finetune(network, train_loader, recipe, val_loader, enable_progress_bar=bars)
        networks = {"original": beside[0], "compressed": network}
        top1 = {} if val_loader is None else {"top1": accuracy(network, val_loader)[0]}
        metrics = {
            "original": {**before, **_count(original, images[:1])},
            "compressed": {**top1, **_count(network, images[:1])},
        }
        warn_of_doubts(metrics, told)
        others = {"original": beside[1]}
        for name, latency in measure_latency(networks, example, timing, others=others).items():
            metrics[name]["latency_ms"] = latency
        timed = {"latency_ms": metrics["compressed"]["latency_ms"]}
        metrics["compressed"] |= measured_of_budget(
            [({**limit.facts(plan.names), "fraction": budget}, costs.identity)],
            here,
            lambda metric: (
                timed[metric] if metric in timed else measure_energy(network, example, timing)
            ),
            {"latency_ms": metrics["original"]["latency_ms"]},
        )
        logger.info("compressed: %s", summary_line(metrics["compressed"]))
    formats = formats_in(costs.identity)
    measured = {**timing.identity(), "input": list(example.shape)}
    measured |= {} if formats is None else {"formats": formats.facts()}
    return Compressed(network, plan, costs, metrics, measured, call, known)


def _check_arguments(
    model: Any, train_loader: Any, val_loader: Any, device: str, options: Mapping[str, Any]
) -> None:
    """Raise a TypeError or a ValueError for arguments that are something else by mistake."""
    if isinstance(model, Mapping):
        remedy = "build the network, and give it the weights by load_state_dict"
        found = f"{type(model).__name__}, such as a state dict"
        raise TypeError(f"model: expected an nn.Module, found {found}; {remedy}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, found {brief(model)}")
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        if isinstance(loader, (Tensor, Dataset)):
            found, remedy = type(loader).__name__, "wrap it in a DataLoader"
            raise TypeError(f"{name}: expected a DataLoader, found a {found}; {remedy}")
    own = [
        name for name in inspect.signature(compress_model).parameters if name != "search_options"
    ]
    for name in options:
        if name not in SearchOptions.model_fields:
            raise TypeError(f"{name}: {unknown_key(name, [*own, *SearchOptions.model_fields])}")
    if device == "gpu":
        raise ValueError(
            "device: expected torch's name of a device, found 'gpu'; did you mean 'cuda'?"
        )


def _call(given: Mapping[str, Any]) -> str:
    """Write a call of `compress_model` as Python, without arguments that are the defaults."""
    parameters = inspect.signature(compress_model).parameters
    values = {**given, **given["search_options"]}
    del values["search_options"]
    words = []
    for key, value in values.items():
        default = parameters[key].default if key in parameters else inspect.Parameter.empty
        if key in ("model", "train_loader"):
            words.append(key)
        elif key == "val_loader":
            words += [key] if value is not None else []
        elif value is not default and value != default:
            is_table = isinstance(value, CostTable)
            text = f"CostTable.load({RunFolder('').costs.name!r})" if is_table else repr(value)
            words.append(f"{key}={text}")
    return f"compress_model({', '.join(words)})"


def _check_budget(budget: float, check: str) -> None:
    """Raise a ValueError for a budget that is no share, or an unknown check."""
    expected = "budget: expected a share of the original's cost, above 0 to 1, found"
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"{expected} {brief(budget)}")
    if not 0 < budget <= 1:
        remedy = f"; write {budget / 100:g} for {budget:g} %" if 1 < budget <= 100 else ""
        raise ValueError(f"{expected} {budget}{remedy}")
    if check not in get_args(Check):
        raise ValueError(f"check: {expected_one_of(get_args(Check), check)}")


def _check_same(named: nn.Module, plan: RankPlan, network: nn.Module) -> None:
    """Raise a ValueError unless the plan makes a network like ``network`` of ``named``."""
    try:
        restructure(named, plan).load_state_dict(network.state_dict())
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"name: expected the network that was compressed: {reason}") from None


def _ranks_for(
    rule: str, metric: str, costs: CostTable | None, model: nn.Module, example: Tensor
) -> AllowedRanks:
    """Return the rank space of a rule.

    Where costs are counted it has every rank, and r1 and r2 apart, as far as the rule takes them;
    with a table that is given, if that knows all of these.
    """
    if rule == "search" or (metric if costs is None else costs.metric) not in COUNTED:
        return AllowedRanks()
    marks = vars(RULES[rule])
    step: Literal["every"] | None = "every" if marks.get("every_rank") else None
    wide = AllowedRanks(step=step, equal=not marks.get("pairs"))
    if costs is None:
        return wide
    candidates = find_layers(model, example, wide).candidates(wide)
    known = all(
        row.keys() <= costs.costs.get(layer, row).keys() for layer, row in candidates.items()
    )
    return wide if known else AllowedRanks()


@dataclass(frozen=True)
class _Promise:
    """What is needed to time a planned network beside the original."""

    model: nn.Module
    shape: tuple[int, ...]
    runtime: Runtime
    device: str
    check: Check
    original: nn.Module
    """The original network in its faster memory format, beside which the planned one is timed."""
    other: Runtime
    """What runs it."""
    memory_format: MemoryFormat

    def plan(
        self,
        limit: Limit,
        make_plan: Callable[[Sequence[Limit]], RankPlan],
        candidates: Mapping[str, Mapping[str, Any]],
    ) -> RankPlan:
        """Make a plan whose network, untrained, keeps its latency budget; see `keep_promise`."""

        def clock(plan: RankPlan) -> Rounds:
            with isolated_random_states():
                planned = laid_out(restructure(self.model, plan), self.memory_format)
                return time_rounds(self.original, planned, self.shape, self.runtime, self.other)

        def make(limits: Sequence[Limit]) -> RankPlan:
            return with_formats(make_plan(limits), limit.costs.identity)

        where = "; the error's attribute 'plan' has the ranks"
        return keep_promise([limit], make, candidates, clock, self.device, self.check, where)


@dataclass(frozen=True)
class _Clocks:
    """A runtime in each memory format that it knows."""

    kind: Any
    device: str
    dtype: str
    threads: int | None

    def in_format(self, memory_format: MemoryFormat) -> Runtime:
        """Return the runtime in a memory format."""
        return self.kind.from_options(
            device=self.device,
            dtype=self.dtype,
            memory_format=memory_format,
            threads=self.threads,
        )

    @property
    def formats(self) -> list[MemoryFormat]:
        """The formats in which it can time networks."""
        return known_formats(self.in_format)


@dataclass(frozen=True)
class _Settled:
    """The memory format of a call, and what is measured in it.

    ``problem`` is the rule's, where it was made to choose the format.
    """

    memory_format: MemoryFormat
    model: nn.Module
    timing: Runtime
    costs: CostTable
    problem: Problem | None = None


@dataclass(frozen=True)
class _Given:
    """A network, the data to choose its ranks by, and what its cost is measured with."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    train: DataLoader
    allowed: AllowedRanks
    seed: int
    clocks: _Clocks
    example: Tensor
    metric: str

    def settle(
        self, asked: FormatSetting, costs: CostTable | None, budget: float, rule: str
    ) -> _Settled:
        """Settle the memory format that is asked for, and the cost table where there is none."""
        known = self._known_format(asked, costs)
        if known is not None:
            of_table = asked == "auto" and costs is not None
            return self._settled(known, costs, None, of_table=of_table)
        runtimes = {each: self.clocks.in_format(each) for each in get_args(MemoryFormat)}
        formats = time_formats(self.model, tuple(self.example.shape), runtimes)
        if formats is None:
            return self._settled("contiguous", None, None)
        if formats.is_far:
            return self._settled(formats.chosen, None, formats)
        faster = formats.faster
        order = sorted(runtimes, key=lambda each: each != faster)
        found = {each: self._settled(each, None, formats) for each in order}
        limits = {each: [Limit.of(one.costs, budget)] for each, one in found.items()}
        tables = [one.costs for one in found.values()]
        plain = replace(self, model=in_format(self.model, "contiguous"))
        formats, problem = judge_rule(formats, limits, lambda own: plain.problem(own, tables), rule)
        best = found[formats.chosen]
        return replace(best, costs=formats.told(best.costs), problem=problem)

    def _known_format(self, asked: FormatSetting, costs: CostTable | None) -> MemoryFormat | None:
        """Return the memory format where none has to be chosen; else None."""
        if asked != "auto":
            return asked
        if costs is not None:
            known = costs.identity.get("memory_format")
            return known if known in self.clocks.formats else "contiguous"
        affected = is_affected(self.model) and self.example.dim() == 4
        if self.metric != METRIC or not affected or len(self.clocks.formats) < 2:
            return "contiguous"
        return None

    def _settled(
        self,
        memory_format: MemoryFormat,
        costs: CostTable | None,
        formats: Formats | None,
        *,
        of_table: bool = False,
    ) -> _Settled:
        """Return the network in a format, with its table, which is measured where it is None."""
        as_it_is = memory_format == "contiguous" and formats is None and not of_table
        model = self.model if as_it_is else in_format(self.model, memory_format)
        timing = self.clocks.in_format(memory_format)
        if costs is None:
            batch = self.example if self.metric in MEASURED else self.images[:1]
            make = _known(PREDICTORS, "metric", self.metric).table
            doing = "measuring" if self.metric in MEASURED else "computing"
            where = "" if formats is None else f", {memory_format}"
            logger.info("%s %s of every candidate%s", doing, self.metric, where)
            told = logged_progress(f"{doing} {self.metric}", _FEWER)
            costs = make(model, batch, self.allowed, timing, told)
        check_table(costs)
        costs = costs if formats is None else formats.told(costs)
        return _Settled(memory_format, model, timing, costs)

    def problem(self, limits: Sequence[Limit], tables: Sequence[CostTable]) -> Problem:
        """Return what a rule chooses from: candidates that are worthwhile by any of the tables."""
        layers = find_layers(self.model, self.images[:1], self.allowed)
        candidates = layers.candidates(self.allowed)
        pinned = [name for name in candidates if self.allowed.pins(name)]
        kept, dropped = worthwhile(candidates, tables, pinned)
        left_alone = {**layers.left_alone, **dropped}
        if not kept:
            raise ValueError(why_nothing(self.model, left_alone))
        return Problem(
            self.model,
            layers.specs,
            kept,
            limits,
            self.images,
            self.labels,
            seed=self.seed,
            train=self.train,
            left_alone=left_alone,
        )


@dataclass(frozen=True)
class _Task:
    """What is given, the limit on its cost, and what was found out before ranks are chosen."""

    given: _Given
    limit: Limit
    promise: _Promise
    made: Problem | None = None

    def search(
        self, val: Any, recipe: Recipe, verbose: bool, options: Mapping[str, Any]
    ) -> tuple[RankPlan, nn.Module, KnownLayers]:
        """Choose ranks by the search; return plan, network with searched weights, and layers."""
        space = RankSpace(
            self.given.model,
            self.given.images[:1],
            self.limit.costs,
            self.given.allowed,
            self.given.images,
        )
        start = space.sensitivities(self.given.images)

        least_use = SearchOptions(**options).min_use

        def first_plan(limits: Sequence[Limit]) -> RankPlan:
            choice = choose_least(start, limits, least_use)
            return RankPlan({x: space.candidates[x][name] for x, name in choice.items()})

        self.promise.plan(self.limit, first_plan, space.candidates)  # before the search is paid for
        strategy = Haloc([self.limit], start=start, seed=self.given.seed, **options)
        bars = verbose and shows_bars()
        evaluator = Classification(self.given.train, val, recipe, enable_progress_bar=bars)
        run_search(space, evaluator, strategy)
        plan = self.promise.plan(
            self.limit, lambda limits: strategy.plan(limits=limits), space.candidates
        )
        return plan, strategy.network(plan), self._known(space, space.candidates, start)

    def apply_rule(self, rule: str) -> tuple[RankPlan, nn.Module, KnownLayers]:
        """Choose ranks by a rule; return plan, network decomposed for the data, and layers."""
        if self.made is None:
            problem = self.given.problem([self.limit], [self.limit.costs])
        else:
            problem = self.made.within([self.limit])

        def make(limits: Sequence[Limit]) -> RankPlan:
            return plan_by_rule(
                problem if limits[0] is self.limit else problem.within(limits), rule
            )

        kept = problem.candidates
        plan = self.promise.plan(self.limit, make, kept)
        return plan, problem.network(plan.names), self._known(problem, kept, problem.scores)

    def _known(
        self,
        space: RankSpace | Problem,
        candidates: Mapping[str, Collection[str]],
        scores: Scores | None,
    ) -> KnownLayers:
        """Gather what is known of every layer."""
        pinned = [name for name in candidates if self.given.allowed.pins(name)]
        return KnownLayers.of(space.specs, candidates, scores, pinned, space.left_alone)


def _known(registry: Registry[Any], key: str, name: str) -> Any:
    """Return a registry's object; say which argument is wrong if there is none of the name."""
    if name not in registry:
        raise ValueError(f"{key}: {expected_one_of(registry, name)}")
    return registry[name]


def _calibration(loader: Iterable[Any], number: int) -> tuple[Tensor, Tensor | None]:
    """Return the first images of a loader, and their labels where it has any."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in loader:
        parts = batch if isinstance(batch, Sequence) else [batch]
        if not isinstance(parts[0], Tensor):
            kind = type(parts[0]).__name__
            remedy = "for other inputs use RankSpace, Haloc and run_search"
            raise ValueError(f"train_loader: expected images in a tensor, found a {kind}; {remedy}")
        images.append(parts[0])
        labels += [part for part in parts[1:2] if isinstance(part, Tensor)]
        if sum(map(len, images)) >= number:
            break
    if not images:
        raise ValueError("train_loader: expected batches of images, found none")
    return torch.cat(images)[:number], torch.cat(labels)[:number] if labels else None


def _pairs(loader: Iterable[Any]) -> Iterable[tuple[Tensor, Any]]:
    """Yield a loader's batches as pairs of images and something."""
    for batch in loader:
        yield (batch[0], None) if isinstance(batch, Sequence) else (batch, None)


def _check_runs(model: nn.Module, images: Tensor) -> None:
    """Raise a `DataError` if a network does not take the images of its loader."""
    try:
        with evaluating(model), torch.no_grad():
            model(images[:2])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        kind = str(images.dtype).removeprefix("torch.")
        found = f"images {list(images.shape[1:])} in {kind}"
        raise DataError(
            f"train_loader: expected images that {type(model).__name__} takes, found {found}: "
            f"{first_line(error)}"
        ) from None


def _classes(model: nn.Module, images: Tensor, labels: Tensor | None, needed: bool) -> Tensor:
    """Return the labels of images, or the classes that the original sees, which stand in for them.

    Raises:
        DataError: if labels that are needed are no classes of its outputs.
    """
    with evaluating(model), torch.no_grad():
        if labels is not None:
            shape = len(images), *logits_of(model(images[:2])).shape[1:]
            try:
                return check_labels(labels, shape, "labels of train_loader")
            except DataError as error:
                if needed:
                    raise
                logger.info(
                    "%s (without training the network's predictions take their place)", error
                )
        return torch.cat([logits_of(model(part)).argmax(1) for part in images.split(64)])


def _judged(network: nn.Module, val_loader: DataLoader | None) -> Figures:
    """Return a network's top-1 and what it is judged by, where a validation loader is at hand."""
    if val_loader is None:
        return {}
    with isolated_random_states():
        logits, labels = predict(network, val_loader)
    return {"top1": top_accuracy(logits, labels), **guessing(labels)}


def _check_precision(costs: CostTable, runtime: Runtime) -> None:
    """Refuse a table of latency or energy in int8 where float32 is timed, and the other way."""
    found, asked = costs.identity.get("dtype"), runtime.identity().get("dtype")
    if costs.metric in MEASURED and found not in (None, asked) and "int8" in (found, asked):
        raise ValueError(
            f"costs: expected a table measured in {asked}, found one in {found}"
            "; measure it in the precision that dtype says, or choose the dtype of the table"
        )


def _count(network: nn.Module, example: Tensor) -> Figures:
    return {"macs": count_macs(network, example), "params": count_params(network)}
