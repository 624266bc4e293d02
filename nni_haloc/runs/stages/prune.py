"""The stage ``prune``: take out channels by a pruner of NNI's, and fine-tune what is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from nni_haloc.inputs.registries import PRUNERS
from nni_haloc.inputs.schema.chain import Prune as Settings
from nni_haloc.runs.folder import Figures, RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.stage import NetworkStage, Outcome, Report
from nni_haloc.runs.stages.training import train
from nni_haloc.space.modules import evaluating
from nni_haloc.utils.errors import Diverged, SettingsError, as_one_line


@dataclass
class _Batches:
    """Yield a number of batches of a loader, in several rounds where it has fewer."""

    loader: DataLoader
    number: int

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        return islice(chain.from_iterable(repeat(self.loader)), self.number)


class Prune(NetworkStage):
    """Prune a copy of the network, speed it up and fine-tune it."""

    name = "prune"
    settings = Settings
    folder = title = "pruned"
    training_title = "fine-tuning of the pruned network"

    def check(self, job: Job) -> None:
        """Check that the settings fit, and that torch can trace the original network."""
        from nni_haloc.chain.pruning import check_arguments
        from nni_haloc.chain.workarounds import traced

        section = self.settings_of(job.config)
        with evaluating(job.model), as_one_line(SettingsError, self.name):
            check_arguments(**_arguments(section))
            if not PRUNERS[section.pruner].single_weights:
                traced(job.model)

    def apply(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> tuple[nn.Module, Figures]:
        """Prune by the settings' section ``prune``."""
        from nni_haloc.chain.pruning import prune, zero_share, zeros_kept

        section = self.settings_of(job.config)
        batches = _Batches(job.loader("train", shuffle=True), section.batches)
        try:
            with as_one_line(SettingsError, self.name):
                network = prune(
                    before.network,
                    job.example,
                    batches=batches,
                    lr=section.lr,
                    **_arguments(section),
                )
        except Diverged as error:
            raise Diverged(f"{self.name}: {error}") from None
        single_weights = PRUNERS[section.pruner].single_weights
        with zeros_kept(network) if single_weights else nullcontext():
            network = train(
                job,
                network,
                section,
                folder.training,
                self.identity(job, before),
                report,
                title=self.training_title,
                resume=resume,
            )
        return network, ({"zero_share": zero_share(network)} if single_weights else {})


def _arguments(section: Settings) -> dict[str, Any]:
    """Return the arguments of `nni_haloc.prune` that a section of the settings has."""
    return {
        "sparsity": section.sparsity,
        "pruner": section.pruner,
        "ranks": section.ranks,
        "sparsity_schedule": section.sparsity_schedule,
    }
