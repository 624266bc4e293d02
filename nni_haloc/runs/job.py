"""Load what every run needs: settings, data and the trained network."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from nni_haloc.costs.counts import count_macs, count_params
from nni_haloc.costs.device.runtime import Runtime
from nni_haloc.costs.device.torch_runtime import hardware
from nni_haloc.costs.from_settings import (
    latency_input,
    runtime_of,
    with_known_format,
    with_memory_format,
)
from nni_haloc.costs.latency import measure_energy, measure_latency
from nni_haloc.inputs.classes import some_of
from nni_haloc.inputs.config import Config
from nni_haloc.inputs.data import load_data
from nni_haloc.inputs.labels import check_labels
from nni_haloc.inputs.models import build_model
from nni_haloc.inputs.options import MemoryFormat
from nni_haloc.inputs.splits import SPLITS
from nni_haloc.inputs.weights import load_weights
from nni_haloc.plan.budget import Limit
from nni_haloc.plan.compression import restructure
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.plan.rules.problem import Problem
from nni_haloc.runs.folder import Figures, RunFolder, hold
from nni_haloc.runs.limits import keep_tables, limits_of
from nni_haloc.runs.memory_format import Formats, fastest_original, in_format, laid_out
from nni_haloc.runs.plausibility import guessing
from nni_haloc.runs.saved import load, save
from nni_haloc.space.modules import evaluating
from nni_haloc.space.outputs import logits_of
from nni_haloc.space.ranks import AllowedRanks, UnfitPattern, check_names, find_layers
from nni_haloc.training.finetuning import accuracy
from nni_haloc.training.loggers import Place, check_logger, make_logger
from nni_haloc.training.random_states import (
    isolated_random_states,
    random_states,
    seed_random_states,
    set_random_states,
)
from nni_haloc.utils.errors import DataError, SettingsError, as_one_line, first_line
from nni_haloc.utils.files import make_folder
from nni_haloc.utils.interruption import stoppable
from nni_haloc.utils.log import log_to, logger
from nni_haloc.utils.placement import working_on
from nni_haloc.utils.printing import percent
from nni_haloc.utils.processes import check_startable, is_first
from nni_haloc.utils.progress import shows_bars
from nni_haloc.utils.quiet import quiet


@dataclass(frozen=True)
class Made:
    """What was made while the memory format was chosen.

    Attributes:
        limits: the run's limits in the chosen format.
        problem: the rule's problem within them, with what was found out of its candidates; None
            where there is no rule.
    """

    limits: list[Limit]
    problem: tuple[Problem, list[str]] | None = None


class Job:
    """Load the data and the network that the settings name, and check that they fit each other.

    Nothing outside the object changes: no folder is made, no random state or number of threads is
    set. That is what `active` does, for the time of a block. A job is never changed after it is
    made; `at` gives one with other settings.

    A memory format ``auto`` is settled where nothing has to be timed for it
    (`nni_haloc.costs.from_settings.with_known_format`); `in_format` gives a job of the chosen one.

    Args:
        config: the settings.
        folder: where the run leaves its results.
        factories: whether a model factory of the user's own may be called (see `build_model`).
        trained: whether to load the settings' ``weights``; else the network is as the seed
            initialises it.

    Raises:
        SettingsError: if a setting does not fit this machine or the network.
        DataError: if the data can't be read.
    """

    def __init__(
        self, config: Config, folder: str | Path, *, factories: bool = True, trained: bool = True
    ) -> None:
        self.folder = RunFolder(folder)
        _check_trainer(config)
        with as_one_line(where="cost"):
            runtime_of(config)
        self.config = config = with_known_format(config)
        self.formats: Formats | None = None
        self.made: Made | None = None
        space = config.rank_space
        patterns = AllowedRanks(
            kinds=tuple(space.kinds), exclude=tuple(space.exclude), pin=space.pin
        )
        with as_one_line(), isolated_random_states():
            seed_random_states(config.seed)
            self.model = build_model(config.model.name, config.model.arguments, factories=factories)
            with _naming_rank_space():
                check_names(self.model, patterns)
            if trained:
                load_weights(self.model, config.weights)
            self._drawn: dict[str, Any] | None = random_states()
        self.model = self.laid_out(self.model)
        with as_one_line(DataError):
            self.splits = load_data(config.data)
            self.example = self.splits.images("test", 1)
            self._check_classes()
        if space.exclude or space.pin:
            with as_one_line(), _naming_rank_space():
                find_layers(self.model, self.example, patterns)

    def _check_classes(self) -> None:
        """Check that the network has an output for each class; warn of classes without images.

        Raises:
            DataError: says what does not fit.
        """
        outputs = logits_of(self._outputs()).shape
        self._check_number(outputs[1])
        for split, what in SPLITS.items():
            labels = self.splits.labels[split]
            check_labels(labels, (len(labels), *outputs[1:]), f"labels of the {what} images")
        for split, what in SPLITS.items():
            if missing := self.splits.missing(split):
                logger.warning("%s images: none of class %s", what, some_of(missing))

    def _check_number(self, outputs: int) -> None:
        name, classes = self.config.model.name, self.splits.classes
        if self.config.data.classes is not None and outputs != len(classes):
            expected = f"expected a name for each of the {outputs} outputs of {name}"
            raise DataError(f"data.classes: {expected}, found {len(classes)}")
        if classes and outputs != len(classes):
            facts = f"{name} has {outputs} outputs, and the data {len(classes)} classes"
            remedy = "expected an output for each class (data.classes can't leave one out)"
            if outputs > len(classes):
                remedy = "name the class of each output, in order, in data.classes"
            raise DataError(f"model: {facts}, {some_of(classes)}; {remedy}")

    def _outputs(self) -> Any:
        """Return what the network gives for one image.

        Raises:
            DataError: if the network does not take the image.
        """
        with evaluating(self.model), isolated_random_states(), torch.no_grad():
            try:
                return self.model(self.example)
            except Exception as error:  # of the network's own code
                raise self._refused(error) from None

    def _refused(self, error: Exception) -> DataError:
        """Return the error of a network that fails on the data's images."""
        shape = "x".join(map(str, self.example.shape[1:]))
        expected = f"expected a network for the data's images, {shape} (channels, height, width)"
        found = f"found {self.config.model.name}, which fails on them ({first_line(error)})"
        remedy = "set data.channels, data.size or model.arguments"
        return DataError(f"model: {expected}, {found}; {remedy}")

    def at(self, config: Config, folder: str | Path) -> Job:
        """Return a job of the same data and network with other settings, in another folder."""
        job = copy.copy(self)
        job.config, job.folder, job._drawn = config, RunFolder(folder), None
        return job

    def in_format(
        self, memory_format: MemoryFormat, formats: Formats | None = None, made: Made | None = None
    ) -> Job:
        """Return the same job in a memory format that was chosen.

        Args:
            memory_format: the format.
            formats: what it was chosen by.
            made: what was made in choosing it, for the search or the rule.
        """
        job = copy.copy(self)
        job.config = with_memory_format(self.config, memory_format)
        job.formats, job.made = formats, made
        if memory_format == "channels_last":
            job.model = in_format(self.model, memory_format)
        return job

    def limits(self, allowed: AllowedRanks) -> list[Limit]:
        """Return the run's limits, and leave their cost tables in its folder.

        Tables that were measured while the memory format was chosen are not measured again.
        """
        if self.made is None:
            return limits_of(
                self.config, self.model, self.example, allowed, self.folder, self.formats
            )
        keep_tables(self.config, self.made.limits, self.folder)
        return self.made.limits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the folder; set device, threads and random states as the settings say, for a block.

        The random states are those after the network was made from the settings' seed; of a job
        that `at` has returned, those of the seed.
        """
        make_folder(self.folder.path)
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        environment = {key: os.environ.get(key) for key in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
        with quiet(), working_on(_device_of(self.config)), isolated_random_states():
            try:
                if self.config.threads is not None:
                    torch.set_num_threads(self.config.threads)
                torch.set_float32_matmul_precision("high")
                seed_everything(self.config.seed, verbose=False)
                if self._drawn is not None:
                    set_random_states(self._drawn)
                yield
            finally:
                torch.set_num_threads(threads)
                torch.set_float32_matmul_precision(precision)
                for key, value in environment.items():
                    if value is None:
                        os.environ.pop(key, None)
                    else:
                        os.environ[key] = value

    def loader(self, split: str, *, shuffle: bool = False, seed: int = 0) -> DataLoader:
        """Return a loader of one split: ``train``, ``plain``, ``val`` or ``test``."""
        d = self.config.data
        seed = self.config.seed + seed
        return self.splits.loader(
            split, d.batch_size, shuffle=shuffle, workers=d.workers, seed=seed
        )

    def logger(self, folder: Path, title: str) -> Any:
        """Return the settings' logger for a training, as Lightning's Trainer takes it.

        Args:
            folder: the folder of the training.
            title: what the training is called.
        """
        return make_logger(self.config.logger, Place(self.folder.path, folder, title))

    def laid_out(self, network: nn.Module) -> nn.Module:
        """Put a network into the settings' memory format, in which it is trained and timed."""
        return laid_out(network, self.config.cost.memory_format)

    def accuracy(self, network: nn.Module, loader: DataLoader) -> Figures:
        """Return ``top1``, and ``top5`` where there are more than ten classes; 0 to 1."""
        names = ("top1", "top5") if len(self.splits.classes) > 10 else ("top1",)
        try:
            values = accuracy(network, loader, tuple(int(name[3:]) for name in names))
        except (RuntimeError, IndexError) as error:
            raise self._refused(error) from None
        return dict(zip(names, values, strict=True))

    def score(self, network: nn.Module) -> Figures:
        """Return the accuracies on the images that the settings' ``data.score`` names.

        Beside those of the validation images stand ``test_top1`` and the like.
        """
        figures = self.accuracy(network, self.loader(self.config.data.score))
        if self.config.data.score == "val":
            test = self.accuracy(network, self.loader("test"))
            figures |= {f"test_{key}": value for key, value in test.items()}
        return figures

    def top1_line(self, top1: float) -> str:
        """Return a top-1 on the validation images for the log."""
        return f"top-1 {percent(top1, 2)} ({len(self.splits.labels['val'])} validation images)"

    def guessing(self, split: str) -> Figures:
        """Return what accuracies on a split are judged by, see `plausibility.guessing`."""
        return guessing(self.splits.labels[split])

    def count(self, network: nn.Module) -> Figures:
        """Return ``macs`` (for one image) and ``params``."""
        return {"macs": count_macs(network, self.example), "params": count_params(network)}

    def time(self, costs: Mapping[str, Any] | None = None, **networks: nn.Module) -> Figures:
        """Return each network's latency in milliseconds for the settings' batch.

        Several networks are timed in alternation, so that a disturbance falls on all of them.

        Args:
            costs: identity of the run's cost table; with it the original network is timed beside
                them, as ``original``, in the memory format in which it is faster.
            networks: networks by name.
        """
        batch, runtime = latency_input(self.config, self.example), runtime_of(self.config)
        if costs is None:
            return measure_latency(networks, batch, runtime)
        original, other = self.fastest_original(costs)
        every = {"original": original, **networks}
        return measure_latency(every, batch, runtime, others={"original": other})

    def fastest_original(self, costs: Mapping[str, Any]) -> tuple[nn.Module, Runtime]:
        """Return the original network in its faster memory format, and the runtime in that format.

        Args:
            costs: identity of the run's cost table.
        """
        return fastest_original(
            self.model,
            runtime_of(self.config),
            lambda memory_format: runtime_of(self.config, memory_format),
            costs,
        )

    def energy(self, network: nn.Module) -> float:
        """Return the millijoules that a network takes for the settings' batch.

        Raises:
            ValueError: if the settings' runtime or device measures no energy.
            MissingPackage: if a package that it needs is not installed.
        """
        batch = latency_input(self.config, self.example)
        return measure_energy(network, batch, runtime_of(self.config))

    @property
    def device(self) -> str:
        """The device that is timed, by the name that cost tables have for it."""
        known = runtime_of(self.config).identity()
        return known.get("device") or hardware(self.config.cost.device)

    @property
    def timing(self) -> dict[str, Any]:
        """What latencies are measured with: runtime, device, threads, shape of the input, ..."""
        batch = latency_input(self.config, self.example)
        told = {"formats": self.formats.facts()} if self.formats else {}
        return {**runtime_of(self.config).identity(), "input": list(batch.shape), **told}

    def holds(self, plan: RankPlan) -> bool:
        """Tell whether an earlier start left the network of this plan in the folder."""
        try:
            load(self.folder.path, self.model)  # what is there may be cut off, or of another plan
            return RankPlan.load(self.folder.ranks).ranks == plan.ranks
        except (OSError, ValueError):
            return False

    def save(self, network: nn.Module, plan: RankPlan, folder: RunFolder | None = None) -> None:
        """Leave a compressed network and its plan in ``folder`` (None: the job's).

        The network may have been pruned after it was decomposed.
        """
        if not is_first():
            return
        facts: dict[str, Any] = {
            "name": self.config.model.name,
            "arguments": self.config.model.arguments,
        }
        whole = restructure(self.model, plan).state_dict()
        shapes = {key: value.shape for key, value in whole.items()}
        if any(value.shape != shapes[key] for key, value in network.state_dict().items()):
            facts["pruned"] = True
        save((folder or self.folder).path, network, plan, facts)


@contextmanager
def _naming_rank_space() -> Iterator[None]:
    """Let an error in a pattern of the rank space begin with the setting's whole key."""
    try:
        yield
    except UnfitPattern as error:
        raise SettingsError(f"rank_space.{error}") from None


@contextmanager
def logged(folder: RunFolder, stage: RunFolder | None = None) -> Iterator[None]:
    """Hold a folder for a block; log to its ``log.txt``, too; end with one line on a signal.

    Args:
        folder: the folder that receives the log.
        stage: folder of the one stage that is run; the line on a signal speaks of it.

    Raises:
        HalocError: if another process works in the folder.
        SettingsError: if nothing can be written there.
    """

    before = _changed(folder.costs)

    def kept() -> str:
        if stage is None:
            found = any(folder.path.rglob(folder.training.checkpoint.name))
        else:
            found = stage.training.checkpoint.is_file()
        if not found:
            if stage is None and _changed(folder.costs) != before:
                return f"no epoch is done; --set cost.table={folder.costs} takes the costs again"
            return "no epoch is done, and nothing is kept: the same command starts anew"
        return f"{stage or folder} keeps the checkpoint; --resume goes on from it"

    with hold(folder), log_to(folder.log), stoppable("haloc", kept):
        yield


def _changed(file: Path) -> int | None:
    """Return when a file was changed last; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def trainer_options(config: Config, *, searching: bool = False) -> dict[str, Any]:
    """Return the options of Lightning's Trainer that the settings name.

    Args:
        config: the settings.
        searching: whether it is for the search, in which the candidates that are not sampled have
            no gradients: several processes must expect that.
    """
    options = config.trainer.model_dump(exclude={"logger"})
    options["enable_progress_bar"] = shows_bars()
    if searching and config.trainer.devices * config.trainer.num_nodes > 1:
        options["strategy"] = "ddp_find_unused_parameters_true"
    return options


def _device_of(config: Config) -> str | None:
    """Return the name of the device that the settings have this process work on.

    None leaves it to `nni_haloc.utils.placement.working_device`.
    """
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return "cpu"
    # Lightning gives each process the device of its number, but only once it trains.
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else None


def _check_trainer(config: Config) -> None:
    check_logger(config.logger)
    processes = config.trainer.devices * config.trainer.num_nodes
    if config.rule == "search" and config.search.compile and processes > 1:
        expected = "expected false with several processes"
        raise SettingsError(f"search.compile: {expected}, found true with {processes}")
    wanted = config.trainer.accelerator
    metal = wanted == "gpu" and torch.backends.mps.is_available()
    if wanted in ("gpu", "cuda") and not (torch.cuda.is_available() or metal):
        expected = "expected auto or cpu, because torch finds no GPU on this machine"
        raise SettingsError(f"trainer.accelerator: {expected}, found {wanted!r}")
    try:
        with quiet():
            trainer = Trainer(**trainer_options(config), logger=False, enable_checkpointing=False)
            check_startable(trainer)
    except (MisconfigurationException, ValueError) as error:
        raise SettingsError(f"trainer: {' '.join(str(error).split())}") from None
