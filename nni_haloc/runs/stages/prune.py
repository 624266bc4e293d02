"""The stage ``prune``: take out channels by a pruner of NNI's, and fine-tune what is left."""

from __future__ import annotations

from itertools import islice

from torch import nn

from nni_haloc.inputs.schema.chain import Prune as Settings
from nni_haloc.runs.folder import Figures, RunFolder
from nni_haloc.runs.job import Job
from nni_haloc.runs.stages.stage import NetworkStage, Outcome, Report
from nni_haloc.runs.stages.training import train
from nni_haloc.space.modules import evaluating
from nni_haloc.utils.errors import SettingsError, as_one_line


class Prune(NetworkStage):
    """Prune a copy of the network, speed it up and fine-tune it."""

    name = "prune"
    settings = Settings
    folder = title = "pruned"
    training_title = "fine-tuning of the pruned network"

    def check(self, job: Job) -> None:
        """Check that torch can trace the original network, as the pruners need."""
        from nni_haloc.chain.workarounds import traced

        with evaluating(job.model), as_one_line(SettingsError, self.name):
            traced(job.model)

    def apply(
        self, job: Job, before: Outcome, folder: RunFolder, report: Report, resume: bool
    ) -> tuple[nn.Module, Figures]:
        """Prune by the settings' section ``prune``."""
        from nni_haloc.chain.pruning import prune

        section = self.settings_of(job.config)
        number = section.batches if section.pruner == "taylor" else 0
        batches = islice(job.loader("train", shuffle=True), number)
        with as_one_line(SettingsError, self.name):
            network = prune(before.network, job.example, section.sparsity, section.pruner, batches)
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
        return network, {}
