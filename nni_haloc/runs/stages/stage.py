"""A step of a run: `Stage`, and `NetworkStage` for those that make a new network."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pytorch_lightning import seed_everything
from torch import nn

from nni_haloc.costs.table import CostTable
from nni_haloc.inputs.config import Config, dump_config
from nni_haloc.inputs.schema.section import Section
from nni_haloc.plan.rank_plan import RankPlan
from nni_haloc.runs.folder import Figures, RunFolder, Training
from nni_haloc.runs.identity import finetuning_identity, section_identity
from nni_haloc.runs.job import Job
from nni_haloc.runs.saved import load
from nni_haloc.utils.errors import reason_of
from nni_haloc.utils.files import is_number, make_folder
from nni_haloc.utils.log import logger
from nni_haloc.utils.processes import is_first, wait_for_all

Report = Callable[[Figures, int], None]
"""Takes the figures of one point of a curve, and the point's place, from 0 on. After a resume the
last place may be reported twice."""


Reports = Callable[[str, Figures, int], None]
"""Takes the points of all stages: the stage's name, the figures, the place in its own curve."""


def ignore(*point: Any) -> None:
    """Report nothing."""


@dataclass
class Outcome:
    """Hold the result of a stage, which the next one starts from.

    Attributes:
        plan: the chosen ranks.
        network: the compressed network.
        figures: the network's figures, as ``metrics.json`` has them; empty in all processes but
            the first.
        original: figures of the original network that were measured beside it.
    """

    plan: RankPlan
    network: nn.Module
    figures: Figures = field(default_factory=dict)
    original: Figures = field(default_factory=dict)


class Stage(ABC):
    """Define one step of a run.

    That is its settings, its folder, how it runs and resumes, and its rows in tables.

    A subclass in one file, and a line in `nni_haloc.inputs.registries.STAGES` (or an entry point of
    the group ``nni_haloc.stages``), add a stage.

    Attributes:
        name: its name in ``metrics.json``, and the key of its section in the settings.
        settings: the type of that section.
        title: its network's name in tables: ``pruned``.
        training_title: what its training is called in logs and figures; empty without one.
        in_run: whether `haloc run` walks it.
    """

    name: ClassVar[str]
    settings: ClassVar[type[Section]]
    title: ClassVar[str] = ""
    training_title: ClassVar[str] = ""
    in_run: ClassVar[bool] = True
    section: ClassVar[str] = ""
    """Key of the settings, where it is another than the name."""
    folder: ClassVar[str] = ""
    """Name of the folder of its results inside the run's; empty where they lie in the run's own."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            cls.section = vars(cls).get("section", cls.name)

    def settings_of(self, config: Config) -> Any:
        """Return this stage's section of the settings; None where the run does not have it.

        Args:
            config: the settings.
        """
        return getattr(config, self.section)

    def wanted(self, config: Config) -> bool:
        """Tell whether the settings ask for this stage.

        Args:
            config: the settings.
        """
        return self.settings_of(config) is not None

    def check(self, job: Job) -> None:  # noqa: B027 (most stages have nothing to check)
        """Check what can be known before anything is trained.

        Args:
            job: the run's settings, data, network and folder.

        Raises:
            HalocError: if the stage is sure to fail.
        """

    @abstractmethod
    def run(self, job: Job, before: Outcome | None, report: Report, resume: bool) -> Outcome:
        """Run the stage, or read it back if it is finished.

        Args:
            job: the run's settings, data, network and folder.
            before: what the stage before it handed on; None for the first one.
            report: takes the points of the stage's curve, counted from 0.
            resume: whether to go on from the state that an interrupted run left.

        Returns:
            What the next stage starts from.
        """

    def files(self, folder: RunFolder) -> Training:
        """Return where the state and the history of its training lie.

        Args:
            folder: the run's folder.
        """
        return Training(folder.path / self.folder)

    def rows(self, figures: Figures) -> dict[str, Figures]:
        """Return the rows of the stage in tables.

        Args:
            figures: the stage's figures, as ``metrics.json`` has them.

        Returns:
            Title to figures.
        """
        return {self.title: figures}

    def headline(self, figures: Figures) -> float | None:
        """Return the figure that a tuner maximises after this stage: top-1.

        Args:
            figures: the stage's figures, as ``metrics.json`` has them.

        Returns:
            A fraction, 0 to 1; None where the stage has no such figure.
        """
        return figures.get("top1")

    def flatten(self, figures: Figures) -> Figures:
        """Return the figures under the names that NNI gets: ``pruned_top1``.

        Args:
            figures: the stage's figures, as ``metrics.json`` has them.
        """
        return {f"{self.folder}_{key}": value for key, value in figures.items()}


_OWN_FOLDERS = ("search", "finetuning", "front", "export")
"""Folders inside a run's that no stage may take."""


class NetworkStage(Stage):
    """Define a stage that makes a new network of the last one, in a folder of its own.

    A subclass implements `apply`; its ``folder`` is by default its name. Saving, measuring,
    reading back and resuming are done here.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            cls.folder = vars(cls).get("folder", cls.name)
            cls.title = vars(cls).get("title", cls.folder)
            if not re.fullmatch(r"[A-Za-z0-9_-]+", cls.folder) or cls.folder in _OWN_FOLDERS:
                expected = f"a folder's plain name, none of {', '.join(_OWN_FOLDERS)}"
                raise ValueError(f"stage {cls.name!r}: expected {expected}, found {cls.folder!r}")

    @abstractmethod
    def apply(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> tuple[nn.Module, Figures]:
        """Make the new network from a copy of ``before.network``.

        Args:
            job: the run's settings, data, network and folder.
            before: what the stage before it handed on.
            folder: receives the stage's results.
            report: takes the points of the stage's curve, counted from 0.
            resume: whether to go on from the state that an interrupted stage left.

        Returns:
            The network, and what was measured of it beyond what `measure` does.
        """

    def run(self, job: Job, before: Outcome | None, report: Report, resume: bool) -> Outcome:
        """Run the stage in its folder inside the run's; for the arguments see `Stage.run`."""
        assert before is not None
        return self.run_in(job, before, RunFolder(job.folder.path / self.folder), report, resume)

    def run_in(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> Outcome:
        """Run the stage with its results in ``folder``, or read it back if it is finished.

        Args:
            job: the run's settings, data, network and folder.
            before: what the stage before it handed on.
            folder: receives the stage's results.
            report: takes the points of the stage's curve, counted from 0.
            resume: whether to go on from the state that an interrupted stage left.

        Returns:
            The plan, the new network and its figures.
        """
        same = self.identity(job, before)
        if resume and (done := self._finished(job, before, folder, same)) is not None:
            logger.info("%s: done: %s", self.name, folder)
            return done
        if is_first() and folder.metrics_file.exists():  # its files are replaced one by one
            logger.info("%s: replacing the results of an earlier stage", folder)
            folder.metrics_file.unlink()
        seed_everything(job.config.seed, verbose=False)
        network, figures = self.apply(job, before, folder, report, resume)
        figures |= self.measure(job, network) if is_first() else {}
        wait_for_all()
        if is_first():
            make_folder(folder.path)
            job.save(network, before.plan, folder)
            figures["bytes"] = folder.weights.stat().st_size
            same = self._what_figures_depend_on(job.config, same)
            config = dump_config(job.config)
            folder.write_metrics({self.name: figures}, config=config, identity=same)
        return Outcome(before.plan, network, figures if is_first() else {})

    def measure(self, job: Job, network: nn.Module) -> Figures:
        """Measure the new network.

        Args:
            job: the run's settings, data, network and folder.
            network: the new network.

        Returns:
            Accuracies (0 to 1), ``macs``, ``params``, ``latency_ms``, and ``speedup``: the latency
            of the original, timed in alternation with the network, over the network's.
        """
        costs = job.folder.costs
        latency = job.time(CostTable.load(costs).identity if costs.is_file() else {}, own=network)
        figures = {**job.score(network), **job.count(network), "latency_ms": latency["own"]}
        return {**figures, "speedup": latency["original"] / latency["own"]}

    def check_files(self, job: Job, folder: RunFolder) -> None:
        """Check the files that a finished stage has left beside its network and its figures.

        Args:
            job: the run's settings, data, network and folder.
            folder: the stage's results.

        Raises:
            OSError: if a file is missing.
            ValueError: if one is damaged: the stage is then run again.
        """

    def identity(self, job: Job, before: Outcome) -> dict[str, Any]:
        """Return what the state of the stage's training depends on, its own section included.

        Args:
            job: the run's settings, data, network and folder.
            before: what the stage before it handed on.

        Returns:
            Values that JSON can hold, by setting.
        """
        digest = hashlib.sha256()
        for name, value in before.network.named_parameters():  # not BatchNorm's statistics, which
            digest.update(name.encode())  # are each process's own
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {
            **finetuning_identity(job.config),
            "ranks": before.plan.names,
            "network": f"sha256 {digest.hexdigest()}",
            self.section: section_identity(self.settings_of(job.config), self.section),
        }

    @staticmethod
    def _what_figures_depend_on(config: Config, same: Mapping[str, Any]) -> dict[str, Any]:
        return {**same, "data.score": config.data.score, "threads": config.threads}

    def _finished(
        self, job: Job, before: Outcome, folder: RunFolder, same: Mapping[str, Any]
    ) -> Outcome | None:
        """Read back a stage that is finished in ``folder`` with the same settings.

        What is there counts if all of it can be read: a power cut may have left empty files.
        """
        same = json.loads(json.dumps(self._what_figures_depend_on(job.config, same)))
        try:
            content = folder.read_metrics()
            if content["identity"] != same or self.name not in content["stages"]:
                return None
            figures = content["stages"][self.name]
            if bad := [key for key, value in figures.items() if not is_number(value)]:
                raise ValueError(f"{folder.metrics_file}: {bad[0]}: expected a number")
            network = job.laid_out(load(folder.path, job.model))
            self.check_files(job, folder)
        except (OSError, ValueError) as error:
            logger.warning("%s; the stage %s is run again", reason_of(error), self.name)
            return None
        return Outcome(before.plan, network, figures)
